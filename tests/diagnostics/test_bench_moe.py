# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a mixture of experts: routings that repeat no weight, weights that are like quantised ones, floors,
candidates held to the reference."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_experts.diagnostics.bench import humming_peer, moe_candidates
from nvfp4_experts.diagnostics.bench.candidates import Candidate, Prepared
from nvfp4_experts.diagnostics.bench.measure import MOE_PEERS, bench, our_moe_candidates
from nvfp4_experts.diagnostics.bench.moe import MoeTask, MoeWeights, Step, draw_steps, draw_weights
from nvfp4_experts.diagnostics.bench.moe_candidates import TorchBf16Moe, add_slots, loop_over_experts
from nvfp4_experts.diagnostics.bench.picture import draw_bench
from nvfp4_experts.diagnostics.bench.report import BenchReport
from nvfp4_experts.diagnostics.bench.work import ROUTED, SHAPES, MoeWork, find_moe
from nvfp4_experts.diagnostics.metrics import rel_l2
from nvfp4_experts.errors import InputError
from nvfp4_experts.formats.codes import unpack_codes
from nvfp4_experts.formats.nvfp4 import quantize
from nvfp4_experts.kernels.target import Target

CPU = torch.device("cpu")
WORK = find_moe("128x64", experts=8, top_k=3)
EVERY = (*our_moe_candidates(("bf16", "fp8", "nvfp4")), *our_moe_candidates(("nvfp4",), "static"), TorchBf16Moe())
SMALL: dict[str, Any] = {"tokens": (1, 9), "device": "cpu", "seconds": 0.05, "rotate": 200_000, "matmul_size": 64}
FLASH_EXPERT = 0.5625 * 3 * 4096 * 2048


def expert_places(step: Step) -> set[tuple[int, int]]:
    return {(step.layer, expert) for expert in step.indices.flatten().tolist()}


# --- the work -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_know_their_experts(name: str) -> None:
    work = find_moe(name)
    assert (work.experts, work.scaling_factor) == ROUTED[name] and work.top_k == 6 and work.shared
    assert (work.expert.hidden, work.expert.intermediate) == SHAPES[name]
    assert find_moe(name, experts=16).experts == 16


def test_what_cannot_be_a_mixture_is_refused() -> None:
    with pytest.raises(InputError, match="--experts"):
        find_moe("256x128")
    for top_k in (0, 5):
        with pytest.raises(InputError, match="from 1 to the number of experts, 4"):
            find_moe("256x128", experts=4, top_k=top_k)
    with pytest.raises(InputError, match="from 1 to the number of experts, 0"):
        find_moe("256x128", experts=0)


@pytest.mark.parametrize(
    ("tokens", "hits", "microseconds"), [(1, 6, 18.9), (8, 43, 135), (64, 196, 617), (256, 255, 802), (4096, 256, 1566)]
)
def test_the_floor_is_the_published_one(tokens: int, hits: int, microseconds: float) -> None:
    """V4-Flash without its shared expert at 4.5 TB/s and 790 TFLOP/s; x and y are counted here, and under 1 %."""
    work = find_moe("V4-Flash", shared=False)
    assert 1e6 * work.floor_seconds(tokens, 4.5e12, 790e12, hits) == pytest.approx(microseconds, rel=0.011)
    assert work.expected_hits(tokens) == pytest.approx(hits, rel=0.03)


def test_the_floor_counts_every_byte_and_every_product() -> None:
    work = MoeWork(find_moe("32x16", experts=4, top_k=2).expert, 4, 2, shared=True, scaling_factor=1.5)
    nbytes = 0.5625 * 3 * 32 * 16 * (3 + 1) + 2 * (5 * 32) * 2
    assert work.floor_seconds(5, 1.0, 1e9, hits=3) == pytest.approx(nbytes)
    assert work.floor_seconds(5, 1e9, 1.0, hits=3) == 2 * (5 * 3) * 3 * 32 * 16
    bare = replace(work, shared=False)
    assert bare.floor_seconds(5, 1.0, 1e9, hits=3) == pytest.approx(nbytes - 0.5625 * 3 * 32 * 16)
    assert bare.floor_seconds(5, 1e9, 1.0) == 2 * (5 * 2) * 3 * 32 * 16


