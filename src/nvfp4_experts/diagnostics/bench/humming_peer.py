# SPDX-License-Identifier: Apache-2.0
"""humming-kernels as a candidate: NVFP4 weights as ModelOpt stores them, bf16 activations, dense or grouped GEMMs.

    HummingLayer(N, K, {"quant_method": "modelopt", "quant_algo": "nvfp4"}[, num_experts=E])
        weight ([E,] N, K/2) uint8, weight_scale ([E,] N, K/16) e4m3, weight_scale_2 (1 or E,) fp32   the bytes we have
    .load_from_tensors(...); .transform(); layer(x)                                     kernels compiled on first use
    layer(rows, expert_layout=offsets (E + 1,), compute_config={"gemm_type": "grouped_contiguous"})   rows by expert

Gate and up are one layer of 2I rows, which works because they share a global scale here. Written against 0.1.19 (its
grouped GEMM from its sources, and not yet run); what goes wrong in it is reported as its reason, like any peer's.

Source: https://github.com/vllm-project/humming
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...formats.nvfp4 import Nvfp4Tensor
from ...formats.stack import Nvfp4Stack
from ...kernels.target import Target
from .candidates import BF16_PEER_BOUND, Prepared, fused, swiglu
from .machine import installed_version
from .moe import Experts, MoeWeights, Step
from .moe_candidates import Grouped, GroupedGemm
from .work import Weights

_PACKAGE = "humming-kernels"
_GROUPED = {"gemm_type": "grouped_contiguous"}


@dataclass(frozen=True)
class _Peer:
    name = _PACKAGE
    ours = False
    reference = ("bf16", "dynamic")
    bound = BF16_PEER_BOUND

    def refusal(self, target: Target) -> str | None:
        if installed_version(_PACKAGE) is None:
            return "not installed"
        return None if target.device_type == "cuda" else "needs a CUDA device"


@dataclass(frozen=True)
class Humming(_Peer):
    """Two `humming.layer.HummingLayer`s with SwiGLU in between."""

    def prepare(self, weights: Weights, max_tokens: int) -> Prepared:
        layers = _layers(weights)
        return _prepared(_expert(*layers), layers)


@dataclass(frozen=True)
class HummingMoe(_Peer):
    """The routed experts by its grouped GEMM, sorted and added as torch's peer does; the shared one as above."""

    def prepare(self, weights: MoeWeights, max_tokens: int) -> Prepared:
        layers = [_layers(experts) for experts in weights.layers]
        beside = [_layers(w) for w in (weights.shared.one_by_one() if weights.shared else ())]
        routed = Grouped(len(weights.layers[0].gate), weights.layers[0].gate.device)
        shared = [_expert(*pair) for pair in beside]

        def run(x: Tensor, step: Step) -> Tensor:
            y = routed(x, step, *(_grouped(layer) for layer in layers[step.layer]))
            if shared:
                y += shared[step.place](x)
            return y.bfloat16()

        return _prepared(run, [layer for pair in (*layers, *beside) for layer in pair])


def _grouped(layer: Any) -> GroupedGemm:
    return lambda rows, offsets: layer(rows, expert_layout=offsets, compute_config=_GROUPED)


def _layers(weights: Weights | Experts) -> tuple[Any, Any]:
    """Those of gate and up, and of down."""
    return _layer(weights.gate, weights.up), _layer(weights.down)


def _expert(gate_up: Any, down: Any) -> Callable[[Tensor], Tensor]:
    activate = fused(swiglu, "cuda")

    def run(x: Tensor) -> Tensor:
        y: Tensor = down(activate(gate_up(x)))
        return y

    return run


def _prepared(run: Callable[..., Tensor], layers: Sequence[Any]) -> Prepared:
    tensors = tuple(t for layer in layers for t in layer.state_dict().values())
    nbytes = sum(p.nbytes for layer in layers for p in layer.parameters())
    return Prepared(run, tensors, nbytes, installed_version(_PACKAGE) or "")


def _layer(*weights: Nvfp4Tensor | Nvfp4Stack) -> Any:
    """One HummingLayer of the rows of all `weights`, which share a global scale; of stacks, one with experts."""
    *experts, _, columns = weights[0].shape
    options = {"num_experts": experts[0]} if experts else {}
    with torch.cuda.device(weights[0].device):
        layer = (
            importlib.import_module("humming.layer")
            .HummingLayer(
                shape_n=sum(w.shape[-2] for w in weights),
                shape_k=columns,
                weight_config={"quant_method": "modelopt", "quant_algo": "nvfp4"},
                torch_dtype=torch.bfloat16,
                **options,
            )
            .to(weights[0].device)
        )
        layer.load_from_tensors(
            {
                "weight": torch.cat([w.codes for w in weights], dim=-2),
                "weight_scale": torch.cat([w.block_scales.view(torch.uint8) for w in weights], dim=-2).view(
                    torch.float8_e4m3fn
                ),
                "weight_scale_2": weights[0].global_scale.reshape(-1),
            }
        )
        layer.transform()
    return layer
