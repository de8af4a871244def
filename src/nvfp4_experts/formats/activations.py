# SPDX-License-Identifier: Apache-2.0
"""Quantisation of activations on their way into a GEMM: NVFP4 and row-scaled FP8, on device, without sync.

x (..., K) of any floating dtype goes in; codes, block scales and a global scale come out, by the "kernel" recipe:

    block_scale = e4m3(min(g * (block_amax * fl(1/6)), 448))
    inverse     = 0 if block_scale == 0 else 1 / (block_scale * s)
    code        = e2m1(x * inverse)

where g (encode direction) and s (decode direction) are the fp32 global scales: () for the modes "static" and
"dynamic", (..., 1) for "per_token". Every operation is one IEEE fp32 operation, so other kernels can match the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FormatError
from .codes import AMAX_FLOOR, BLOCK_SIZE, E4M3_MAX, decode_blocks, encode_e2m1, encode_e4m3, pack_codes
from .recipes import NVFP4_MAX, find_recipe, global_scales_from_amax

_KERNEL = find_recipe("kernel")


class Nvfp4Activation(NamedTuple):
    """Quantised activations: value = e2m1(codes) * block_scales * global_scale."""

    codes: Tensor
    """(..., K/2) uint8"""
    block_scales: Tensor
    """(..., K/16) float8_e4m3fn, linear order"""
    global_scale: Tensor
    """fp32, decode direction: () or, per token, (..., 1)"""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., K) values: the exact fp32 product of code and block scale, times global_scale, cast once."""
        return (decode_blocks(self.codes, self.block_scales, torch.float32) * self.global_scale).to(dtype)


def activation_global_scales(x: Tensor, mode: str, scale: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
    """Global scales (g, s) of one activation tensor, encode and decode direction, both fp32.

        static     s = scale               g = 1 / s                ()
        dynamic    g = 2688 / amax(x)      s = 1 / g                ()
        per_token  g = 2688 / amax(row)    s = 1 / g                (..., 1)

    Args:
        x: (..., K) floating; the maxima of its blocks do as well, and are fewer.
        mode: "static", "dynamic" or "per_token".
        scale: for "static" only: decode direction, amax / 2688, fp32 () or a float, positive and finite.

    Numerics: amax below AMAX_FLOOR gives g = s = 1; an amax that is NaN or infinite gives NaN. A static scale outside
        [AMAX_FLOOR / 2688, largest fp32 / 2688] gives NaN.
    Cost: one read of x ("static": none); no sync, if scale is a tensor on the device of x.
    """
    if (mode == "static") != (scale is not None):
        raise FormatError(
            "scale", 'is given with mode "static" and only then', f"mode {mode!r} with scale {scale is not None}",
            'calibrate and pass the scale, or use mode "dynamic" or "per_token"',
        )  # fmt: skip
    if mode == "static":
        s = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
        if s.ndim:
            raise FormatError("scale", "must have shape ()", tuple(s.shape), "use .reshape(()) for one element")
        return global_scales_from_static(s)
    if mode == "dynamic":
        amax = x.abs().amax() if x.numel() else x.new_zeros(())
    elif mode == "per_token":
        amax = x.abs().amax(-1, keepdim=True)
    else:
        raise FormatError("mode", 'must be "static", "dynamic" or "per_token"', repr(mode), "pick one of them")
    return global_scales_of(amax)


def global_scales_from_static(s: Tensor) -> tuple[Tensor, Tensor]:
    """Global scales (g, s) of each calibrated scale, fp32; NaN where `activation_global_scales` says."""
    largest = torch.finfo(torch.float32).max / NVFP4_MAX
    s = torch.where((s >= AMAX_FLOOR / NVFP4_MAX) & (s <= largest), s, torch.nan)
    return s.reciprocal(), s


def global_scales_of(amax: Tensor) -> tuple[Tensor, Tensor]:
    """Global scales (g, s) of activations with each such amax, any shape."""
    return global_scales_from_amax(amax.float(), _KERNEL)


def quantize_activation(x: Tensor, mode: str, scale: Tensor | float | None = None) -> Nvfp4Activation:
    """Quantise activations to NVFP4 by the formula of this module.

    Args:
        x: (..., K) floating, K a multiple of 16; any strides, any number of rows.
        mode, scale: as in `activation_global_scales`.

    Returns:
        Nvfp4Activation (codes, block_scales, global_scale).

    Raises:
        FormatError: K not a multiple of 16, a dtype that is not floating, an unknown mode, a scale missing or extra.

    Numerics: a NaN makes its block NaN (scale byte 0x7F, codes 7); with a computed amax it makes the row
        ("per_token") or the tensor ("dynamic") NaN, through the global scale as well. Infinity saturates under a
        static scale (scale 448, code 7 or 15) and counts as NaN under a computed amax. Zero blocks have scale byte 0;
        -0 keeps its sign (code 8).
    Cost: two reads of x, temporaries of four fp32 x; no sync and no branch on data, so CUDA graphs and torch.compile
        take it.
    Source: the activation quantisation kernels of vLLM, FlashInfer and TensorRT-LLM, with IEEE division.
    """
    _check_activation(x, BLOCK_SIZE)
    blocks, block_amax = _blocks_of(x)
    return _quantize(blocks, block_amax, *activation_global_scales(block_amax, mode, scale))


def quantize_under(x: Tensor, g: Tensor, s: Tensor) -> Nvfp4Activation:
    """As `quantize_activation`, under known global scales, () or (..., 1)."""
    _check_activation(x, BLOCK_SIZE)
    return _quantize(*_blocks_of(x), g, s)


def _blocks_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in fp32 as (..., K/16, 16), and each block's amax."""
    blocks = x.float().reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)
    return blocks, blocks.abs().amax(-1)


def _quantize(blocks: Tensor, block_amax: Tensor, g: Tensor, s: Tensor) -> Nvfp4Activation:
    block_scales = _KERNEL.block_scales(block_amax, g, s)
    nibbles = encode_e2m1(_KERNEL.quotients(blocks, block_scales.float(), g, s))
    return Nvfp4Activation(pack_codes(nibbles.flatten(-2)), block_scales, s)


def quantize_fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row to e4m3 with one fp32 scale.

        a = max(amax(row), 2^-100);   scale = a / 448;   value = e4m3(clamp(x * (448 / a), -448, 448))

    Args:
        x: (..., K) floating, any strides.

    Returns:
        values (..., K) float8_e4m3fn and scale (..., 1) fp32, decode direction: x ~ value * scale.

    Numerics: a row that holds NaN or infinity decodes to NaN in every value; -0 keeps its sign; a zero row gives
        zeros and a positive scale.
    Cost: two reads of x, fp32 temporaries of 2 x; no sync.
    """
    _check_activation(x, 1)
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True).clamp(min=AMAX_FLOOR)
    largest = torch.full_like(amax, E4M3_MAX)  # a tensor, so that both divisions are IEEE divisions on every device
    return encode_e4m3(x * (largest / amax)), amax / largest


def _check_activation(x: Tensor, multiple: int) -> None:
    if not x.is_floating_point():
        raise FormatError("x", "must have a floating dtype", x.dtype, "cast it first")
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % multiple:
        raise FormatError(
            "x", f"K must be a positive multiple of {multiple}", tuple(x.shape), "pad K with zeros in x and weights"
        )