# --- routings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 4, 8, 64])
@pytest.mark.parametrize(("experts", "top_k"), [(256, 6), (16, 6), (6, 6), (5, 1)])
@pytest.mark.parametrize("shared", [True, False])
def test_routings_of_a_chain(tokens: int, experts: int, top_k: int, shared: bool) -> None:
    work, rotate = find_moe("V4-Flash", experts, top_k, shared), 400_000_000
    steps = draw_steps(work, tokens, rotate, CPU)
    read = [FLASH_EXPERT * (step.hits + shared) for step in steps]
    assert sum(read) >= rotate and len(steps) >= 2
    assert len(steps) == 2 or sum(read[:-1]) < rotate, "the chain is longer than it need be"
    assert [step.place for step in steps] == list(range(len(steps)))
    for step in steps:
        assert step.indices.shape == step.weights.shape == (tokens, top_k)
        assert step.indices.min() >= 0 and step.indices.max() < experts
        assert all(len(set(row)) == top_k for row in step.indices.tolist()), "an expert twice in a token"
        assert step.hits == len(expert_places(step))
        assert torch.allclose(step.weights.sum(1), torch.tensor(1.5)) and bool((step.weights > 0).all())
    places = list(map(expert_places, steps))
    if read[0] < rotate:
        assert len(set().union(*places)) == sum(map(len, places)), "an expert comes again in the chain"
    else:
        assert len(steps) == 2 and {step.layer for step in steps} == {0}, "one call alone reads enough"


def test_layers_are_made_only_where_experts_run_out() -> None:
    layers = {
        experts: max(step.layer for step in draw_steps(find_moe("V4-Flash", experts), 1, 400_000_000, CPU)) + 1
        for experts in (256, 32, 16, 6)
    }
    assert layers == {256: 1, 32: 1, 16: 3, 6: 5}  # five calls of six experts each


def test_loads_are_those_of_uniform_routing() -> None:
    work = find_moe("V4-Flash")
    for tokens in (4, 64):
        hits = [step.hits for step in draw_steps(work, tokens, 40_000_000_000, CPU)]
        assert sum(hits) / len(hits) == pytest.approx(work.expected_hits(tokens), rel=0.02)
    (step, _) = draw_steps(work, 4096, 1, CPU)
    loads = torch.bincount(step.indices.flatten(), minlength=256).double()
    assert float(loads.var() / loads.mean()) == pytest.approx(1 - 6 / 256, abs=0.3)


def test_routings_are_the_same_again_and_differ_by_tokens() -> None:
    first, second = (draw_steps(WORK, 9, 100_000, CPU) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.indices, b.indices) and torch.equal(a.weights, b.weights)
    assert not torch.equal(first[0].indices, first[1].indices)


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> MoeWeights:
    return draw_weights(find_moe("256x128", experts=4, top_k=2), 2, 3, CPU)


def test_weights_have_their_shapes_and_differ(weights: MoeWeights) -> None:
    assert len(weights.layers) == 2 and weights.shared is not None and weights.top_k == 2
    for count, experts in ((4, weights.layers[0]), (4, weights.layers[1]), (3, weights.shared)):
        assert tuple(experts.gate.shape) == tuple(experts.up.shape) == (count, 128, 256)
        assert tuple(experts.down.shape) == (count, 256, 128)
        assert torch.equal(experts.gate.global_scale, experts.up.global_scale)
        for stack in experts:
            assert len(set(stack.global_scale.tolist())) == count
    stacks = [stack for experts in (*weights.layers, weights.shared) for stack in experts]
    codes = [stack.codes[i].flatten()[:4096].tolist() for stack in stacks for i in range(len(stack))]
    assert all(a != b for i, a in enumerate(codes) for b in codes[:i])
    assert draw_weights(find_moe("32x16", 2, 1, shared=False), 1, 2, CPU).shared is None


