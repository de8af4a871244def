# SPDX-License-Identifier: Apache-2.0
"""What expert modules ask of their arguments, in one place: options, weights, hidden states; all before any work."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError, LayoutError
from ..formats.codes import BLOCK_SIZE
from ..formats.nvfp4 import Nvfp4Tensor
from ..formats.stack import StackLike
from ..kernels.dispatch import ACTIVATION_SCALES, ACTIVATIONS
from ..kernels.target import target_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def checked_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """A value that must be one of some names."""
    if value not in choices:
        raise InputError(name, f"must be one of {choices}", repr(value), "pick one of them")
    return value


def checked_activations(activations: str, activation_scale: str, device: torch.device) -> tuple[str, str]:
    """The two options, with "auto" decided for a device."""
    if activations == "auto":
        activations = "nvfp4" if target_of(device).has_native_fp4 else "bf16"
    if activations not in ACTIVATIONS:
        checked_choice("activations", activations, ("auto", *ACTIVATIONS))
    return activations, checked_choice("activation_scale", activation_scale, ACTIVATION_SCALES)


def checked_limit(limit: float | None) -> float:
    """swiglu_limit as a number; None is 0."""
    try:
        number = 0.0 if limit is None else float(limit)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise InputError("swiglu_limit", "must be finite and >= 0", limit, "0 or None turns the clamp off")
    return number


def checked_count(name: str, count: int, way_out: str) -> int:
    """An integer of at least 1."""
    if not isinstance(count, int) or count < 1:
        raise InputError(name, "must be an integer of at least 1", count, way_out)
    return count


def checked_scale(
    name: str, scale: float | Tensor | None, device: torch.device, experts: int | None = None
) -> Tensor | None:
    """A static scale as a new fp32 tensor: () of one expert, (E,) of `experts`, for which one number may stand.

    NaN in an (E,) is an expert whose scale is unknown.
    """
    if scale is None:
        return None
    tensor = torch.as_tensor(scale, dtype=torch.float32).detach().to(device)
    of_each = experts is not None and tuple(tensor.shape) == (experts,)
    fits = tensor.numel() == 1 or of_each
    if not fits or not (torch.isfinite(tensor) & (tensor > 0) | (torch.isnan(tensor) if of_each else False)).all():
        of_experts = f", or one for each of {experts} experts, NaN where it is unknown" if experts else ""
        rule = f"must be one finite number > 0{of_experts}"
        got = tuple(tensor.shape) if tensor.numel() > 1 and not fits else scale
        raise InputError(name, rule, got, "give amax / 2688 in decode direction, or None")
    if experts is None:
        return tensor.reshape(()).clone()
    return tensor.reshape(-1).expand(experts).clone()


def check_weights(gate: Nvfp4Tensor | StackLike, up: Nvfp4Tensor | StackLike, down: Nvfp4Tensor | StackLike) -> None:
    """Shapes that fit together, multiples of 16, one device; of one expert or of stacks."""
    shapes = f"gate {tuple(gate.shape)}, up {tuple(up.shape)}, down {tuple(down.shape)}"
    lead = "" if isinstance(gate, Nvfp4Tensor) else "E, "
    *experts, intermediate, hidden = gate.shape if len(gate.shape) > 1 else (0, 0)
    expected = (*experts, hidden, intermediate)
    fits = len(gate.shape) == (3 if lead else 2) and gate.shape == up.shape and tuple(down.shape) == expected
    if not fits or 0 in gate.shape:
        rule = f"must be gate ({lead}I, H), up ({lead}I, H), down ({lead}H, I)"
        raise LayoutError("weights", rule, shapes, "transpose or reorder them")
    if intermediate % BLOCK_SIZE or hidden % BLOCK_SIZE:
        raise LayoutError("weights", "H and I must be multiples of 16", shapes, "pad with zero rows and columns")
    if not gate.device == up.device == down.device:
        devices = f"{gate.device}, {up.device}, {down.device}"
        raise LayoutError("weights", "gate, up and down must be on one device", devices, "move them with .to()")


def check_hidden_states(x: Tensor, hidden_size: int, max_tokens: int | None, device: torch.device) -> None:
    """x of a call: (..., H), a dtype and the device of the layer, at most max_tokens rows."""
    if x.shape[-1:] != (hidden_size,):
        raise InputError("x", f"must be (..., {hidden_size})", tuple(x.shape), "check the layer's hidden size")
    if x.dtype not in DTYPES:
        raise InputError("x", "must be bf16, fp16 or fp32", x.dtype, "cast it")
    if x.device != device:
        raise InputError("x", f"must be on {device}", x.device, "move x or the layer with .to()")
    tokens = x.numel() // hidden_size
    if max_tokens is not None and tokens > max_tokens:
        way_out = "build the layer with a larger max_tokens, or split the batch"
        raise InputError("x", f"must have at most max_tokens={max_tokens} rows", tokens, way_out)


def check_routing(x: Tensor, indices: Tensor, weights: Tensor, top_k: int, device: torch.device) -> None:
    """topk_indices and topk_weights of a call: (..., k) for x (..., H), k at most top_k, on the device of the layer."""
    for name, tensor, dtypes in (
        ("topk_indices", indices, (torch.int32, torch.int64)),
        ("topk_weights", weights, DTYPES),
    ):
        if tensor.shape[:-1] != x.shape[:-1] or tensor.ndim != x.ndim or not 1 <= tensor.shape[-1] <= top_k:
            expected = f"must be {(*x.shape[:-1], 'k')}, 1 <= k <= top_k={top_k}"
            way_out = "give one row per token, or build the layer with a larger top_k"
            raise InputError(name, expected, tuple(tensor.shape), way_out)
        if tensor.dtype not in dtypes:
            raise InputError(name, f"must be one of {dtypes}", tensor.dtype, "cast it")
        if tensor.device != device:
            raise InputError(name, f"must be on {device}", tensor.device, "move it with .to()")
    if indices.shape != weights.shape:
        got = f"{tuple(indices.shape)} and {tuple(weights.shape)}"
        raise InputError("topk_indices and topk_weights", "must have one shape", got, "give one weight an index")


def check_out(x: Tensor, out: Tensor) -> None:
    """out of a call: contiguous, as x or in fp32, and outside the memory that x spans."""
    if (
        out.shape != x.shape
        or out.dtype not in (x.dtype, torch.float32)
        or out.device != x.device
        or not out.is_contiguous()
    ):
        got = f"{tuple(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}"
        rule = "must be contiguous, with shape, dtype (or fp32) and device of x"
        raise InputError("out", rule, got, "use empty_like")
    if not torch.compiler.is_compiling() and _overlap(x, out):
        raise InputError("out", "must not overlap x", "memory that x spans", "use empty_like")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the bytes from first to last element of two tensors of one shape and device meet."""
    if a.numel() == 0 or a.is_meta:
        return False
    (a_start, a_stop), (b_start, b_stop) = _span(a), _span(b)
    return a_start < b_stop and b_start < a_stop


def _span(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize
