# SPDX-License-Identifier: Apache-2.0
"""Kernels of Hopper on a CPU (tests/emulator): those of few tokens, whose blocks hand words to each other, results and
what a call leaves behind; and those of more tokens, with GEMMs; all that surrounds FP8 to the bit.

The order in which warps go on is drawn anew in each launch, and results do not depend on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nvfp4_experts.formats.activations import quantize_fp8_rows
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor
from nvfp4_experts.kernels.dispatch import WEIGHTINGS, Beside, Call, Routing
from nvfp4_experts.kernels.reference import enter, shared_expert
from nvfp4_experts.kernels.sm90 import (
    backend,
    fp8,
    fp8_backend,
    gemm,
    grouped,
    mailbox,
    routed,
    routed_decode,
    routed_fp8,
)
from nvfp4_experts.kernels.sm90.config import GemmConfig, config_is_legal, halves
from nvfp4_experts.kernels.sm90.mailbox import Mailboxes, mailbox_bytes
from nvfp4_experts.kernels.target import Target
from nvfp4_experts.layouts.fragments import CHUNK_BYTES
from tests.emulator.translate import build
from tests.kernels.test_routed_experts import LIMIT, draw_routing, make_experts, static_scales, wanted
from tests.kernels.test_sm90_fp8 import (
    assert_same_bytes,
    check_h,
    enter_rows_by_torch,
    places_of_rows,
    rounded,
    untouched,
    weights_of,
)
from tests.tolerances import against_reference

BLOCKS, E, K = 4, 9, 6
SHAPE = 272, 80  # rows of whole chunks and the rest of one; 10 tiles of L1 for 4 blocks
MODES = [("bf16", "dynamic"), *(("nvfp4", scale) for scale in ("static", "dynamic", "per_token"))]
FP8 = "fp8", "dynamic"
CPU = torch.device("cpu")
LIBRARIES: dict[tuple[str, tuple[tuple[str, int], ...]], ctypes.CDLL] = {}  # built so far

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("c++"), reason="needs c++ and Linux's ucontext"
)


class Emulator:
    """In the place of what loads and launches kernels, and gives them mailboxes."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder, self.launches = folder, 0
        self._mailboxes: dict[tuple[object, ...], Mailboxes] = {}
        hopper = Target("cuda", "a small Hopper", (9, 0), BLOCKS)
        cuda_core = SimpleNamespace(LaunchConfig=SimpleNamespace, launch=self.launch)
        patch.setitem(sys.modules, "cuda.core", cuda_core)
        patch.setattr(mailbox, "allocate", lambda _, size: aligned_bytes(size))
        patch.setattr(mailbox, "fill", lambda memory, byte: memory.fill_(byte))
        patch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(backend, "current_stream", lambda _: None)
        for module in (backend, routed_decode, gemm, fp8):
            patch.setattr(module, "target_of", lambda _: hopper)
        for module in (grouped, fp8, gemm):
            patch.setattr(module, "carve", lambda _, *parts: [torch.zeros(shape, dtype=kind) for shape, kind in parts])
        for module in (backend, routed_decode):
            patch.setattr(module, "mailboxes", self.mailboxes)
        patch.setattr(gemm, "_weight_map", weight_map)
        patch.setattr(gemm, "_activation_map", activation_map)
        for module in (backend, routed_decode, gemm, grouped, fp8):
            patch.setattr(module, "load_kernel", self.load)
        for module in (gemm, grouped, fp8):
            patch.setattr(module, "launch_kernel", self.launch_kernel)
        for module in (routed_decode, gemm):
            patch.setattr(module, "launch_structure", self.launch_structure)
        routed_decode._tiles.cache_clear()

    def load(self, name: str, file: str, macros: tuple[tuple[str, int], ...], *_: object) -> ctypes.CDLL:
        if (name, macros) not in LIBRARIES:
            LIBRARIES[name, macros] = build(name, file, macros, self._folder)
        return LIBRARIES[name, macros]

    def mailboxes(self, device: torch.device, box: int, layout: tuple[object, ...] = ()) -> Mailboxes:
        return self._mailboxes.setdefault((box, layout), Mailboxes(device, mailbox_bytes(box)))

    def launch(self, _: None, config: SimpleNamespace, kernel: ctypes.CDLL, *arguments: Any) -> None:
        self._run(kernel, (config.grid,), config.block, config.shmem_size, packed(arguments), cluster=0)

    def launch_structure(self, kernel: ctypes.CDLL, *shape: Any, cluster: int = 1, together: bool = False) -> None:
        blocks, threads, shared_bytes, arguments, _ = shape
        self._run(kernel, (blocks,), threads, shared_bytes, arguments, 0 if together else cluster)

    def launch_kernel(
        self, kernel: ctypes.CDLL, grid: tuple[int, ...], threads: int, *arguments: Any, shared_bytes: int = 0
    ) -> None:
        self._run(kernel, grid, threads, shared_bytes, packed(arguments), cluster=1)

    def _run(
        self, kernel: ctypes.CDLL, grid: tuple[int, ...], threads: int, shared_bytes: int, given: bytes, cluster: int
    ) -> None:
        self.launches += 1
        x, y = (*grid, 1)[:2]
        memory = ctypes.create_string_buffer(given, len(given))
        seed = ctypes.c_ulonglong(self.launches)
        assert kernel.launch(memory, x, y, threads, shared_bytes, cluster, seed), "stuck, or a copy has met a load"


