# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a shared expert, or routed ones, and why not the others.

A backend is one module with a `BACKEND` object. It refuses a problem with a reason or takes it; it packs weights into
the form its kernel reads and can unpack them again; and it computes. A new backend is a new row in `_MODULES`, in
`_MODULES_BY_NAME` if it must be asked for, or in `_OTHER_FORMS`: the contract tests, `nvfp4-experts run --backend` and
the error messages find it there. One that has routed experts too has a `ROUTED` object, and a row in `_ROUTED`.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..formats.nvfp4 import Nvfp4Tensor
from ..formats.stack import Nvfp4Stack, StackLike
from .target import Target

ACTIVATIONS = ("nvfp4", "fp8", "bf16")
ACTIVATION_SCALES = ("static", "dynamic", "per_token")
WEIGHTINGS = ("before_down", "after_down")

# Preference order of "auto": the first that does not refuse. Modules load on first use.
_MODULES = {"sm100": "sm100.backend", "sm90": "sm90.backend", "cpu": "cpu.backend", "torch": "torch_backend"}
BACKENDS = tuple(_MODULES)

# Another form of a backend's weights is a backend of its own, tried with it: the name stands for both.
_OTHER_FORMS = {"sm90": {"sm90-fp8": "sm90.fp8_backend"}}


