# SPDX-License-Identifier: Apache-2.0
"""The shared expert as a module: NVFP4 weights, packed once at construction, hidden states in, hidden states out.

    gate, up = x @ W1.T, x @ W3.T
    h        = silu(min(gate, L)) * clamp(up, -L, L)       fp32; L = swiglu_limit, 0 or None is off
    y        = h @ W2.T

Buffers hold the backend's packed form; `state_dict` holds the canonical one (codes, block scales and global scale of
gate, up and down, and the static scales), so a state dict moves between backends and machines.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, FormatError, InputError, LayoutError, UnsupportedError
from ..formats.codes import BLOCK_SIZE
from ..formats.nvfp4 import Nvfp4Tensor, joint_amax, quantize
from ..kernels import ops
from ..kernels.dispatch import ACTIVATION_SCALES, ACTIVATIONS, Problem, choose_backend, get_backend
from ..kernels.target import target_of
from .calibration import observed_scale

_PROJECTIONS = ("gate", "up", "down")
_PARTS = ("codes", "block_scales", "global_scale")
_STATIC_SCALES = ("input_scale", "hidden_scale")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Nvfp4SharedExpert(nn.Module):
    """A gate/up/down expert with NVFP4 weights and a choice of activation format.

    Build it with `from_weights` or `load_shared_expert`; the constructor takes weights already in NVFP4.

    Args:
        gate, up: (I, H) NVFP4. Their global scales may differ; each is applied to its own half, exactly.
        down: (H, I) NVFP4. H and I are any multiples of 16.
        swiglu_limit: L of the clamp, >= 0; 0 or None is off. Default 10.0.
        activations: what enters each GEMM: "nvfp4", "fp8", "bf16", or "auto" (nvfp4 where the device of the weights
            multiplies FP4, else bf16; decided here, once).
        activation_scale: where nvfp4's global scale comes from: "static" (calibration or checkpoint), "dynamic" (amax
            of the batch) or "per_token" (amax of each row: no request changes another's numbers).
        input_scale, hidden_scale: static scales of x and of h, decode direction (amax / 2688), > 0; None if unknown.
        max_tokens: the largest T of a call; more raises.
        backend: a name from `kernels.dispatch.ALL_BACKENDS`, or "auto".

    Raises:
        LayoutError: shapes that do not fit together, or negative block scales, which sm90 cannot hold.
        InputError: an option outside its range.
        UnsupportedError: the backend cannot run this here.

    Numerics: NaN in x gives NaN in exactly the rows it is in with bf16, fp8, static and per_token; with dynamic in all.
        The accumulators, the clamp and SwiGLU are fp32; the result is rounded once to the dtype of x.

    Cost: 0.5625 bytes per weight resident. Inference only: there is no backward.
    """

    _input_scale: Tensor | None
    _hidden_scale: Tensor | None

    def __init__(
        self,
        gate: Nvfp4Tensor,
        up: Nvfp4Tensor,
        down: Nvfp4Tensor,
        *,
        swiglu_limit: float | None = 10.0,
        activations: str = "auto",
        activation_scale: str = "dynamic",
        input_scale: float | Tensor | None = None,
        hidden_scale: float | Tensor | None = None,
        max_tokens: int = 8192,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_weights(gate, up, down)
        self.intermediate_size, self.hidden_size = gate.shape
        self.swiglu_limit = _checked_limit(swiglu_limit)
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise InputError(
                "max_tokens", "must be an integer of at least 1", max_tokens, "give the largest batch you will send"
            )
        self.max_tokens = max_tokens
        self._backend_choice = backend
        self._set_activations(activations, activation_scale, gate.device)
        self._set_weights(gate, up, down)
        for name, scale in zip(_STATIC_SCALES, (input_scale, hidden_scale), strict=True):
            self.register_buffer(f"_{name}", _checked_scale(name, scale, gate.device), persistent=False)

    @classmethod
    def from_weights(
        cls,
        gate: Tensor | Nvfp4Tensor,
        up: Tensor | Nvfp4Tensor,
        down: Tensor | Nvfp4Tensor,
        *,
        recipe: str = "modelopt",
        **options: Any,
    ) -> Nvfp4SharedExpert:
        """Build from floating weights or NVFP4 tensors, in any mixture.

        Args:
            gate, up: (I, H) bf16, fp16 or fp32, or Nvfp4Tensor. When both are floating they share one global scale,
                from their joint amax, as inference engines expect.
            down: (H, I), likewise.
            recipe: how floating weights are quantised; see `quantize`.
            **options: those of the class.

        Raises: what the class and `quantize` raise.
        """
        amax = None
        if not isinstance(gate, Nvfp4Tensor) and not isinstance(up, Nvfp4Tensor):
            amax = joint_amax(gate, up)

        def as_nvfp4(w: Tensor | Nvfp4Tensor, amax: float | None = None) -> Nvfp4Tensor:
            return w if isinstance(w, Nvfp4Tensor) else quantize(w.detach(), recipe, amax)

        return cls(as_nvfp4(gate, amax), as_nvfp4(up, amax), as_nvfp4(down), **options)

    # -- using it ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Run the expert.

        Args:
            x: (..., H) bf16, fp16 or fp32 on the device of the weights, any strides, at most max_tokens rows.
            out: where to write: contiguous, shape, dtype and device of x, outside the memory from x's first element to
                its last (not checked in compiled code); None allocates.

        Returns:
            (..., H) in the dtype of x, the caller's own: no later call changes it.

        Raises:
            InputError: x or out does not fit; nothing has been computed.
            CalibrationError: static scales asked for and there are none.
        """
        self._check_call(x, out)
        return self._run(x, out)

    def _run(self, x: Tensor, out: Tensor | None) -> Tensor:
        if x.numel() == 0:
            return torch.empty_like(x) if out is None else out
        arguments = (
            x.reshape(-1, self.hidden_size).contiguous(),
            self._weights(),
            self._input_scale,
            self._hidden_scale,
            self.swiglu_limit,
            self.activations,
            self.activation_scale,
            self.backend,
        )
        if out is None:
            y = ops.shared_expert(*arguments).view(x.shape)
            return _NoBackward.apply(y) if x.requires_grad and torch.is_grad_enabled() else y
        ops.shared_expert_out(*arguments, out.view(-1, self.hidden_size))
        return out

    @torch.no_grad()
    def calibrate(self, x: Tensor, percentile: float | None = None) -> Tensor:
        """Widen the static scales to cover x, and return the layer's bf16-activation result for it.

        Args:
            x: (..., H), as for `forward`.
            percentile: of |x| and |h| in this call, in (0, 100]; None is the maximum. Scales are the running maximum
                over calls.

        Returns:
            (..., H): so that a whole model can run on while it is being calibrated.

        Raises:
            CalibrationError: x is empty, all zero or not finite (so is h); the scales are as they were.

        Numerics: the activation mode in force does not change; ask for activation_scale="static" to use the scales.
            Not for concurrent use: of two calls at the same time, one may lose what the other saw.
        """
        self._check_call(x, None, needs_static=False)
        rows = x.reshape(-1, self.hidden_size)
        gate, up, _ = self._projections()
        input_scale = observed_scale("hidden states", rows, percentile, self._input_scale)
        h = ops.hidden_states(rows, gate, up, self.swiglu_limit)
        hidden_scale = observed_scale("input of the down projection", h, percentile, self._hidden_scale)
        self._input_scale, self._hidden_scale = input_scale, hidden_scale
        return self.with_activations("bf16")._run(x, None)

    def with_activations(self, activations: str, activation_scale: str | None = None) -> Nvfp4SharedExpert:
        """The same expert with another activation format; the two share the weights' memory.

        Raises:
            InputError, UnsupportedError: as the class.
        """
        other = copy.copy(self)
        # Hooks, buffers and what else nn.Module keeps in dictionaries become the new module's own.
        other.__dict__.update({name: copy.copy(v) for name, v in vars(self).items() if isinstance(v, dict)})
        device = self._weights()[0].device
        other._set_activations(activations, activation_scale or self.activation_scale, device)
        if other._choose(device) != self.backend:
            other._set_weights(*self._projections())
        else:
            other._prepare(device)
        return other

    @property
    def gate(self) -> Nvfp4Tensor:
        """The gate projection, (I, H)."""
        return self._projections()[0]

    @property
    def up(self) -> Nvfp4Tensor:
        """The up projection, (I, H)."""
        return self._projections()[1]

    @property
    def down(self) -> Nvfp4Tensor:
        """The down projection, (H, I)."""
        return self._projections()[2]

    @property
    def input_scale(self) -> float | None:
        """Static scale of x, decode direction; None if unknown. Reads the device."""
        return None if self._input_scale is None else float(self._input_scale)

    @property
    def hidden_scale(self) -> float | None:
        """Static scale of h, decode direction; None if unknown. Reads the device."""
        return None if self._hidden_scale is None else float(self._hidden_scale)

    @property
    def resident_bytes(self) -> int:
        """Bytes of packed weights this module keeps on its device."""
        return sum(w.nbytes for w in self._weights())

    @property
    def scratch_bytes(self) -> int:
        """Bytes that calls keep on the device beside weights: one block a stream, shared by all layers there."""
        return get_backend(self.backend).scratch_bytes(self._weights()[0].device)

    # -- inside --------------------------------------------------------------------------------------------------

    def _set_activations(self, activations: str, activation_scale: str, device: torch.device) -> None:
        if activations == "auto":
            activations = "nvfp4" if target_of(device).has_native_fp4 else "bf16"
        if activations not in ACTIVATIONS:
            rule = f"must be one of {('auto', *ACTIVATIONS)}"
            raise InputError("activations", rule, repr(activations), "pick one of them")
        if activation_scale not in ACTIVATION_SCALES:
            rule = f"must be one of {ACTIVATION_SCALES}"
            raise InputError("activation_scale", rule, repr(activation_scale), "pick one of them")
        self.activations, self.activation_scale = activations, activation_scale

    def _problem(self, device: torch.device) -> Problem:
        sizes = self.hidden_size, self.intermediate_size
        return Problem(*sizes, self.activations, target_of(device), self.activation_scale)

    def _choose(self, device: torch.device) -> str:
        return choose_backend(self._backend_choice, self._problem(device)).name

    def _set_weights(self, gate: Nvfp4Tensor, up: Nvfp4Tensor, down: Nvfp4Tensor) -> None:
        """Pack for the backend that fits the weights' device, replacing what was packed before."""
        backend = self._choose(gate.device)
        packed = get_backend(backend).pack(gate, up, down)
        for name in getattr(self, "_packed_names", ()):
            del self._buffers[name]
        self.backend, self._packed_names = backend, tuple(packed)
        for name, tensor in packed.items():
            self.register_buffer(name, tensor, persistent=False)
        self._prepare(gate.device)

    def _prepare(self, device: torch.device) -> None:
        get_backend(self.backend).prepare(self._problem(device), device, self.max_tokens)

    def _weights(self) -> list[Tensor]:
        return [self._buffers[name] for name in self._packed_names]  # type: ignore[misc]

    def _projections(self) -> tuple[Nvfp4Tensor, Nvfp4Tensor, Nvfp4Tensor]:
        packed = dict(zip(self._packed_names, self._weights(), strict=True))
        gate, up, down = get_backend(self.backend).unpack(packed, self.hidden_size, self.intermediate_size)
        return gate, up, down

    def _check_call(self, x: Tensor, out: Tensor | None, needs_static: bool = True) -> None:
        if x.shape[-1:] != (self.hidden_size,):
            raise InputError("x", f"must be (..., {self.hidden_size})", tuple(x.shape), "check the layer's hidden size")
        if x.dtype not in _DTYPES:
            raise InputError("x", "must be bf16, fp16 or fp32", x.dtype, "cast it")
        if x.device != self._weights()[0].device:
            raise InputError("x", f"must be on {self._weights()[0].device}", x.device, "move x or the layer with .to()")
        tokens = x.numel() // self.hidden_size
        if tokens > self.max_tokens:
            way_out = "build the layer with a larger max_tokens, or split the batch"
            raise InputError("x", f"must have at most max_tokens={self.max_tokens} rows", tokens, way_out)
        if out is not None:
            expected, got = (x.shape, x.dtype, x.device), (out.shape, out.dtype, out.device)
            if expected != got or not out.is_contiguous():
                got_text = f"{tuple(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}"
                raise InputError(
                    "out", "must be contiguous, with shape, dtype and device of x", got_text, "use empty_like"
                )
            if not torch.compiler.is_compiling() and _overlap(x, out):
                raise InputError("out", "must not overlap x", "memory that x spans", "use empty_like")
        static = needs_static and self.activations == "nvfp4" and self.activation_scale == "static"
        if static and (self._input_scale is None or self._hidden_scale is None):
            way_out = (
                "call calibrate() on typical hidden states, or load a checkpoint with input scales (or pass "
                'input_scale and hidden_scale), or choose activation_scale="dynamic" or "per_token"'
            )
            raise CalibrationError('activation_scale="static"', "needs input_scale and hidden_scale", "none", way_out)

    def extra_repr(self) -> str:
        mode = f"activations={self.activations!r}"
        if self.activations == "nvfp4":
            mode += f", activation_scale={self.activation_scale!r}"
        if self._input_scale is not None and self._hidden_scale is not None:
            mode += ", static scales known"
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, {mode}, "
            f"swiglu_limit={self.swiglu_limit or None}, max_tokens={self.max_tokens}, backend={self.backend!r}"
        )

    # -- torch's protocol: devices and state dicts ---------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Nvfp4SharedExpert:
        """Move to a device; never convert a dtype.

        Codes and scales are bytes with a meaning: `.half()` or `.to(torch.bfloat16)` on a whole model must not touch
        them. So `fn` sees bytes, which dtype conversions leave alone. A new device may want another backend.
        """

        def move(t: Tensor) -> Tensor:
            return fn(t.reshape(-1).view(torch.uint8)).view(t.dtype).view(t.shape)

        before = self._weights()
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = move(buffer)
        device = self._weights()[0].device
        if device != before[0].device and self._choose(device) != self.backend:
            self._set_weights(*self._projections())
        elif any(new.data_ptr() != old.data_ptr() for new, old in zip(self._weights(), before, strict=True)):
            self._prepare(device)  # on the same device too: launches may read weights early, these must lie still
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for projection, tensor in zip(_PROJECTIONS, self._projections(), strict=True):
            for part in _PARTS:
                destination[f"{prefix}{projection}.{part}"] = getattr(tensor, part)
        for name in _STATIC_SCALES:
            scale = getattr(self, f"_{name}")
            if scale is not None:
                destination[prefix + name] = scale

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        required = [f"{prefix}{projection}.{part}" for projection in _PROJECTIONS for part in _PARTS]
        optional = [prefix + name for name in _STATIC_SCALES]
        unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in (*required, *optional)]
        missing = [k for k in required if k not in state_dict]
        missing_keys += missing
        if missing:
            return
        device = self._weights()[0].device
        try:
            gate, up, down = (
                Nvfp4Tensor(*(state_dict[f"{prefix}{projection}.{part}"].detach().to(device) for part in _PARTS))
                for projection in _PROJECTIONS
            )
            _check_weights(gate, up, down)
            size = (self.intermediate_size, self.hidden_size)
            if tuple(gate.shape) != size:
                raise LayoutError("gate", f"must be {size}", tuple(gate.shape), "build the layer with that size")
            scales = {name: _checked_scale(name, state_dict.get(prefix + name), device) for name in _STATIC_SCALES}
        except (FormatError, LayoutError, InputError) as error:
            error_msgs.append(f"{prefix or 'shared expert'}: {error}")
            return
        self._set_weights(gate, up, down)
        self._input_scale, self._hidden_scale = scales["input_scale"], scales["hidden_scale"]


