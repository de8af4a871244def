# SPDX-License-Identifier: Apache-2.0
"""The kernels for Blackwell with their FP4 instruction replaced: every case, on whatever runs Triton here.

Not collected by itself: `test_sm100_interpreted.py` runs this file under Triton's interpreter, on the CPU, and
`test_gpu_sm100.py` takes its tests over and adds larger ones, on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from nvfp4_experts.formats.activations import quantize_activation  # noqa: E402
from nvfp4_experts.formats.codes import decode_blocks, encode_e2m1, encode_e4m3  # noqa: E402
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor, quantize  # noqa: E402
from nvfp4_experts.kernels import reference  # noqa: E402
from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES  # noqa: E402
from nvfp4_experts.kernels.sm100 import numbers, pipeline  # noqa: E402
from nvfp4_experts.kernels.sm100.config import CHIPS, DECODING_CHIP, Chip  # noqa: E402
from nvfp4_experts.kernels.sm100.gemm import gemm  # noqa: E402
from nvfp4_experts.layers.shared_expert import Nvfp4SharedExpert  # noqa: E402
from nvfp4_experts.layouts.scales import swizzle_scales, swizzled_shape  # noqa: E402
from nvfp4_experts.layouts.weights import interleave_gate_up  # noqa: E402
from tests.tolerances import AGAINST_REFERENCE, against_reference  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    from triton.runtime import interpreter

    # Triton 3.6 reads the bounds of a loop as int(array of one element), which numpy 2.4 refuses; 3.9 squeezes it.
    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor: type, scope: object) -> None:
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = _patch_tensor_and_index

INPUT_SCALE, HIDDEN_SCALE = 5 / 2688, 8 / 2688
LIMIT = 10.0


def decoding(chip: Chip) -> Chip:
    """A chip's own cuts, with the FP4 instruction replaced and one stage (config.py says why)."""
    return dataclasses.replace(
        chip, native=False, table=tuple(dataclasses.replace(config, stages=1) for config in chip.table)
    )


# Every cut there is: tokens on either side of the dot, 128 and 256 columns at a step.
CHIP_CASES = {"decoding": DECODING_CHIP, "sm_100a": decoding(CHIPS[10, 0]), "sm_120a": decoding(CHIPS[12, 0])}


@functools.cache
def weights_of(hidden: int, intermediate: int, groups: int = 1) -> list[tuple[Nvfp4Tensor, ...]]:
    """gate, up, down of each expert; all global scales differ."""
    g = torch.Generator().manual_seed(hidden + intermediate)
    experts = []
    for group in range(groups):
        gate = torch.randn(intermediate, hidden, generator=g) * (1 + group) * hidden**-0.5
        up = torch.randn(intermediate, hidden, generator=g) * 2 * hidden**-0.5
        down = torch.randn(hidden, intermediate, generator=g) * (2 + group) * intermediate**-0.5
        experts.append((quantize(gate), quantize(up), quantize(down)))
    return experts


def packed(experts: Sequence[tuple[Nvfp4Tensor, ...]]) -> pipeline.Experts:
    def swizzled(scales: Tensor) -> Tensor:
        return swizzle_scales(scales.view(torch.uint8))

    pairs = [interleave_gate_up(gate, up) for gate, up, _ in experts]
    parts = (
        torch.stack([codes for codes, _ in pairs]),
        torch.stack([swizzled(scales) for _, scales in pairs]),
        torch.stack([torch.stack((gate.global_scale, up.global_scale)) for gate, up, _ in experts]),
        torch.stack([down.codes for *_, down in experts]),
        torch.stack([swizzled(down.block_scales) for *_, down in experts]),
        torch.stack([down.global_scale for *_, down in experts]),
    )
    return pipeline.Experts(*(part.to(DEVICE) for part in parts))


def poisoned(plan: pipeline.Plan) -> dict[str, Tensor]:
    """Scratch in the worst state: NaN, and bytes and counters that mean something."""
    fill = {torch.uint8: 0x7F, torch.int32: 3, torch.float32: float("nan")}
    layout = plan.scratch.items()
    return {name: torch.full(shape, fill[dtype], dtype=dtype, device=DEVICE) for name, (shape, dtype) in layout}


