# SPDX-License-Identifier: Apache-2.0
"""FP8 on Hopper: its kernels compile without spills; on a GPU their bytes are those of formats/activations.py.

On a CPU the plans of fp8.py, for few tokens and many, and of grouped.py run with plain torch in the place of kernels.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_experts.formats.activations import quantize_fp8_rows
from nvfp4_experts.formats.codes import AMAX_FLOOR, E4M3_MAX, decode_blocks, encode_e4m3
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor, quantize
from nvfp4_experts.kernels import reference
from nvfp4_experts.kernels.cuda.workspace import Part, bytes_of
from nvfp4_experts.kernels.dispatch import WEIGHTINGS, Call, Routing
from nvfp4_experts.kernels.one_by_one import hit_experts
from nvfp4_experts.kernels.sm90 import fp8, gemm, grouped
from nvfp4_experts.kernels.sm90.config import GemmConfig, GemmProblem, refusal
from nvfp4_experts.kernels.sm90.fp8_backend import BACKEND
from nvfp4_experts.kernels.sm90.routed_fp8 import ROUTED
from nvfp4_experts.kernels.target import Target
from nvfp4_experts.layouts.e4m3_fragments import unpack_e4m3_fragments
from nvfp4_experts.layouts.weights import deinterleave_rows
from tests.kernels.test_routed_experts import draw_routing, make_experts, wanted
from tests.kernels.test_sm90_compile import Kernel, compiler
from tests.layouts.test_e4m3_fragments import transposed
from tests.tolerances import AGAINST_REFERENCE

LIMIT = 10.0
SHAPES = [(144, 80), (512, 2304), (7168, 256)]  # H, I
WHOLE = fp8.WEIGHTS_AT_ONCE
FILES = {
    "unpack.cu": ["unpack_fragments"],
    "fp8.cu": [*fp8._QUANTIZE_ROWS.values(), *fp8._ENTER_ROWS.values(), "swiglu_quantize"],
}

# swiglu_quantize against exact SwiGLU of the same bf16: h is off by |gate| * 2^-24 (the rounded argument of the
# exponential) and a few 2^-23 (exponential, reciprocal, two products), below 2^-19 for |gate| < 16, and so is the scale
# that its largest value sets. A byte of h may then be that of any number so near to the exact quotient.
SWIGLU_BOUND = 2.0**-18

# Relative L2 between two ways of summing that round gate and up to bf16, or keep as few bits: the largest value of h,
# and so its row's scale, moves by up to 2^-8 and takes values across boundaries of e4m3, which are 2^-3.5 apart:
# sqrt(2^-3.5 * 2^-8) = 0.019, and up to three times that for a single token. A wrong row or column is off by 1.
BF16_BETWEEN = 2.0**-4


def weights_of(hidden: int, intermediate: int, strange: bool = False) -> tuple[Nvfp4Tensor, ...]:
    """gate, up, down; strange: every code under every scale, rows of zeros, a NaN scale, all far from Gaussian."""
    shapes = (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)
    made = [quantize(torch.randn(s) * s[1] ** -0.5) for s in shapes]
    if strange:
        for w in made:
            w.codes[4:] = torch.randint(0, 256, w.codes[4:].shape, dtype=torch.uint8)
            scales = w.block_scales.view(torch.uint8)
            scales[4:] = torch.randint(0, 0x7F, scales[4:].shape, dtype=torch.uint8)
            scales[9], scales[10, 1] = 0, 0x7F
    return tuple(made)


def rounded(*weights: Nvfp4Tensor) -> tuple[Tensor, Tensor]:
    """What the kernels must make of weights: e4m3 rows (N, K), and a scale per row (N,), global scale included."""
    pairs = [quantize_fp8_rows(decode_blocks(w.codes, w.block_scales, torch.float32)) for w in weights]
    scales = [scale[:, 0] * w.global_scale for (_, scale), w in zip(pairs, weights, strict=True)]
    return torch.cat([values for values, _ in pairs]), torch.cat(scales)


def assert_same_bytes(got: Tensor, want: Tensor) -> None:
    """Equal e4m3 bytes, -0 and 0 told apart; a NaN is a NaN whatever its sign."""
    got, want = (t.cpu().view(torch.uint8) for t in (got, want))
    different = (got != want) & ~(((got & 0x7F) == 0x7F) & ((want & 0x7F) == 0x7F))
    assert not different.any(), f"{int(different.sum())} bytes differ, first at {different.nonzero()[0].tolist()}"


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_kernels_compile_and_spill_no_register(tmp_path: Path, file: str) -> None:
    compile_one = compiler()
    if compile_one is None:
        pytest.skip("needs nvcc on PATH, or cuda.bindings and NVRTC")
    made = compile_one(tmp_path / "built", Kernel(FILES[file][0], file, ()))
    assert made.error is None
    assert all(f".entry {name}(" in made.ptx for name in FILES[file])
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", made.log)
    assert spills == [("0", "0")] * len(FILES[file]), made.log
    stack = set(re.findall(r"(\d+) bytes stack frame", made.log))
    assert stack <= {"0"} and ".local" not in made.ptx


def test_two_products_make_all_eight_magnitudes() -> None:
    """unpack.cu rounds scale / amax and 1.5 * scale / amax alone; times a power of two, they are the other products."""
    scales = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()[:, None]
    extremes = torch.tensor([2.0**-10, 6 * E4M3_MAX, AMAX_FLOOR])
    amax = torch.cat(((8 * torch.randn(2000)).exp2().bfloat16().float(), extremes))
    whole, of_kernel = E4M3_MAX / amax, (E4M3_MAX / 2**7) / amax
    one, one_and_half = scales * 2**7 * of_kernel, scales * 2**7 * 1.5 * of_kernel
    got = (0 * one, one / 2, one, one_and_half, 2 * one, 2 * one_and_half, 4 * one, 4 * one_and_half)
    for magnitude, product in zip((0, 0.5, 1, 1.5, 2, 3, 4, 6), got, strict=True):
        assert torch.equal(product, scales * magnitude * whole)


@pytest.mark.parametrize("at_once", [WHOLE, 1 << 12, 1], ids=["whole", "tiles", "single"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_plan_of_many_tokens_with_torch_for_kernels(
    monkeypatch: pytest.MonkeyPatch, at_once: int, dtype: torch.dtype
) -> None:
    def quantize_rows(x: Tensor, values: Tensor, scales: Tensor) -> None:
        for to, made in zip((values, scales), quantize_fp8_rows(x), strict=True):
            to.copy_(made)

    def swiglu_quantize(gate_up: Tensor, limit: float, h: Tensor, scales: Tensor) -> None:
        quantize_rows(reference.swiglu(*gate_up.float().chunk(2, dim=1), limit), h, scales)

    def unpack_rows(packed: Tensor, row_amax: Tensor, globals_: Tensor, values: Tensor, scales: Tensor) -> None:
        codes, block_scales = unpack_e4m3_fragments(packed, *values.shape)
        decoded = decode_blocks(codes, block_scales, torch.float32)
        if len(row_amax) == 2:
            decoded = torch.cat(deinterleave_rows(decoded))
        assert torch.equal(decoded.abs().amax(1), row_amax.float().flatten())
        made, made_scales = quantize_fp8_rows(decoded)
        values.copy_(made)
        scales.copy_(made_scales[:, 0] * globals_.repeat_interleave(len(scales) // len(globals_)))

    def carve(device: torch.device, *parts: Part) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in parts]

    for twin in (quantize_rows, swiglu_quantize, unpack_rows, carve):
        monkeypatch.setattr(fp8, twin.__name__, twin)
    monkeypatch.setattr(fp8, "WEIGHTS_AT_ONCE", at_once)
    monkeypatch.setattr(fp8, "FEW", 0)
    hidden, intermediate = 144, 80
    weights = weights_of(hidden, intermediate)
    x = torch.randn(5, hidden).to(dtype)
    out = torch.empty_like(x)
    fp8.shared_expert(x, list(BACKEND.pack(*weights).values()), Call(LIMIT, "fp8", "dynamic"), intermediate, out)
    want = reference.shared_expert(x, *weights, swiglu_limit=LIMIT, activations="fp8").float()
    assert (out.float() - want).norm() <= BF16_BETWEEN * want.norm()


def test_scratch_of_a_huge_layer_is_bounded() -> None:
    hidden, intermediate, tokens = 16384, 8192, 1
    parts = fp8._scratch_of_many(hidden, intermediate, tokens, torch.bfloat16)
    assert bytes_of(parts) <= fp8.WEIGHTS_AT_ONCE + 8 * (2 * intermediate + hidden)
    for rows, of_row in ((intermediate, 2 * hidden), (hidden, intermediate)):
        tiles = list(fp8._tiles(rows, of_row))
        assert [start for start, _ in tiles[1:]] == [stop for _, stop in tiles[:-1]]
        assert tiles[0][0] == 0 and tiles[-1][1] == rows and all(start % 16 == 0 for start, _ in tiles)


@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2], ids=str)
def test_a_step_from_a_reciprocal_is_the_rounded_quotient(off: int) -> None:
    """`inverse_of` of e4m3.cuh, for every mantissa that bf16 has, with a reciprocal so many units off; in fractions."""
    for mantissa in range(128):
        amax, largest = Fraction(128 + mantissa, 128), Fraction(448, 128)
        reciprocal = to_fp32(1 / amax) + off * Fraction(1, 2**24)
        quotient = to_fp32(largest * reciprocal)
        rest = to_fp32(largest - quotient * amax)
        assert to_fp32(rest * reciprocal + quotient) == to_fp32(largest / amax)


def to_fp32(exact: Fraction) -> Fraction:
    """To nearest even, of a number that fp32 has as a normal one, or 0."""
    if exact == 0:
        return exact
    unit = Fraction(2) ** -149
    while abs(exact) >= unit * 2**24:
        unit *= 2
    return round(exact / unit) * unit


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacked_rows_are_the_rounded_rows(shape: tuple[int, int]) -> None:
    gate, up, down = weights_of(*shape, strange=True)
    packed = BACKEND.pack(*(w.to("cuda") for w in (gate, up, down)))
    gate_up, global_scales, row_amax, of_down, down_global_scale, down_row_amax = packed.values()
    for fragments, amax, scale, want in (
        (gate_up, row_amax, global_scales, rounded(gate, up)),
        (of_down, down_row_amax[None], down_global_scale, rounded(down)),
    ):
        values, scales = (torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in want)
        fp8.unpack_rows(fragments, amax, scale, values, scales)
        assert_same_bytes(values, want[0])
        torch.testing.assert_close(scales.cpu(), want[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [80, 144, 2304, 7168, 40000])  # the last: more than a block of threads keeps
def test_quantized_rows_are_those_of_the_format(columns: int, dtype: torch.dtype) -> None:
    for tokens in (1, 3, 129):
        x = (torch.randn(tokens, columns) * torch.randn(tokens, 1).exp()).to(dtype)
        if tokens == 129:
            x[1], x[2], x[3] = 0, -0.0, torch.finfo(dtype).tiny
            x[4, 7], x[5, columns - 1], x[6, 0], x[7, 3] = torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max
        values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device="cuda")
        scales = torch.empty(tokens, 1, device="cuda")
        fp8.quantize_rows(x.cuda(), values, scales)
        want, want_scales = quantize_fp8_rows(x)
        assert_same_bytes(values, want)
        torch.testing.assert_close(scales.cpu(), want_scales, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_plan_of_routed_experts_with_torch_for_kernels(monkeypatch: pytest.MonkeyPatch, weighting: str) -> None:
    """grouped.py in fp8: which rows, scales, weights and orders it hands its launches, computed by plain torch."""
    hidden, intermediate, experts, top_k, tokens = 144, 80, 5, 3, 40
    stacks = make_experts(experts, hidden, intermediate)

    def carve(device: torch.device, *parts: Part) -> list[Tensor]:
        return [torch.zeros(shape, dtype=dtype) for shape, dtype in parts]

    def group(routing: Routing, experts: int, tile_rows: int, made: dict[str, Tensor]) -> None:
        made["row_of_slot"].fill_(-1)
        row = tile = 0
        for expert, slots in hit_experts(routing, experts):
            rows = torch.arange(row, row + len(slots))
            made["row_of_slot"][slots] = rows.int()
            made["expert_of_row"][rows] = expert
            made["weight_of_row"][rows] = routing.weights.flatten()[slots]
            for first in range(row, row + len(slots), tile_rows):
                made["tiles"][tile] = torch.tensor([expert, first, min(first + tile_rows, row + len(slots)), 0])
                tile += 1
            row += len(slots)
        made["counts"][0], made["counts"][1] = tile, row

    def run_half(
        values: Tensor, packed: Tensor, rows: int, weight_scales: Tensor, out: Tensor, *_: Any, **named: Any
    ) -> None:
        groups, columns = named["groups"], hidden if named["gate_up"] else intermediate
        for expert, first, end, _ in groups.tiles[: int(groups.counts[0])].tolist():
            of_expert = packed[expert], rows, columns, weight_scales[expert].flatten(), named["row_amax"][expert]
            sums = half_by_torch(values[first:end], *of_expert, named["token_scales"][first:end], named)
            out[first:end] = sums if groups.weights is None else sums * groups.weights[first:end, None]

    def combine(rows: Tensor, row_of_slot: Tensor, top_k: int, addend: Tensor | None, out: Tensor) -> None:
        here = torch.where(row_of_slot[:, None] < 0, 0.0, rows[row_of_slot.long()])
        out.copy_(here.view(len(out), top_k, -1).sum(1) + (0 if addend is None else addend))

    for twin in (carve, run_half, combine):
        monkeypatch.setattr(grouped, twin.__name__, twin)
    monkeypatch.setattr(grouped, "_group", group)
    monkeypatch.setattr(fp8, "enter_rows", enter_rows_by_torch)
    x, routing = torch.randn(tokens, hidden), draw_routing(tokens, top_k, weighting, experts)
    call, out, addend = Call(LIMIT, "fp8", "dynamic"), torch.empty(tokens, hidden), torch.randn(tokens, hidden)
    grouped.routed_experts(x, list(ROUTED.pack(*stacks).values()), routing, call, out, addend)
    want = wanted(x, stacks, routing, call) + addend
    # h is rounded to bf16 before its row's largest value is found: tests/tolerances.py.
    assert (out - want).norm() <= AGAINST_REFERENCE["routed_experts", "fp8", "sm90-fp8"] * want.norm()


def enter_rows_by_torch(
    x: Tensor, values: Tensor, scales: Tensor, *, count: Tensor | None = None, row_of_slot: Tensor | None = None
) -> None:
    made, made_scales = quantize_fp8_rows(x)
    if row_of_slot is None:
        to = source = torch.arange(len(x) if count is None else int(count))
    else:
        (slots,) = torch.nonzero(row_of_slot >= 0, as_tuple=True)
        to, source = row_of_slot[slots].long(), slots // (len(row_of_slot) // len(x))
    values[to], scales[to] = as_operands(made)[source], made_scales[source, 0]


def half_by_torch(
    values: Tensor,
    packed: Tensor,
    rows: int,
    columns: int,
    weight_scales: Tensor,
    row_amax: Tensor,
    token_scales: Tensor,
    named: dict[str, Any],
) -> Tensor:
    """What a launch of gemm.cu with FP8 makes of some rows of one expert, in fp32."""
    codes, scales = unpack_e4m3_fragments(packed, rows, columns)
    decoded = decode_blocks(codes, scales, torch.float32)
    amax = decoded.abs().amax(1).view(-1, 8) if named["gate_up"] else decoded.abs().amax(1)
    of_rows = torch.stack((amax[::2].flatten(), amax[1::2].flatten())) if named["gate_up"] else amax
    assert torch.equal(of_rows, row_amax.float())
    made, made_scales = quantize_fp8_rows(decoded)
    plain = transposed(values.view(torch.uint8)).view(torch.float8_e4m3fn)[:, :columns].float()
    sums = (plain @ made.float().T) * token_scales[:, None] * made_scales[:, 0]
    if not named["gate_up"]:
        return sums * weight_scales[0]
    gate, up = sums.view(len(values), -1, 2, 8).unbind(2)
    return reference.swiglu(gate.flatten(1) * weight_scales[0], up.flatten(1) * weight_scales[1], named["limit"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_plan_of_few_tokens_with_torch_for_kernels(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    hidden, intermediate, tokens = 144, 80, 5

    def carve(device: torch.device, *parts: Part) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype) for shape, dtype in parts]

    def run_half(
        values: Tensor, packed: Tensor, rows: int, weight_scales: Tensor, out: Tensor, config: GemmConfig, **named: Any
    ) -> None:
        assert config.fp8 and named["scaling"] == gemm.SCALE_OF_TOKEN
        columns = hidden if named["gate_up"] else intermediate
        of_weights = packed, rows, columns, weight_scales, named["row_amax"]
        out.copy_(half_by_torch(values, *of_weights, named["token_scales"], named))

    monkeypatch.setattr(fp8, "carve", carve)
    monkeypatch.setattr(fp8, "enter_rows", enter_rows_by_torch)
    monkeypatch.setattr(fp8, "target_of", lambda _: Target("cuda", "a Hopper", (9, 0), 132))
    monkeypatch.setattr(gemm, "run_half", run_half)
    weights = weights_of(hidden, intermediate)
    x = torch.randn(tokens, hidden).to(dtype)
    out = torch.empty_like(x)
    fp8.shared_expert(x, list(BACKEND.pack(*weights).values()), Call(LIMIT, "fp8", "dynamic"), intermediate, out)
    want = reference.shared_expert(x, *weights, swiglu_limit=LIMIT, activations="fp8").float()
    assert (out.float() - want).norm() <= AGAINST_REFERENCE["routed_experts", "fp8", "sm90-fp8"] * want.norm()


def padded(columns: int) -> int:
    return -(-columns // 64) * 64


def as_operands(values: Tensor) -> Tensor:
    """Padded with zeros, each row in the order of layouts/e4m3_fragments.py."""
    bytes_ = torch.nn.functional.pad(values.view(torch.uint8), (0, padded(values.shape[1]) - values.shape[1]))
    return transposed(bytes_).view(torch.float8_e4m3fn)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [80, 144, 4096, 40000])
def test_entered_rows_are_quantized_rows_in_another_order(columns: int, dtype: torch.dtype) -> None:
    x = (torch.randn(40, columns) * torch.randn(40, 1).exp()).to(dtype)
    x[3, 7] = torch.nan
    for places in places_of_rows(40):
        there = {name: place.cuda() for name, place in places.items()}
        values, scales = (t.cuda() for t in untouched(columns))
        fp8.enter_rows(x.cuda(), values, scales, **there)
        want, want_scales = untouched(columns)
        enter_rows_by_torch(x, want, want_scales, **places)
        assert_same_bytes(values, want)
        torch.testing.assert_close(scales.cpu(), want_scales, rtol=0, atol=0, equal_nan=True)


def places_of_rows(tokens: int) -> list[dict[str, Tensor]]:
    """Where fp8.enter_rows is asked to put rows: their own, all or some, and those of 3 and 11 slots, some of none."""
    of_slots = []
    for top_k in (3, 11):
        places = torch.randperm(tokens * top_k, dtype=torch.int32)
        of_slots.append({"row_of_slot": torch.where(places % 4 == 0, -1, places)})
    return [{}, {"count": torch.tensor([tokens - 7], dtype=torch.int32)}, *of_slots]


def untouched(columns: int) -> tuple[Tensor, Tensor]:
    """Values and scales of places_of_rows(40), as they are where nothing is written."""
    values = torch.full((40 * 11, padded(columns)), 0x11, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return values, torch.full((len(values),), -1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [(4, 1, 32, 1), (4, 1, 64, 1), (4, 1, 128, 1), (2, 1, 128, 1, 2)], ids=str)
def test_weights_enter_the_fp8_gemm_as_the_format_rounds_them(cut: tuple[int, ...]) -> None:
    """Rows with a single 1 pick a column: sums have one term, so results are exact; two experts, ragged sizes."""
    hidden, intermediate, experts, tokens = 272, 144, 2, cut[2]
    stacks = [weights_of(hidden, intermediate, strange=expert == 1) for expert in range(experts)]
    packed = [list(ROUTED.one.pack(*(w.to("cuda") for w in weights)).values()) for weights in stacks]
    down, scales, row_amax = (torch.stack([p[i] for p in packed]) for i in (3, 4, 5))
    ones = torch.eye(intermediate, device="cuda").repeat(experts, 1)
    rows = len(ones)
    values = torch.empty(rows, padded(intermediate), dtype=torch.float8_e4m3fn, device="cuda")
    x_scales, out = torch.empty(rows, device="cuda"), torch.full((rows, hidden), torch.nan, device="cuda")
    fp8.enter_rows(ones, values, x_scales)
    tiles = [
        (expert, first, min(first + tokens, (expert + 1) * intermediate), 0)
        for expert in range(experts)
        for first in range(expert * intermediate, (expert + 1) * intermediate, tokens)
    ]
    lists = [torch.tensor(of, dtype=torch.int32, device="cuda") for of in (tiles, [len(tiles), rows])]
    gemm.run_half(
        values,
        down,
        hidden,
        scales,
        out,
        GemmConfig(*cut, fp8=True),
        gate_up=False,
        token_scales=x_scales,
        scaling=gemm.SCALE_OF_TOKEN,
        groups=gemm.Groups(*lists),
        row_amax=row_amax,
    )
    for expert, (*_, w) in enumerate(stacks):
        columns, row_scales = rounded(w)
        want = (columns.float() * 448).T * (torch.tensor(1 / 448) * row_scales)
        got = out[expert * intermediate : (expert + 1) * intermediate].cpu()
        # A row with a NaN scale has a NaN row scale: all of it is NaN.
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [(1, 2, 32, 2), (2, 1, 64, 1), (1, 1, 128, 4), (1, 4, 32, 1), (2, 2, 64, 2)], ids=str)
def test_weights_of_a_shared_expert_enter_the_fp8_gemm_so_too(cut: tuple[int, ...]) -> None:
    """As above, by launches without a list of tiles, K cut in blocks and clusters; more rows than one block's."""
    hidden, intermediate = 272, 576
    weights = weights_of(hidden, intermediate, strange=True)
    *_, down, scale, row_amax = BACKEND.pack(*(w.to("cuda") for w in weights)).values()
    ones = torch.eye(intermediate, device="cuda")
    values = torch.empty(intermediate, padded(intermediate), dtype=torch.float8_e4m3fn, device="cuda")
    x_scales = torch.empty(intermediate, device="cuda")
    out = torch.full((intermediate, hidden), torch.nan, device="cuda")
    fp8.enter_rows(ones, values, x_scales)
    config, named = GemmConfig(*cut, fp8=True), {"token_scales": x_scales, "scaling": gemm.SCALE_OF_TOKEN}
    assert refusal(config, GemmProblem(hidden, intermediate, intermediate)) is None
    gemm.run_half(values, down, hidden, scale, out, config, gate_up=False, row_amax=row_amax, **named)
    columns, row_scales = rounded(weights[2])
    want = (columns.float() * 448).T * (torch.tensor(1 / 448) * row_scales)
    torch.testing.assert_close(out.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [LIMIT, math.inf])
