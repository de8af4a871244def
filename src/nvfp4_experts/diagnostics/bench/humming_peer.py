# SPDX-License-Identifier: Apache-2.0
"""humming-kernels as a candidate: NVFP4 weights as ModelOpt stores them, bf16 activations, two dense GEMMs.

    HummingLayer(N, K, {"quant_method": "modelopt", "quant_algo": "nvfp4"})
        weight (N, K/2) uint8, weight_scale (N, K/16) e4m3, weight_scale_2 (1,) fp32       the bytes we have
    .load_from_tensors(...); .transform(); layer(x)                                        kernels compiled on first use

Gate and up are one layer of 2I rows, which works because they share a global scale here. Written against 0.1.19; what
goes wrong in it is reported as its reason, like any peer's.

Source: https://github.com/vllm-project/humming
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...formats.nvfp4 import Nvfp4Tensor
from ...kernels.target import Target
from .candidates import BF16_PEER_BOUND, Prepared, fused, swiglu
from .machine import installed_version
from .work import Weights

_PACKAGE = "humming-kernels"


@dataclass(frozen=True)
class Humming:
    """Two `humming.layer.HummingLayer`s with SwiGLU in between."""

    name = _PACKAGE
    ours = False
    reference = ("bf16", "dynamic")
    bound = BF16_PEER_BOUND

    def refusal(self, target: Target) -> str | None:
        if installed_version(_PACKAGE) is None:
            return "not installed"
        return None if target.device_type == "cuda" else "needs a CUDA device"

    def prepare(self, weights: Weights, max_tokens: int) -> Prepared:
        gate_up, down = _layer(weights.gate, weights.up), _layer(weights.down)
        activate = fused(swiglu, "cuda")

        def run(x: Tensor) -> Tensor:
            y: Tensor = down(activate(gate_up(x)))
            return y

        tensors = tuple(t for layer in (gate_up, down) for t in layer.state_dict().values())
        nbytes = sum(p.nbytes for layer in (gate_up, down) for p in layer.parameters())
        return Prepared(run, tensors, nbytes, installed_version(_PACKAGE) or "")


def _layer(*weights: Nvfp4Tensor) -> Any:
    """One HummingLayer of the rows of all `weights`, which share a global scale."""
    columns = weights[0].shape[1]
    with torch.cuda.device(weights[0].device):
        layer = (
            importlib.import_module("humming.layer")
            .HummingLayer(
                shape_n=sum(w.shape[0] for w in weights),
                shape_k=columns,
                weight_config={"quant_method": "modelopt", "quant_algo": "nvfp4"},
                torch_dtype=torch.bfloat16,
            )
            .to(weights[0].device)
        )
        layer.load_from_tensors(
            {
                "weight": torch.cat([w.codes for w in weights]),
                "weight_scale": torch.cat([w.block_scales.view(torch.uint8) for w in weights]).view(
                    torch.float8_e4m3fn
                ),
                "weight_scale_2": weights[0].global_scale.reshape(1),
            }
        )
        layer.transform()
    return layer