def run_layer(
    x: Tensor,
    experts: Sequence[tuple[Nvfp4Tensor, ...]],
    mode: str,
    chip: Chip = DECODING_CHIP,
    multiprocessors: int = 4,
    limit: float = LIMIT,
    input_scale: Tensor | None = None,
    hidden_scale: Tensor | None = None,
    made: dict[str, Tensor] | None = None,
    launch: pipeline.Launch = pipeline.launch_now,
) -> Tensor:
    """y on the CPU, of x's dtype; scratch is left in `made` where that is given, empty."""
    hidden, intermediate = experts[0][0].shape[1], experts[0][0].shape[0]
    plan = pipeline.Plan(chip, mode, hidden, intermediate, 1, len(x), multiprocessors)
    scratch = poisoned(plan)
    y = torch.full((len(x), hidden), float("nan"), dtype=x.dtype, device=DEVICE)
    scales: list[Tensor | None] = [None, None]
    if mode == "static":
        scales = [
            torch.tensor(default, device=DEVICE) if given is None else given.to(DEVICE)
            for given, default in ((input_scale, INPUT_SCALE), (hidden_scale, HIDDEN_SCALE))
        ]
    activations = pipeline.Activations(*scales, limit)
    pipeline.run(x.to(DEVICE), packed(experts), activations, plan, scratch, y, launch)
    if made is not None:
        made.update({name: part.cpu() for name, part in scratch.items()})
    return y.cpu()


def expected(
    x: Tensor, expert: tuple[Nvfp4Tensor, ...], mode: str, limit: float = LIMIT,
    input_scale: float = INPUT_SCALE, hidden_scale: float = HIDDEN_SCALE,
) -> Tensor:  # fmt: skip
    options = {"swiglu_limit": 0.0 if limit == torch.inf else limit, "activations": "nvfp4", "activation_scale": mode}
    scales = {"input_scale": torch.tensor(input_scale), "hidden_scale": torch.tensor(hidden_scale)}
    return reference.shared_expert(x.float(), *expert, **options, **scales)


def bound(values: int, rounded: bool = False) -> float:
    """Interpreted, sums are numpy's fp32 in any order; on a GPU, the tensor core's."""
    if INTERPRETED:
        return AGAINST_REFERENCE["shared_expert", "nvfp4"]
    return against_reference("nvfp4", "sm100-decode", values, rounded)


