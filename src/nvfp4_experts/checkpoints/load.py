# SPDX-License-Identifier: Apache-2.0
"""Loads layers from a checkpoint in any dialect: path and layer number in, a module that is ready to run out.

NVFP4                    used as it is, gate and up under their own global scales
MXFP4                    cast exactly, each weight under its own global scale
bf16, fp16, fp32, FP8    decoded, then quantised with `recipe`, gate and up under one global scale; a shared expert
                         that is to be kept (`load_moe(shared="keep")`) stays as it is

Weights go to the device as they are stored, one expert at a time, and are decoded and packed there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..formats.fp8_block import Fp8BlockTensor
from ..formats.mxfp4 import Mxfp4Tensor, mxfp4_to_nvfp4
from ..formats.nvfp4 import Nvfp4Tensor
from ..kernels.target import usable_device
from ..layers.kept_expert import KeptSharedExpert
from ..layers.moe import Nvfp4MoE
from ..layers.routed_experts import Nvfp4RoutedExperts
from ..layers.shards import cut_channels
from ..layers.shared_expert import Nvfp4SharedExpert
from ..layers.streaming import Weight, quantize_expert
from .errors import ConfigMismatchError, MissingConfigError, MissingExpertError
from .plan import check_shared
from .projections import load_projection, projection_input_scale
from .reader import CONFIG_FILE, Checkpoint, ExpertEntry, open_checkpoint
from .router import experts_per_token, load_router


def load_shared_expert(
    path: str | os.PathLike[str] | Checkpoint,
    layer: int,
    device: str | torch.device = "cpu",
    max_tokens: int = 8192,
    *,
    channels: range | None = None,
    activations: str = "auto",
    activation_scale: str | None = None,
    backend: str = "auto",
    recipe: str = "modelopt",
) -> Nvfp4SharedExpert:
    """The shared expert of one layer of a checkpoint.

    Args:
        path: directory, .safetensors file or hub id, in any dialect; or a checkpoint already open.
        layer: layer number, as in the tensor names.
        device: where the weights are prepared and the layer runs.
        max_tokens: the most tokens one call will bring.
        channels: the run of I to keep, as `layers.shards.channels_of` gives it: those rows of gate and up, columns of
            down. Default: all.
        activations: "nvfp4", "fp8", "bf16" or "auto".
        activation_scale: "static", "dynamic" or "per_token"; default: static if the checkpoint has input scales for
            gate, up and down, else dynamic.
        backend: name of a backend, or "auto".
        recipe: how scales are chosen if the checkpoint is not NVFP4 yet.

    Returns:
        A prepared Nvfp4SharedExpert on `device`.

    Raises:
        MissingExpertError, MissingConfigError, SuspiciousScaleError, and the errors of `open_checkpoint`.
        UnsupportedError: a device or backend that does not work here.
        FormatError: weights that hold NaN or infinity; MXFP4 whose exponents span more than the exact cast holds.
        LayoutError: channels that are no run of whole blocks of 16.

    Numerics: one tensor enters both gate and up, so if their input scales differ the larger one is used: it covers
        the range of both. swiglu_limit is config.json's.

    Cost: reads the layer's tensors and nothing else; FP8 weights are held as fp32 until they are quantised.
    """
    device = usable_device(device)
    checkpoint = opened(path)
    entry = checkpoint.shared_expert(layer)
    _check_config(checkpoint)
    input_scale, hidden_scale = shared_input_scales(checkpoint, entry)
    if activation_scale is None:
        activation_scale = "dynamic" if input_scale is None or hidden_scale is None else "static"
    gate, up, down = _weights(checkpoint, entry, device, channels, recipe)
    return Nvfp4SharedExpert.from_weights(
        gate,
        up,
        down,
        swiglu_limit=checkpoint.swiglu_limit,
        activations=activations,
        activation_scale=activation_scale,
        input_scale=input_scale,
        hidden_scale=hidden_scale,
        recipe=recipe,
        max_tokens=max_tokens,
        backend=backend,
    )


def load_kept_expert(
    path: str | os.PathLike[str] | Checkpoint, layer: int, device: str | torch.device = "cpu", max_tokens: int = 8192
) -> KeptSharedExpert:
    """The shared expert of one layer, in FP8 blocks or floating as it is stored; arguments as `load_shared_expert`.

    Raises:
        InputError: it is stored in NVFP4 or MXFP4, which `load_shared_expert` takes as it is.
        And what `load_shared_expert` raises.
    """
    device = usable_device(device)
    checkpoint = opened(path)
    entry = checkpoint.shared_expert(layer)
    _check_config(checkpoint)
    weights = []
    for projection in entry.projections.values():
        loaded = load_projection(checkpoint, projection)
        if isinstance(loaded, Mxfp4Tensor | Nvfp4Tensor):
            rule = "must be FP8 or floating, as all three projections, to be kept as it is"
            way_out = 'use load_shared_expert, or shared="nvfp4"'
            raise InputError(projection.prefix, rule, projection.format, way_out)
        weights.append(loaded.to(device))
    return KeptSharedExpert(*weights, swiglu_limit=checkpoint.swiglu_limit, max_tokens=max_tokens)


def load_routed_experts(
    path: str | os.PathLike[str] | Checkpoint,
    layer: int,
    device: str | torch.device = "cpu",
    max_tokens: int = 8192,
    *,
    experts: Sequence[int] | None = None,
    channels: range | None = None,
    activations: str = "auto",
    activation_scale: str | None = None,
    backend: str = "auto",
    recipe: str = "modelopt",
    weighting: str | None = None,
    top_k: int | None = None,
) -> Nvfp4RoutedExperts:
    """The routed experts of one layer of a checkpoint, or a share of them.

    Args:
        path, layer, device, max_tokens, channels, activations, backend, recipe: as for `load_shared_expert`.
        experts: numbers of the experts to load, a range or a sequence; the module's expert i is experts[i]. With
            range(a, b), subtract a from a router's indices. Default: all.
        activation_scale: "static", "dynamic" or "per_token"; default: static if every expert of the layer, loaded or
            not, has input scales for gate, up and down; else dynamic. So all shares of a layer have one mode.
        weighting: "before_down" or "after_down"; default: before_down, but after_down if config.json names a model
            other than DeepSeek-V4. V4's code weighs h, and its exports' input scales of down were calibrated on
            weighted h; V3's weighs the result. Exports calibrated through transformers' modules weigh after down, too.
        top_k: the most experts of a token; default: num_experts_per_tok of config.json.

    Returns:
        A prepared Nvfp4RoutedExperts on `device`.

    Raises:
        MissingExpertError: an expert asked for, or below n_routed_experts of config.json, that is not there.
        ConfigMismatchError: more experts than config.json says.
        InputError: experts that are none, twice the same, or negative.
        And what `load_shared_expert` raises.

    Numerics: as `load_shared_expert`, for each expert on its own; its static scales are its own. Experts that the
        checkpoint has none for are `uncalibrated`; the others keep theirs, whatever the mode.

    Cost: reads headers, and the input scales and weights of the experts asked for, one expert after the other: one in
        host memory, and one on the device beside the packed ones. What other experts hold is not read.
    """
    device = usable_device(device)
    checkpoint = opened(path)
    entries = owned_experts(checkpoint, layer, experts)
    _check_config(checkpoint)
    input_scale, hidden_scale = routed_input_scales(checkpoint, entries)
    if activation_scale is None:
        activation_scale = "static" if _has_input_scales(checkpoint.routed_experts(layer)) else "dynamic"
    return Nvfp4RoutedExperts.from_experts(
        (_weights(checkpoint, entry, device, channels, recipe) for entry in entries),
        len(entries),
        device=device,
        recipe=recipe,
        swiglu_limit=checkpoint.swiglu_limit,
        activations=activations,
        activation_scale=activation_scale,
        input_scale=input_scale,
        hidden_scale=hidden_scale,
        weighting=default_weighting(checkpoint) if weighting is None else weighting,
        top_k=experts_per_token(checkpoint) if top_k is None else top_k,
        max_tokens=max_tokens,
        backend=backend,
    )


def load_moe(
    path: str | os.PathLike[str] | Checkpoint,
    layer: int,
    device: str | torch.device = "cpu",
    max_tokens: int = 8192,
    *,
    shared: str = "nvfp4",
    activations: str = "auto",
    activation_scale: str | None = None,
    backend: str = "auto",
    recipe: str = "modelopt",
    weighting: str | None = None,
) -> Nvfp4MoE:
    """The whole mixture-of-experts block of one layer of a checkpoint: router, routed experts, shared expert.

    Args:
        path, layer, device, max_tokens, activations, backend, recipe: as for `load_shared_expert`.
        activation_scale: as there, for routed and shared experts each; default: static where they have the scales.
        shared: what becomes of a shared expert that is FP8 or floating: "nvfp4" quantises it, "keep" runs it as it is
            stored, with bf16 activations. One in NVFP4 or MXFP4 is NVFP4 either way, without a change of value.
        weighting: as for `load_routed_experts`.

    Returns:
        An Nvfp4MoE; its `shared` is None if config.json says that there are none.

    Raises:
        InputError: an unknown `shared`.
        And what `load_router`, `load_routed_experts` and `load_shared_expert` raise.

    Numerics: those of its parts.

    Cost: that of its parts.
    """
    check_shared(shared)
    device = usable_device(device)
    checkpoint = opened(path)
    router = load_router(
        checkpoint, layer, device
    )  # small, and what is wrong with it shows before the weights are read
    entry = shared_entry(checkpoint, layer)
    routed = load_routed_experts(
        checkpoint, layer, device, max_tokens,
        activations=activations, activation_scale=activation_scale, backend=backend, recipe=recipe, weighting=weighting,
        top_k=router.top_k,
    )  # fmt: skip
    if entry is None:
        return Nvfp4MoE(router, routed)
    if shared == "keep" and not is_fp4(entry):
        return Nvfp4MoE(router, routed, load_kept_expert(checkpoint, layer, device, max_tokens))
    quantised = load_shared_expert(
        checkpoint, layer, device, max_tokens,
        activations=activations, activation_scale=activation_scale, backend=backend, recipe=recipe,
    )  # fmt: skip
    return Nvfp4MoE(router, routed, quantised)


# --- what the checkpoint says --------------------------------------------------------------------------------


def opened(path: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    """A checkpoint that is opened now, or was already."""
    return path if isinstance(path, Checkpoint) else open_checkpoint(path)


def shared_entry(checkpoint: Checkpoint, layer: int) -> ExpertEntry | None:
    """The shared expert of a layer; None if there is none and config.json says so."""
    if layer in checkpoint.layers or checkpoint.setting("n_shared_experts") != 0:
        return checkpoint.shared_expert(layer)
    return None


def is_fp4(entry: ExpertEntry) -> bool:
    """Whether an expert is NVFP4 as it is stored, or becomes so by the exact cast."""
    return {projection.format for projection in entry.projections.values()} <= {"nvfp4", "mxfp4"}


def owned_experts(checkpoint: Checkpoint, layer: int, experts: Sequence[int] | None) -> list[ExpertEntry]:
    """The well-formed entries of the experts that `load_routed_experts` is asked for, in that order."""
    found = {entry.index: entry for entry in checkpoint.routed_experts(layer)}
    declared = checkpoint.setting("n_routed_experts")
    count = declared if isinstance(declared, int) else 1 + max(index for index in found if index is not None)
    if experts is None:
        if len(found) > count:
            rule = f"n_routed_experts of {CONFIG_FILE} is {count}"
            raise ConfigMismatchError(f"layer {layer}", rule, f"{len(found)} experts", "the config is another model's")
        experts = range(count)
    if not experts or len(set(experts)) < len(experts) or min(experts) < 0:
        rule = "must be numbers of experts, at least one, none twice"
        raise InputError("experts", rule, experts, "give a range, or None for all")
    missing = [index for index in experts if index not in found]
    if missing:
        rule, got = f"must hold the experts asked for, of {count}", f"{len(missing)} missing, first {missing[0]}"
        raise MissingExpertError(f"layer {layer}", rule, got, "fetch the shard that holds it, or ask for others")
    return [found[index].check() for index in experts]


def default_weighting(checkpoint: Checkpoint) -> str:
    """Where the model's own code applies routing weights, and so what its input scales of down were calibrated on."""
    return weighting_of(checkpoint.setting("model_type"))


