# SPDX-License-Identifier: Apache-2.0
"""`Nvfp4Tensor`, `quantize` and `dequantize`: what they refuse, what they keep, and every special value."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_experts.errors import FormatError
from nvfp4_experts.formats.codes import AMAX_FLOOR, unpack_codes
from nvfp4_experts.formats.nvfp4 import RECIPES, Nvfp4Tensor, global_scale_from_amax, quantize, reciprocal_scale
from nvfp4_experts.layouts.scales import swizzle_scales

ZERO_BLOCK = {"modelopt": 0x38, "torchao": 0x08, "compressed-tensors": 0x20, "kernel": 0x00}
KEEPS_NEGATIVE_ZERO = {"modelopt": False, "torchao": True, "compressed-tensors": False, "kernel": True}
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def parts(rows: int = 8, columns: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    scales = torch.randint(1, 0x7F, (rows, columns // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return codes, scales, torch.tensor(0.01)


def assert_same(a: Nvfp4Tensor, b: Nvfp4Tensor) -> None:
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.block_scales.view(torch.uint8), b.block_scales.view(torch.uint8))
    assert a.global_scale.item() == b.global_scale.item()


class TestContainer:
    def test_describes_itself(self) -> None:
        t = Nvfp4Tensor(*parts(8, 64))
        assert t.shape == (8, 64)
        assert t.nbytes == 8 * 32 + 8 * 4 + 4
        assert t.bits_per_value == 8 * t.nbytes / 512
        assert t.device == torch.device("cpu")
        assert t.to("cpu").shape == t.shape

    def test_repr_holds_metadata_only(self) -> None:
        assert repr(Nvfp4Tensor(*parts(8, 64))) == "Nvfp4Tensor(shape=(8, 64), device='cpu', bits_per_value=4.562)"
        meta = Nvfp4Tensor(*(p.to("meta") for p in parts()))
        assert "meta" in repr(meta)  # nothing to read there: a repr that looks at values fails

    def test_is_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            Nvfp4Tensor(*parts()).codes = torch.zeros(1)  # type: ignore[misc]

    def test_pickle_and_deepcopy(self) -> None:
        t = Nvfp4Tensor(*parts())
        assert_same(pickle.loads(pickle.dumps(t)), t)
        duplicate = copy.deepcopy(t)
        assert_same(duplicate, t)
        assert duplicate.codes.data_ptr() != t.codes.data_ptr()

    def test_takes_any_strides(self) -> None:
        codes, scales, s = parts(8, 64)
        strided = Nvfp4Tensor(codes.T.contiguous().T, scales.T.contiguous().T, s)
        assert torch.equal(strided.dequantize(), Nvfp4Tensor(codes, scales, s).dequantize())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c, b, g: (c.view(torch.int8), b, g), "codes: must be uint8, got torch.int8"),
            (lambda c, b, g: (c[:, :7], b, g), "codes: the last dimension must be a positive multiple of 8 bytes"),
            (lambda c, b, g: (c[:, :0], b[:, :0], g), "codes: the last dimension must be a positive multiple of 8"),
            (lambda c, b, g: (c[0, 0], b, g), "codes: the last dimension must be a positive multiple of 8"),
            (lambda c, b, g: (c, b.float(), g), "block_scales: must be float8_e4m3fn, got torch.float32"),
            (lambda c, b, g: (c, b.view(torch.uint8), g), "block_scales: must be float8_e4m3fn, got torch.uint8"),
            (lambda c, b, g: (c, b[:, :2], g), "block_scales: expected (8, 4) for codes (8, 32), got (8, 2)"),
            (lambda c, b, g: (c, b[:4], g), "block_scales: expected (8, 4) for codes (8, 32), got (4, 4)"),
            (lambda c, b, g: (c, b, g.double()), "global_scale: must be float32, got torch.float64"),
            (lambda c, b, g: (c, b, g.view(1)), "global_scale: must have shape (), got (1,); use .reshape(())"),
            (lambda c, b, g: (c, b, g.expand(2)), "global_scale: must have shape (), got (2,)"),
            (lambda c, b, g: (c, b.to("meta"), g), "must be on one device, got ['cpu', 'meta']"),
        ],
    )
    def test_refuses(self, change, message: str) -> None:
        with pytest.raises(FormatError) as error:
            Nvfp4Tensor(*change(*parts(8, 64)))
        assert message in str(error.value)

    @pytest.mark.parametrize("shape", [(8, 64), (200, 80), (2, 8, 64)])
    def test_recognises_swizzled_scales(self, shape: tuple[int, ...]) -> None:
        codes = torch.zeros(*shape[:-1], shape[-1] // 2, dtype=torch.uint8)
        linear = torch.ones(*shape[:-1], shape[-1] // 16).to(torch.float8_e4m3fn)
        for swizzled in (swizzle_scales(linear), swizzle_scales(linear).flatten()):
            with pytest.raises(FormatError, match=r"these look swizzled: pass them through unswizzle_scales first"):
                Nvfp4Tensor(codes, swizzled, torch.tensor(1.0))
        with pytest.raises(FormatError, match="in linear order"):
            Nvfp4Tensor(codes, linear[..., :1], torch.tensor(1.0))


class TestDequantize:
    def test_is_one_exact_product_then_one_rounding(self) -> None:
        codes, scales, s = parts(16, 128)
        t = Nvfp4Tensor(codes, scales, s)
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
        products = table[unpack_codes(codes).long()] * scales.double().repeat_interleave(16, -1)
        expected = (products * s.double()).float()  # exact in float64: 6 + 24 bits
        assert torch.equal(t.dequantize(), expected)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            assert torch.equal(t.dequantize(dtype), expected.to(dtype))

    def test_nan_scale_spoils_its_block_only(self) -> None:
        codes, scales, s = parts(2, 64)
        scales.view(torch.uint8)[1, 2] = 0x7F
        values = Nvfp4Tensor(codes, scales, s).dequantize()
        assert values[1, 32:48].isnan().all()
        assert int(values.isnan().sum()) == 16

    def test_does_not_write_into_the_tensor_or_the_table(self) -> None:
        t = Nvfp4Tensor(*parts())
        assert torch.equal(t.dequantize(), t.dequantize())

    @every_recipe
    def test_error_of_a_round_trip(self, recipe: str) -> None:
        w = torch.randn(512, 512)
        error = (quantize(w, recipe).dequantize() - w).norm() / w.norm()
        assert 0.090 < error < 0.100  # 0.095 on normals under every recipe


class TestQuantizeInput:
    @every_recipe
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_strides_leading_dimensions_and_tiles_do_not_matter(self, recipe: str, dtype: torch.dtype) -> None:
        w = torch.randn(3, 700, 160).to(dtype)  # more blocks than one tile, the last tile ragged
        whole = quantize(w, recipe)
        flat = quantize(w.view(-1, 160), recipe)
        assert whole.codes.shape == (3, 700, 80) and whole.block_scales.shape == (3, 700, 10)
        assert torch.equal(whole.codes.flatten(0, 1), flat.codes)
        assert_same(quantize(w.transpose(0, 1).contiguous().transpose(0, 1), recipe), whole)
        assert_same(quantize(w.flatten(), recipe), quantize(w.view(1, -1)[0], recipe))
        padded = torch.nn.functional.pad(w, (3, 5))
        assert_same(quantize(padded[..., 3:-5], recipe), whole)

    @every_recipe
    def test_never_writes_into_its_input(self, recipe: str) -> None:
        w = torch.randn(64, 64)
        before = w.clone()
        t = quantize(w, recipe)
        t.codes.fill_(0), t.block_scales.view(torch.uint8).fill_(0), t.global_scale.fill_(0)
        assert torch.equal(w, before)

    @every_recipe
    def test_takes_a_parameter(self, recipe: str) -> None:
        w = torch.nn.Parameter(torch.randn(8, 32))
        t = quantize(w, recipe)
        assert_same(t, quantize(w.detach(), recipe))
        assert not t.global_scale.requires_grad

    @every_recipe
    @given(start=st.integers(0, 40), length=st.integers(0, 40))
    def test_rows_under_the_whole_amax_equal_the_slice_of_the_whole(self, recipe: str, start: int, length: int) -> None:
        w = torch.randn(40, 48).bfloat16() * torch.logspace(-5, 1, 40)[:, None]
        whole, rows = quantize(w, recipe), slice(start, start + length)
        for amax in (w.abs().max(), float(w.abs().max())):
            part = quantize(w[rows], recipe, amax=amax)
            assert torch.equal(part.codes, whole.codes[rows])
            assert torch.equal(part.block_scales.view(torch.uint8), whole.block_scales[rows].view(torch.uint8))
            assert part.global_scale == whole.global_scale

    @every_recipe
    def test_zero_rows(self, recipe: str) -> None:
        t = quantize(torch.empty(0, 32), recipe)
        assert t.shape == (0, 32) and t.block_scales.shape == (0, 2)
        assert t.global_scale == 1
        assert t.dequantize().shape == (0, 32)
        assert t.bits_per_value == 0

    @every_recipe
    def test_a_smaller_amax_saturates(self, recipe: str) -> None:
        w = torch.full((1, 32), 10.0)
        w[0, :16] = -1.0
        t = quantize(w, recipe, amax=1.0)
        assert t.block_scales[0].tolist() == [448, 448]
        assert t.dequantize()[0, 16:].tolist() == pytest.approx([1.0] * 16)
        assert t.dequantize()[0, :16].tolist() == pytest.approx([-1.0] * 16)


class TestQuantizeSpecialValues:
    @every_recipe
    @pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-149, -(2.0**-101)])
    def test_a_tensor_below_the_floor_counts_as_zero(self, recipe: str, value: float) -> None:
        t = quantize(torch.full((2, 32), value), recipe)
        assert t.global_scale == 1
        assert not t.codes.any()
        assert t.block_scales.view(torch.uint8).tolist() == [[ZERO_BLOCK[recipe]] * 2] * 2
        assert torch.equal(t.dequantize(), torch.zeros(2, 32))

    @every_recipe
    def test_the_floor_itself_is_a_value(self, recipe: str) -> None:
        w = torch.linspace(-1, 1, 32).view(1, 32) * AMAX_FLOOR
        t, scaled = quantize(w, recipe), quantize(w * 2.0**100, recipe)
        assert t.global_scale != 1
        assert torch.equal(t.codes, scaled.codes)
        assert torch.equal(t.dequantize() * 2.0**100, scaled.dequantize())

    @every_recipe
    def test_zero_blocks_and_negative_zero_beside_values(self, recipe: str) -> None:
        w = torch.ones(1, 64)
        w[0, 16:32], w[0, 32:48], w[0, 50] = 0.0, -0.0, -0.0
        t = quantize(w, recipe)
        codes, minus_zero = unpack_codes(t.codes)[0], 8 if KEEPS_NEGATIVE_ZERO[recipe] else 0
        assert codes[16:32].tolist() == [0] * 16
        assert codes[32:48].tolist() == [minus_zero] * 16
        assert codes[50] == minus_zero
        assert t.block_scales.view(torch.uint8)[0, 1:3].tolist() == [ZERO_BLOCK[recipe]] * 2

    @every_recipe
    def test_subnormal_values_in_a_tensor_of_ordinary_ones_round_to_zero(self, recipe: str) -> None:
        w = torch.full((1, 32), 2.0**-140)
        w[0, :16] = 3.0
        values = quantize(w, recipe).dequantize()
        assert values[0, :16].tolist() == pytest.approx([3.0] * 16)
        assert not values[0, 16:].any()

    @every_recipe
    def test_the_largest_values_of_each_dtype(self, recipe: str) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            w = torch.tensor([1.0, -1.0, 0.5, 0.25]).repeat(8).to(dtype).view(1, 32) * torch.finfo(dtype).max
            t = quantize(w, recipe)
            assert t.global_scale.isfinite()
            assert t.block_scales[0].tolist() == [448, 448]
            assert unpack_codes(t.codes)[0, :4].tolist() == [7, 15, 5, 3]

    @every_recipe
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("amax", [None, 1.0])
    def test_refuses_values_that_are_not_finite(self, recipe: str, bad: float, amax: float | None) -> None:
        w = torch.randn(4, 32).bfloat16()
        w[2, 5] = w[3, 1] = bad
        with pytest.raises(FormatError, match=r"w: must be finite, got 2 .* of 128 values, the first at \(2, 5\)"):
            quantize(w, recipe, amax=amax)

    @pytest.mark.parametrize("columns", [8, 15, 17, 24, 0])
    def test_refuses_k_that_is_not_a_multiple_of_16(self, columns: int) -> None:
        with pytest.raises(FormatError, match=rf"w: K must be a positive multiple of 16, got \(2, {columns}\)"):
            quantize(torch.ones(2, columns))

    def test_refuses_a_scalar(self) -> None:
        with pytest.raises(FormatError, match="w: K must be a positive multiple of 16"):
            quantize(torch.tensor(1.0))

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn])
    def test_refuses_other_dtypes(self, dtype: torch.dtype) -> None:
        with pytest.raises(FormatError, match=f"w: must be bfloat16, float16 or float32, got {dtype}"):
            quantize(torch.zeros(2, 32).to(dtype))

    @pytest.mark.parametrize("amax", [-1.0, torch.nan, torch.inf])
    def test_refuses_an_amax_that_is_no_magnitude(self, amax: float) -> None:
        with pytest.raises(FormatError, match="amax: must be finite and not negative"):
            quantize(torch.ones(2, 32), amax=amax)

    def test_refuses_an_amax_that_would_make_everything_zero(self) -> None:
        with pytest.raises(FormatError, match=r"amax: must be at least 2\*\*-100 for a w whose own amax is 1"):
            quantize(torch.ones(2, 32), amax=0.0)
        assert quantize(torch.zeros(2, 32), amax=0.0).global_scale == 1

    def test_refuses_several_amax(self) -> None:
        with pytest.raises(FormatError, match=r"amax: must be one number, got shape \(2,\)"):
            quantize(torch.ones(2, 32), amax=torch.ones(2))


class TestGlobalScale:
    @every_recipe
    def test_is_that_of_quantize(self, recipe: str) -> None:
        for amax in (1.0, 3.14159, 1e-20, 65504.0):
            w = torch.zeros(1, 16)
            w[0, 3] = amax
            assert global_scale_from_amax(amax, recipe) == quantize(w, recipe).global_scale

    @every_recipe
    def test_many_at_once_and_special_values(self, recipe: str) -> None:
        amax = torch.tensor([0.0, AMAX_FLOOR / 2, AMAX_FLOOR, 2688.0, torch.inf, torch.nan])
        scales = global_scale_from_amax(amax, recipe)
        assert scales[:2].tolist() == [1, 1]
        assert scales[2:4].tolist() == pytest.approx([AMAX_FLOOR / 2688, 1])
        assert scales[4:].isnan().all()

    def test_reciprocal_scale_inverts_every_reciprocal(self) -> None:
        """All 2^23 significands: where s is the reciprocal of some fp32 number, the round trip gives s back."""
        g = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).view(torch.float32)
        s = g.reciprocal()
        assert torch.equal(reciprocal_scale(s).reciprocal(), s)

    def test_reciprocal_scale_is_the_best_there_is(self) -> None:
        """No neighbour of fl(1 / s) decodes to s where it does not, and it is never more than one step off."""
        s = torch.arange(0x3F800000, 0x40000000, 7, dtype=torch.int32).view(torch.float32)
        g = reciprocal_scale(s)
        missed = g.reciprocal() != s
        for direction in (0.0, torch.inf):
            neighbour = g.nextafter(torch.tensor(direction))
            assert not (missed & (neighbour.reciprocal() == s)).any()
        assert int((g.reciprocal().view(torch.int32) - s.view(torch.int32)).abs().max()) == 1
