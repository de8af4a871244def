# SPDX-License-Identifier: Apache-2.0
"""The experts of each layer by themselves: what enters them, what they give, and what exact math gives.

y = shared(x) + sum over slots of weight * routed[index](x)         a layer's experts, (T, H)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nvfp4_experts import Nvfp4RoutedExperts, Nvfp4SharedExpert
from nvfp4_experts.diagnostics.metrics import rel_l2
from nvfp4_experts.integrations.transformers import experts_of

Three = tuple[Any, Any, Any]  # gate, up and down: tensors, or NVFP4
Layer = tuple[Three, Three]  # of routed experts (E first), and of the shared one


@dataclass
class Seen:
    """What entered a layer's experts: x (T, H) bf16, and the router's indices and weights (T, k)."""

    x: Tensor
    indices: Tensor
    weights: Tensor


@torch.inference_mode()
def record(model: nn.Module, tokens: Tensor) -> list[Seen]:
    """What enters the experts of each layer of a transformers model."""
    seen: list[Seen] = []
    blocks = [layer.mlp.experts for layer in model.model.layers]  # type: ignore[union-attr]
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(Seen(*args))) for block in blocks]
    model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def weights_of_layers(model: nn.Module) -> list[Layer]:
    """The experts' weights of each layer, floating or NVFP4, as they are."""
    found: list[Layer] = []
    for layer in model.model.layers:  # type: ignore[union-attr]
        routed, shared = layer.mlp.experts, layer.mlp.shared_experts
        if isinstance(routed, Nvfp4RoutedExperts):
            found.append(((routed.gate, routed.up, routed.down), (shared.gate, shared.up, shared.down)))
        else:
            gate, up = routed.gate_up_proj.detach().chunk(2, dim=1)
            own = tuple(getattr(shared, f"{name}_proj").weight.detach() for name in ("gate", "up", "down"))
            found.append(((gate, up, routed.down_proj.detach()), own))  # type: ignore[arg-type]
    return found


@torch.inference_mode()
def exact_outputs(seen: list[Seen], layers: list[Layer], limit: float) -> list[Tensor]:
    """What each layer's experts give in fp64, nothing rounded on the way."""
    found = []
    for enters, (routed, shared) in zip(seen, layers, strict=True):
        x, total = enters.x.double(), in_fp64(enters.x, shared, limit)
        for expert, three in enumerate(zip(*routed, strict=True)):
            token, slot = (enters.indices == expert).nonzero(as_tuple=True)
            rows = in_fp64(x[token], three, limit) * enters.weights[token, slot, None].double()
            total.index_add_(0, token, rows)
        found.append(total)
    return found


def in_fp64(x: Tensor, three: Sequence[Any], limit: float) -> Tensor:
    """One expert in exact math."""
    gate, up, down = (floating(w).double() for w in three)
    h = nn.functional.silu((x.double() @ gate.T).clamp(max=limit)) * (x.double() @ up.T).clamp(-limit, limit)
    return h @ down.T


def floating(w: Any) -> Tensor:
    return w if isinstance(w, Tensor) else w.dequantize()


@torch.inference_mode()
def outputs_of(model: nn.Module, seen: list[Seen]) -> list[Tensor]:
    """What each layer's NVFP4 experts give, fp32."""
    blocks = [layer.mlp for layer in model.model.layers]  # type: ignore[union-attr]
    return [
        block.experts(enters.x.float(), enters.indices, enters.weights) + block.shared_experts(enters.x.float())
        for block, enters in zip(blocks, seen, strict=True)
    ]


def weight_error(before: Layer, after: Layer) -> float:
    """Relative L2 error of a layer's weights, all experts together."""
    one, other = (torch.cat([floating(w).float().flatten() for t in layer for w in t]) for layer in (before, after))
    return rel_l2(other, one)


def damaged(model: nn.Module, layers: list[Layer], exchange: bool) -> None:
    """Give a model wrong experts: gate and up exchanged, or a gate scale 5 % too large; bf16 activations."""

    def wrong(gate: Any, up: Any, down: Any) -> Three:
        if exchange:
            return up, gate, down
        return type(gate)(gate.codes, gate.block_scales, gate.global_scale * 1.05), up, down

    for name, experts in experts_of(model).items():
        routed, shared = layers[int(name.split(".")[2])]
        if isinstance(experts, Nvfp4RoutedExperts):
            made: nn.Module = Nvfp4RoutedExperts(*wrong(*routed), activations="bf16", top_k=experts.top_k)
        else:
            made = Nvfp4SharedExpert(*wrong(*shared), activations="bf16")
        model.set_submodule(name, made)
