# SPDX-License-Identifier: Apache-2.0
"""Routed experts as a module: E experts' NVFP4 weights, packed once; hidden states and their experts in, their sum out.

h_s  = silu(min(gate, L)) * clamp(up, -L, L)           by expert topk_indices[t, s]; fp32
y[t] = sum over s of (h_s * topk_weights[t, s]) @ W2.T   fp32, in ascending order of s; or weighted after W2
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, FormatError, LayoutError
from ..formats.nvfp4 import Nvfp4Tensor
from ..formats.stack import Nvfp4Stack, StackLike
from ..kernels import ops
from ..kernels.dispatch import WEIGHTINGS, Problem, choose_routed_backend, get_routed_backend
from ..kernels.target import target_of
from .calibration import check_percentile, observed_scale
from .checks import (
    check_hidden_states,
    check_out,
    check_routing,
    check_weights,
    checked_choice,
    checked_count,
    checked_scale,
)
from .packed import NoBackward, PackedModule
from .shared_expert import Nvfp4SharedExpert
from .streaming import ExpertStream, Weight

Weights = Tensor | Nvfp4Stack | Sequence[Nvfp4Tensor]


class Nvfp4RoutedExperts(PackedModule):
    """E gate/up/down experts with NVFP4 weights, of which each token takes k, weighted.

    Build it with `from_weights` or `from_experts`, or `load_routed_experts`; the constructor takes weights already in
    NVFP4.

    Args:
        gate, up: (E, I, H) NVFP4. Each expert has global scales of its own, and those of its gate and up may differ.
        down: (E, H, I) NVFP4. H and I are any multiples of 16.
        swiglu_limit: L of the clamp, >= 0; 0 or None is off. Default 10.0.
        activations: as for `Nvfp4SharedExpert`.
        activation_scale: where nvfp4's global scales come from: "static" (one for x and one for h of each expert),
            "dynamic" (of x: amax of the batch; of h: amax of the rows of that expert) or "per_token".
        input_scale, hidden_scale: static scales of x and of h, decode direction (amax / 2688), > 0: (E,), or one number
            for all experts; NaN or None where unknown. That of h is of what enters down: with weighting "before_down"
            the calibration must have seen weighted h.
        weighting: "before_down": routing weights multiply h, in fp32, before it enters its format; "after_down": they
            multiply what down makes of it.
        top_k: the most experts of a token; a call with more raises. Backends size their scratch by it.
        max_tokens: the largest T of a call; more raises.
        backend: a name from `kernels.dispatch.ALL_BACKENDS` that has routed experts, or "auto".

    Raises:
        LayoutError: shapes that do not fit together.
        InputError: an option outside its range.
        UnsupportedError: the backend cannot run this here, or has no routed experts.

    Numerics: a token's experts are added in fp32 in the order it names them, and rounded once. An index outside [0, E)
        is not here and adds nothing. NaN stays in its row with bf16, fp8, static and per_token; with dynamic, NaN in x
        reaches all rows, and in h those of the same expert, hence of tokens that share it.

    Cost: 0.5625 bytes per weight resident. Inference only: there is no backward.
    """

    weight_type = Nvfp4Stack
    _kernels = staticmethod(get_routed_backend)

    def __init__(
        self,
        gate: StackLike,
        up: StackLike,
        down: StackLike,
        *,
        swiglu_limit: float | None = 10.0,
        activations: str = "auto",
        activation_scale: str = "dynamic",
        input_scale: float | Tensor | None = None,
        hidden_scale: float | Tensor | None = None,
        weighting: str = "before_down",
        top_k: int = 8,
        max_tokens: int = 8192,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_weights(gate, up, down)
        self.num_experts, self.intermediate_size, self.hidden_size = gate.shape
        self.weighting = checked_choice("weighting", weighting, WEIGHTINGS)
        self.top_k = checked_count("top_k", top_k, "give the most experts that a token has")
        self._set_options(swiglu_limit, max_tokens, backend)
        self._set_activations(activations, activation_scale, gate.device)
        self._set_static_scales(input_scale, hidden_scale, gate.device)  # before the weights, which may take minutes
        self._set_weights(gate, up, down)

    @classmethod
    def from_weights(
        cls, gate: Weights, up: Weights, down: Weights, *, recipe: str = "modelopt", **options: Any
    ) -> Nvfp4RoutedExperts:
        """Build from floating weights or NVFP4 tensors, in any mixture of gate, up and down.

        Args:
            gate, up: (E, I, H) bf16, fp16 or fp32; or E Nvfp4Tensors (I, H); or an Nvfp4Stack. When both are floating,
                gate and up of an expert share one global scale, from their joint amax.
            down: (E, H, I), likewise.
            recipe: how floating weights are quantised; see `quantize`.
            **options: those of the class.

        Raises: what the class and `quantize` raise.

        Cost: the packed form, and one expert in NVFP4 at a time.
        """
        projections = {"gate": gate, "up": up, "down": down}
        for name, weights in projections.items():
            if isinstance(weights, Tensor) and (weights.ndim != 3 or len(weights) == 0):
                rule, way_out = "must have three dimensions, experts first", "stack the experts' weights"
                raise FormatError(name, rule, tuple(weights.shape), f"{way_out}, or give a list of Nvfp4Tensors")
        counts = {name: len(weights) for name, weights in projections.items()}
        if len(set(counts.values())) > 1:
            rule = "must be gate (E, I, H), up (E, I, H), down (E, H, I)"
            raise LayoutError("weights", rule, f"E {counts}", "give each expert all three")
        experts = zip(gate, up, down, strict=True)  # type: ignore[arg-type]  # a stack goes by __getitem__
        return cls.from_experts(experts, len(gate), recipe=recipe, **options)

    @classmethod
    def from_experts(
        cls,
        experts: Iterable[tuple[Weight, Weight, Weight]],
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        recipe: str = "modelopt",
        **options: Any,
    ) -> Nvfp4RoutedExperts:
        """Build from one expert after the other; each is packed before the next is taken.

        Args:
            experts: num_experts times (gate, up, down), (I, H), (I, H), (H, I), each floating or an Nvfp4Tensor, on any
                device; an iterator that reads them from somewhere, say. Gate and up that are both floating share one
                global scale, from their joint amax.
            num_experts: E.
            device: where the layer is to be; each expert goes there before it is quantised. Default: where the first
                one's gate lies.
            recipe: how floating weights are quantised; see `quantize`.
            **options: those of the class.

        Raises:
            InputError: fewer or more experts than num_experts.
            LayoutError: experts of different shapes.
            And what the class and `quantize` raise, and the iterator.

        Cost: the packed form, and one expert (as it comes, and in NVFP4) at a time.
        """
        stream = ExpertStream(experts, checked_count("num_experts", num_experts, "count them"), device, recipe)
        made = cls(*stream.projections, **options)
        stream.finish()
        return made

    # -- using it ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, topk_indices: Tensor, topk_weights: Tensor, out: Tensor | None = None) -> Tensor:
        """Run each token's experts and add what they give.

        Args:
            x: (..., H) bf16, fp16 or fp32 on the device of the weights, any strides, at most max_tokens rows.
            topk_indices: (..., k) int32 or int64, k <= top_k; an index outside [0, E) is an expert that is not here.
            topk_weights: (..., k) bf16, fp16 or fp32; used in fp32.
            out: where to write: contiguous, shape and device of x, dtype of x or fp32 (the sum, not rounded), outside
                the memory from x's first element to its last (not checked in compiled code); None allocates.

        Returns:
            (..., H) in the dtype of x, or `out`.

        Raises:
            InputError: an argument does not fit; nothing has been computed.
            CalibrationError: static scales asked for and there are none, or not of every expert (`uncalibrated`).
        """
        self._check_call(x, topk_indices, topk_weights, out)
        return self._run(x, topk_indices, topk_weights, out)

    def _run(self, x: Tensor, topk_indices: Tensor, topk_weights: Tensor, out: Tensor | None) -> Tensor:
        if x.numel() == 0:
            return torch.empty_like(x) if out is None else out
        arguments = self._arguments(x, topk_indices, topk_weights)
        if out is None:
            y = ops.routed_experts(*arguments).view(x.shape)
            wants_grad = torch.is_grad_enabled() and (x.requires_grad or topk_weights.requires_grad)
            return NoBackward.apply(y, "routed experts", x, topk_weights) if wants_grad else y
        ops.routed_experts_out(*arguments, out.view(-1, self.hidden_size))
        return out

    def with_capacity(self, max_tokens: int, top_k: int) -> Nvfp4RoutedExperts:
        """The same module for calls of up to so many tokens and slots; the two share the weights' memory.

        Raises:
            InputError: a number below 1.
        """
        other = self._twin()
        other.max_tokens = checked_count("max_tokens", max_tokens, "give the largest batch you will send")
        other.top_k = checked_count("top_k", top_k, "give the most experts that a token has")
        other._prepare(self._weights()[0].device)
        return other

    def with_shared(
        self,
        x: Tensor,
        topk_indices: Tensor,
        topk_weights: Tensor,
        shared: Nvfp4SharedExpert,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `forward`, plus what the shared expert gives for x, unweighted, before the sum is rounded."""
        self._check_call(x, topk_indices, topk_weights, out)
        shared.check_call(x, None)
        if x.numel() == 0:
            return torch.empty_like(x) if out is None else out
        arguments = *self._arguments(x, topk_indices, topk_weights), *shared.arguments
        if out is None:
            return ops.moe(*arguments).view(x.shape)
        ops.moe_out(*arguments, out.view(-1, self.hidden_size))
        return out

    def prepare_with(self, shared: Nvfp4SharedExpert) -> None:
        """Do what the first call of `with_shared` would otherwise have to."""
        device = self._weights()[0].device
        self._kernels(self.backend).prepare_moe(shared.problem, device, self.max_tokens)

    @torch.no_grad()
    def calibrate(
        self, x: Tensor, topk_indices: Tensor, topk_weights: Tensor, percentile: float | None = None
    ) -> Tensor:
        """Widen the static scales of the experts that x goes to, and return the layer's bf16-activation result for it.

        Of an expert, that of x covers the rows of its tokens, and that of h what enters its down projection for them:
        h times the routing weight with weighting "before_down", h alone with "after_down".

        Args:
            x, topk_indices, topk_weights: as for `forward`.
            percentile: of an expert's |x| and |h| in this call, in (0, 100]; None is the maximum. Scales are the
                running maximum over calls.

        Returns:
            (..., H): so that a whole model can run on while it is being calibrated.

        Raises:
            InputError: percentile outside (0, 100].
            CalibrationError: x is empty, or an expert's x or h is not finite; the scales are as they were.

        Numerics: experts that saw no token, or nothing but zeros (a routing weight of 0), keep the scales they had;
            those that never had any are `uncalibrated`. The activation mode in force does not change. Not for
            concurrent use.
        Cost: beside the call, a pass over each hit expert's weights, unpacked one after the other; reads the device. In
            fp8 on Hopper each call packs all experts once more: calibrate in another format.
        """
        self._check_call(x, topk_indices, topk_weights, None, needs_static=False)
        check_percentile(percentile)
        if x.numel() == 0:
            way_out = "calibrate on text that reaches this layer"
            raise CalibrationError("hidden states", "needs at least one token", "none", way_out)
        rows, indices, weights = (t.reshape(-1, t.shape[-1]) for t in (x, topk_indices, topk_weights.float()))
        scales = {
            "hidden states": self._copy_of_scales(self._input_scale),
            "input of the down projection": self._copy_of_scales(self._hidden_scale),
        }
        for expert in indices.unique().tolist():
            if not 0 <= expert < self.num_experts:
                continue  # it is not here
            token, slot = (indices == expert).nonzero(as_tuple=True)
            gate, up = self._expert(expert)[:2]
            h = ops.hidden_states(rows[token], gate, up, self.swiglu_limit)
            if self.weighting == "before_down":
                h = h * weights[token, slot, None]
            for (name, of_all), values in zip(scales.items(), (rows[token], h), strict=True):
                if values.any():
                    known = None if of_all[expert].isnan() else of_all[expert]
                    of_all[expert] = observed_scale(f"{name} of expert {expert}", values, percentile, known)
        self._input_scale, self._hidden_scale = scales.values()
        self._find_uncalibrated()
        return self.with_activations("bf16")._run(x, topk_indices, topk_weights, None)

    def fill_uncalibrated(self) -> tuple[int, ...]:
        """Give experts without static scales the largest that another one has, and return which experts these were.

        For experts that no text of the calibration reached. The largest scale does not saturate where the others do
        not; what it costs in resolution is unknown.

        Raises:
            CalibrationError: no expert has static scales.
        """
        missing = self.uncalibrated
        if len(missing) == self.num_experts:
            raise CalibrationError("static scales", "must be known of some expert", "none", "call calibrate() first")
        if missing:
            self._input_scale, self._hidden_scale = (
                torch.where(s.isnan(), s.nan_to_num(0.0).amax(), s)
                for s in (self._copy_of_scales(self._input_scale), self._copy_of_scales(self._hidden_scale))
            )
            self._find_uncalibrated()
        return missing

    @property
    def uncalibrated(self) -> tuple[int, ...]:
        """Experts that have no static scales, in ascending order; all of them before any calibration."""
        if self._input_scale is None or self._hidden_scale is None:
            return tuple(range(self.num_experts))
        return self._uncalibrated

    @property
    def gate(self) -> Nvfp4Stack:
        """The gate projections, (E, I, H)."""
        return self._projections()[0]

    @property
    def up(self) -> Nvfp4Stack:
        """The up projections, (E, I, H)."""
        return self._projections()[1]

    @property
    def down(self) -> Nvfp4Stack:
        """The down projections, (E, H, I)."""
        return self._projections()[2]

    @property
    def input_scale(self) -> Tensor | None:
        """Static scales of x, (E,) fp32, decode direction; NaN where unknown, None if all are."""
        return self._input_scale

    @property
    def hidden_scale(self) -> Tensor | None:
        """Static scales of h, (E,) fp32, decode direction; NaN where unknown, None if all are."""
        return self._hidden_scale

    # -- inside --------------------------------------------------------------------------------------------------

    def _arguments(self, x: Tensor, indices: Tensor, weights: Tensor) -> tuple[Any, ...]:
        return (
            x.reshape(-1, self.hidden_size).contiguous(),
            self._weights(),
            indices.reshape(-1, indices.shape[-1]).contiguous(),
            weights.reshape(-1, weights.shape[-1]).float().contiguous(),
            self._input_scale,
            self._hidden_scale,
            self.swiglu_limit,
            self.activations,
            self.activation_scale,
            self.weighting,
            self.backend,
        )

    def _problem(self, device: torch.device) -> Problem:
        sizes = self.hidden_size, self.intermediate_size
        return Problem(*sizes, self.activations, target_of(device), self.activation_scale, self.num_experts, self.top_k)

    def _choose(self, device: torch.device) -> str:
        return choose_routed_backend(self._backend_choice, self._problem(device)).name

    def _checked_scale(self, name: str, scale: float | Tensor | None, device: torch.device) -> Tensor | None:
        return checked_scale(name, scale, device, self.num_experts)

    def _expert(self, expert: int) -> tuple[Nvfp4Tensor, ...]:
        """gate, up and down of one expert, the others left packed."""
        packed = {name: w[expert : expert + 1] for name, w in zip(self._packed_names, self._weights(), strict=True)}
        unpacked = self._kernels(self.backend).unpack(packed, self.hidden_size, self.intermediate_size)
        return tuple(stack[0] for stack in unpacked)

    def _set_static_scales(self, input_scale: Any, hidden_scale: Any, device: torch.device) -> None:
        super()._set_static_scales(input_scale, hidden_scale, device)
        self._find_uncalibrated()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._find_uncalibrated()

    def _find_uncalibrated(self) -> None:
        """Note which experts lack a static scale: when scales change, since asking at a call would read the device."""
        self._uncalibrated: tuple[int, ...] = ()
        if self._input_scale is not None and self._hidden_scale is not None:
            unknown = self._input_scale.isnan() | self._hidden_scale.isnan()
            self._uncalibrated = tuple(unknown.nonzero()[:, 0].tolist())

    def _copy_of_scales(self, scales: Tensor | None) -> Tensor:
        """(E,), to be written; NaN where unknown."""
        if scales is not None:
            return scales.clone()
        return torch.full((self.num_experts,), torch.nan, device=self._weights()[0].device)

    def _check_call(
        self, x: Tensor, indices: Tensor, weights: Tensor, out: Tensor | None, needs_static: bool = True
    ) -> None:
        device = self._weights()[0].device
        check_hidden_states(x, self.hidden_size, self.max_tokens, device)
        check_routing(x, indices, weights, self.top_k, device)
        if out is not None:
            check_out(x, out)
        if needs_static:
            self._check_static_scales(
                "call calibrate() on typical hidden states, load or pass input_scale and hidden_scale, one for each "
                'expert, or choose activation_scale="dynamic" or "per_token"'
            )

    def _check_static_scales(self, ways_out: str) -> None:
        super()._check_static_scales(ways_out)
        if self._uncalibrated and self.activations == "nvfp4" and self.activation_scale == "static":
            first = ", ".join(map(str, self._uncalibrated[:8])) + (", ..." if len(self._uncalibrated) > 8 else "")
            got = f"none of {len(self._uncalibrated)} of {self.num_experts} experts: {first}"
            way_out = (
                "calibrate on text that reaches them, call fill_uncalibrated(), or choose another activation_scale"
            )
            raise CalibrationError('activation_scale="static"', "needs scales of every expert", got, way_out)

    def _mode(self) -> str:
        mode = super()._mode()
        return f"{mode} of all but {len(self._uncalibrated)} experts" if self._uncalibrated else mode

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, {self._mode()}, weighting={self.weighting!r}, "
            f"swiglu_limit={self.swiglu_limit or None}, top_k={self.top_k}, max_tokens={self.max_tokens}, "
            f"backend={self.backend!r}"
        )