@pytest.mark.parametrize("columns", [80, 144, 3072, 40000])
def test_swiglu_is_rounded_to_a_nearest_e4m3(columns: int, limit: float) -> None:
    """Every byte is what some number within SWIGLU_BOUND of the exact quotient rounds to."""
    gate_up = (torch.randn(129, 2 * columns) * 4).clamp(-15.5, 15.5).bfloat16()
    gate_up[0] = 0
    values = torch.empty(129, columns, dtype=torch.float8_e4m3fn, device="cuda")
    scales = torch.empty(129, 1, device="cuda")
    fp8.swiglu_quantize(gate_up.cuda(), limit, values, scales)
    check_h(values, scales, gate_up, limit)


def check_h(values: Tensor, scales: Tensor, gate_up: Tensor, limit: float) -> None:
    """What `swiglu_quantize` made of gate and up."""
    h = reference.swiglu(*gate_up.double().chunk(2, dim=1), limit)
    want_scales = h.abs().amax(1, keepdim=True).clamp(min=AMAX_FLOOR) / E4M3_MAX
    torch.testing.assert_close(scales.cpu().double(), want_scales, rtol=SWIGLU_BOUND, atol=0)
    quotient = h / scales.cpu().double()
    near, far = (encode_e4m3((quotient * (1 + e)).float()).float() for e in (-SWIGLU_BOUND, SWIGLU_BOUND))
    got = values.cpu().float()
    assert ((got.abs() >= near.abs()) & (got.abs() <= far.abs())).all()
    assert (torch.signbit(got) == torch.signbit(h)).all()


