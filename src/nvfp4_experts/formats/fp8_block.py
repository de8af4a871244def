# SPDX-License-Identifier: Apache-2.0
"""Block-scaled FP8 as DeepSeek checkpoints store it: e4m3 values with one scale per rectangle.

    value[n, k] = values[n, k] * scales[n // b0, k // b1]

values  (N, K) float8_e4m3fn
scales  (ceil(N / b0), ceil(K / b1)) fp32, or uint8 e8m0 bytes
block   (b0, b1), e.g. (128, 128) or (32, 32); the last row and column of blocks may be ragged
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError
from .codes import decode_e4m3, decode_e8m0


@dataclass(frozen=True, eq=False, repr=False)
class Fp8BlockTensor:
    """A matrix in block-scaled FP8; see the module docstring for the formula.

    Args:
        values: (N, K) float8_e4m3fn.
        scales: (ceil(N / b0), ceil(K / b1)), fp32 or uint8 e8m0 bytes (float8_e8m0fnu: `.view(torch.uint8)`).
        block: (b0, b1), both positive.

    Raises:
        FormatError: a dtype, shape or device that is not the above.
    """

    values: Tensor
    scales: Tensor
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float8_e4m3fn:
            raise FormatError(
                "values", "must be float8_e4m3fn", self.values.dtype, "view the bytes as torch.float8_e4m3fn"
            )
        if self.scales.dtype not in (torch.float32, torch.uint8):
            raise FormatError(
                "scales", "must be float32, or uint8 e8m0 bytes", self.scales.dtype,
                "cast bf16 scales with .float(); view float8_e8m0fnu as torch.uint8",
            )  # fmt: skip
        if len(self.block) != 2 or min(self.block) < 1:
            raise FormatError("block", "must be two positive integers", self.block, "pass e.g. (128, 128)")
        if self.values.ndim != 2:
            raise FormatError(
                "values", "must be a matrix (N, K)", tuple(self.values.shape), "decode one matrix at a time"
            )
        expected = tuple(-(-size // b) for size, b in zip(self.values.shape, self.block, strict=True))
        if tuple(self.scales.shape) != expected:
            raise FormatError(
                "scales", f"expected {expected} for values {tuple(self.values.shape)} in blocks {self.block}",
                tuple(self.scales.shape), "check weight_block_size in the checkpoint's config",
            )  # fmt: skip
        if self.values.device != self.scales.device:
            raise FormatError(
                "scales", f"must be on the device of the values, {self.values.device}", self.scales.device, "move them"
            )

    @property
    def shape(self) -> torch.Size:
        """Shape (N, K)."""
        return self.values.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K) values: one fp32 product each (exact for e8m0 scales inside fp32's range), then one cast to `dtype`.

        Numerics: NaN values (0x7F, 0xFF) and NaN scales (e8m0 0xFF) give NaN.
        Cost: the result, and an fp32 temporary of a block row (b0 x K), since it goes one row of blocks at a time.
        """
        return self.dequantize_rows(0, self.shape[0], dtype)

    def dequantize_rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [start, stop) of `dequantize`, wherever blocks begin.

        Numerics: bf16 holds e4m3 times a power of two exactly, down to bf16's smallest.
        """
        height, width = self.block
        first, last = start // height, -(-stop // height)
        scales = self.scales[first:last]
        scales = decode_e8m0(scales) if scales.dtype == torch.uint8 else scales
        out = torch.empty(stop - start, self.shape[1], dtype=dtype, device=self.values.device)
        for i, row_scales in enumerate(scales, first):
            low, high = max(start, i * height), min(stop, (i + 1) * height)
            by_column = row_scales.repeat_interleave(width)[: self.shape[1]]
            out[low - start : high - start] = decode_e4m3(self.values[low:high]).mul_(by_column)
        return out

    def to(self, device: torch.device | str) -> Fp8BlockTensor:
        """The same tensor on another device."""
        return Fp8BlockTensor(self.values.to(device), self.scales.to(device), self.block)

    def __repr__(self) -> str:
        return f"Fp8BlockTensor(shape={tuple(self.shape)}, block={self.block}, device={str(self.values.device)!r})"
