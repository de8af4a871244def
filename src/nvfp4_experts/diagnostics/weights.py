# SPDX-License-Identifier: Apache-2.0
"""The weights a checkpoint can hold, seen alike: as fp32 values, and as named parts whose bytes can be compared.

floating tensor  {"weight": w}
Nvfp4Tensor      {"codes", "block_scales", "global_scale"}
Mxfp4Tensor      {"codes", "scales"}
Fp8BlockTensor   {"values", "scales"}
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import torch
from torch import Tensor

from ..formats.fp8_block import Fp8BlockTensor
from ..formats.mxfp4 import Mxfp4Tensor
from ..formats.nvfp4 import Nvfp4Tensor

Weight: TypeAlias = Tensor | Nvfp4Tensor | Mxfp4Tensor | Fp8BlockTensor


def values(weight: Weight) -> Tensor:
    """fp32 values (N, K) of a weight in any format, exact."""
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize(torch.float32)


def parts(weight: Weight) -> dict[str, Tensor]:
    """The tensors a weight is made of, by name."""
    if isinstance(weight, Tensor):
        return {"weight": weight}
    fields = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    return {name: part for name, part in fields.items() if isinstance(part, Tensor)}