class _NoBackward(torch.autograd.Function):
    """The identity, whose backward says that there is none, where torch would warn and leave gradients out."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        way_out = "call it under torch.no_grad(), or detach its result"
        raise UnsupportedError("shared expert", "is for inference", "a backward pass through it", way_out)


def _check_weights(gate: Nvfp4Tensor, up: Nvfp4Tensor, down: Nvfp4Tensor) -> None:
    shapes = f"gate {tuple(gate.shape)}, up {tuple(up.shape)}, down {tuple(down.shape)}"
    fits = len(gate.shape) == 2 and gate.shape == up.shape and tuple(down.shape) == tuple(gate.shape)[::-1]
    if not fits or 0 in gate.shape:
        raise LayoutError("weights", "must be gate (I, H), up (I, H), down (H, I)", shapes, "transpose or reorder them")
    if gate.shape[0] % BLOCK_SIZE or gate.shape[1] % BLOCK_SIZE:
        raise LayoutError("weights", "H and I must be multiples of 16", shapes, "pad with zero rows and columns")
    if not gate.device == up.device == down.device:
        devices = f"{gate.device}, {up.device}, {down.device}"
        raise LayoutError("weights", "gate, up and down must be on one device", devices, "move them with .to()")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the bytes from first to last element of two tensors of one shape and device meet."""
    if a.numel() == 0 or a.is_meta:
        return False
    (a_start, a_stop), (b_start, b_stop) = _span(a), _span(b)
    return a_start < b_stop and b_start < a_stop


def _span(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize


def _checked_limit(limit: float | None) -> float:
    try:
        number = 0.0 if limit is None else float(limit)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise InputError("swiglu_limit", "must be finite and >= 0", limit, "0 or None turns the clamp off")
    return number


def _checked_scale(name: str, scale: float | Tensor | None, device: torch.device) -> Tensor | None:
    if scale is None:
        return None
    tensor = torch.as_tensor(scale, dtype=torch.float32).detach().to(device)
    if tensor.numel() != 1 or not (torch.isfinite(tensor) & (tensor > 0)).all():
        way_out = "give amax / 2688 in decode direction, or None"
        raise InputError(name, "must be one finite number > 0", scale, way_out)
    return tensor.reshape(()).clone()