def weight_map(address: int, tiles: int, chunks: int, box_tiles: int, box_chunks: int) -> bytes:
    """A `Map` of instructions.hpp, in the place of the driver's; so is the next."""
    sizes, strides = (CHUNK_BYTES, chunks, tiles), (CHUNK_BYTES, chunks * CHUNK_BYTES)
    return struct.pack("11Q40x", address, *sizes, *strides, CHUNK_BYTES, box_chunks, box_tiles, 0, 4)


def activation_map(address: int, tokens: int, columns: int, box_tokens: int, value_bytes: int) -> bytes:
    row = columns * value_bytes
    return struct.pack("11Q40x", address, row, tokens, 1, row, 0, 128, box_tokens, 1, 1, value_bytes)


def packed(arguments: tuple[Any, ...]) -> bytes:
    """As a structure of C; tensors as their address."""
    kinds = {np.int32: "i", np.int64: "q", np.float32: "f", int: "Q"}
    values = [0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    return struct.pack("@" + "".join(kinds[type(value)] for value in values), *values)


def aligned_bytes(size: int) -> Tensor:
    memory = torch.empty(size + 128, dtype=torch.uint8)
    begin = -memory.data_ptr() % 128
    return memory[begin : begin + size]


@pytest.fixture
def emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    yield Emulator(tmp_path, monkeypatch)
    routed_decode._tiles.cache_clear()


def one_of(stacks: tuple[Any, ...], expert: int) -> list[Nvfp4Tensor]:
    return [stack[expert] for stack in stacks]


def alone(x: Tensor, tensors: list[Nvfp4Tensor], call: Call) -> Tensor:
    """What a shared expert makes of x."""
    return shared_expert(
        x,
        *tensors,
        swiglu_limit=call.swiglu_limit,
        activations=call.activations,
        activation_scale=call.activation_scale,
        input_scale=call.input_scale,
        hidden_scale=call.hidden_scale,
    )


def check(got: Tensor, expected: Tensor, mode: tuple[str, str], op: str, *, by_gemm: bool = True) -> None:
    """by_gemm: h passes through bf16 in front of gemm.cu, where it enters as e4m3."""
    backend_name = "sm90-fp8" if mode[0] == "fp8" and by_gemm else "sm90"
    bound = against_reference(mode[0], backend_name, len(got) * K * SHAPE[1], rounded=False, op=op)
    assert (got.double() - expected.double()).norm() <= bound * expected.double().norm()


def bound_call(mode: tuple[str, str], expert: int | None = None) -> Call:
    scales = static_scales(E) if expert is None else (s[expert] for s in static_scales(E))
    return Call(LIMIT, *mode, *scales)


IN_ONE_LAUNCH = [*zip(MODES, WEIGHTINGS * 2, strict=True), *((FP8, weighting) for weighting in WEIGHTINGS)]


@pytest.mark.parametrize(("mode", "weighting"), IN_ONE_LAUNCH, ids=str)
def test_routed_experts(mode: tuple[str, str], weighting: str, emulator: Emulator) -> None:
    """Calls that follow each other, of more and of fewer tokens, with a shared expert and without; also for nobody."""
    stacks = make_experts(E, *SHAPE)
    kernels = routed_fp8.ROUTED if mode == FP8 else routed.ROUTED
    weights, call = list(kernels.pack(*stacks).values()), bound_call(mode)
    beside = Beside(kernels.one, list(kernels.one.pack(*one_of(stacks, 2)).values()), bound_call(mode, expert=2))
    calls: list[tuple[Callable[[Tensor], None], Tensor]] = []
    for tokens, has_shared in ((8, False), (1, True), (3, False), (8, True), (1, False)):
        x, routing = torch.randn(tokens, SHAPE[0]), draw_routing(tokens, min(K, 1 + tokens), weighting, E)
        nobody = Routing(torch.full_like(routing.indices, -1), routing.weights, weighting)
        of_shared = alone(x, one_of(stacks, 2), beside.call) if has_shared else torch.zeros_like(x)
        for chosen, of_routed in ((routing, wanted(x, stacks, routing, call)), (nobody, torch.zeros_like(x))):

            def run(out: Tensor, x: Tensor = x, chosen: Routing = chosen, has_shared: bool = has_shared) -> None:
                routed_decode.routed_experts(x, weights, chosen, call, out, beside if has_shared else None)

            calls.append((run, of_routed + of_shared))
    seen = []
    for run, expected in calls:
        out = torch.full_like(expected, torch.nan)
        run(out)
        check(out, expected, mode, "routed_experts", by_gemm=False)
        seen.append(out)
    for which in torch.randperm(len(calls))[:4].tolist():
        out = torch.full_like(seen[which], torch.nan)
        calls[which][0](out)
        assert torch.equal(out, seen[which])


@pytest.mark.parametrize("mode", [*MODES, FP8], ids=str)
def test_a_shared_expert(mode: tuple[str, str], emulator: Emulator) -> None:
    tensors = one_of(make_experts(E, *SHAPE), 4)
    kernels = fp8_backend.BACKEND if mode == FP8 else backend.BACKEND
    weights, call = list(kernels.pack(*tensors).values()), bound_call(mode, expert=4)
    for tokens in (8, 1, 2, 8):
        x = torch.randn(tokens, SHAPE[0])
        outs = [torch.full_like(x, torch.nan) for _ in range(2)]
        for out in outs:
            backend.decode(x, weights, call, SHAPE[1], out)
        check(outs[0], alone(x, tensors, call), mode, "shared_expert", by_gemm=False)
        assert torch.equal(*outs)
    assert emulator.launches == 8


@pytest.mark.parametrize("mode", ["static", "dynamic", "per_token"])
def test_activations_enter_to_the_bit(mode: str, emulator: Emulator) -> None:
    """enter.cu, with an amax over all of x or over a row."""
    x = torch.randn(20, SHAPE[0])
    given = static_scales(E)[0][3] if mode == "static" else None
    values, scale = torch.empty(x.shape, dtype=torch.bfloat16), torch.empty(20 if mode == "per_token" else 1)
    partials = torch.empty(gemm.ENTER_THREADS, dtype=torch.int32)
    gemm.enter(x, mode, scale if given is None else given, values, partials)
    expected, scales = enter(x, "nvfp4", mode, given)
    assert torch.equal(values.float(), expected)
    assert given is not None or torch.equal(scale, scales.flatten())


# row_groups, column_groups, tokens, split: one part; parts of a block, of a cluster, of both; a ring that comes round
CUTS = [(4, 1, 32, 1), (1, 3, 64, 1), (2, 1, 32, 2), (1, 2, 32, 2), (1, 1, 256, 1)]


@pytest.mark.parametrize(
    ("cut", "static"), [*((cut, False) for cut in CUTS), *((cut, True) for cut in CUTS[-2:])], ids=str
)
def test_halves_of_a_shared_expert(cut: tuple[int, ...], static: bool, emulator: Emulator) -> None:
    """gemm.cu without a list of tiles; h as NVFP4 values where scales are static."""
    shape, tokens = (656, 80), 41
    hidden, size = shape
    mode, tensors = ("nvfp4", "static") if static else ("bf16", "dynamic"), one_of(make_experts(E, *shape), 4)
    gate_up, scales, _, down, scale_of_down, _ = backend.BACKEND.pack(*tensors).values()
    call = bound_call(mode, expert=4)
    x = torch.randn(tokens, hidden)
    values = enter(x, *mode, call.input_scale)[0].bfloat16()
    h, out = torch.empty(tokens, size, dtype=torch.bfloat16), torch.empty(tokens, hidden)
    first, second = GemmConfig(*cut), GemmConfig(*cut[:3], 1)  # the second's columns are one stage
    for config, problem in zip((first, second), halves(*shape, tokens), strict=True):
        assert config_is_legal(config, problem)
    of_x, of_h = (call.input_scale, call.hidden_scale) if static else (None, None)
    gemm.run_half(
        values, gate_up, 2 * size, scales, h, first, gate_up=True, limit=LIMIT, token_scales=of_x, hidden_scale=of_h
    )
    gemm.run_half(h, down, hidden, scale_of_down, out, second, gate_up=False, token_scales=of_h)
    check(out, alone(x, tensors, call), mode, "shared_expert")


@pytest.mark.parametrize("cut", [None, *CUTS], ids=str)
def test_a_shared_expert_in_fp8(
    cut: tuple[int, ...] | None, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few tokens: fp8.cu, and gemm.cu on e4m3 without a list of tiles."""
    hidden, size = shape = 656, 80
    if cut is not None:
        configs = GemmConfig(*cut, fp8=True), GemmConfig(*cut[:3], 1, fp8=True)
        monkeypatch.setattr(fp8, "choose", lambda *_: configs)
    tensors, call = one_of(make_experts(E, *shape), 4), Call(LIMIT, *FP8)
    weights = list(fp8_backend.BACKEND.pack(*tensors).values())
    for tokens in (1, 41):
        x = torch.randn(tokens, hidden)
        out = torch.full_like(x, torch.nan)
        fp8.shared_expert(x, weights, call, size, out)
        check(out, alone(x, tensors, call), FP8, "shared_expert")
    assert emulator.launches == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_enter_fp8_to_the_bit(dtype: torch.dtype, emulator: Emulator) -> None:
    """fp8.cu: rows as they are, and in the order of fragments to wherever rows of slots are."""
    x = (torch.randn(40, 272) * torch.randn(40, 1).exp()).to(dtype)
    x[3, 7], x[5] = torch.nan, 0
    want, want_scales = quantize_fp8_rows(x)
    values, scales = torch.empty(x.shape, dtype=want.dtype), torch.empty(40, 1)
    fp8.quantize_rows(x, values, scales)
    assert_same_bytes(values, want)
    torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)
    for places in places_of_rows(40):
        (values, scales), (want, want_scales) = untouched(272), untouched(272)
        fp8.enter_rows(x, values, scales, **places)
        enter_rows_by_torch(x, want, want_scales, **places)
        assert_same_bytes(values, want)
        torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)


def test_h_in_fp8(emulator: Emulator) -> None:
    """swiglu_quantize of fp8.cu: every byte is what some number near the exact quotient rounds to."""
    gate_up = (torch.randn(9, 544) * 4).clamp(-15.5, 15.5).bfloat16()
    values, scales = torch.empty(9, 272, dtype=torch.float8_e4m3fn), torch.empty(9, 1)
    fp8.swiglu_quantize(gate_up, LIMIT, values, scales)
    check_h(values, scales, gate_up, LIMIT)


def test_weights_unpacked_to_fp8(emulator: Emulator) -> None:
    """unpack.cu: gate and up taken apart, down; every code under every scale."""
    gate, up, down = weights = weights_of(272, 144, strange=True)
    gate_up, global_scales, amax, of_down, scale_of_down, amax_of_down = fp8_backend.BACKEND.pack(*weights).values()
    for packed, of_rows, scale, want in (
        (gate_up, amax, global_scales, rounded(gate, up)),
        (of_down, amax_of_down[None], scale_of_down, rounded(down)),
    ):
        values, scales = (torch.empty_like(t) for t in want)
        fp8.unpack_rows(packed, of_rows, scale, values, scales)
        assert_same_bytes(values, want[0])
        torch.testing.assert_close(scales, want[1], rtol=0, atol=0, equal_nan=True)


# tokens, experts, top_k: tiles of 32 rows at most, and of 128; more slots of a token than are asked for at once
FEW_ROWS, MANY_ROWS, MANY_SLOTS = (12, E, 3), (40, 2, 2), (4, 12, 11)
BY_EXPERT = [
    *((mode, weighting, FEW_ROWS) for mode, weighting in zip(MODES, WEIGHTINGS * 2, strict=True)),
    *((mode, "before_down", MANY_ROWS) for mode in MODES[:2]),
    *((mode, "before_down", MANY_SLOTS) for mode in MODES),
    *((FP8, "after_down", sizes) for sizes in (FEW_ROWS, MANY_ROWS, MANY_SLOTS)),
]


@pytest.mark.parametrize(("mode", "weighting", "sizes"), BY_EXPERT, ids=str)
def test_rows_by_expert(mode: tuple[str, str], weighting: str, sizes: tuple[int, int, int], emulator: Emulator) -> None:
    """More tokens: group.cu, enter_rows.cu (fp8: fp8.cu), gemm.cu over a list of tiles, combine.cu."""
    tokens, experts, top_k = sizes
    stacks = make_experts(experts, *SHAPE)
    x, routing = torch.randn(tokens, SHAPE[0]), draw_routing(tokens, top_k, weighting, experts)
    out, addend = torch.full_like(x, torch.nan), torch.randn_like(x)
    call = Call(LIMIT, *mode, *static_scales(experts))
    kernels = routed_fp8.ROUTED if mode == FP8 else routed.ROUTED
    grouped.routed_experts(x, list(kernels.pack(*stacks).values()), routing, call, out, addend)
    check(out, wanted(x, stacks, routing, call) + addend, mode, "routed_experts")


@pytest.mark.parametrize(("mode", "of_shared"), [(MODES[0], FP8), (FP8, MODES[0]), (MODES[1], FP8)], ids=str)
def test_a_shared_expert_of_another_format_beside(
    mode: tuple[str, str], of_shared: tuple[str, str], emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, experts, top_k = FEW_ROWS
    monkeypatch.setattr(routed, "carve", lambda *_, behind: [torch.zeros(tokens, SHAPE[0])] * (behind > 0))
    monkeypatch.setattr(backend, "exclusive", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    stacks = make_experts(experts, *SHAPE)
    x, routing = torch.randn(tokens, SHAPE[0]), draw_routing(tokens, top_k, "before_down", experts)
    call, tensors = Call(LIMIT, *mode, *static_scales(experts)), one_of(stacks, 2)
    kernels, one = (
        routed_fp8.ROUTED if mode == FP8 else routed.ROUTED,
        fp8_backend.BACKEND if of_shared == FP8 else backend.BACKEND,
    )
    beside = Beside(one, list(one.pack(*tensors).values()), Call(LIMIT, *of_shared))
    out = torch.full_like(x, torch.nan)
    routed._run_beside(x, list(kernels.pack(*stacks).values()), routing, call, beside, out)
    check(out, wanted(x, stacks, routing, call) + alone(x, tensors, beside.call), FP8, "routed_experts")


@pytest.mark.parametrize(("tokens", "tile_rows"), [(1, 32), (70, 32), (180, 64)])
def test_slots_by_expert(tokens: int, tile_rows: int, emulator: Emulator) -> None:
    """One block, and above 1024 slots many."""
    routing = draw_routing(tokens, K, experts=E)
    slots = routing.indices.numel()
    lists = {"tiles": (slots, 4), "counts": (2,)} | dict.fromkeys(grouped._LISTS[2:], (slots,))
    made = {name: torch.full(shape, -7, dtype=torch.int32) for name, shape in lists.items()}
    made["weight_of_row"] = torch.zeros(slots)
    grouped._group(routing, E, tile_rows, made)
    chosen, weights = routing.indices.flatten(), routing.weights.flatten()
    is_here = (chosen >= 0) & (chosen < E)
    (here,) = torch.nonzero(is_here, as_tuple=True)
    row_of = made["row_of_slot"].long()
    assert (row_of[~is_here] == -1).all() and int(made["counts"][1]) == len(here)
    assert torch.equal(row_of[here].sort().values, torch.arange(len(here)))
    assert torch.equal(made["expert_of_row"][row_of[here]], chosen[here].int())
    assert torch.equal(made["weight_of_row"][row_of[here]], weights[here])
    row = 0
    for expert, first, end, _ in made["tiles"][: int(made["counts"][0])].tolist():
        assert first == row and 0 < end - first <= tile_rows
        assert (made["expert_of_row"][first:end] == expert).all()
        left = int((made["expert_of_row"][first : len(here)] == expert).sum())
        assert end - first == left or (end - first) % 8 == 0
        row = end
    assert row == len(here)
