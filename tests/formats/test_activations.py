# SPDX-License-Identifier: Apache-2.0
"""The activation quantisers against the scalar oracle, bit for bit, and every special value in every mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nvfp4_experts.errors import FormatError
from nvfp4_experts.formats.activations import (
    Nvfp4Activation,
    activation_global_scales,
    quantize_activation,
    quantize_fp8_rows,
)
from nvfp4_experts.formats.codes import AMAX_FLOOR, unpack_codes
from nvfp4_experts.formats.nvfp4 import quantize
from tests.formats import scalar_oracle as oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = {"static": 1 / 2688, "dynamic": None, "per_token": None}
every_mode = pytest.mark.parametrize(("mode", "scale"), MODES.items())


def tokens() -> Tensor:
    """Rows over ten orders of magnitude, with zero blocks, a zero row, a -0 row and ties."""
    x = torch.randn(24, 96) * torch.logspace(-6, 4, 24)[:, None]
    x[3, 16:48], x[5], x[7] = 0.0, 0.0, -0.0
    x[9] = torch.tensor(
        [6.0, 0.25, -0.75, 1.25, -1.75, 2.5, -3.5, 5.0, -0.0, 0.0, -0.1, 0.1, 1.0, 2.0, 3.0, 4.0]
    ).repeat(6)
    return x


def same_bytes(a: Nvfp4Activation, b: Nvfp4Activation) -> bool:
    return all(
        torch.equal(p.reshape(-1).view(torch.uint8), q.reshape(-1).view(torch.uint8)) for p, q in zip(a, b, strict=True)
    )


def oracle_scales(x: np.ndarray, mode: str, scale: float | None) -> tuple[np.ndarray, np.ndarray]:
    if scale is not None:
        s = np.float32(scale)
        return np.float32(1) / s, s
    amax = np.abs(x).max(axis=-1, keepdims=True) if mode == "per_token" else np.abs(x).max()
    with np.errstate(divide="ignore"):
        g = np.where(amax < AMAX_FLOOR, np.float32(1), np.float32(2688) / amax)
    return g, np.float32(1) / g


@every_mode
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_equal_the_scalar_oracle(mode: str, scale: float | None, dtype: torch.dtype) -> None:
    x = tokens().to(dtype)
    g, s = oracle_scales(x.float().numpy(), mode, scale)
    codes, scales = oracle.kernel_recipe(x.float().numpy(), g, s)
    q = quantize_activation(x, mode, scale)
    assert torch.equal(q.global_scale, torch.from_numpy(np.asarray(s)))
    assert torch.equal(q.block_scales.view(torch.uint8), torch.from_numpy(scales))
    assert torch.equal(q.codes, torch.from_numpy(codes))


@pytest.mark.parametrize("exponent", range(-90, 111, 20))
def test_static_scales_of_every_magnitude_equal_the_scalar_oracle(exponent: int) -> None:
    x = torch.randn(8, 64) * 2.0**exponent
    for s in (x.abs().max() / 2688, x.abs().max() / 26880, x.abs().max() / 3):
        codes, scales = oracle.kernel_recipe(x.numpy(), np.float32(1) / s.numpy(), s.numpy())
        q = quantize_activation(x, "static", s)
        assert torch.equal(q.block_scales.view(torch.uint8), torch.from_numpy(scales))
        assert torch.equal(q.codes, torch.from_numpy(codes))


def test_dynamic_is_the_kernel_recipe_of_weights() -> None:
    x = tokens()
    w, q = quantize(x, "kernel"), quantize_activation(x, "dynamic")
    assert same_bytes(q, Nvfp4Activation(w.codes, w.block_scales, w.global_scale))


def test_per_token_rows_stand_alone() -> None:
    x = tokens()
    whole = quantize_activation(x, "per_token")
    assert whole.global_scale.shape == (24, 1)
    for t in range(24):
        assert same_bytes(quantize_activation(x[t], "per_token"), Nvfp4Activation(*(part[t] for part in whole)))


@every_mode
def test_shapes_and_strides(mode: str, scale: float | None) -> None:
    x = tokens()
    flat, cube = quantize_activation(x, mode, scale), quantize_activation(x.view(2, 12, 96), mode, scale)
    assert cube.codes.shape == (2, 12, 48) and cube.block_scales.shape == (2, 12, 6)
    assert cube.global_scale.shape == ((2, 12, 1) if mode == "per_token" else ())
    assert same_bytes(flat, cube)
    assert same_bytes(quantize_activation(x.T.contiguous().T, mode, scale), flat)
    empty = quantize_activation(x[:0], mode, scale)
    assert empty.codes.shape == (0, 48) and empty.dequantize().shape == (0, 96)


@every_mode
def test_leaves_its_input(mode: str, scale: float | None) -> None:
    x = tokens()
    before = x.clone()
    quantize_activation(x, mode, scale)
    quantize_fp8_rows(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000, 0x7F800001, -1])
def test_nan_spoils_its_block_under_a_static_scale(bits: int) -> None:
    x = torch.ones(2, 48)
    x.view(torch.int32)[1, 20] = bits  # NaN, of either sign
    q = quantize_activation(x, "static", 1 / 2688)
    assert q.block_scales.view(torch.uint8).tolist()[1] == [0x7E, 0x7F, 0x7E]
    assert q.codes[1, 8:16].tolist() == [0x77] * 8
    assert q.dequantize()[1].isnan().tolist() == [False] * 16 + [True] * 16 + [False] * 16
    assert not q.dequantize()[0].isnan().any()


def test_infinity_saturates_under_a_static_scale() -> None:
    x = torch.ones(1, 32)
    x[0, 0], x[0, 1] = torch.inf, -torch.inf
    q = quantize_activation(x, "static", 0.5)
    assert q.block_scales[0].tolist() == [448.0, 0.34375]
    assert unpack_codes(q.codes)[0, :3].tolist() == [7, 15, 0]
    assert q.dequantize().isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_computed_amax_that_is_not_finite_gives_nan(bad: float) -> None:
    x = torch.ones(3, 32)
    x[1, 4] = bad
    per_token = quantize_activation(x, "per_token")
    assert per_token.dequantize().isnan().all(-1).tolist() == [False, True, False]
    assert per_token.global_scale.isnan().flatten().tolist() == [False, True, False]
    assert torch.equal(per_token.dequantize()[0], quantize_activation(x[0], "per_token").dequantize())
    dynamic = quantize_activation(x, "dynamic")
    assert dynamic.dequantize().isnan().all() and dynamic.global_scale.isnan()
    assert (dynamic.block_scales.view(torch.uint8) == 0x7F).all()


@pytest.mark.parametrize("mode", ["dynamic", "per_token"])
@pytest.mark.parametrize("value", [0.0, 2.0**-149, 2.0**-101, -(2.0**-120)])
def test_amax_below_the_floor_counts_as_zero(mode: str, value: float) -> None:
    q = quantize_activation(torch.full((2, 32), value), mode)
    assert (q.global_scale == 1).all()
    assert not q.block_scales.view(torch.uint8).any()
    assert (q.codes == (0x88 if value < 0 else 0)).all()
    at_floor = quantize_activation(torch.full((2, 32), AMAX_FLOOR), mode)
    assert (at_floor.dequantize() / AMAX_FLOOR - 1).abs().max() < 1e-6


@pytest.mark.parametrize("s", [0.0, -1.0, torch.nan, torch.inf, 1e-36, 2e35])
def test_a_static_scale_out_of_range_gives_nan(s: float) -> None:
    q = quantize_activation(torch.ones(1, 16), "static", s)
    assert q.global_scale.isnan() and q.dequantize().isnan().all()


def test_static_scale_as_number_or_tensor() -> None:
    x = tokens()
    assert same_bytes(quantize_activation(x, "static", 0.25), quantize_activation(x, "static", torch.tensor(0.25)))
    g, s = activation_global_scales(x, "static", 0.25)
    assert (g.item(), s.item()) == (4.0, 0.25)


def test_dequantize_is_one_rounding() -> None:
    q = quantize_activation(tokens(), "per_token")
    table = torch.tensor([oracle.e2m1(c) for c in range(16)], dtype=torch.float64)
    products = table[unpack_codes(q.codes).long()] * q.block_scales.double().repeat_interleave(16, -1)
    assert torch.equal(q.dequantize(), (products * q.global_scale.double()).float())
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16


@every_mode
def test_compiles_without_graph_breaks(mode: str, scale: float | None) -> None:
    """One graph: an operation that reads a value back to the host would break it."""
    x, static = tokens(), None if scale is None else torch.tensor(scale)
    compiled = torch.compile(lambda x, s: tuple(quantize_activation(x, mode, s)), fullgraph=True, backend="aot_eager")
    assert same_bytes(Nvfp4Activation(*compiled(x, static)), quantize_activation(x, mode, static))
    rows = torch.compile(quantize_fp8_rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(rows(x)[0].view(torch.uint8), quantize_fp8_rows(x)[0].view(torch.uint8))


@pytest.mark.parametrize(
    ("x", "mode", "scale", "message"),
    [
        (torch.ones(2, 24), "dynamic", None, "x: K must be a positive multiple of 16, got (2, 24)"),
        (torch.ones(2, 0), "dynamic", None, "x: K must be a positive multiple of 16, got (2, 0)"),
        (torch.ones(()), "dynamic", None, "x: K must be a positive multiple of 16, got ()"),
        (torch.ones(2, 32).int(), "dynamic", None, "x: must have a floating dtype, got torch.int32"),
        (torch.ones(2, 32), "block", None, 'mode: must be "static", "dynamic" or "per_token", got \'block\''),
        (torch.ones(2, 32), "static", None, 'scale: is given with mode "static" and only then'),
        (torch.ones(2, 32), "dynamic", 1.0, 'scale: is given with mode "static" and only then'),
        (torch.ones(2, 32), "static", torch.ones(1), "scale: must have shape (), got (1,)"),
    ],
)
def test_refuses(x: Tensor, mode: str, scale: float | Tensor | None, message: str) -> None:
    with pytest.raises(FormatError) as error:
        quantize_activation(x, mode, scale)
    assert message in str(error.value)


class TestFp8Rows:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_bytes_equal_the_definition(self, dtype: torch.dtype) -> None:
        x = tokens().to(dtype)
        values, scale = quantize_fp8_rows(x)
        rows = x.float().numpy()
        amax = np.maximum(np.abs(rows).max(axis=-1, keepdims=True), np.float32(2.0**-100))
        assert torch.equal(scale, torch.from_numpy(amax / np.float32(448)))
        quotients = np.abs(rows * (np.float32(448) / amax)).astype(np.float64)
        expected = oracle.nearest(quotients, oracle.E4M3) | (np.signbit(rows) * 0x80)
        assert torch.equal(values.view(torch.uint8), torch.from_numpy(expected.astype(np.uint8)))

    def test_error_on_normals(self) -> None:
        x = torch.randn(64, 1024)
        values, scale = quantize_fp8_rows(x)
        assert scale.shape == (64, 1)
        assert ((values.float() * scale - x).norm() / x.norm()) < 0.03

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_a_bad_row_decodes_to_nan_and_only_that(self, bad: float) -> None:
        x = torch.ones(3, 7)
        x[1, 2] = bad
        values, scale = quantize_fp8_rows(x)
        assert (values.float() * scale).isnan().all(-1).tolist() == [False, True, False]
        assert (values.float() * scale).isnan().any(-1).tolist() == [False, True, False]

    def test_zero_rows_and_no_rows(self) -> None:
        values, scale = quantize_fp8_rows(torch.zeros(2, 8))
        assert not values.view(torch.uint8).any()
        assert (scale > 0).all() and scale.isfinite().all()
        assert quantize_fp8_rows(torch.zeros(0, 8))[1].shape == (0, 1)

    def test_refuses_integers(self) -> None:
        with pytest.raises(FormatError, match="x: must have a floating dtype"):
            quantize_fp8_rows(torch.ones(2, 8).int())
