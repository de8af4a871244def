# SPDX-License-Identifier: Apache-2.0
"""Experts of a model in memory, exchanged for NVFP4 ones, and back; and static scales from text.

    handle = swap_experts(model)                                 quantise the model's own weights, routed and shared
    handle = swap_experts(model, checkpoint="nvfp4-dir")         or take them from an NVFP4 checkpoint of it
    scales = calibrate_model(model, batches)                     {expert: (input_scale, hidden_scale)}
    handle.restore()

`rule.py` says what counts as an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...checkpoints import Checkpoint, load_routed_experts, load_shared_expert, open_checkpoint
from ...checkpoints.input_scales import InputScales
from ...checkpoints.load import weighting_of
from ...errors import CalibrationError, InputError, UnsupportedError
from ...layers.checks import checked_choice
from ...layers.dispatched import DispatchedOverRanks
from ...layers.parallel import SummedOverRanks
from ...layers.part import LayerPart
from ...layers.routed_experts import Nvfp4RoutedExperts
from ...layers.shared_expert import Nvfp4SharedExpert
from .rule import ROUTED, SHARED, find_experts, kind_of, layer_number, setting, swiglu_limit, top_k_of, weights_of

Experts = Nvfp4SharedExpert | Nvfp4RoutedExperts
_OVER_RANKS = (SummedOverRanks, DispatchedOverRanks, LayerPart)


@dataclass(frozen=True)
class SwapHandle:
    """What `swap_experts` did, and how to undo it.

    Attributes:
        experts: module name -> the NVFP4 experts now in its place.
        originals: module name -> the module that was there; clear it to free its weights, if you will not restore.
    """

    model: nn.Module
    experts: dict[str, Experts]
    originals: dict[str, nn.Module]

    @property
    def shared(self) -> dict[int, Nvfp4SharedExpert]:
        """Layer number -> the shared expert now in that layer."""
        return {layer_number(name): e for name, e in self.experts.items() if isinstance(e, Nvfp4SharedExpert)}

    @property
    def routed(self) -> dict[int, Nvfp4RoutedExperts]:
        """Layer number -> the routed experts now in that layer."""
        return {layer_number(name): e for name, e in self.experts.items() if isinstance(e, Nvfp4RoutedExperts)}

    def set_activations(self, activations: str, activation_scale: str | None = None) -> None:
        """`set_activations` for all swapped experts."""
        _exchange(self.model, self.experts, activations, activation_scale)

    def restore(self) -> None:
        """Put the original modules back."""
        for name, original in self.originals.items():
            self.model.set_submodule(name, original)
        _let_save(self.model, self.originals)


def swap_experts(
    model: nn.Module,
    checkpoint: str | Path | Checkpoint | None = None,
    *,
    experts: str = "all",
    recipe: str = "modelopt",
    weighting: str | None = None,
    **options: Any,
) -> SwapHandle:
    """Exchange experts of a model for NVFP4 ones.

    Args:
        model: a transformers model (any nn.Module that fits the rule of `rule.py`), changed in place.
        checkpoint: where NVFP4 (or other) weights of the same model lie, a directory or hub id; None quantises the
            weights the model holds.
        experts: "all", "routed" or "shared".
        recipe: how floating weights are quantised; see `quantize`.
        weighting: of routed experts: "before_down" or "after_down"; None is where the model's own code applies routing
            weights: before in DeepSeek-V4, after in others. transformers' modules weigh after down in all models; the
            two differ in rounding, and in what a static hidden scale is of.
        **options: of `Nvfp4SharedExpert` and `Nvfp4RoutedExperts`: activations, activation_scale, max_tokens, backend.
            The SwiGLU limit comes from the module or its config, or from the checkpoint's; top_k from the config.

    Returns:
        A handle with the experts and `restore()`. Until then `model.save_pretrained` raises UnsupportedError: nobody
        could load what it would write.

    Raises:
        InputError: the model has no such experts, or some that do not fit; the model is unchanged.
        CheckpointError: the checkpoint lacks a layer or cannot be read; the model is unchanged.

    Cost: one module at a time: its weights in NVFP4 and one expert in fp32 beside the model. The originals stay in
        memory with the handle.
    """
    kinds = (ROUTED, SHARED) if checked_choice("experts", experts, ("all", ROUTED, SHARED)) == "all" else (experts,)
    originals = {name: module for kind in kinds for name, module in find_experts(model, kind).items()}
    opened = open_checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    options |= {"recipe": recipe}
    routed: dict[str, Any] = {"weighting": weighting or weighting_of(setting(model, "model_type"))}
    if ROUTED in kinds:
        routed["top_k"] = top_k_of(model)
    swapped: dict[str, Experts] = {}
    for name, module in originals.items():
        weights = weights_of(name, module)
        own = options | (routed if kind_of(name) == ROUTED else {})
        if opened is not None:
            swapped[name] = load_experts(opened, name, weights[0].device, **own)
        else:
            layer = Nvfp4RoutedExperts if kind_of(name) == ROUTED else Nvfp4SharedExpert
            swapped[name] = layer.from_weights(*weights, swiglu_limit=swiglu_limit(name, module, model), **own)
    for name, expert in swapped.items():
        model.set_submodule(name, expert)
    _keep_from_saving(model, swapped)
    return SwapHandle(model, swapped, originals)


def swap_shared_experts(
    model: nn.Module, checkpoint: str | Path | Checkpoint | None = None, recipe: str = "modelopt", **options: Any
) -> SwapHandle:
    """`swap_experts(model, checkpoint, experts="shared")`: the routed experts stay as they are."""
    return swap_experts(model, checkpoint, experts=SHARED, recipe=recipe, **options)


def load_experts(checkpoint: Checkpoint, name: str, device: torch.device, **options: Any) -> Experts:
    """The experts of a module, by its name, from a checkpoint; options are those of `load_shared_expert` or
    `load_routed_experts`.
    """
    load = load_shared_expert if kind_of(name) == SHARED else load_routed_experts
    return load(checkpoint, layer_number(name), device, **options)


def experts_of(model: nn.Module) -> dict[str, Experts]:
    """Module name -> NVFP4 experts, of all that a model has, in model order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Nvfp4SharedExpert | Nvfp4RoutedExperts)}