def _forms(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(form for one in names for form in (one, *_OTHER_FORMS.get(one, ())))


# What "auto" never takes, wherever it runs: each answers another question than how to be fast.
_MODULES_BY_NAME = {
    "sm100-torch": "sm100.vendor_torch",
    "sm100-flashinfer": "sm100.vendor_flashinfer",
    "sm100-decode": "sm100.decoding",
    "exact": "exact.backend",
}
BACKENDS_BY_NAME = tuple(_MODULES_BY_NAME)
ALL_BACKENDS = (*_forms(BACKENDS), *BACKENDS_BY_NAME)

# Where those that have routed experts keep them; the others refuse such a problem.
_ROUTED = {
    "sm100": "sm100.routed",
    "sm90": "sm90.routed",
    "sm90-fp8": "sm90.routed_fp8",
    "cpu": "cpu.routed",
    "torch": "torch_backend",
    "exact": "exact.backend",
    "sm100-torch": "sm100.vendor_torch",
    "sm100-decode": "sm100.decoding",
}
ROUTED_BACKENDS = tuple(_ROUTED)


@dataclass(frozen=True)
class Problem:
    """What a backend must know to say yes or no, and to prepare: the layer's shape, its activations and the machine."""

    hidden: int
    intermediate: int
    activations: str
    target: Target
    activation_scale: str = "dynamic"
    experts: int = 0
    """of a layer of routed experts; 0 is one shared expert"""
    top_k: int = 0
    """the most slots of a token: a call has at most max_tokens * top_k rows"""


@dataclass(frozen=True)
class Call:
    """The options of one forward call that are not tensors' shapes.

    Args:
        swiglu_limit: L of the clamp; 0 is off.
        activations: one of ACTIVATIONS.
        activation_scale: one of ACTIVATION_SCALES; used by "nvfp4" alone.
        input_scale, hidden_scale: () fp32 decode-direction scales on the device of x, for "static"; else None.
    """

    swiglu_limit: float
    activations: str
    activation_scale: str
    input_scale: Tensor | None = None
    hidden_scale: Tensor | None = None

    @property
    def clamp(self) -> float:
        """What gate and up are clamped to: L, or infinity where that is off or no fp32 is beyond it."""
        return self.swiglu_limit if 0 < self.swiglu_limit <= torch.finfo(torch.float32).max else math.inf


@dataclass(frozen=True)
class Routing:
    """Which experts each token of a call goes to.

    Args:
        indices: (T, k) int32 or int64, contiguous; outside [0, E): not here.
        weights: (T, k) fp32, contiguous.
        weighting: one of WEIGHTINGS: whether weights multiply h (fp32, before it enters) or what down makes of it.
    """

    indices: Tensor
    weights: Tensor
    weighting: str


@dataclass(frozen=True)
class Beside:
    """A shared expert that runs with routed ones: added to every token's sum after its slots, unweighted.

    Args:
        backend: whose `pack` made the weights.
        weights: in its order.
        call: its options.
    """

    backend: Backend
    weights: list[Tensor]
    call: Call


class Backend(Protocol):
    """What a backend module's `BACKEND` provides; `reference.py` says what `shared_expert` computes."""

    name: str

    def refusal(self, problem: Problem) -> str | None:
        """Why this backend cannot run the problem, as a clause; None if it can."""

    def pack(self, gate: Nvfp4Tensor, up: Nvfp4Tensor, down: Nvfp4Tensor) -> dict[str, Tensor]:
        """Weights in the form the kernel reads, by name; order is the order `shared_expert` takes them in."""

    def unpack(self, weights: Mapping[Any, Tensor], hidden: int, intermediate: int) -> tuple[Nvfp4Tensor, ...]:
        """gate, up, down from what `pack` made, byte for byte (codes under a zero scale may lose their magnitude)."""

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """Do what the first call would otherwise have to: compile, load, allocate. Nothing is left for a capture."""

    def scratch_bytes(self, device: torch.device) -> int:
        """Bytes that calls on a device keep beside weights, shared by all layers there."""

    def shared_expert(self, x: Tensor, weights: list[Tensor], call: Call, out: Tensor) -> None:
        """Write the layer's result for contiguous x (T, H), T > 0, into out (T, H), of the dtype of x or fp32."""


class RoutedBackend(Protocol):
    """A backend's `ROUTED`: as `Backend`, on stacks of E experts; `reference.py` says what it computes."""

    name: str

    def refusal(self, problem: Problem) -> str | None:
        """See `Backend`; the problem has experts."""

    def pack(self, gate: StackLike, up: StackLike, down: StackLike) -> dict[str, Tensor]:
        """The packed forms of the experts, stacked: `pack(...)[name][e]` is what one expert e alone is packed into.

        Takes gate[e], up[e] and down[e] once each, e ascending, and holds no expert beyond its packing: the stacks may
        be read from a disk meanwhile.
        """

    def unpack(self, weights: Mapping[Any, Tensor], hidden: int, intermediate: int) -> tuple[Nvfp4Stack, ...]:
        """See `Backend`."""

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """See `Backend`."""

    def scratch_bytes(self, device: torch.device) -> int:
        """See `Backend`."""

    def routed_experts(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor) -> None:
        """Write the layer's result for contiguous x (T, H), T > 0, into out (T, H), of the dtype of x or fp32.

        Static scales in `call` are (E,) fp32.
        """

    def prepare_moe(self, shared: Problem, device: torch.device, max_tokens: int) -> None:
        """What `prepare` does, for what `moe` needs beside."""

    def moe(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, beside: Beside, out: Tensor) -> None:
        """`routed_experts` and a shared expert: the fp32 sum of a token's slots, plus the fp32 result of the other."""


@functools.cache
def get_backend(name: str) -> Backend:
    """The backend of that name, imported on first use."""
    if name not in ALL_BACKENDS:
        raise UnsupportedError("backend", f"must be one of {('auto', *ALL_BACKENDS)}", repr(name), "use 'auto'")
    module = ChainMap(_MODULES, *_OTHER_FORMS.values(), _MODULES_BY_NAME)[name]
    return importlib.import_module(f".{module}", __package__).BACKEND


@functools.cache
def get_routed_backend(name: str) -> RoutedBackend:
    """The routed experts of the backend of that name; UnsupportedError if it has none."""
    if name not in _ROUTED:
        rule = f"must be one of {('auto', *_ROUTED)} for routed experts"
        raise UnsupportedError("backend", rule, repr(name), "use 'auto'")
    return importlib.import_module(f".{_ROUTED[name]}", __package__).ROUTED


def choose_backend(name: str, problem: Problem) -> Backend:
    """The backend to use for a problem.

    Args:
        name: a name from ALL_BACKENDS, or "auto" for the first of BACKENDS that does not refuse.
        problem: the layer and the machine.

    Raises:
        UnsupportedError: the named backend refuses (nothing else is tried), or every backend does; the message carries
            every backend's reason.
    """
    return get_backend(_first_able(name, problem, lambda other: get_backend(other).refusal(problem)))


def choose_routed_backend(name: str, problem: Problem) -> RoutedBackend:
    """The backend to use for a problem with experts; as `choose_backend`."""

    def refusal(other: str) -> str | None:
        if other not in _ROUTED:
            get_backend(other)  # an unknown name is another error
            return "has no routed experts"
        return get_routed_backend(other).refusal(problem)

    return get_routed_backend(_first_able(name, problem, refusal))


def _first_able(name: str, problem: Problem, refusal: Callable[[str], str | None]) -> str:
    wanted = _forms(BACKENDS if name == "auto" else (name,))
    for candidate in wanted:
        if refusal(candidate) is None:
            return candidate
    asked = dict.fromkeys((*wanted, *_forms(BACKENDS)))  # its own reason first
    reasons = "; ".join(f"{other}: {refusal(other) or 'can run this'}" for other in asked)
    raise UnsupportedError(
        f"backend {name!r}", f"must be able to run {problem}", reasons, "use 'auto' or change the layer"
    )
