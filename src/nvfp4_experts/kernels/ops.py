# SPDX-License-Identifier: Apache-2.0
"""The only door from layers to kernels: torch.library ops, opaque to torch.compile, with fake kernels.

    shared_expert(x, weights, ...) -> y          a tensor of the caller's own
    shared_expert_out(x, weights, ..., out)      the same into the caller's tensor, which may be fp32
    routed_experts, routed_experts_out           the same with indices and weights of each token
    moe, moe_out                                 routed experts and a shared one, added before the sum is rounded
    kept_expert(x, weights, block, limit) -> y   a shared expert in FP8 blocks or floating, plain torch on every device
    hidden_states(x, gate, up, limit) -> h       the layer's first half, for calibration; an ordinary function

`weights` are what the named backend's `pack` made, in its order (but for kept_expert); `reference.py` says what is
computed.
Arguments have been checked by the layer; an op only forwards them to the backend. torch.autocast changes nothing here:
it would have the matmuls of backends in plain torch round to bf16.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..formats.fp8_block import Fp8BlockTensor
from ..formats.nvfp4 import Nvfp4Tensor
from . import tiled
from .dispatch import Beside, Call, Routing, get_backend, get_routed_backend

_TILE = 1 << 20  # values, of ops that run in plain torch

# Registered by hand: what torch.library.custom_op wraps around a function takes longer than the backend of a CPU does
# to call its kernel. There is no backward.
_LIBRARY = torch.library.Library("nvfp4_experts", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

# Those with autocast that layers may run on; torch raises when asked about a device without, as "meta".
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which torch multiplies tensors of that device in their own dtype; none where autocast is off."""
    if device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _register(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], writes: str = ""
) -> Callable[..., Any]:
    """The op of that name and the signature of `function`, which runs it on every device; `writes`: an argument.

    The dispatcher takes the kernels of autocast while that is on and only then, so other calls do not pay for them.
    """
    schema = torch.library.infer_schema(function, mutates_args={writes} if writes else ())
    _LIBRARY.define(name + schema, tags=_TAGS)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nvfp4_experts::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.nvfp4_experts, name).default
    for device_type in _AUTOCAST_DEVICES:
        _LIBRARY.impl(name, _outside_autocast(op, device_type), f"Autocast{device_type.upper()}")
    return op


def _outside_autocast(op: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return op(*arguments)

    return run


def _register_both(name: str, write: Callable[..., None]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Two ops of a function that writes x (T, H) to y in its last argument, `out`, which must not overlap x: `name`,
    which makes a y of the dtype of x, and `name`_out.
    """

    def make(*arguments: Any) -> Tensor:
        out = _like_x(*arguments)
        write(*arguments, out)
        return out

    signature = inspect.signature(write, eval_str=True)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "out"]
    make.__signature__ = signature.replace(parameters=parameters, return_annotation=Tensor)  # type: ignore[attr-defined]
    return _register(name, make, _like_x), _register(f"{name}_out", write, lambda *_: None, writes="out")


def _shared_expert(
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
    call = Call(swiglu_limit, activations, activation_scale, input_scale, hidden_scale)
    get_backend(backend).shared_expert(x, weights, call, out)


def _routed_experts(
    x: Tensor,
    weights: list[Tensor],
    indices: Tensor,
    topk_weights: Tensor,
    input_scale: Tensor | None,
    hidden_scale: Tensor | None,
    swiglu_limit: float,
    activations: str,
    activation_scale: str,
    weighting: str,
    backend: str,
    out: Tensor,
) -> None:
    call = Call(swiglu_limit, activations, activation_scale, input_scale, hidden_scale)
    get_routed_backend(backend).routed_experts(x, weights, Routing(indices, topk_weights, weighting), call, out)


def _moe(
    x: Tensor,
    weights: list[Tensor],
    indices: Tensor,
    topk_weights: Tensor,
    input_scale: Tensor | None,
    hidden_scale: Tensor | None,
    swiglu_limit: float,
    activations: str,
    activation_scale: str,
    weighting: str,
    backend: str,
    shared_weights: list[Tensor],
    shared_input_scale: Tensor | None,
    shared_hidden_scale: Tensor | None,
    shared_swiglu_limit: float,
    shared_activations: str,
    shared_activation_scale: str,
    shared_backend: str,
    out: Tensor,
) -> None:
    call = Call(swiglu_limit, activations, activation_scale, input_scale, hidden_scale)
    options = shared_swiglu_limit, shared_activations, shared_activation_scale
    of_shared = Call(*options, shared_input_scale, shared_hidden_scale)
    beside = Beside(get_backend(shared_backend), shared_weights, of_shared)
    routing = Routing(indices, topk_weights, weighting)
    get_routed_backend(backend).moe(x, weights, routing, call, beside, out)


def _kept_expert(x: Tensor, weights: list[Tensor], block: list[int], swiglu_limit: float) -> Tensor:
    out = _like_x(x)
    call = Call(swiglu_limit, "bf16", "dynamic")
    gate, up, down = kept_weights(weights, block)
    with torch.no_grad():
        tiled.shared_expert(x, tiled.stored_tiles(gate, up, down, _TILE), gate.shape[0], call, out)
    return out


def kept_weights(weights: list[Tensor], block: list[int]) -> list[Tensor] | list[Fp8BlockTensor]:
    """gate, up and down: three floating tensors, or values and scales of three, in blocks of `block`."""
    if not block:
        return weights
    pairs = zip(weights[::2], weights[1::2], strict=True)
    return [Fp8BlockTensor(values, scales, (block[0], block[1])) for values, scales in pairs]


def _like_x(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


shared_expert, shared_expert_out = _register_both("shared_expert", _shared_expert)
routed_experts, routed_experts_out = _register_both("routed_experts", _routed_experts)
moe, moe_out = _register_both("moe", _moe)
kept_expert = _register("kept_expert", _kept_expert, _like_x)


def hidden_states(x: Tensor, gate: Nvfp4Tensor, up: Nvfp4Tensor, swiglu_limit: float) -> Tensor:
    """h = silu(min(gate, L)) * clamp(up, -L, L), (T, I) fp32, with bf16 activations.

    What enters the down projection, before any rounding; calibration reads its range. Plain torch on any device:
    calibration is offline.
    """
    call = Call(swiglu_limit, "bf16", "dynamic")
    with without_autocast(x.device):
        values, scale = tiled.enter(x, call, None)
        weights = tiled.tiles_of(gate, up, gate, _TILE)
        return tiled.intermediate(values, scale, weights, gate.shape[0], call, torch.float32)
