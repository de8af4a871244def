# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model are experts, by a rule and not by a list of models.

shared   named `shared_expert` or `shared_experts`; children `gate_proj`, `up_proj`, `down_proj` linear, without bias
routed   named `experts`; parameters `gate_up_proj` (E, 2I, H), gate first, and `down_proj` (E, H, I), no others
both     h = silu(min(gate, L)) * clamp(up, -L, L), L = `limit` of the module, or no clamp; tried on numbers
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...layers.routed_experts import Nvfp4RoutedExperts
from ...layers.shared_expert import Nvfp4SharedExpert

SHARED, ROUTED = "shared", "routed"
KINDS = {"shared_expert": SHARED, "shared_experts": SHARED, "experts": ROUTED}
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_FUSED = {"gate_up_proj", "down_proj"}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def layer_number(name: str) -> int:
    """The N of `...layers.N...` in a module name.

    Raises:
        InputError: the name has no layer number.
    """
    found = _LAYER.search(name)
    if found is None:
        raise InputError("module name", "must contain layers.N", name, "swap models whose layers are numbered")
    return int(found[1])


def kind_of(name: str) -> str | None:
    """ "shared" or "routed", by the last word of a module's name; None for every other module."""
    return KINDS.get(name.rpartition(".")[2])


def find_experts(model: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Module name -> module, of every expert of a kind by the rule of this file, in model order.

    Raises:
        InputError: there is none; or one has the name but does not fit, and why.
    """
    found = {name: module for name, module in model.named_modules() if kind_of(name) == kind}
    for name, module in found.items():
        check_fit(name, module)
    if not found:
        names = " or ".join(name for name, of in KINDS.items() if of == kind)
        way_out = f"give a model with {kind} experts, not yet swapped"
        raise InputError("model", f"must have modules named {names}", type(model).__name__, way_out)
    return found


def find_shared_experts(model: nn.Module) -> dict[str, nn.Module]:
    """`find_experts(model, "shared")`."""
    return find_experts(model, SHARED)


def check_fit(name: str, module: nn.Module) -> None:
    """Raise InputError, with the reason, if a module that is named like experts does not fit the rule."""
    shared = kind_of(name) == SHARED
    reason = _unfit_shared(module) if shared else _unfit_routed(module)
    if reason:
        rule = "must be a bias-free SiLU gate/up/down MLP" if shared else "must be fused SiLU experts, gate first"
        raise InputError(f"module {name}", rule, reason, "leave this model")


def weights_of(name: str, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of a module that fits: (I, H), (I, H), (H, I), with E in front where they are routed."""
    if kind_of(name) == ROUTED:
        gate, up = module.get_parameter("gate_up_proj").chunk(2, dim=1)
        return gate, up, module.get_parameter("down_proj")
    first, second, third = (module.get_parameter(f"{projection}.weight") for projection in _PROJECTIONS)
    return first, second, third


def swiglu_limit(name: str, module: nn.Module, model: nn.Module) -> float | None:
    """L of a module: its own `limit`; a shared expert without one has `swiglu_limit` of the model's config."""
    limit = getattr(module, "limit", None)
    if limit is None and kind_of(name) == SHARED:
        return getattr(getattr(model, "config", None), "swiglu_limit", None)
    return limit


def setting(model: nn.Module, name: str) -> Any:
    """A setting of the language model's config; None if there is none."""
    config: Any = getattr(model, "config", None)
    return getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, name, None)


def top_k_of(model: nn.Module) -> int:
    """The number of experts of a token, from the model's config.

    Raises:
        InputError: the config does not tell.
    """
    top_k = setting(model, "num_experts_per_tok")
    if top_k is None:
        raise InputError("config", "must have num_experts_per_tok", type(model).__name__, "pass top_k")
    return int(top_k)


def _unfit_shared(module: nn.Module) -> str | None:
    if isinstance(module, Nvfp4SharedExpert):
        return "an NVFP4 expert already"
    for name in _PROJECTIONS:
        linear = getattr(module, name, None)
        if not isinstance(linear, nn.Linear):
            return f"{name} is {type(linear).__name__}"
        if linear.bias is not None:
            return f"{name} has a bias"
    activation = getattr(module, "act_fn", None)
    return None if _computes(activation, nn.functional.silu, 64) else f"act_fn is {activation}"


def _unfit_routed(module: nn.Module) -> str | None:
    if isinstance(module, Nvfp4RoutedExperts):
        return "NVFP4 experts already"
    parameters = dict(module.named_parameters())
    if parameters.keys() != _FUSED:
        return f"its parameters are {sorted(parameters) or 'none'}"
    gate_up, down = (tuple(parameters[name].shape) for name in ("gate_up_proj", "down_proj"))
    experts, doubled, hidden = gate_up if len(gate_up) == 3 else (0, 0, 0)
    if doubled % 2 or down != (experts, hidden, doubled // 2) or 0 in gate_up:
        return f"gate_up_proj {gate_up} and down_proj {down}"
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        return "weights that are transposed or interleaved"
    gating = _gate_first(getattr(module, "limit", None))
    return None if _computes(getattr(module, "_apply_gate", None), gating, doubled) else "another gating function"


def _gate_first(limit: float | None) -> Callable[[Tensor], Tensor]:
    def gated(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        if limit:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return nn.functional.silu(gate) * up

    return gated


def _computes(function: Any, expected: Callable[[Tensor], Tensor], width: int) -> bool:
    """Whether a function gives what another does, on `width` numbers from -40 to 40 in no order."""
    if not callable(function):
        return False
    with torch.device("cpu"), torch.no_grad():
        probe = 40 * torch.sin(torch.arange(width).float())
        got, want = function(probe), expected(probe)
        return got.shape == want.shape and torch.allclose(got, want, atol=1e-5)
