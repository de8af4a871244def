# SPDX-License-Identifier: Apache-2.0
"""NVFP4 as a container and its two verbs, `quantize` and `dequantize`.

    value[..., k] = e2m1(codes[..., k]) * block_scales[..., k // 16] * global_scale

codes         (..., K/2)  uint8, two codes a byte, even k in the low nibble
block_scales  (..., K/16) float8_e4m3fn, linear order
global_scale  ()          fp32, decode direction (multiply)

0.5625 bytes per value. The product of code and block scale is exact in bf16 and in fp32 (see `decode_blocks`); the
product with the global scale rounds once. How scales are chosen is a recipe: see `recipes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..errors import FormatError
from .codes import AMAX_FLOOR, BLOCK_SIZE, decode_blocks, encode_e2m1, pack_codes
from .recipes import RECIPES, find_recipe, global_scales_from_amax

__all__ = [
    "RECIPES",
    "Nvfp4Tensor",
    "decode_blocks",
    "global_scale_from_amax",
    "joint_amax",
    "quantize",
    "reciprocal_scale",
]

# On a CPU a tile stays just under the 2^15 values from which torch splits one operation over threads: the tile's
# passes then stay in the cache, and no thread waits at a barrier for one that the machine has taken away.
_CPU_TILE_BLOCKS, _DEVICE_TILE_BLOCKS = (1 << 11) - 1, 1 << 18
_SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False, repr=False)
class Nvfp4Tensor:
    """A tensor in NVFP4; see the module docstring for the formula.

    Args:
        codes: (..., K/2) uint8.
        block_scales: (..., K/16) float8_e4m3fn, linear order.
        global_scale: () fp32, decode direction.

    Raises:
        FormatError: a dtype, shape or device that is not the above. Values are not looked at (that would
            synchronise a device): NaN scales decode to NaN.

    Numerics: equality is identity; compare the three tensors to compare bytes.
    """

    codes: Tensor
    block_scales: Tensor
    global_scale: Tensor

    def __post_init__(self) -> None:
        _check_codes(self.codes)
        _check_block_scales(self.block_scales, self.codes)
        _check_global_scale(self.global_scale)
        devices = {str(t.device) for t in (self.codes, self.block_scales, self.global_scale)}
        if len(devices) > 1:
            raise FormatError(
                "codes, block_scales, global_scale", "must be on one device", sorted(devices), "use .to(device)"
            )

    @property
    def shape(self) -> torch.Size:
        """Shape of the values, (..., K)."""
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    @property
    def device(self) -> torch.device:
        """Device of all three tensors."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, block scales and global scale."""
        return self.codes.nbytes + self.block_scales.nbytes + self.global_scale.nbytes

    @property
    def bits_per_value(self) -> float:
        """Bits per value, scales included: 4.5 and a little; 0 for a tensor without values."""
        return 8 * self.nbytes / self.shape.numel() if self.shape.numel() else 0.0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., K) values: code times block scale, exact in fp32, times the global scale, then one cast to `dtype`.

        Cost: while it runs, 4 bytes a value for fp32 and 2 for the index; decode a large tensor in slices of rows.
        """
        values = decode_blocks(self.codes, self.block_scales, torch.float32)
        return values.mul_(self.global_scale).to(dtype)

    def to(self, device: torch.device | str) -> Nvfp4Tensor:
        """The same tensor on another device."""
        return Nvfp4Tensor(self.codes.to(device), self.block_scales.to(device), self.global_scale.to(device))

    def __reduce__(self) -> tuple[object, ...]:
        # torch cannot read float8 storages back from a plain pickle, so the scales travel as bytes.
        return _from_bytes, (self.codes, self.block_scales.view(torch.uint8), self.global_scale)

    def __repr__(self) -> str:
        return (
            f"Nvfp4Tensor(shape={tuple(self.shape)}, device={str(self.device)!r}, "
            f"bits_per_value={self.bits_per_value:.3f})"
        )


def _from_bytes(codes: Tensor, scale_bytes: Tensor, global_scale: Tensor) -> Nvfp4Tensor:
    return Nvfp4Tensor(codes, scale_bytes.view(torch.float8_e4m3fn), global_scale)


def global_scale_from_amax(amax: Tensor | float, recipe: str = "modelopt") -> Tensor:
    """The decode-direction global scale a recipe gives to a tensor of that amax.

    Args:
        amax: largest magnitude, a float or a tensor of any shape (one scale each).
        recipe: one of RECIPES; "modelopt" and "torchao": amax / 2688; the others: 1 / (2688 / amax), see `recipes`.

    Returns:
        fp32, shape of amax.

    Numerics: amax below AMAX_FLOOR counts as zero and gives 1; NaN or infinity gives NaN.
    Cost: no sync.
    """
    return global_scales_from_amax(torch.as_tensor(amax, dtype=torch.float32), find_recipe(recipe))[1]


def reciprocal_scale(s: Tensor | float) -> Tensor:
    """The encode-direction scale g = fl(1 / s), for checkpoints that store the global scale as a reciprocal.

    Args:
        s: decode direction, fp32 (or a float rounded to it), any shape, normal and with a normal reciprocal.

    Returns:
        fp32, shape of s.

    Numerics: if any fp32 g has fl(1 / g) == s, this one has (seen on all 2^23 significands), so scales that were made
        as reciprocals survive the round trip. 17 % of all s have no such g and come back one step off.
    """
    return torch.as_tensor(s, dtype=torch.float32).reciprocal()


def quantize(w: Tensor, recipe: str = "modelopt", amax: Tensor | float | None = None) -> Nvfp4Tensor:
    """Quantise a tensor to NVFP4, in blocks of 16 along the last dimension.

    Args:
        w: (..., K) bf16, fp16 or fp32, finite, K a multiple of 16; any strides, rows may be zero in number.
        recipe: one of RECIPES: which package's bytes to produce; see `recipes` for the formulas.
        amax: largest magnitude the global scale must reach, () tensor or float; default: that of w. Pass the amax of
            a whole tensor to quantise it in slices (the result is the slice of the whole), or the joint amax of
            tensors that are to share one scale. A smaller amax than that of w saturates: block scales stop at 448.

    Returns:
        Nvfp4Tensor on the device of w.

    Raises:
        FormatError: NaN or infinity in w (with their number and the first place), K not a multiple of 16, another
            dtype, no values (the meta device), an unknown recipe, an amax that is negative, not finite, or zero
            although w is not.

    Numerics: bit for bit the oracle package of the recipe. A tensor whose amax is below AMAX_FLOOR (2^-100) counts as
        zero: global scale 1, codes 0, and the scale byte that the recipe gives to a zero block. -0 keeps its sign
        (code 8) under "torchao" and "kernel" and loses it under the other two. Subnormal values are values like any.
    Cost: two reads of w, the second in tiles on one core: extra memory is the result and under 4 MiB (and one copy of
        a w that is not contiguous); syncs to see that w is finite.
    """
    rule = find_recipe(recipe)
    _check_source(w)
    own = _finite_amax(w)
    amax = own if amax is None else _check_amax(amax, own)
    one = torch.ones((), dtype=torch.float32, device=w.device)
    code_shape = (*w.shape[:-1], w.shape[-1] // 2)
    scale_shape = (*w.shape[:-1], w.shape[-1] // BLOCK_SIZE)
    if amax < AMAX_FLOOR:
        byte = rule.block_scales(torch.zeros_like(one), one, one).view(torch.uint8)
        block_scales = byte.expand(scale_shape).contiguous().view(torch.float8_e4m3fn)
        return Nvfp4Tensor(torch.zeros(code_shape, dtype=torch.uint8, device=w.device), block_scales, one)

    g, s = global_scales_from_amax(torch.tensor(amax, dtype=torch.float32, device=w.device), rule)
    blocks = w.detach().contiguous().view(-1, BLOCK_SIZE)
    codes = torch.empty(len(blocks), BLOCK_SIZE // 2, dtype=torch.uint8, device=w.device)
    block_scales = torch.empty(len(blocks), dtype=torch.float8_e4m3fn, device=w.device)
    step = _CPU_TILE_BLOCKS if w.device.type == "cpu" else _DEVICE_TILE_BLOCKS
    for start in range(0, len(blocks), step):
        tile = slice(start, start + step)
        values = blocks[tile].float()
        block_scales[tile] = rule.block_scales(values.abs().amax(-1), g, s)
        codes[tile] = pack_codes(encode_e2m1(rule.quotients(values, block_scales[tile].float(), g, s)))
    return Nvfp4Tensor(codes.view(code_shape), block_scales.view(scale_shape), s)


def joint_amax(*weights: Tensor) -> float:
    """The largest magnitude among weights that are to share one global scale; raises what `quantize` raises of each."""
    for w in weights:
        _check_source(w)
    return max(_finite_amax(w) for w in weights)


def _finite_amax(w: Tensor) -> float:
    """amax of w without a temporary; FormatError if w holds NaN or infinity."""
    if w.numel() == 0:
        return 0.0
    low, high = (float(x) for x in torch.aminmax(w.detach()))
    amax = max(abs(low), abs(high))
    if amax < float("inf"):  # NaN propagates through aminmax and fails this comparison
        return amax
    bad = ~w.isfinite()
    first = tuple(int(i) for i in bad.nonzero()[0])
    raise FormatError(
        "w", "must be finite", f"{int(bad.sum())} NaN or infinite of {w.numel()} values, the first at {first}",
        "repair the source tensor, or clamp it if saturation is what you want",
    )  # fmt: skip


def _check_amax(amax: Tensor | float, own: float) -> float:
    """The amax asked for, as fp32 in a Python float."""
    given = torch.as_tensor(amax, dtype=torch.float32)
    if given.numel() != 1:
        raise FormatError("amax", "must be one number", f"shape {tuple(given.shape)}", "pass amax.max()")
    value = float(given)
    if not 0.0 <= value < float("inf"):
        raise FormatError("amax", "must be finite and not negative", value, "pass the largest magnitude, w.abs().max()")
    if value < AMAX_FLOOR <= own:
        raise FormatError(
            "amax", f"must be at least 2**-100 for a w whose own amax is {own:g}", value, "leave it out to use that"
        )
    return value


def _check_source(w: Tensor) -> None:
    if w.dtype not in _SOURCE_DTYPES:
        raise FormatError(
            "w", "must be bfloat16, float16 or float32", w.dtype, "decode it or cast it with .float() first"
        )
    if w.is_meta:
        raise FormatError("w", "must hold values", "a tensor on the meta device", "load the weights first")
    if w.ndim == 0 or w.shape[-1] == 0 or w.shape[-1] % BLOCK_SIZE:
        raise FormatError("w", "K must be a positive multiple of 16", tuple(w.shape), "pad K with zeros, in x as well")


def _check_codes(codes: Tensor) -> None:
    if codes.dtype != torch.uint8:
        raise FormatError("codes", "must be uint8", codes.dtype, "view packed nibbles as torch.uint8")
    if codes.ndim == 0 or codes.shape[-1] == 0 or codes.shape[-1] % (BLOCK_SIZE // 2):
        raise FormatError(
            "codes", "the last dimension must be a positive multiple of 8 bytes, which is one block of 16",
            tuple(codes.shape), "pack two codes a byte along K, and pad K to a multiple of 16",
        )  # fmt: skip


def _check_block_scales(block_scales: Tensor, codes: Tensor) -> None:
    if block_scales.dtype != torch.float8_e4m3fn:
        raise FormatError(
            "block_scales", "must be float8_e4m3fn", block_scales.dtype, "view the bytes as torch.float8_e4m3fn"
        )
    expected = (*codes.shape[:-1], codes.shape[-1] // (BLOCK_SIZE // 2))
    if tuple(block_scales.shape) == expected:
        return
    padded = prod(-(-rows // 128) * 128 for rows in expected[-2:-1]) * (-(-expected[-1] // 4) * 4)
    swizzled = len(expected) > 1 and block_scales.numel() == prod(expected[:-2]) * padded
    raise FormatError(
        "block_scales", f"expected {expected} for codes {tuple(codes.shape)}", tuple(block_scales.shape),
        "these look swizzled: pass them through unswizzle_scales first" if swizzled
        else "pass one scale per 16 values along K, in linear order",
    )  # fmt: skip


def _check_global_scale(global_scale: Tensor) -> None:
    if global_scale.dtype != torch.float32:
        raise FormatError("global_scale", "must be float32", global_scale.dtype, "cast it with .float()")
    if global_scale.ndim != 0:
        raise FormatError(
            "global_scale", "must have shape ()", tuple(global_scale.shape),
            "use .reshape(()) for one element; a tensor has one global scale, so split what has several",
        )  # fmt: skip