def set_activations(
    model: nn.Module,
    activations: str,
    activation_scale: str | None = None,
    experts: Mapping[str, Experts] | None = None,
) -> dict[str, Experts]:
    """Give a model's NVFP4 experts another activation format.

    Args:
        model: with NVFP4 experts, swapped or loaded.
        activations, activation_scale: as `with_activations` of the layers.
        experts: module name -> which; None is all.

    Returns:
        module name -> the experts now in its place.

    Raises:
        InputError, UnsupportedError: as the layers; the model is unchanged.

    Cost: weights stay where they are, except to and from fp8 on Hopper, where each layer is packed again: one at a
        time, and the old form goes as the new one comes, unless the caller holds it (in `experts`, say).
    """
    changed = dict(experts_of(model) if experts is None else experts)
    _exchange(model, changed, activations, activation_scale)
    return changed


def _exchange(model: nn.Module, experts: dict[str, Experts], activations: str, activation_scale: str | None) -> None:
    """Change experts in the model and in `experts` one after the other, so that no two are there in both forms."""
    for name in experts:
        experts[name].check_activations(activations, activation_scale)
    for name in experts:
        experts[name] = experts[name].with_activations(activations, activation_scale)
        model.set_submodule(name, experts[name])


@torch.no_grad()
def calibrate_model(model: nn.Module, batches: Iterable[Any], percentile: float | None = None) -> InputScales:
    """Run batches through a model with NVFP4 experts and set their static scales from what they see.

    Args:
        model: a model whose experts have been swapped, or loaded by `from_pretrained`; or one with `Nvfp4MoE` blocks.
            Whole: calibrate before `parallelize`.
        batches: each a tensor of token ids (B, S), or a mapping of keyword arguments for the model.
        percentile: of |x| per expert and call, in (0, 100]; None is the maximum.

    Returns:
        (input_scale, hidden_scale) of each expert, for `save_input_scales` or `convert(..., input_scales=...)`: layer
        -> of the shared one, (layer, number) -> of a routed one. Left out are routed experts that no token reached
        (`uncalibrated` names them), and modules whose names have no layer number or share it, as of an encoder and a
        decoder. `save_pretrained` of a loaded model writes the others' scales too.

    Raises:
        InputError: the model has no NVFP4 expert.
        CalibrationError: no batches, or an expert saw nothing, zeros or NaN; or the model is in parts, over ranks.

    Numerics: experts run with bf16 activations meanwhile; their activation modes are unchanged afterwards.

    Cost: that of `calibrate` of the layers: those in fp8 on Hopper pack their weights once more for every batch.
    """
    for name, module in model.named_modules():
        if isinstance(module, _OVER_RANKS):
            got = f"one rank's part of {name or type(module).__name__}"
            way_out = "calibrate the whole model before parallelize(), which keeps static scales"
            raise CalibrationError("model", "must have its experts whole", got, way_out)
    experts = experts_of(model)
    if not experts:
        raise InputError("model", "must have NVFP4 experts", "none", "call swap_experts first")
    reached: set[str] = set()
    with ExitStack() as undo:
        for name, expert in experts.items():
            for method, calibrate in _calibrating(name, expert, percentile, reached).items():
                setattr(expert, method, calibrate)
                undo.callback(delattr, expert, method)
        for batch in batches:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    if blind := sorted(experts.keys() - reached):  # also one that has scales already, from a checkpoint
        got = f"{blind} unseen" if reached else "none"
        raise CalibrationError("batches", "must reach every expert module", got, "give batches of real text")
    scales: InputScales = {}
    for name, layer in _numbered(experts).items():
        expert = experts[name]
        if isinstance(expert, Nvfp4SharedExpert):
            scales[layer] = expert.input_scale, expert.hidden_scale  # type: ignore[assignment]
        else:
            pairs = zip(expert.input_scale.tolist(), expert.hidden_scale.tolist(), strict=True)  # type: ignore[union-attr]
            scales |= {(layer, n): pair for n, pair in enumerate(pairs) if n not in expert.uncalibrated}
    return scales