def test_weights_are_distributed_as_quantised_ones_are(weights: MoeWeights) -> None:
    """Codes and scales against those of a matrix that `quantize` made, and their product against what was asked for."""
    q = quantize(torch.randn(512, 2048, generator=torch.Generator().manual_seed(1)))
    made, drawn = (
        torch.bincount(unpack_codes(w.codes).flatten().long(), minlength=16) for w in (q, weights.layers[0].up)
    )
    assert torch.allclose(made / made.sum(), drawn / drawn.sum(), atol=5e-3)
    scales = [w.block_scales.float() for w in (q, weights.layers[0].up)]
    assert float(scales[0].mean() / scales[1].mean()) == pytest.approx(1, abs=0.1)
    for stack, std in ((weights.layers[1].gate, 20 / 256**0.5), (weights.shared.down, None)):
        values = stack.dequantize() / (stack.global_scale / stack.global_scale.mean())[:, None, None]
        if std is not None:
            assert float(values.std()) == pytest.approx(std, rel=0.1)
        assert float((values == 0).double().mean()) < 0.2


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("top_k", [2, 6])
def test_a_long_chain_neither_fades_nor_grows(top_k: int, shared: bool) -> None:
    task = MoeTask(find_moe("256x128", 12, top_k, shared), CPU, (8,), 3_000_000)
    calls = task.calls([TorchBf16Moe().prepare(task.weights, 8)], 8)
    assert len(calls) > 3
    x = task.start(8)
    for _ in range(10):
        for call in calls[:3]:
            x = call(x)
            assert 0.75 < float(x.float().square().mean().sqrt()) < 1.35


# --- candidates ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task() -> MoeTask:
    return MoeTask(find_moe("256x128", experts=8, top_k=3), CPU, (1, 7, 33), 500_000)


@pytest.mark.parametrize("candidate", EVERY, ids=lambda candidate: candidate.name)
def test_candidates_are_right(candidate: Candidate, task: MoeTask) -> None:
    prepared = candidate.prepare(task.weights, 33)
    bits = 8 * prepared.nbytes / (3 * 256 * 128 * (8 * len(task.weights.layers) + len(task.weights.shared.gate)))
    assert bits >= 4.5, "what is counted is less than the weights can be packed into"
    for tokens in (33, 1, 7):
        y = task.calls([prepared], tokens)[0](task.input(tokens))
        assert y.dtype == torch.bfloat16 and y.shape == (tokens, 256)
        assert rel_l2(y, task.output(tokens, *candidate.reference)) <= candidate.bound


@pytest.mark.parametrize("candidate", EVERY, ids=lambda candidate: candidate.name)
def test_every_call_of_a_chain_has_its_own_routing(candidate: Candidate, task: MoeTask) -> None:
    calls, x = task.calls([candidate.prepare(task.weights, 7)], 7), task.input(7)
    outputs = [call(x) for call in calls]
    assert len(outputs) >= 2 and all(rel_l2(a, b) > 0.5 for i, a in enumerate(outputs) for b in outputs[:i])
    assert all(torch.equal(call(x), y) for call, y in zip(calls, outputs, strict=True))


def test_the_grouped_form_is_the_loop(task: MoeTask) -> None:
    """What runs on CUDA, here on the CPU: the same products, rounded alike but for the order of their sums."""
    step, x = task.steps[33][0], task.input(33)
    gate_up, down = moe_candidates._decoded(task.weights.layers[step.layer])
    grouped = moe_candidates._grouped(moe_candidates.Grouped(8, CPU), x, step, gate_up, down)
    assert rel_l2(grouped, loop_over_experts(x, step, gate_up, down)) < 2e-3