def weighting_of(model_type: str | None) -> str:
    """As `default_weighting`, by the `model_type` of config.json."""
    return "before_down" if model_type in (None, "deepseek_v4") else "after_down"


def shared_input_scales(checkpoint: Checkpoint, entry: ExpertEntry) -> tuple[float | None, float | None]:
    """(input_scale, hidden_scale) of an expert; the input scale is the larger of gate's and up's."""
    scales = {name: projection_input_scale(checkpoint, p) for name, p in entry.projections.items()}
    gate, up = scales["gate"], scales["up"]
    return (None if gate is None or up is None else max(gate, up)), scales["down"]


def routed_input_scales(checkpoint: Checkpoint, entries: Sequence[ExpertEntry]) -> tuple[Tensor | None, Tensor | None]:
    """(E,) input scales and (E,) hidden scales of some experts; NaN where unknown, None if all are."""
    pairs = [shared_input_scales(checkpoint, entry) for entry in entries]
    known = torch.tensor([[math.nan if s is None else s for s in pair] for pair in pairs], dtype=torch.float32)
    input_scale, hidden_scale = (None if scales.isnan().all() else scales for scales in known.unbind(1))
    return input_scale, hidden_scale


def _has_input_scales(entries: Sequence[ExpertEntry]) -> bool:
    """Whether each of some experts has all of its input scales; by the headers, nothing is read."""
    return all(
        len(entry.projections) == 3 and all("input_scale" in p.names for p in entry.projections.values())
        for entry in entries
    )


# --- inside --------------------------------------------------------------------------------------------------


def _check_config(checkpoint: Checkpoint) -> None:
    if not checkpoint.config:
        rule = f"{CONFIG_FILE} must be there: it tells the limit at which the SwiGLU clamps"
        raise MissingConfigError(str(checkpoint.directory), rule, f"no {CONFIG_FILE}", "fetch it, or use from_weights")


def _weights(
    checkpoint: Checkpoint, entry: ExpertEntry, device: torch.device, channels: range | None, recipe: str
) -> tuple[Weight, Weight, Weight]:
    """gate, up and down of an expert on a device. They cross over in the form they are stored in.

    NVFP4 or floating; some channels alone NVFP4, since their scales are those of the whole.
    """

    def load(name: str) -> Weight:
        loaded = load_projection(checkpoint, entry.projections[name]).to(device)
        if isinstance(loaded, Mxfp4Tensor):
            return mxfp4_to_nvfp4(loaded)
        return loaded.dequantize() if isinstance(loaded, Fp8BlockTensor) else loaded

    weights = load("gate"), load("up"), load("down")
    return weights if channels is None else cut_channels(*quantize_expert(*weights, recipe), channels)