def rel_l2(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


# --- number formats ---------------------------------------------------------------------------------------------------


@triton.jit
def encode_kernel(x, e4m3, e2m1, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    values = tl.load(x + place)
    tl.store(e4m3 + place, numbers.encode_e4m3(values))
    tl.store(e2m1 + place, numbers.encode_e2m1(values).to(tl.uint8))


@triton.jit
def decode_kernel(codes, scales, values, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    tile = tl.load(codes + row[:, None] * 8 + tl.arange(0, 8)[None, :])
    decoded = numbers.decode_blocks(tile, tl.load(scales + row[:, None] + tl.arange(0, 1)[None, :]))
    tl.store(values + row[:, None] * 16 + tl.arange(0, 16)[None, :], decoded)


def encoded(values: Tensor) -> tuple[Tensor, Tensor]:
    size = 1 << (len(values) - 1).bit_length()
    x = torch.nn.functional.pad(values, (0, size - len(values))).to(DEVICE)
    e4m3, e2m1 = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    encode_kernel[(1,)](x, e4m3, e2m1, size)
    return e4m3.cpu()[: len(values)], e2m1.cpu()[: len(values)]


def around(points: Tensor) -> Tensor:
    """Each point and the fp32 values on either side of it."""
    up, down = torch.full_like(points, torch.inf), torch.full_like(points, -torch.inf)
    return torch.cat((points, points.nextafter(up), points.nextafter(down)))


def test_scales_round_as_e4m3_does_at_every_value_and_tie() -> None:
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (table[1:] + table[:-1]) / 2
    odd = torch.tensor([448.0, 449, 464, 465, 1e30, torch.inf, torch.nan, 2.0**-149, 2.0**-10, 2.0**-11])
    values = torch.cat((around(table[1:]), around(ties), odd, torch.zeros(1)))
    assert torch.equal(encoded(values)[0], encode_e4m3(values).view(torch.uint8))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: overflow of exp, inf - inf
def test_codes_round_as_e2m1_does_at_every_value_and_tie() -> None:
    grid = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 100, 2.0**-149])
    values = torch.cat((around(grid), -around(grid), torch.tensor([0.0, -0.0, torch.inf, -torch.inf])))
    nan = torch.tensor([0x7FC00000, -0x400000, 0x7F800001], dtype=torch.int32).view(torch.float32)  # either sign
    values = torch.cat((values, nan))
    assert torch.equal(encoded(values)[1], encode_e2m1(values))


def test_every_code_under_every_scale_decodes_exactly() -> None:
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    values = torch.empty(256, 16, dtype=torch.float16, device=DEVICE)
    decode_kernel[(1,)](codes.to(DEVICE), scales.to(DEVICE), values, 256)
    want = decode_blocks(codes, scales.view(torch.float8_e4m3fn), torch.float16)
    got = values.cpu()
    assert torch.equal(got.isnan(), want.isnan())
    same = got.view(torch.int16) == want.view(torch.int16)  # -0 too
    assert same[~want.isnan()].all()


# --- hidden states to NVFP4 -------------------------------------------------------------------------------------------


def awkward(tokens: int, columns: int) -> Tensor:
    """Rows of many sizes, and a block of zeros, of -0, of halves (ties), of tiny and of huge values."""
    x = torch.randn(tokens, columns) * torch.logspace(-3, 3, tokens)[:, None]
    for row, value in enumerate((0.0, -0.0, 0.5, 2.0**-140, 1e30)[:tokens]):
        x[row, :16] = value
    x[:, -1] = x[:, 0]
    return x


def check_entered(x: Tensor, mode: str, made: dict[str, Tensor], name: str, scale: float) -> None:
    want = quantize_activation(x, mode, torch.tensor(scale) if mode == "static" else None)
    assert torch.equal(made[f"{name}_codes"], want.codes)
    swizzled = swizzle_scales(want.block_scales.view(torch.uint8))
    assert torch.equal(made[f"{name}_scales"][: len(swizzled)], swizzled)


ENTERED = [(torch.float32, mode) for mode in ACTIVATION_SCALES]
ENTERED += [(torch.bfloat16, "per_token"), (torch.float16, "dynamic")]
AWKWARD = [(7, (144, 80)), (130, (80, 16))]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: overflow of exp, inf - inf
@pytest.mark.parametrize(("dtype", "mode"), ENTERED, ids=str)
def test_entered_bytes_are_those_of_the_activation_format(dtype: torch.dtype, mode: str) -> None:
    """Codes, block scales in their swizzled places, zero padding: byte for byte, from poisoned memory."""
    for tokens, (hidden, intermediate) in AWKWARD:
        made: dict[str, Tensor] = {}
        x = awkward(tokens, hidden).clamp(-6e4, 6e4).to(dtype)
        run_layer(x, weights_of(hidden, intermediate), mode, made=made)
        check_entered(x, mode, made, "x", INPUT_SCALE)
        assert made["x_scales"].shape == swizzled_shape(tokens, hidden // 16)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: overflow of exp, inf - inf
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
def test_nan_and_infinity_enter_as_the_format_says(mode: str, value: float) -> None:
    x = torch.randn(7, 144)
    x[2, 5], x[4, 100] = value, -value
    made: dict[str, Tensor] = {}
    y = run_layer(x, weights_of(144, 80), mode, made=made)
    check_entered(x, mode, made, "x", INPUT_SCALE)
    want = expected(x, weights_of(144, 80)[0], mode)
    assert torch.equal(y.isnan(), want.isnan())
    assert rel_l2(y.nan_to_num(), want.nan_to_num()) <= bound(7 * 80) or want.isnan().all()


@pytest.mark.parametrize("scale", [0.0, 1e-38, 3e38, torch.nan], ids=str)
def test_a_static_scale_out_of_range_gives_nan(scale: float) -> None:
    y = run_layer(torch.randn(3, 64), weights_of(64, 32), "static", input_scale=torch.tensor(scale))
    assert y.isnan().all()


# --- the layer --------------------------------------------------------------------------------------------------------


# A cut's K in one run and (many multiprocessors) in several; sizes that fill no tile.
LAYERS = {
    "decoding": [((144, 80), 1, 4), ((144, 80), 129, 4), ((400, 416), 20, 64)],
    "sm_100a": [((144, 80), 7, 4), ((144, 80), 129, 4)],
    "sm_120a": [((144, 80), 7, 4), ((400, 416), 40, 64)],
}


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
@pytest.mark.parametrize("chip", CHIP_CASES)
def test_layer_matches_reference(chip: str, mode: str) -> None:
    for (hidden, intermediate), tokens, multiprocessors in LAYERS[chip]:
        x = torch.randn(tokens, hidden)
        got = run_layer(x, weights_of(hidden, intermediate), mode, CHIP_CASES[chip], multiprocessors)
        want = expected(x, weights_of(hidden, intermediate)[0], mode)
        assert rel_l2(got, want) <= bound(tokens * intermediate), (hidden, intermediate, tokens)


def test_h_is_quantised_to_the_bytes_of_the_format() -> None:
    """In registers (static) and by the last tile of a block of rows (per_token): padding is zero, nothing is left."""
    x = torch.randn(129, 144)
    expert = weights_of(144, 80)
    for mode in ("static", "per_token"):
        made: dict[str, Tensor] = {}
        run_layer(x, expert, mode, made=made)
        values, scale = reference.enter(x, "nvfp4", mode, torch.tensor(INPUT_SCALE))
        gate, up = (reference.linear(values, scale, w, "nvfp4") for w in expert[0][:2])
        want = quantize_activation(
            reference.swiglu(gate, up, LIMIT), mode, torch.tensor(HIDDEN_SCALE) if mode == "static" else None
        )
        # The sum of a product may differ in its last bit, and a value then fall on the other side of a tie.
        assert (made["h_codes"] != want.codes).float().mean() < 0.01
        swizzled = swizzle_scales(want.block_scales.view(torch.uint8))
        assert (made["h_scales"] != swizzled).float().mean() < 0.01
        padding = swizzle_scales(torch.ones_like(want.block_scales.view(torch.uint8))) == 0
        assert not made["h_scales"][padding].any()


def test_the_smallest_layer() -> None:
    x = torch.randn(1, 16)
    got = run_layer(x, weights_of(16, 16), "per_token")
    assert rel_l2(got, expected(x, weights_of(16, 16)[0], "per_token")) <= bound(16)


def test_any_number_of_programs_gives_the_same_bits() -> None:
    """Runs of K are summed in their order, and h is quantised once, whoever comes last."""

    def few_programs(kernel: object, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
        grid = (3,) if kernel is gemm else grid
        pipeline.launch_now(kernel, grid, *arguments, **constants)

    x, weights = torch.randn(20, 400), weights_of(400, 416)
    plan = pipeline.Plan(DECODING_CHIP, "per_token", 400, 416, 1, 20, 64)
    assert plan.gate_up[1] == plan.down[1] == 2  # each in two runs
    whole = run_layer(x, weights, "per_token", multiprocessors=64)
    assert torch.equal(run_layer(x, weights, "per_token", multiprocessors=64, launch=few_programs), whole)


@pytest.mark.parametrize("limit", [0.5, torch.inf])
def test_the_clamp(limit: float) -> None:
    x = torch.randn(5, 144) * 3
    got = run_layer(x, weights_of(144, 80), "per_token", limit=limit)
    assert rel_l2(got, expected(x, weights_of(144, 80)[0], "per_token", limit)) <= bound(5 * 80)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_y_has_the_dtype_of_x(dtype: torch.dtype) -> None:
    x = torch.randn(5, 144).to(dtype)
    got = run_layer(x, weights_of(144, 80), "static")
    assert got.dtype == dtype
    want = expected(x, weights_of(144, 80)[0], "static")
    assert rel_l2(got, want) <= max(bound(5 * 80, rounded=True), 2.0**-8)


@pytest.mark.parametrize("mode", ["static", "per_token"])
def test_a_tokens_result_does_not_depend_on_the_batch(mode: str) -> None:
    x = torch.randn(16, 144)
    whole = run_layer(x, weights_of(144, 80), mode)
    order = [3, 15, 0, 7, 7]
    assert torch.equal(run_layer(x[order], weights_of(144, 80), mode), whole[order])


# --- through the front door -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
def test_the_backend_runs_a_module(mode: str) -> None:
    weights = weights_of(144, 80)[0]
    expert = Nvfp4SharedExpert(
        *(w.to(DEVICE) for w in weights),
        activations="nvfp4",
        activation_scale=mode,
        backend="sm100-decode",
        max_tokens=64,
        input_scale=INPUT_SCALE,
        hidden_scale=HIDDEN_SCALE,
    )
    x = torch.randn(2, 3, 144)
    y = expert(x.to(DEVICE)).cpu()
    assert rel_l2(y.view(6, 144), expected(x.view(6, 144), weights, mode)) <= bound(6 * 80)
    for before, after in zip(weights, (expert.gate, expert.up, expert.down), strict=True):
        assert torch.equal(before.codes, after.codes.cpu())