def test_slots_are_added_by_token() -> None:
    slots = torch.tensor([3, 0, 5, 1, 4, 2])
    rows = (2.0 ** torch.arange(6))[slots, None].bfloat16()
    assert add_slots(rows, slots, torch.zeros(3, 2)).tolist() == [[1 + 2], [4 + 8], [16 + 32]]


def test_a_backend_without_routed_experts_is_listed_with_its_reason() -> None:
    report = bench(WORK, our_moe_candidates(("nvfp4",), backends=("sm100-flashinfer",)), **SMALL)
    assert report.passed
    assert all(row.status == "unavailable" and "sm100-flashinfer" in (row.reason or "") for row in report.rows)


class TestHumming:
    """The adapter, against a stand-in that reads the tensors as ModelOpt defines them and multiplies by group."""

    def test_what_it_is_given_is_a_modelopt_layer(self, monkeypatch: pytest.MonkeyPatch, task: MoeTask) -> None:
        class HummingLayer(torch.nn.Module):
            def __init__(self, shape_n: int, shape_k: int, num_experts: int | None = None, **options: Any) -> None:
                super().__init__()
                self.shape = (*([num_experts] if num_experts else []), shape_n, shape_k)
                assert options["weight_config"] == {"quant_method": "modelopt", "quant_algo": "nvfp4"}

            def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
                *experts, n, k = self.shape
                weight, scale, scale_2 = (tensors[name] for name in ("weight", "weight_scale", "weight_scale_2"))
                assert (weight.shape, scale.shape) == ((*experts, n, k // 2), (*experts, n, k // 16))
                assert scale_2.shape == (*(experts or [1]),)
                table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
                values = table[torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2).long()]
                decoded = values * scale.float().repeat_interleave(16, dim=-1) * scale_2.view(-1, 1, 1)
                self.weight = torch.nn.Parameter(decoded.view(self.shape).bfloat16(), requires_grad=False)

            def transform(self) -> None:
                self.ready = True

            def forward(self, x: Tensor, expert_layout: Tensor | None = None, compute_config: Any = None) -> Tensor:
                assert self.ready
                if expert_layout is None:
                    return x @ self.weight.T
                assert compute_config == {"gemm_type": "grouped_contiguous"} and expert_layout.dtype == torch.int32
                starts = expert_layout.tolist()
                assert len(starts) == len(self.weight) + 1 and starts[0] == 0 and starts[-1] == len(x)
                return torch.cat([x[a:b] @ w.T for a, b, w in zip(starts, starts[1:], self.weight, strict=False)])

        module = types.ModuleType("humming.layer")
        module.HummingLayer = HummingLayer  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "humming", types.ModuleType("humming"))
        monkeypatch.setitem(sys.modules, "humming.layer", module)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(humming_peer, "fused", lambda function, device_type: function)
        monkeypatch.setattr(humming_peer, "installed_version", lambda package: "0.1.19")
        candidate = humming_peer.HummingMoe()
        assert candidate.refusal(Target("cuda", "", (9, 0))) is None
        prepared = candidate.prepare(task.weights, 33)
        for tokens in (33, 1):
            y = task.calls([prepared], tokens)[0](task.input(tokens))
            assert rel_l2(y, task.output(tokens, *candidate.reference)) <= candidate.bound
        assert prepared.detail == "0.1.19" and all(candidate.name != other.name for other in EVERY)


# --- the whole ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> BenchReport:
    return bench(WORK, (*EVERY, *MOE_PEERS[1:]), **SMALL)


def test_every_candidate_gets_a_row_per_number_of_tokens(report: BenchReport) -> None:
    assert report.passed and report.tokens == (1, 9)
    for candidate in EVERY:
        for row in report.of(candidate.name):
            assert row.status == "timed", row.reason
            assert row.median_us and row.resident_bytes and row.copies == 1
            assert row.rel_l2 is not None and row.rel_l2 <= candidate.bound
    assert {row.status for row in report.of("humming-kernels")} == {"unavailable"}


