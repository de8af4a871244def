# SPDX-License-Identifier: Apache-2.0
"""The four NVFP4 quantisation recipes: one format, four sets of bytes.

With s the decode-direction global scale, g the encode-direction one, a the amax of a block of 16 and e4m3() rounding
to nearest even with saturation at 448 (2688 = 6 * 448; every operation is one fp32 operation):

    recipe             g, s                        block scale b                       quotient to round
    modelopt           s = amax / 2688             e4m3(max(a / (6 s), 2^-9)), 0 -> 1  x / (b s)
    torchao            s = amax / 2688             e4m3(max((a / 6) / s, 2^-6))        x * ((1 / s) / b)
    compressed-tensors g = (1 / amax) * 2688       e4m3((a / 6) * g), 0 -> 0.125       x / (b / g)
    kernel             g = 2688 / amax, s = 1 / g  e4m3(g * (a * fl(1/6)))             x * (1 / (b s)), 0 if b = 0

    recipe             scale byte of a zero block  -0
    modelopt           0x38 (1.0)                  code 0
    torchao            0x08 (2^-6)                 code 8
    compressed-tensors 0x20 (0.125)                code 0
    kernel             0x00 (0)                    code 8

The first three equal NVIDIA ModelOpt, torchao and compressed-tensors bit for bit on CPU. "kernel" is the rule of the
GPU kernels in vLLM, FlashInfer and TensorRT-LLM in IEEE arithmetic, and also how this library quantises activations.
The recipes differ in ties and in zero blocks; the error of reconstruction is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError
from .codes import AMAX_FLOOR, E2M1_MAX, E4M3_MAX, encode_e4m3

NVFP4_MAX = E2M1_MAX * E4M3_MAX
"""2688, the largest magnitude of a code times a block scale."""


@dataclass(frozen=True)
class Recipe:
    """One way to choose scales and quotients; all tensors are fp32 and nothing synchronises.

    global_scales(amax) -> (g, s), both shaped like amax, for a finite amax >= AMAX_FLOOR;
    block_scales(block_amax, g, s) -> float8_e4m3fn of the shape of block_amax;
    quotients(blocks (..., 16), block_scales (...) as fp32, g, s) -> what is rounded to e2m1.
    """

    name: str
    global_scales: Callable[[Tensor], tuple[Tensor, Tensor]]
    block_scales: Callable[[Tensor, Tensor, Tensor], Tensor]
    quotients: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _divide(numerator: float, x: Tensor) -> Tensor:
    """numerator / x with one rounding; `numerator / x` itself is reciprocal-then-multiply in torch."""
    return torch.full_like(x, numerator) / x


def _decode_first(amax: Tensor) -> tuple[Tensor, Tensor]:
    s = amax / torch.full_like(amax, NVFP4_MAX)
    return s.reciprocal(), s


def _modelopt_block_scales(block_amax: Tensor, g: Tensor, s: Tensor) -> Tensor:
    scale = block_amax / (E2M1_MAX * s)
    return encode_e4m3(torch.where(scale == 0, 1.0, scale).clamp(min=2.0**-9))


def _modelopt_quotients(blocks: Tensor, block_scales: Tensor, g: Tensor, s: Tensor) -> Tensor:
    # Adding zero turns -0 into +0: this rule takes the sign from `quotient < 0`.
    return (blocks / (block_scales * s).unsqueeze(-1)).add_(0.0)


def _torchao_block_scales(block_amax: Tensor, g: Tensor, s: Tensor) -> Tensor:
    return encode_e4m3((block_amax / E2M1_MAX / s).clamp(min=2.0**-6))


def _torchao_quotients(blocks: Tensor, block_scales: Tensor, g: Tensor, s: Tensor) -> Tensor:
    return blocks * (g / block_scales).unsqueeze(-1)


def _compressed_tensors_global_scales(amax: Tensor) -> tuple[Tensor, Tensor]:
    g = amax.reciprocal() * NVFP4_MAX  # two roundings, as that package's `2688 / amax` has in torch
    return g, g.reciprocal()


def _compressed_tensors_block_scales(block_amax: Tensor, g: Tensor, s: Tensor) -> Tensor:
    scale = encode_e4m3(g * (block_amax / E2M1_MAX)).float()
    return encode_e4m3(torch.where(scale == 0, 0.125, scale))


def _compressed_tensors_quotients(blocks: Tensor, block_scales: Tensor, g: Tensor, s: Tensor) -> Tensor:
    return (blocks / (block_scales / g).unsqueeze(-1)).add_(0.0)  # sign from `quotient < 0`, as above


def _kernel_global_scales(amax: Tensor) -> tuple[Tensor, Tensor]:
    g = _divide(NVFP4_MAX, amax)
    return g, g.reciprocal()


def _kernel_block_scales(block_amax: Tensor, g: Tensor, s: Tensor) -> Tensor:
    return encode_e4m3(g * (block_amax * (1.0 / E2M1_MAX)))


def _kernel_quotients(blocks: Tensor, block_scales: Tensor, g: Tensor, s: Tensor) -> Tensor:
    inverse = torch.where(block_scales == 0, 0.0, (block_scales * s).reciprocal())
    return blocks * inverse.unsqueeze(-1)


_TABLE = {
    recipe.name: recipe
    for recipe in (
        Recipe("modelopt", _decode_first, _modelopt_block_scales, _modelopt_quotients),
        Recipe("torchao", _decode_first, _torchao_block_scales, _torchao_quotients),
        Recipe(
            "compressed-tensors",
            _compressed_tensors_global_scales,
            _compressed_tensors_block_scales,
            _compressed_tensors_quotients,
        ),
        Recipe("kernel", _kernel_global_scales, _kernel_block_scales, _kernel_quotients),
    )
}
RECIPES = tuple(_TABLE)


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; FormatError lists the names there are."""
    if name not in _TABLE:
        raise FormatError("recipe", f"must be one of {', '.join(RECIPES)}", repr(name), "pick one of them")
    return _TABLE[name]


def global_scales_from_amax(amax: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Encode- and decode-direction global scales (g, s) of each amax, without sync.

    An amax below AMAX_FLOOR counts as zero and gives g = s = 1; NaN or infinity gives NaN for both.
    """
    g, s = recipe.global_scales(amax)
    counts_as_zero, finite = amax < AMAX_FLOOR, amax.isfinite()
    g, s = (torch.where(counts_as_zero, 1.0, torch.where(finite, x, torch.nan)) for x in (g, s))
    return g, s
