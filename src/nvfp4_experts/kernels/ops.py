# SPDX-License-Identifier: Apache-2.0
"""The only door from layers to kernels: torch.library ops, opaque to torch.compile, with fake kernels.

    shared_expert(x, weights, ...) -> y          a tensor of the caller's own
    shared_expert_out(x, weights, ..., out)      the same into the caller's tensor
    hidden_states(x, gate, up, limit) -> h       the layer's first half, for calibration; an ordinary function

`weights` are what the named backend's `pack` made, in its order; `reference.shared_expert` says what is computed.
Arguments have been checked by the layer; an op only forwards them to the backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.nvfp4 import Nvfp4Tensor
from . import tiled
from .dispatch import Call, get_backend

_CALIBRATION_TILE = 1 << 20


@torch.library.custom_op("nvfp4_experts::shared_expert", mutates_args=())
def shared_expert(
    x: Tensor,
    weights: list[Tensor],
    input_scale: Tensor | None,
    hidden_scale: Tensor | None,
    swiglu_limit: float,
    activations: str,
    activation_scale: str,
    backend: str,
) -> Tensor:
    """x (T, H) to y (T, H), dtype of x."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    call = Call(swiglu_limit, activations, activation_scale, input_scale, hidden_scale)
    get_backend(backend).shared_expert(x, weights, call, out)
    return out


@shared_expert.register_fake
def _(x, weights, input_scale, hidden_scale, swiglu_limit, activations, activation_scale, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("nvfp4_experts::shared_expert_out", mutates_args=("out",))
def shared_expert_out(
    x: Tensor,
    weights: list[Tensor],
    input_scale: Tensor | None,
    hidden_scale: Tensor | None,
    swiglu_limit: float,
    activations: str,
    activation_scale: str,
    backend: str,
    out: Tensor,
) -> None:
    """x (T, H) to out (T, H), dtype of x; out must not overlap x."""
    call = Call(swiglu_limit, activations, activation_scale, input_scale, hidden_scale)
    get_backend(backend).shared_expert(x, weights, call, out)


@shared_expert_out.register_fake
def _(x, weights, input_scale, hidden_scale, swiglu_limit, activations, activation_scale, backend, out):  # type: ignore[no-untyped-def]
    return None


def hidden_states(x: Tensor, gate: Nvfp4Tensor, up: Nvfp4Tensor, swiglu_limit: float) -> Tensor:
    """h = silu(min(gate, L)) * clamp(up, -L, L), (T, I) fp32, with bf16 activations.

    What enters the down projection, before any rounding; calibration reads its range. Plain torch on any device:
    calibration is offline.
    """
    call = Call(swiglu_limit, "bf16", "dynamic")
    values, scale = tiled.enter(x, call, None)
    weights = tiled.tiles_of(gate, up, gate, _CALIBRATION_TILE)
    return tiled.intermediate(values, scale, weights, gate.shape[0], call, torch.float32)