def test_the_floor_is_that_of_the_routings_that_were_run(report: BenchReport) -> None:
    for row in report.rows:
        steps = draw_steps(WORK, row.tokens, SMALL["rotate"], CPU)
        hits = sum(step.hits for step in steps) / len(steps)
        assert row.hits == pytest.approx(hits) and (row.tokens > 1 or hits == 3)
        nbytes = 0.5625 * 3 * 128 * 64 * (hits + 1) + 2 * (row.tokens * 128) * 2
        read = nbytes / report.ceilings.read_bytes_per_second
        matmul = 2 * row.tokens * 4 * 3 * 128 * 64 / report.ceilings.matmul_flop_per_second
        assert row.floor_us == pytest.approx(1e6 * max(read, matmul))


def test_json_csv_and_picture_say_what_was_timed(report: BenchReport, tmp_path: Path) -> None:
    made = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    said = {name: made[name] for name in ("shape", "hidden_size", "experts", "top_k", "shared", "scaling_factor")}
    assert said == {
        "shape": "128x64", "hidden_size": 128, "experts": 8, "top_k": 3, "shared": True, "scaling_factor": 1.5,
    }  # fmt: skip
    report.write_csv(tmp_path / "bench.csv")
    with open(tmp_path / "bench.csv", newline="", encoding="utf-8") as file:
        assert {row["hits"] for row in csv.DictReader(file)} == {str(row.hits) for row in report.rows}
    draw_bench(report, tmp_path / "bench.svg")
    picture = (tmp_path / "bench.svg").read_text()
    assert "8 routed experts, top-3, and a shared one, 128x64: H 128, I 64" in picture


@dataclass(frozen=True)
class Odd:
    """The bf16 block with something done to its routing or to what it gives."""

    step: Callable[[Step], Step] = lambda step: step
    spoil: Callable[[Tensor], Tensor] = lambda y: y
    name = "odd"
    ours = True
    reference = ("bf16", "dynamic")
    bound = 0.01

    def refusal(self, target: Target) -> str | None:
        return None

    def prepare(self, weights: MoeWeights, max_tokens: int) -> Prepared:
        right = TorchBf16Moe().prepare(weights, max_tokens)
        return replace(right, run=lambda x, step: self.spoil(right.run(x, self.step(step))))


@pytest.mark.parametrize(
    "odd",
    [
        Odd(lambda step: replace(step, indices=(step.indices + 1) % 8)),
        Odd(lambda step: replace(step, weights=step.weights.flip(1))),
        Odd(lambda step: replace(step, weights=step.weights * 1.05)),
        Odd(lambda step: replace(step, place=(step.place + 1) % 2)),
        Odd(spoil=partial(torch.full_like, fill_value=float("nan"))),
    ],
    ids=["other experts", "weights of other slots", "weights 5 % off", "another shared expert", "NaN"],
)
def test_what_is_wrong_is_not_timed(odd: Odd) -> None:
    found = bench(WORK, (odd, TorchBf16Moe()), **SMALL)
    assert not found.passed and all(row.median_us is None and row.status == "failed" for row in found.of("odd"))
    assert all(row.status == "timed" for row in found.of("torch bf16"))


@pytest.mark.gpu
def test_on_a_gpu_a_mixture_is_timed_or_says_why_not() -> None:
    candidates = (*our_moe_candidates(("bf16", "nvfp4"), "static"), TorchBf16Moe())
    found = bench(find_moe("V4-Flash", experts=32), candidates, tokens=(1, 64), device="cuda", seconds=2)
    assert found.passed
    for row in found.rows:
        assert row.status == "timed" or "must not wait for the device" in (row.reason or ""), row.reason
    for row in found.of("torch bf16"):
        assert row.times_floor is not None and row.times_floor > 0.9
