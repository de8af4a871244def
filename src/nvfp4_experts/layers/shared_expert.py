# SPDX-License-Identifier: Apache-2.0
"""The shared expert as a module: NVFP4 weights, packed once at construction, hidden states in, hidden states out.

    gate, up = x @ W1.T, x @ W3.T
    h        = silu(min(gate, L)) * clamp(up, -L, L)       fp32; L = swiglu_limit, 0 or None is off
    y        = h @ W2.T

Buffers hold the backend's packed form; `state_dict` holds the canonical one (codes, block scales and global scale of
gate, up and down, and the static scales), so a state dict moves between backends and machines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats.nvfp4 import Nvfp4Tensor
from ..kernels import ops
from ..kernels.dispatch import Problem, choose_backend, get_backend
from ..kernels.target import target_of
from .calibration import observed_scale
from .checks import check_hidden_states, check_out, check_weights, checked_scale
from .packed import NoBackward, PackedModule
from .streaming import quantize_expert


class Nvfp4SharedExpert(PackedModule):
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

    weight_type = Nvfp4Tensor
    _kernels = staticmethod(get_backend)

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
        check_weights(gate, up, down)
        self.intermediate_size, self.hidden_size = gate.shape
        self._set_options(swiglu_limit, max_tokens, backend)
        self._set_activations(activations, activation_scale, gate.device)
        self._set_weights(gate, up, down)
        self._set_static_scales(input_scale, hidden_scale, gate.device)

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
        return cls(*quantize_expert(gate, up, down, recipe), **options)

    # -- using it ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Run the expert.

        Args:
            x: (..., H) bf16, fp16 or fp32 on the device of the weights, any strides, at most max_tokens rows.
            out: where to write: contiguous, shape and device of x, dtype of x or fp32 (the sum, not rounded), outside
                the memory from x's first element to its last (not checked in compiled code); None allocates.

        Returns:
            (..., H) in the dtype of x, the caller's own: no later call changes it.

        Raises:
            InputError: x or out does not fit; nothing has been computed.
            CalibrationError: static scales asked for and there are none.
        """
        self.check_call(x, out)
        return self._run(x, out)

    def _run(self, x: Tensor, out: Tensor | None) -> Tensor:
        if x.numel() == 0:
            return torch.empty_like(x) if out is None else out
        arguments = x.reshape(-1, self.hidden_size).contiguous(), *self.arguments
        if out is None:
            y = ops.shared_expert(*arguments).view(x.shape)
            return NoBackward.apply(y, "shared expert", x) if x.requires_grad and torch.is_grad_enabled() else y
        ops.shared_expert_out(*arguments, out.view(-1, self.hidden_size))
        return out

    def check_call(self, x: Tensor, out: Tensor | None, needs_static: bool = True) -> None:
        """Raise what `forward` raises for these arguments."""
        check_hidden_states(x, self.hidden_size, self.max_tokens, self._weights()[0].device)
        if out is not None:
            check_out(x, out)
        if needs_static:
            self._check_static_scales(
                "call calibrate() on typical hidden states, or load a checkpoint with input scales (or pass "
                'input_scale and hidden_scale), or choose activation_scale="dynamic" or "per_token"'
            )

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the op takes beside x, in its order."""
        return (
            self._weights(),
            self._input_scale,
            self._hidden_scale,
            self.swiglu_limit,
            self.activations,
            self.activation_scale,
            self.backend,
        )

    @property
    def problem(self) -> Problem:
        """What this layer is to a backend, on the device it is on."""
        return self._problem(self._weights()[0].device)

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
        Cost: beside the call, a pass over gate and up, unpacked; reads the device. In fp8 on Hopper each call packs the
            weights once more: calibrate in another format.
        """
        self.check_call(x, None, needs_static=False)
        rows = x.reshape(-1, self.hidden_size)
        gate, up, _ = self._projections()
        input_scale = observed_scale("hidden states", rows, percentile, self._input_scale)
        h = ops.hidden_states(rows, gate, up, self.swiglu_limit)
        hidden_scale = observed_scale("input of the down projection", h, percentile, self._hidden_scale)
        self._input_scale, self._hidden_scale = input_scale, hidden_scale
        return self.with_activations("bf16")._run(x, None)

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

    # -- inside --------------------------------------------------------------------------------------------------

    def _problem(self, device: torch.device) -> Problem:
        sizes = self.hidden_size, self.intermediate_size
        return Problem(*sizes, self.activations, target_of(device), self.activation_scale)

    def _choose(self, device: torch.device) -> str:
        return choose_backend(self._backend_choice, self._problem(device)).name

    def _checked_scale(self, name: str, scale: float | Tensor | None, device: torch.device) -> Tensor | None:
        return checked_scale(name, scale, device)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, {self._mode()}, "
            f"swiglu_limit={self.swiglu_limit or None}, max_tokens={self.max_tokens}, backend={self.backend!r}"
        )
