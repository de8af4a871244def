# SPDX-License-Identifier: Apache-2.0
"""Routed experts in the kernels for Blackwell, their FP4 instruction replaced: on whatever runs Triton here.

Not collected by itself, as `sm100_cases.py` is not: under the interpreter with the contract of routed experts
(`test_routed_experts.py`), which runs natively by itself; on a GPU as part of `test_gpu_sm100.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvfp4_experts.formats.stack import Nvfp4Stack
from nvfp4_experts.kernels import reference
from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES, Routing
from nvfp4_experts.kernels.sm100 import pipeline
from nvfp4_experts.kernels.sm100.config import DECODING_CHIP, Chip
from nvfp4_experts.kernels.sm100.gemm import gemm
from nvfp4_experts.kernels.sm100.slots import add_slots, group_slots
from nvfp4_experts.layers.routed_experts import Nvfp4RoutedExperts
from tests.kernels import test_routed_experts as contract
from tests.kernels.sm100_cases import (
    CHIP_CASES,
    DEVICE,
    INTERPRETED,
    LIMIT,
    bound,
    packed,
    poisoned,
    rel_l2,
    weights_of,
)

E = 3
SCALES = torch.linspace(2, 8, E) / 2688, torch.linspace(8, 4, E) / 2688


def takes_a_backend(test: object) -> bool:
    return any("backend" in str(mark.args[:1]) for mark in getattr(test, "pytestmark", ()))


if INTERPRETED:
    globals().update({name: value for name, value in vars(contract).items() if takes_a_backend(value)})


def routing_of(tokens: int, top_k: int, experts: int = E, dtype: torch.dtype = torch.int64) -> Routing:
    """Experts at random, so some are named twice; one slot in eight is not here."""
    indices = torch.randint(experts, (tokens, top_k), dtype=dtype)
    here = torch.rand(tokens, top_k) < 0.875
    far = 2**40 if dtype == torch.int64 else 2**31 - 1
    outside = torch.tensor([-1, experts, far, -far], dtype=dtype)[torch.randint(4, (tokens, top_k))]
    return Routing(torch.where(here, indices, outside), torch.randn(tokens, top_k), "before_down")


def stacks_of(hidden: int, intermediate: int) -> tuple[Nvfp4Stack, ...]:
    return tuple(Nvfp4Stack.of(projection) for projection in zip(*weights_of(hidden, intermediate, E), strict=True))


def run_layer(
    x: Tensor,
    shape: tuple[int, int],
    routing: Routing,
    mode: str,
    chip: Chip = DECODING_CHIP,
    multiprocessors: int = 4,
    launch: pipeline.Launch = pipeline.launch_now,
) -> Tensor:
    """y on the CPU, from poisoned scratch."""
    plan = pipeline.Plan(chip, mode, *shape, E, len(x), multiprocessors, routing.indices.numel())
    scales = [scale.to(DEVICE) if mode == "static" else None for scale in SCALES]
    there = Routing(routing.indices.to(DEVICE), routing.weights.to(DEVICE), routing.weighting)
    y = torch.full_like(x, float("nan"), device=DEVICE)
    activations = pipeline.Activations(*scales, LIMIT, there)
    pipeline.run(x.to(DEVICE), packed(weights_of(*shape, E)), activations, plan, poisoned(plan), y, launch)
    return y.cpu()


def expected(x: Tensor, shape: tuple[int, int], routing: Routing, mode: str) -> Tensor:
    options = {"swiglu_limit": LIMIT, "activations": "nvfp4", "activation_scale": mode, "weighting": routing.weighting}
    scales = {"input_scale": SCALES[0], "hidden_scale": SCALES[1]}
    return reference.routed_experts(x, *stacks_of(*shape), routing.indices, routing.weights, **options, **scales)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (7, 6, 5), (700, 6, 40)])
def test_slots_are_grouped_by_expert_in_ascending_order(
    tokens: int, top_k: int, experts: int, dtype: torch.dtype
) -> None:
    """Over more slots than a block has; nothing is written beyond the rows that are here."""
    indices = routing_of(tokens, top_k, experts, dtype).indices
    rows = [torch.full((tokens * top_k,), -7, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    offsets = torch.full((experts + 1,), -7, dtype=torch.int32, device=DEVICE)
    group_slots[(experts,)](indices.to(DEVICE), offsets, *rows, tokens * top_k, top_k, BLOCK=2048)
    flat = indices.flatten().long()
    here = (flat >= 0) & (flat < experts)
    grouped, slots = torch.where(here, flat, experts).sort(stable=True)
    count = int(here.sum())
    want = torch.nn.functional.pad(torch.bincount(grouped, minlength=experts + 1)[:experts].cumsum(0), (1, 0))
    assert torch.equal(offsets.cpu().long(), want)
    padding = torch.full((tokens * top_k - count,), -7)
    assert torch.equal(rows[1].cpu().long(), torch.cat((slots[:count], padding)))
    assert torch.equal(rows[0].cpu().long(), torch.cat((slots[:count] // top_k, padding)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the interpreter cuts bf16 off
def test_a_tokens_rows_are_added_in_order_and_nothing_else_is_read(dtype: torch.dtype) -> None:
    for top_k in (1, 4, 9):
        rows = torch.randn(5, top_k, 1040) * 1000 ** torch.rand(5, top_k, 1)
        indices = routing_of(5, top_k).indices
        here = (indices >= 0) & (indices < E)
        want = torch.zeros(5, 1040)
        for slot in range(top_k):
            want = torch.where(here[:, slot, None], want + rows[:, slot], want)
        rows[~here] = torch.nan
        y = torch.full((5, 1040), torch.nan, dtype=dtype, device=DEVICE)
        arguments = rows.to(DEVICE), indices.to(DEVICE), y, 5, top_k
        add_slots[(6, 2)](*arguments, EXPERTS=E, COLUMNS=1040, BLOCK=1024, AT_A_TIME=4)
        assert torch.equal(y.cpu(), want.to(dtype))


# Slots for each cut that a chip has beside those of the contract's tests.
CUTS = {"sm_100a": [(10, 4), (40, 4)], "sm_120a": [(25, 4)]}


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
@pytest.mark.parametrize("chip", CUTS)
def test_every_cut_matches_the_reference(chip: str, mode: str) -> None:
    for tokens, top_k in CUTS[chip]:
        x, routing = torch.randn(tokens, 144), routing_of(tokens, top_k)
        got = run_layer(x, (144, 80), routing, mode, CHIP_CASES[chip])
        assert rel_l2(got, expected(x, (144, 80), routing, mode)) <= bound(tokens * top_k * 80), tokens


def test_few_slots_cut_k_and_any_number_of_programs_gives_the_same_bits() -> None:
    def few_programs(kernel: object, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
        pipeline.launch_now(kernel, (3,) if kernel is gemm else grid, *arguments, **constants)

    x, routing = torch.randn(3, 400), routing_of(3, 2)
    plan = pipeline.Plan(DECODING_CHIP, "per_token", 400, 416, E, 3, 64, 6)
    assert plan.gate_up[1] == plan.down[1] == 2  # each in two runs
    whole = run_layer(x, (400, 416), routing, "per_token", multiprocessors=64)
    assert rel_l2(whole, expected(x, (400, 416), routing, "per_token")) <= bound(3 * 2 * 416)
    assert torch.equal(run_layer(x, (400, 416), routing, "per_token", multiprocessors=64, launch=few_programs), whole)


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
def test_a_module_runs_with_fewer_experts_a_token_than_it_was_built_for(mode: str) -> None:
    x, routing = torch.randn(2, 3, 144).bfloat16(), routing_of(6, 2)
    experts = Nvfp4RoutedExperts(
        *(stack.to(DEVICE) for stack in stacks_of(144, 80)),
        activations="nvfp4",
        activation_scale=mode,
        backend="sm100-decode",
        top_k=4,
        max_tokens=8,
        input_scale=SCALES[0],
        hidden_scale=SCALES[1],
    )
    indices, weights = (part.view(2, 3, 2).to(DEVICE) for part in (routing.indices, routing.weights))
    y = experts(x.to(DEVICE), indices, weights, torch.empty(2, 3, 144, device=DEVICE)).cpu()
    want = expected(x.view(6, 144).float(), (144, 80), routing, mode)
    assert rel_l2(y.view(6, 144), want) <= bound(6 * 2 * 80)
