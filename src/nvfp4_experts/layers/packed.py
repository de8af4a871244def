# SPDX-License-Identifier: Apache-2.0
"""What expert modules share: weights packed once for a backend, canonical state dicts, devices, activation formats.

Buffers hold the backend's packed form; `state_dict` holds the canonical one (codes, block scales and global scale of
gate, up and down, and the static scales), so a state dict moves between backends and machines.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, FormatError, InputError, LayoutError, UnsupportedError
from ..formats.nvfp4 import Nvfp4Tensor
from ..formats.stack import Nvfp4Stack
from ..kernels.dispatch import Problem
from .checks import check_weights, checked_activations, checked_count, checked_limit

PROJECTIONS = ("gate", "up", "down")
PARTS = ("codes", "block_scales", "global_scale")
STATIC_SCALES = ("input_scale", "hidden_scale")

_Self = TypeVar("_Self", bound="PackedModule")


class PackedModule(nn.Module):
    """Base of the expert modules.

    A subclass says what its weights are (`weight_type`), which problem it is (`_problem`), who may run it (`_choose`,
    `_kernels`) and what a static scale looks like (`_checked_scale`); its constructor calls `_set_options`,
    `_set_activations`, and then `_set_weights` and `_set_static_scales`.
    """

    weight_type: type[Nvfp4Tensor] | type[Nvfp4Stack]
    hidden_size: int
    intermediate_size: int
    _input_scale: Tensor | None
    _hidden_scale: Tensor | None

    def _problem(self, device: torch.device) -> Problem:
        raise NotImplementedError

    def _choose(self, device: torch.device) -> str:
        raise NotImplementedError

    @staticmethod
    def _kernels(backend: str) -> Any:
        raise NotImplementedError

    def _checked_scale(self, name: str, scale: float | Tensor | None, device: torch.device) -> Tensor | None:
        raise NotImplementedError

    # -- using it ------------------------------------------------------------------------------------------------

    def with_activations(self: _Self, activations: str, activation_scale: str | None = None) -> _Self:
        """The same module with another activation format; the two share weights, unless another backend runs the other.

        Raises:
            InputError, UnsupportedError: as the class.
        """
        other, backend = self._in_mode(activations, activation_scale)
        if backend != self.backend:
            other._set_weights(*self._projections())
        else:
            other._prepare(self._weights()[0].device)
        return other

    def check_activations(self, activations: str, activation_scale: str | None = None) -> None:
        """Raise what `with_activations` raises for these arguments; no weight is touched."""
        self._in_mode(activations, activation_scale)

    @property
    def resident_bytes(self) -> int:
        """Bytes of packed weights this module keeps on its device."""
        return sum(w.nbytes for w in self._weights())

    @property
    def scratch_bytes(self) -> int:
        """Bytes that calls keep on the device beside weights: one block a stream, shared by all layers there."""
        return self._kernels(self.backend).scratch_bytes(self._weights()[0].device)

    # -- inside --------------------------------------------------------------------------------------------------

    def _twin(self: _Self) -> _Self:
        """A copy on the same weights; hooks, buffers and what else nn.Module keeps in dictionaries are its own."""
        other = copy.copy(self)
        other.__dict__.update({name: copy.copy(v) for name, v in vars(self).items() if isinstance(v, dict)})
        return other

    def _in_mode(self: _Self, activations: str, activation_scale: str | None) -> tuple[_Self, str]:
        """A twin in another activation format, and the backend that it has to be packed for yet."""
        other = self._twin()
        device = self._weights()[0].device
        other._set_activations(activations, activation_scale or self.activation_scale, device)
        return other, other._choose(device)

    def _set_options(self, swiglu_limit: float | None, max_tokens: int, backend: str) -> None:
        self.swiglu_limit = checked_limit(swiglu_limit)
        self.max_tokens = checked_count("max_tokens", max_tokens, "give the largest batch you will send")
        self._backend_choice = backend

    def _set_activations(self, activations: str, activation_scale: str, device: torch.device) -> None:
        self.activations, self.activation_scale = checked_activations(activations, activation_scale, device)

    def _set_weights(self, gate: Any, up: Any, down: Any) -> None:
        """Pack for the backend that fits the weights' device, replacing what was packed before."""
        backend = self._choose(gate.device)
        packed = self._kernels(backend).pack(gate, up, down)
        for name in getattr(self, "_packed_names", ()):
            del self._buffers[name]
        self.backend, self._packed_names, self._gate_shape = backend, tuple(packed), tuple(gate.shape)
        for name, tensor in packed.items():
            self.register_buffer(name, tensor, persistent=False)
        self._prepare(gate.device)

    def _set_static_scales(self, input_scale: Any, hidden_scale: Any, device: torch.device) -> None:
        for name, scale in zip(STATIC_SCALES, (input_scale, hidden_scale), strict=True):
            self.register_buffer(f"_{name}", self._checked_scale(name, scale, device), persistent=False)

    def _prepare(self, device: torch.device) -> None:
        self._kernels(self.backend).prepare(self._problem(device), device, self.max_tokens)

    def _weights(self) -> list[Tensor]:
        return [self._buffers[name] for name in self._packed_names]  # type: ignore[misc]

    def _projections(self) -> tuple[Any, Any, Any]:
        packed = dict(zip(self._packed_names, self._weights(), strict=True))
        gate, up, down = self._kernels(self.backend).unpack(packed, self.hidden_size, self.intermediate_size)
        return gate, up, down

    def _check_static_scales(self, ways_out: str) -> None:
        static = self.activations == "nvfp4" and self.activation_scale == "static"
        if static and (self._input_scale is None or self._hidden_scale is None):
            rule = "needs input_scale and hidden_scale"
            raise CalibrationError('activation_scale="static"', rule, "none", ways_out)

    def _mode(self) -> str:
        """The activation format in force, for `extra_repr`."""
        mode = f"activations={self.activations!r}"
        if self.activations == "nvfp4":
            mode += f", activation_scale={self.activation_scale!r}"
        if self._input_scale is not None and self._hidden_scale is not None:
            mode += ", static scales known"
        return mode

    # -- torch's protocol: devices and state dicts ---------------------------------------------------------------

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        """Move to a device, as `move_buffers` says. A new device may want another backend."""
        before = self._weights()
        move_buffers(self, fn)
        device = self._weights()[0].device
        if device != before[0].device and self._choose(device) != self.backend:
            self._set_weights(*self._projections())
        elif any(new.data_ptr() != old.data_ptr() for new, old in zip(self._weights(), before, strict=True)):
            self._prepare(device)  # on the same device too: launches may read weights early, these must lie still
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for projection, tensor in zip(PROJECTIONS, self._projections(), strict=True):
            for part in PARTS:
                destination[f"{prefix}{projection}.{part}"] = getattr(tensor, part)
        for name in STATIC_SCALES:
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
        required = [f"{prefix}{projection}.{part}" for projection in PROJECTIONS for part in PARTS]
        optional = [prefix + name for name in STATIC_SCALES]
        unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in (*required, *optional)]
        missing = [k for k in required if k not in state_dict]
        missing_keys += missing
        if missing:
            return
        device = self._weights()[0].device
        try:
            gate, up, down = (
                self.weight_type(*(state_dict[f"{prefix}{projection}.{part}"].detach().to(device) for part in PARTS))
                for projection in PROJECTIONS
            )
            check_weights(gate, up, down)
            if tuple(gate.shape) != self._gate_shape:
                rule = f"must be {self._gate_shape}"
                raise LayoutError("gate", rule, tuple(gate.shape), "build the layer with that size")
            scales = {name: self._checked_scale(name, state_dict.get(prefix + name), device) for name in STATIC_SCALES}
        except (FormatError, LayoutError, InputError) as error:
            error_msgs.append(f"{prefix or type(self).__name__}: {error}")
            return
        self._set_weights(gate, up, down)
        self._input_scale, self._hidden_scale = scales["input_scale"], scales["hidden_scale"]


def move_buffers(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Move a module's own buffers to a device; never convert a dtype.

    Codes and scales are bytes with a meaning: `.half()` or `.to(torch.bfloat16)` on a whole model must not touch them.
    So `fn` sees bytes, which dtype conversions leave alone.
    """
    for name, t in module._buffers.items():
        if t is not None:
            module._buffers[name] = fn(t.reshape(-1).view(torch.uint8)).view(t.dtype).view(t.shape)


class NoBackward(torch.autograd.Function):
    """The identity, whose backward says that there is none, where torch would warn and leave gradients out."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, what: str, *sources: Tensor) -> Tensor:
        """y; `what` is named in the error; `sources` are what it was made from, if y itself does not say so."""
        ctx.what = what
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Raises UnsupportedError."""
        way_out = "call it under torch.no_grad(), or detach its result"
        raise UnsupportedError(ctx.what, "is for inference", "a backward pass through it", way_out)
