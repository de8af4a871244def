# SPDX-License-Identifier: Apache-2.0
"""Weights as a checkpoint has them: what backends share that keep codes and scales in their plain form.

Gate rows, then up rows, in one tensor of codes and one of scale bytes; 0.5625 bytes per weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats.nvfp4 import Nvfp4Tensor


class PlainWeights:
    """`pack` and `unpack` of such a backend, whose calls keep no scratch."""

    def pack(self, gate: Nvfp4Tensor, up: Nvfp4Tensor, down: Nvfp4Tensor) -> dict[str, Tensor]:
        return {
            "gate_up_codes": torch.cat((gate.codes, up.codes)),
            "gate_up_block_scales": torch.cat((gate.block_scales.view(torch.uint8), up.block_scales.view(torch.uint8))),
            "gate_up_global_scales": torch.stack((gate.global_scale, up.global_scale)),
            "down_codes": down.codes.contiguous(),
            "down_block_scales": down.block_scales.view(torch.uint8).contiguous(),
            "down_global_scale": down.global_scale.reshape(1),
        }

    def unpack(self, weights: Mapping[Any, Tensor], hidden: int, intermediate: int) -> tuple[Nvfp4Tensor, ...]:
        codes, scale_bytes, global_scales, down_codes, down_scale_bytes, down_global_scale = weights.values()
        block_scales, down_block_scales = (b.view(torch.float8_e4m3fn) for b in (scale_bytes, down_scale_bytes))
        return (
            Nvfp4Tensor(codes[:intermediate], block_scales[:intermediate], global_scales[0]),
            Nvfp4Tensor(codes[intermediate:], block_scales[intermediate:], global_scales[1]),
            Nvfp4Tensor(down_codes, down_block_scales, down_global_scale[0]),
        )

    def scratch_bytes(self, device: torch.device) -> int:
        return 0  # calls take their temporaries from torch's allocator and give them back