def _numbered(experts: Mapping[str, Experts]) -> dict[str, int]:
    """Name -> layer, of the experts that are the only ones of their kind with that number."""
    found: dict[tuple[int, type], list[str]] = {}
    for name, expert in experts.items():
        with suppress(InputError):
            found.setdefault((layer_number(name), type(expert)), []).append(name)
    return {names[0]: layer for (layer, _), names in found.items() if len(names) == 1}


def _calibrating(
    name: str, experts: Any, percentile: float | None, reached: set[str]
) -> dict[str, Callable[..., Tensor]]:
    """What stands in for the methods of a layer that is being calibrated: the same arguments, the same results."""

    def calibrate(x: Tensor, routing: tuple[Tensor, ...], out: Tensor | None) -> Tensor:
        x = x if out is None else x.to(out.dtype)  # of fp32 the sum, not rounded
        y: Tensor = experts.calibrate(x, *routing, percentile=percentile)
        reached.add(name)
        return y if out is None else out.copy_(y)

    def shared_forward(x: Tensor, out: Tensor | None = None) -> Tensor:
        return calibrate(x, (), out)

    def forward(x: Tensor, topk_indices: Tensor, topk_weights: Tensor, out: Tensor | None = None) -> Tensor:
        return calibrate(x, (topk_indices, topk_weights), out)

    def with_shared(
        x: Tensor, topk_indices: Tensor, topk_weights: Tensor, shared: nn.Module, out: Tensor | None = None
    ) -> Tensor:
        total = forward(x, topk_indices, topk_weights, torch.empty(x.shape, device=x.device))
        total += shared(x, torch.empty_like(total))  # which has a stand-in of its own
        return total.to(x.dtype) if out is None else out.copy_(total)

    if isinstance(experts, Nvfp4SharedExpert):
        return {"forward": shared_forward}
    return {"forward": forward, "with_shared": with_shared}


# --- saving while experts are swapped ------------------------------------------------------------------------------


class _SavingRefused:
    """Stands for a model's `save_pretrained` while experts are swapped: it would write names that no reader knows.

    Args:
        former: what stood there, if not the method of the model's class.
    """

    def __init__(self, former: Any) -> None:
        self.former, self.swapped = former, set[str]()

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        got = f"{len(self.swapped)} of them, {min(self.swapped)} for one"
        way_out = (
            "call restore() of the handle first; an NVFP4 checkpoint is written by `nvfp4-experts quantize`, or by "
            'save_pretrained of a model loaded with Nvfp4ExpertsConfig(experts="all")'
        )
        raise UnsupportedError("save_pretrained", "must not be called while experts are swapped", got, way_out)


def _keep_from_saving(model: Any, names: Iterable[str]) -> None:
    if not hasattr(model, "save_pretrained"):
        return
    if not isinstance(model.save_pretrained, _SavingRefused):
        model.save_pretrained = _SavingRefused(vars(model).get("save_pretrained"))
    model.save_pretrained.swapped.update(names)


def _let_save(model: Any, names: Iterable[str]) -> None:
    """Once all that were swapped are back: two handles may be restored in any order."""
    refused = vars(model).get("save_pretrained")
    if not isinstance(refused, _SavingRefused):
        return
    refused.swapped.difference_update(names)
    if not refused.swapped:
        del model.save_pretrained
        if refused.former is not None:
            model.save_pretrained = refused.former
