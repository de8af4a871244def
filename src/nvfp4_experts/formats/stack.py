# SPDX-License-Identifier: Apache-2.0
"""One projection of E experts in NVFP4: tensors of one shape on top of each other, each with its own global scale.

    value[e, n, k] = e2m1(codes[e, n, k]) * block_scales[e, n, k // 16] * global_scale[e]

codes         (E, N, K/2)  uint8
block_scales  (E, N, K/16) float8_e4m3fn, linear order
global_scale  (E,)         fp32, decode direction
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import FormatError
from .nvfp4 import Nvfp4Tensor


class StackLike(Protocol):
    """What packing asks of a stack: each expert once, in ascending order. It need not hold them all at a time."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the values, (E, N, K)."""

    @property
    def device(self) -> torch.device:
        """Device of every expert."""

    def __len__(self) -> int: ...

    def __getitem__(self, expert: int) -> Nvfp4Tensor: ...


@dataclass(frozen=True, eq=False, repr=False)
class Nvfp4Stack:
    """E tensors in NVFP4; see the module docstring for the formula.

    Args:
        codes: (E, N, K/2) uint8, E >= 1.
        block_scales: (E, N, K/16) float8_e4m3fn, linear order.
        global_scale: (E,) fp32, decode direction.

    Raises:
        FormatError: a dtype, shape or device that is not the above. Values are not looked at.
    """

    codes: Tensor
    block_scales: Tensor
    global_scale: Tensor

    def __post_init__(self) -> None:
        shapes = tuple(self.codes.shape), tuple(self.block_scales.shape), tuple(self.global_scale.shape)
        experts = shapes[0][:1]
        if len(shapes[0]) != 3 or experts == (0,) or shapes[1][:1] != experts or shapes[2] != experts:
            rule = "must be (E, N, K/2), (E, N, K/16) and (E,), E >= 1"
            raise FormatError("codes, block_scales, global_scale", rule, shapes, "stack the experts' tensors")
        _ = self[0]  # the rest is what Nvfp4Tensor checks

    @classmethod
    def of(cls, tensors: Sequence[Nvfp4Tensor]) -> Nvfp4Stack:
        """Stack tensors of one shape, (N, K) each.

        Raises:
            FormatError: there is none, or they differ in shape.

        Cost: a copy.
        """
        shapes = {tuple(t.shape) for t in tensors}
        if len(shapes) != 1:
            raise FormatError("experts", "must have one shape", sorted(shapes) or "none", "give one tensor an expert")
        scale_bytes = torch.stack([t.block_scales.view(torch.uint8) for t in tensors])
        return cls(
            torch.stack([t.codes for t in tensors]),
            scale_bytes.view(torch.float8_e4m3fn),
            torch.stack([t.global_scale for t in tensors]),
        )

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, expert: int) -> Nvfp4Tensor:
        return Nvfp4Tensor(self.codes[expert], self.block_scales[expert], self.global_scale[expert])

    @property
    def shape(self) -> torch.Size:
        """Shape of the values, (E, N, K)."""
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    @property
    def device(self) -> torch.device:
        """Device of all three tensors."""
        return self.codes.device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(E, N, K) values; as `Nvfp4Tensor.dequantize`, expert by expert."""
        return torch.stack([self[expert].dequantize(dtype) for expert in range(len(self))])

    def to(self, device: torch.device | str) -> Nvfp4Stack:
        """The same stack on another device."""
        return Nvfp4Stack(self.codes.to(device), self.block_scales.to(device), self.global_scale.to(device))

    def __repr__(self) -> str:
        return f"Nvfp4Stack(shape={tuple(self.shape)}, device={str(self.device)!r})"
