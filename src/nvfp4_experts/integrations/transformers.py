# SPDX-License-Identifier: Apache-2.0
"""Shared experts of a transformers model, exchanged for NVFP4 ones, and back.

    handle = swap_shared_experts(model)                          quantise the model's own weights
    handle = swap_shared_experts(model, checkpoint="nvfp4-dir")  or take them from an NVFP4 checkpoint of it
    scales = calibrate_model(model, batches)                     {layer: (input_scale, hidden_scale)}
    handle.restore()

What counts as a shared expert is a rule, not a list of models: a module named `shared_expert` or `shared_experts` whose
children `gate_proj`, `up_proj` and `down_proj` are linear layers without bias and whose activation is SiLU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import load_shared_expert, open_checkpoint
from ..errors import CalibrationError, InputError
from ..layers.shared_expert import Nvfp4SharedExpert

_NAMES = ("shared_expert", "shared_experts")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class SwapHandle:
    """What `swap_shared_experts` did, and how to undo it.

    Attributes:
        experts: module name -> the NVFP4 expert now in its place.
        originals: module name -> the module that was there.
    """

    model: nn.Module
    experts: dict[str, Nvfp4SharedExpert]
    originals: dict[str, nn.Module]

    @property
    def layers(self) -> dict[int, Nvfp4SharedExpert]:
        """Layer number -> the NVFP4 expert of that layer."""
        return {layer_number(name): expert for name, expert in self.experts.items()}

    def set_activations(self, activations: str, activation_scale: str | None = None) -> None:
        """Change the activation format of every swapped expert; weights stay where they are."""
        changed = {name: e.with_activations(activations, activation_scale) for name, e in self.experts.items()}
        for name, expert in changed.items():
            self.model.set_submodule(name, expert)
        self.experts.update(changed)

    def restore(self) -> None:
        """Put the original modules back."""
        for name, original in self.originals.items():
            self.model.set_submodule(name, original)


def layer_number(name: str) -> int:
    """The N of `...layers.N...` in a module name.

    Raises:
        InputError: the name has no layer number.
    """
    found = _LAYER.search(name)
    if found is None:
        raise InputError("module name", "must contain layers.N", name, "swap models whose layers are numbered")
    return int(found[1])


def find_shared_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Module name -> module, of every shared expert by the rule of this file, in model order.

    Raises:
        InputError: there is none; or one has the name but not the shape, and why.
    """
    found = {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in _NAMES}
    for name, module in found.items():
        reason = _unfit(module)
        if reason:
            raise InputError(f"module {name}", "must be a bias-free SiLU gate/up/down MLP", reason, "leave this model")
    if not found:
        way_out = "give a model with shared experts, not yet swapped"
        raise InputError("model", f"must have modules named {' or '.join(_NAMES)}", type(model).__name__, way_out)
    return found


def swap_shared_experts(
    model: nn.Module, checkpoint: str | Path | None = None, recipe: str = "modelopt", **options: Any
) -> SwapHandle:
    """Exchange every shared expert of a model for an `Nvfp4SharedExpert`.

    Args:
        model: a transformers model (any nn.Module that fits the rule of this file), changed in place.
        checkpoint: where NVFP4 (or other) weights of the same model lie, a directory or hub id; None quantises the
            weights the model holds.
        recipe: how floating weights are quantised; see `quantize`.
        **options: of `Nvfp4SharedExpert`: activations, activation_scale, max_tokens, backend. The SwiGLU limit comes
            from the module or its config, or from the checkpoint's.

    Returns:
        A handle with the experts and `restore()`.

    Raises:
        InputError: the model has no shared expert, or one that does not fit; the model is unchanged.
        CheckpointError: the checkpoint lacks a layer or cannot be read; the model is unchanged.

    Cost: one expert at a time; peak extra memory is one expert in fp32.
    """
    originals = find_shared_experts(model)
    opened = None if checkpoint is None else open_checkpoint(checkpoint)
    experts = {}
    for name, module in originals.items():
        weights = [module.get_parameter(f"{projection}.weight") for projection in _PROJECTIONS]
        if opened is not None:
            layer, device = layer_number(name), weights[0].device
            experts[name] = load_shared_expert(opened, layer, device=device, recipe=recipe, **options)
        else:
            limit = _swiglu_limit(module, model)
            experts[name] = Nvfp4SharedExpert.from_weights(*weights, recipe=recipe, swiglu_limit=limit, **options)
    for name, expert in experts.items():
        model.set_submodule(name, expert)
    return SwapHandle(model, experts, originals)


@torch.no_grad()
def calibrate_model(
    model: nn.Module, batches: Iterable[Any], percentile: float | None = None
) -> dict[int, tuple[float, float]]:
    """Run batches through a swapped model and set every expert's static scales from what it sees.

    Args:
        model: a model whose shared experts have been swapped.
        batches: each a tensor of token ids (B, S), or a mapping of keyword arguments for the model.
        percentile: of |x| per expert and call, in (0, 100]; None is the maximum.

    Returns:
        layer -> (input_scale, hidden_scale), for `save_input_scales` or `convert(..., input_scales=...)`.

    Raises:
        InputError: the model has no swapped expert.
        CalibrationError: no batches, or an expert saw nothing, zeros or NaN.

    Numerics: experts run with bf16 activations meanwhile; their activation modes are unchanged afterwards.
    """
    experts = {name: m for name, m in model.named_modules() if isinstance(m, Nvfp4SharedExpert)}
    if not experts:
        raise InputError("model", "must have NVFP4 shared experts", "none", "call swap_shared_experts first")
    reached: set[str] = set()
    try:
        for name, expert in experts.items():
            expert.forward = _calibrating(name, expert, percentile, reached)  # type: ignore[method-assign]
        for batch in batches:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for expert in experts.values():
            del expert.forward
    if blind := sorted(experts.keys() - reached):  # also one that has scales already, from a checkpoint
        got = f"{blind} unseen" if reached else "none"
        raise CalibrationError("batches", "must reach every shared expert", got, "give batches of real text")
    scales = {layer_number(name): (expert.input_scale, expert.hidden_scale) for name, expert in experts.items()}
    return scales  # type: ignore[return-value]


def _calibrating(name: str, expert: Nvfp4SharedExpert, percentile: float | None, reached: set[str]) -> Any:
    def calibrate(x: torch.Tensor) -> torch.Tensor:
        y = expert.calibrate(x, percentile)
        reached.add(name)
        return y

    return calibrate


def _unfit(module: nn.Module) -> str | None:
    if isinstance(module, Nvfp4SharedExpert):
        return "an NVFP4 expert already"
    for name in _PROJECTIONS:
        linear = getattr(module, name, None)
        if not isinstance(linear, nn.Linear):
            return f"{name} is {type(linear).__name__}"
        if linear.bias is not None:
            return f"{name} has a bias"
    activation = getattr(module, "act_fn", None)
    probe = torch.linspace(-4, 4, 9)
    if activation is None or not torch.allclose(activation(probe), nn.functional.silu(probe), atol=1e-6):
        return f"act_fn is {activation}"
    return None


def _swiglu_limit(module: nn.Module, model: nn.Module) -> float | None:
    limit = getattr(module, "limit", None)
    return getattr(getattr(model, "config", None), "swiglu_limit", None) if limit is None else limit