@pytest.mark.gpu
def test_swiglu_passes_nan_to_its_row_alone() -> None:
    gate_up = torch.randn(4, 160).bfloat16()
    gate_up[1, 5], gate_up[2, 85], gate_up[3, 6] = torch.nan, torch.nan, -torch.inf  # gate, up; -inf * sigmoid(-inf)
    values, scales = torch.empty(4, 80, dtype=torch.float8_e4m3fn, device="cuda"), torch.empty(4, 1, device="cuda")
    fp8.swiglu_quantize(gate_up.cuda(), LIMIT, values, scales)
    assert scales.isnan().flatten().tolist() == [False, True, True, True]
    assert not values[0].float().isnan().any() and values[1:].float().isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("at_once", [WHOLE, 1 << 18], ids=["whole", "tiles"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(144, 80), (1024, 512)], ids=str)
def test_layer_is_its_gemms_on_exact_operands(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype, at_once: int
) -> None:
    """Bit for bit the vendor's GEMMs on operands made by plain torch; tiles are other GEMMs, that may sum otherwise."""
    monkeypatch.setattr(fp8, "WEIGHTS_AT_ONCE", at_once)
    monkeypatch.setattr(fp8, "FEW", 0)
    hidden, intermediate = shape
    weights = [w.to("cuda") for w in weights_of(hidden, intermediate)]
    packed = list(BACKEND.pack(*weights).values())

    def multiply(values: Tensor, scales: Tensor, w: tuple[Tensor, Tensor]) -> Tensor:
        return torch._scaled_mm(values, w[0].t(), scales, w[1][None], out_dtype=torch.bfloat16, use_fast_accum=True)

    for tokens in (1, 7, 300):
        x = torch.randn(tokens, hidden, device="cuda").to(dtype)
        out = torch.empty_like(x)
        fp8.shared_expert(x, packed, Call(LIMIT, "fp8", "dynamic"), intermediate, out)
        gate_up = multiply(*quantize_fp8_rows(x), rounded(*weights[:2]))
        h = torch.empty(tokens, intermediate, dtype=torch.float8_e4m3fn, device="cuda")
        h_scales = torch.empty(tokens, 1, device="cuda")
        fp8.swiglu_quantize(gate_up, LIMIT, h, h_scales)
        want = multiply(h, h_scales, rounded(weights[2])).to(dtype)
        if at_once == WHOLE:
            assert torch.equal(out, want), tokens
        else:
            assert (out - want).float().norm() <= BF16_BETWEEN * want.float().norm(), tokens
