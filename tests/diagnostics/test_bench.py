# SPDX-License-Identifier: Apache-2.0
"""The benchmark: right work, nothing wrong is timed, copies that share no memory, turns that are taken in turn."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import Tensor

from nvfp4_experts.diagnostics.bench import humming_peer, measure, timing
from nvfp4_experts.diagnostics.bench.candidates import OUR_BOUNDS, Candidate, Prepared, TorchBf16, TorchFp8
from nvfp4_experts.diagnostics.bench.measure import PEERS, bench, our_candidates
from nvfp4_experts.diagnostics.bench.picture import draw_bench
from nvfp4_experts.diagnostics.bench.report import BenchReport
from nvfp4_experts.diagnostics.bench.task import SharedExpertTask
from nvfp4_experts.diagnostics.bench.work import SHAPES, SWIGLU_LIMIT, Weights, Work, find_work
from nvfp4_experts.diagnostics.metrics import rel_l2
from nvfp4_experts.errors import InputError, UnsupportedError
from nvfp4_experts.kernels.target import Target
from tests.tolerances import AGAINST_EXACT_MATH, AGAINST_REFERENCE

CPU = torch.device("cpu")
WORK = find_work("128x64")
EVERY = (*our_candidates(("bf16", "fp8", "nvfp4")), *our_candidates(("nvfp4",), "static"), TorchBf16())
SMALL: dict[str, Any] = {"tokens": (1, 4), "device": "cpu", "seconds": 0.05, "rotate": 100_000, "matmul_size": 64}


@dataclass(frozen=True)
class Odd:
    """The bf16 layer with something done to what it gives; a stand-in for candidates that misbehave."""

    spoil: Callable[[Tensor], Tensor]
    ours: bool = False
    name: str = "odd"
    reference = ("bf16", "dynamic")
    bound = 0.01

    def refusal(self, target: Target) -> str | None:
        return None

    def prepare(self, weights: Weights, max_tokens: int) -> Prepared:
        right = TorchBf16().prepare(weights, max_tokens)
        return replace(right, run=lambda x: self.spoil(right.run(x)))


def small_bench(*candidates: Candidate, **options: Any) -> BenchReport:
    return bench(WORK, candidates, **{**SMALL, **options})


@pytest.fixture(scope="module")
def report() -> BenchReport:
    return small_bench(*EVERY, *PEERS[1:])


# --- the work -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes(name: str) -> None:
    work = find_work(name)
    assert (work.hidden, work.intermediate) == SHAPES[name]
    assert find_work(f"{work.hidden}x{work.intermediate}").weight_count == work.weight_count


@pytest.mark.parametrize("shape", ["V5", "256", "256x", "256x250", "0x16", "16x16x16", "-16x16"])
def test_other_shapes_are_refused(shape: str) -> None:
    with pytest.raises(InputError, match="V4-Flash"):
        find_work(shape)


def test_the_floor_is_the_published_one() -> None:
    work = find_work("V4-Pro")
    floors = [1e6 * work.floor_seconds(tokens, 4.5e12, 790e12) for tokens in (1, 64, 1024)]
    assert floors == pytest.approx([8.26, 10.7, 171], rel=5e-3)


@pytest.mark.parametrize("candidate", EVERY, ids=lambda candidate: candidate.name)
def test_a_long_chain_neither_fades_nor_grows(candidate: Candidate) -> None:
    work = find_work("256x128")
    run = candidate.prepare(work.weights(CPU), 16).run
    x = work.hidden_states(16, CPU)
    for _ in range(40):
        x = run(x)
        assert 0.8 < float(x.float().square().mean().sqrt()) < 1.25


def test_check_input_is_fresh_and_reaches_the_clamp_now_and_then() -> None:
    work = find_work("256x128")
    x, weights = work.check_states(32, CPU), work.weights(CPU)
    assert not torch.equal(x, work.hidden_states(32, CPU))
    gate = x.float() @ weights.gate.dequantize().T
    assert 0.005 < float((gate.abs() > SWIGLU_LIMIT).float().mean()) < 0.2


# --- candidates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidate", [*EVERY, TorchFp8()], ids=lambda candidate: candidate.name)
def test_copies_share_no_memory(candidate: Candidate) -> None:
    weights = WORK.weights(CPU)
    copies = [candidate.prepare(weights, 1) for _ in range(3)]
    places = [{t.untyped_storage().data_ptr() for t in copy.tensors} for copy in copies]
    source = {t.untyped_storage().data_ptr() for w in vars(weights).values() for t in (w.codes, w.block_scales)}
    assert all(places) and all(not a & b for a in places for b in (*places, source) if a is not b)
    bits = 8 * copies[0].nbytes / WORK.weight_count
    assert bits >= 4.5, "what is counted is less than the weights can be packed into"
    assert sum(t.nbytes for t in copies[0].tensors) >= copies[0].nbytes


@pytest.mark.parametrize("candidate", [*EVERY, TorchFp8()], ids=lambda candidate: candidate.name)
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_candidates_are_right(candidate: Candidate, tokens: int) -> None:
    truths = SharedExpertTask(find_work("256x128"), CPU, 0)
    y = candidate.prepare(truths.weights, tokens).run(truths.input(tokens))
    assert y.dtype == torch.bfloat16 and y.shape == (tokens, 256)
    assert rel_l2(y, truths.output(tokens, *candidate.reference)) <= candidate.bound


def test_fp8_activations_are_not_taken_for_bf16_ones() -> None:
    truths = SharedExpertTask(WORK, CPU, 0)
    error = rel_l2(truths.output(8, "fp8", "dynamic"), truths.output(8, "bf16", "dynamic"))
    assert error > OUR_BOUNDS["bf16"] and error > OUR_BOUNDS["fp8"]


def test_bounds_lie_between_the_suites_and_what_the_formats_cost() -> None:
    for activations, bound in OUR_BOUNDS.items():
        assert AGAINST_REFERENCE["shared_expert", activations] <= bound
    assert OUR_BOUNDS["fp8"] < AGAINST_EXACT_MATH["fp8"] / 2
    assert OUR_BOUNDS["nvfp4"] < AGAINST_EXACT_MATH["nvfp4"] / 4
    assert TorchFp8().bound < 2 * AGAINST_EXACT_MATH["fp8"]


@pytest.mark.parametrize(("capability", "refuses"), [(None, True), ((8, 0), True), ((8, 9), False), ((9, 0), False)])
def test_torch_fp8_needs_fp8_units(capability: tuple[int, int] | None, refuses: bool) -> None:
    target = Target("cpu" if capability is None else "cuda", "", capability)
    assert (TorchFp8().refusal(target) is not None) is refuses


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(InputError, match="int3"):
        our_candidates(("bf16", "int3"))
    with pytest.raises(InputError, match="sometimes"):
        our_candidates(("nvfp4",), "sometimes")


def test_names_of_backends_are_told_apart() -> None:
    names = [candidate.name for candidate in our_candidates(("bf16", "nvfp4"), "static", ("auto", "torch"))]
    assert names[0] == "nvfp4-experts bf16" and "nvfp4-experts nvfp4 static [torch]" in names and len(set(names)) == 4


class TestHumming:
    """The adapter, against a stand-in that reads the tensors as ModelOpt defines them."""

    def test_what_it_is_given_is_a_modelopt_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class HummingLayer(torch.nn.Module):
            def __init__(self, shape_n: int, shape_k: int, weight_config: dict[str, str], torch_dtype: Any) -> None:
                super().__init__()
                assert weight_config == {"quant_method": "modelopt", "quant_algo": "nvfp4"}
                self.shape, self.dtype, self.ready = (shape_n, shape_k), torch_dtype, False

            def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
                weight, scale, scale_2 = (tensors[name] for name in ("weight", "weight_scale", "weight_scale_2"))
                n, k = self.shape
                assert (weight.shape, scale.shape, scale_2.shape) == ((n, k // 2), (n, k // 16), (1,))
                assert (weight.dtype, scale.dtype) == (torch.uint8, torch.float8_e4m3fn)
                table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
                nibbles = torch.stack((weight & 15, weight >> 4), dim=-1).reshape(n, k).long()
                values = table[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
                decoded = values * scale.float().repeat_interleave(16, dim=1) * scale_2
                self.weight = torch.nn.Parameter(decoded.to(self.dtype), requires_grad=False)

            def transform(self) -> None:
                self.ready = True

            def forward(self, x: Tensor) -> Tensor:
                assert self.ready
                return x @ self.weight.T

        module = types.ModuleType("humming.layer")
        module.HummingLayer = HummingLayer  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "humming", types.ModuleType("humming"))
        monkeypatch.setitem(sys.modules, "humming.layer", module)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(humming_peer, "fused", lambda function, device_type: function)
        monkeypatch.setattr(humming_peer, "installed_version", lambda package: "0.1.19")
        truths, candidate = SharedExpertTask(WORK, CPU, 0), humming_peer.Humming()
        prepared = candidate.prepare(truths.weights, 5)
        assert rel_l2(prepared.run(truths.input(5)), truths.output(5, *candidate.reference)) <= candidate.bound
        assert prepared.detail == "0.1.19" and prepared.nbytes == 2 * WORK.weight_count

    def test_refusals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        candidate, gpu = humming_peer.Humming(), Target("cuda", "", (9, 0))
        monkeypatch.setattr(humming_peer, "installed_version", lambda package: None)
        assert candidate.refusal(gpu) == "not installed"
        monkeypatch.setattr(humming_peer, "installed_version", lambda package: "0.1.19")
        assert candidate.refusal(gpu) is None
        assert candidate.refusal(Target("cpu", "")) == "needs a CUDA device"


# --- checking and timing ------------------------------------------------------------------------------------------


def test_every_candidate_gets_a_row_per_number_of_tokens(report: BenchReport) -> None:
    assert report.passed and report.tokens == (1, 4)
    assert report.candidates == tuple(candidate.name for candidate in (*EVERY, *PEERS[1:]))
    assert len(report.rows) == 2 * len(report.candidates)
    for candidate in EVERY:
        for row in report.of(candidate.name):
            assert row.status == "timed" and row.reason is None and row.samples >= measure.MIN_SAMPLES
            assert row.median_us and row.low_us and row.high_us and row.resident_bytes
            assert 0 < row.low_us <= row.median_us <= row.high_us
            assert row.times_floor == pytest.approx(row.median_us / row.floor_us)
            assert row.copies >= 2 and row.copies * row.resident_bytes >= SMALL["rotate"]
            assert row.rel_l2 is not None and row.rel_l2 <= candidate.bound
    for row in report.of("torch fp8"):
        assert row.status == "unavailable" and "8.9" in (row.reason or "") and row.median_us is None


def test_floor_comes_from_the_ceilings(report: BenchReport) -> None:
    for row in report.rows:
        read = 0.5625 * 3 * 128 * 64 / report.ceilings.read_bytes_per_second
        matmul = 2 * row.tokens * 3 * 128 * 64 / report.ceilings.matmul_flop_per_second
        assert row.floor_us == pytest.approx(1e6 * max(read, matmul))


@pytest.mark.parametrize(
    "spoil",
    [lambda y: y * 1.05, lambda y: y.flip(0) if y.shape[0] > 1 else y, lambda y: torch.full_like(y, math.nan)],
    ids=["5 % off", "rows exchanged at 4 tokens", "NaN"],
)
@pytest.mark.parametrize("ours", [False, True])
def test_what_is_wrong_is_not_timed(spoil: Callable[[Tensor], Tensor], ours: bool) -> None:
    report = small_bench(Odd(spoil, ours), TorchBf16())
    for row in report.of("odd"):
        assert row.status == "failed" and row.median_us is None and row.times_floor is None and row.samples == 0
        assert "past the bound" in (row.reason or "")
    assert all(row.status == "timed" for row in report.of("torch bf16"))
    assert report.passed is not ours


@pytest.mark.parametrize(
    "error", [RuntimeError("no such kernel\nand a long story"), UnsupportedError("x", "y", "z", "w")]
)
@pytest.mark.parametrize("ours", [False, True])
def test_what_raises_has_a_reason(error: Exception, ours: bool) -> None:
    def spoil(y: Tensor) -> Tensor:
        if y.shape[0] == 4:
            raise error
        return y

    one, four = small_bench(Odd(spoil, ours)).of("odd")
    assert (four.reason or "").startswith(type(error).__name__) and "\n" not in (four.reason or "")
    broken = ours and not isinstance(error, UnsupportedError)
    assert four.status == ("failed" if broken else "unavailable")
    assert one.status == ("failed" if broken else "timed")


def test_a_backend_that_cannot_run_is_listed_with_its_reason() -> None:
    report = small_bench(*our_candidates(("bf16",), backends=("abacus",)))
    assert report.passed and all(row.status == "unavailable" and "abacus" in (row.reason or "") for row in report.rows)


def test_a_chain_that_fades_is_not_timed() -> None:
    calls = 0

    def spoil(y: Tensor) -> Tensor:  # right while it is checked, zero while it is timed
        nonlocal calls
        calls += 1
        return y if calls <= len(SMALL["tokens"]) else torch.zeros_like(y)

    report = small_bench(Odd(spoil, ours=True))
    assert not report.passed
    assert all(row.median_us is None and "rms 0" in (row.reason or "") for row in report.rows)


def test_a_replay_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar(timing.ClockTimer):
        def outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
            for y, _ in super().outputs():
                yield y, y
                yield y, y * 1.1

    monkeypatch.setattr(measure, "timer_for", Liar)
    assert "replayed as a graph" in (small_bench(TorchBf16()).rows[0].reason or "")


def test_turns_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    made: list[Any] = []

    class Recorder(timing.ClockTimer):
        def __init__(self, calls: Any, x: Tensor) -> None:
            made.append(self)
            super().__init__(calls, x)

        def sample(self) -> float:
            asked.append(made.index(self))
            return super().sample()

    monkeypatch.setattr(measure, "timer_for", Recorder)
    small_bench(TorchBf16(), Odd(lambda y: y), tokens=(1,))
    turns = asked[2:]  # each timer takes one sample of its own to warm up
    assert len(turns) >= 2 * measure.MIN_SAMPLES
    assert turns == [0, 1] * (len(turns) // 2)


def test_progress_reaches_its_end() -> None:
    seen: list[tuple[int, int]] = []
    small_bench(TorchBf16(), progress=lambda done, total, label: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1] == (4, 4)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tokens": (0, 1)}, InputError),
        ({"seconds": 0.0}, InputError),
        ({"seconds": math.inf}, InputError),
        ({"device": "abacus"}, UnsupportedError),
    ],
)
def test_what_cannot_be_run_is_refused_first(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        small_bench(TorchBf16(), **options)


@pytest.mark.gpu
def test_on_a_gpu_replays_are_right_and_timed() -> None:
    work = find_work("V4-Flash")
    report = bench(
        work, (*our_candidates(("bf16",)), TorchBf16(), TorchFp8()), tokens=(1, 64), device="cuda", seconds=2
    )
    assert report.passed
    for row in (*report.of("nvfp4-experts bf16"), *report.of("torch bf16")):
        assert row.status == "timed", row.reason
        assert row.copies * (row.resident_bytes or 0) >= 400_000_000
        assert row.times_floor is not None and 0.9 < row.times_floor < 10_000


# --- what comes out -----------------------------------------------------------------------------------------------


def test_json_and_csv_hold_the_rows(report: BenchReport, tmp_path: Path) -> None:
    made = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert made["machine"]["torch"] == torch.__version__ and made["passed"] is True and made["shape"] == "128x64"
    report.write_csv(tmp_path / "bench.csv")
    with open(tmp_path / "bench.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(made["rows"])
    for row, expected in zip(rows, made["rows"], strict=True):
        assert row["candidate"] == expected["candidate"] and int(row["tokens"]) == expected["tokens"]
        assert row["median_us"] == ("" if expected["median_us"] is None else str(expected["median_us"]))


def test_the_picture_shows_every_line(report: BenchReport, tmp_path: Path) -> None:
    draw_bench(report, tmp_path / "bench.png")
    image = matplotlib.image.imread(tmp_path / "bench.png")
    assert image.shape[:2] == (864, 1440)
    for colour in ((0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73), (0x56, 0xB4, 0xE9), (0xCC, 0x79, 0xA7), (0xE6, 0x9F, 0x00)):
        near = np.abs(image[..., :3] - np.array(colour) / 255).max(-1) < 0.01
        assert near.sum() > 200, f"no line of colour {colour}"


@pytest.mark.parametrize("tokens", [(1,), (1, 4)])
def test_a_picture_without_any_time_is_the_floor(report: BenchReport, tmp_path: Path, tokens: tuple[int, ...]) -> None:
    rows = tuple(row for row in report.of("torch fp8") if row.tokens in tokens)
    draw_bench(replace(report, rows=rows), tmp_path / "bench.svg")
    assert "</svg>" in (tmp_path / "bench.svg").read_text()


def test_an_unknown_suffix_is_refused(report: BenchReport, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="must end in one of"):
        draw_bench(report, tmp_path / "bench.xyz")
    assert not (tmp_path / "bench.xyz").exists()


def test_a_work_of_any_size_has_gate_and_up_under_one_scale() -> None:
    weights = Work("odd", 96, 48).weights(CPU)
    assert torch.equal(weights.gate.global_scale, weights.up.global_scale)
    assert not torch.equal(weights.gate.codes, weights.up.codes)
    assert tuple(weights.down.shape) == (96, 48)
