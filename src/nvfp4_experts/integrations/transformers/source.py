# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, seen from the model that is being loaded from it: who takes which tensor.

    experts   module name -> its entries in the checkpoint: this package takes all their tensors, layer by layer
    fp8       parameter -> its FP8 blocks: transformers takes the values as numbers, this package multiplies by scales
    names     parameter or buffer -> (tensor, dtype) of the checkpoint: transformers takes it and only renames it
    unplaced  tensors that the model has no place for, as MTP layers: nobody takes them

`ignored` names exactly what this package takes, so that a tensor which neither takes is still told as unexpected.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ...checkpoints import Checkpoint, ExpertEntry, Projection, TensorInfo, open_checkpoint
from ...checkpoints.dialects import NVFP4_LAYOUTS, recognize
from ...checkpoints.errors import ConfigMismatchError, MissingExpertError
from ...checkpoints.reader import SINGLE_FILE
from ...errors import UnsupportedError
from .rule import ROUTED, check_fit, kind_of, layer_number, weights_of

_FOUR_BITS = {"nvfp4", "mxfp4"}
_ONLY_NVFP4 = {role.suffix for lay in NVFP4_LAYOUTS.values() for role in lay.roles.values()} - {"weight"}
_LAYER, _EXPERT = re.compile(r"(?<=\blayers\.)\d+(?=\.)"), re.compile(r"(?<=\bexperts\.)\d+(?=\.)")


def open_files(files: list[str] | None) -> Checkpoint:
    """The checkpoint of the files that transformers has found.

    Raises:
        UnsupportedError: there are none, or they are not safetensors.
    """
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        way_out = "load a directory or hub id with .safetensors files"
        raise UnsupportedError("nvfp4_experts", "loads safetensors checkpoints", files or "a state dict", way_out)
    first = Path(files[0])
    return open_checkpoint(first.parent if len(files) > 1 or first.name == SINGLE_FILE else first)


class Source:
    """A checkpoint that a model is about to be loaded from.

    Args:
        checkpoint: opened.
        model: on the meta device, as transformers made it.
        experts: as of `Nvfp4ExpertsConfig`.

    Raises:
        MissingExpertError: nothing in the checkpoint becomes ours, or it lacks experts that should.
        InputError: a module that should hold NVFP4 experts does not fit the rule of `rule.py`.
        ConfigMismatchError: experts whose number or size is not the model's.
        Any problem of those experts, as `ExpertEntry.check` raises it.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, experts: str) -> None:
        self.checkpoint = checkpoint
        self.experts = choose_experts(checkpoint, model, experts)
        self.fp8: dict[str, Projection] = {}
        self.names: dict[str, tuple[str, str]] = {}
        self.unplaced: list[str] = []
        self.ignored: set[str] = set()

    def trace(self, conversions: list[Any], model: nn.Module) -> list[Any]:
        """Follow every tensor through transformers' renaming; fills `fp8`, `names`, `unplaced` and `ignored`.

        Returns:
            The conversions without those that would merge experts that are ours.

        Raises:
            UnsupportedError: quantised weights outside experts that are no FP8 blocks, or that transformers merges.
        """
        tensors = self.checkpoint.tensors
        ours = {name for entries in self.experts.values() for entry in entries for name in entry_tensors(entry)}
        kept = [c for c in conversions if not isinstance(c, WeightConverter) or not _merges(c, conversions, ours)]
        renaming = _Renaming(kept, model)
        modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        for name in tensors.keys() - ours:
            prefix, _, suffix = name.rpartition(".")
            modules[prefix][suffix] = tensors[name]
        scales: set[str] = set()
        for prefix, found in modules.items():
            key, is_merged = renaming.turn(f"{prefix}.weight")
            if key in renaming.state and _is_quantised(found):
                self.fp8[key] = _fp8_blocks(self.checkpoint, prefix, found, is_merged)
                scales |= {info.name for suffix, info in found.items() if suffix != "weight"}
        for name in tensors.keys() - ours - scales:
            key, is_merged = renaming.turn(name)
            if key not in renaming.state:
                self.unplaced.append(name)
            elif key not in self.fp8 and not is_merged:
                self.names[key] = name, tensors[name].dtype
        self.ignored = _patterns(ours | scales, renaming)
        return kept


def entry_tensors(entry: ExpertEntry) -> Iterable[str]:
    """The names of all tensors of an expert."""
    return (name for projection in entry.projections.values() for name in projection.names.values())


def choose_experts(checkpoint: Checkpoint, model: nn.Module, experts: str) -> dict[str, list[ExpertEntry]]:
    """Module name -> entries in the checkpoint, routed ones by number, of the experts that become ours."""
    entries: dict[tuple[int, str], list[ExpertEntry]] = defaultdict(list)
    for entry in checkpoint.experts:
        entries[entry.layer, entry.kind].append(entry)
    chosen: dict[str, list[ExpertEntry]] = {}
    for name, module in model.named_modules():
        kind = kind_of(name)
        if kind is None or not _LAYER.search(name):
            continue
        found = entries.pop((layer_number(name), kind), [])
        if experts not in (kind, "all") and not any(_is_four_bits(entry) for entry in found):
            continue
        check_fit(name, module)
        _check_sizes(name, module, [entry.check() for entry in found])
        chosen[name] = found
    if homeless := [found[0].prefix for found in entries.values() if any(map(_is_four_bits, found))]:
        rule = "must have a module in the model"
        raise ConfigMismatchError(homeless[0], rule, f"{len(homeless)} without", "load it with its own config.json")
    if not chosen:
        rule = "must hold experts in NVFP4 or MXFP4"
        way_out = 'pass Nvfp4ExpertsConfig(experts="all"), which quantises while loading'
        raise MissingExpertError(str(checkpoint.path), rule, f"dialect {checkpoint.dialect}", way_out)
    return chosen


def _is_four_bits(entry: ExpertEntry) -> bool:
    return bool(entry.problems) or any(p.format in _FOUR_BITS for p in entry.projections.values())


def _check_sizes(name: str, module: nn.Module, entries: list[ExpertEntry]) -> None:
    gate = weights_of(name, module)[0].shape
    expected = list(range(gate[0])) if kind_of(name) == ROUTED else [None]
    if not entries:
        rule = f"must have its {kind_of(name)} experts in the checkpoint"
        raise MissingExpertError(name, rule, "none", "fetch the shards that hold them")
    if [entry.index for entry in entries] != expected:
        rule, got = f"must be experts 0 to {len(expected) - 1}", f"{len(entries)} experts"
        if expected == [None]:
            rule = "must be one shared expert"
        raise ConfigMismatchError(name, rule, got, "fetch the shards that are missing, or the model's own config.json")
    for entry in entries:
        if entry.projections["gate"].shape != tuple(gate[-2:]):
            rule, got = f"must be (I, H) = {tuple(gate[-2:])}", str(entry.projections["gate"].shape)
            raise ConfigMismatchError(entry.prefix, rule, got, "load it with the model's own config.json")


# --- transformers' renaming ----------------------------------------------------------------------------------------


class _Renaming:
    """Names of a checkpoint's tensors as transformers' loader turns them. state: the model's state dict."""

    def __init__(self, conversions: list[Any], model: nn.Module) -> None:
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._prefix, self.state = getattr(model, "base_model_prefix", None), model.state_dict()

    def turn(self, name: str) -> tuple[str, bool]:
        """The name in the model, and whether a converter makes that tensor, from this one and others."""
        turned, converter = rename_source_key(name, self._renamings, self._converters, self._prefix, self.state)
        if turned not in self.state and name in self.state:
            return name, False
        return turned, converter is not None


def _merges(converter: Any, conversions: list[Any], ours: set[str]) -> bool:
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    return any(rename_source_key(name, renamings, [converter])[1] is not None for name in _one_of_each(ours))


def _alike(name: str) -> str:
    return _EXPERT.sub("*", _LAYER.sub("*", name))


def _one_of_each(names: Iterable[str]) -> Iterable[str]:
    """One name of each that are alike but for layer and expert."""
    return {_alike(name): name for name in names}.values()


def _patterns(names: set[str], renaming: _Renaming) -> set[str]:
    """Regular expressions of the renamed names and of no others: for each that are alike, the layers that have it."""
    layers: dict[str, set[str]] = defaultdict(set)
    for name in names:
        layers[_alike(name)].update(_LAYER.findall(name))
    found = set()
    for name in _one_of_each(names):
        words = renaming.turn(name)[0].split(".")
        of_layers = "|".join(sorted(layers[_alike(name)], key=int))
        numbers = {"layers": f"(?:{of_layers})", "experts": r"\d+"}
        told = [
            numbers[before] if word.isdigit() and before in numbers else re.escape(word)
            for before, word in pairwise(["", *words])
        ]
        found.add("^" + r"\.".join(told) + "$")
    return found


# --- weights outside experts ---------------------------------------------------------------------------------------


def _is_quantised(found: dict[str, TensorInfo]) -> bool:
    """Whether a module's weight needs its other tensors to mean anything."""
    weight = found.get("weight")
    bytewise = weight is not None and weight.dtype in ("F8_E4M3", "F8_E5M2", "U8", "I8")
    return bytewise or bool(found.keys() & _ONLY_NVFP4)


def _fp8_blocks(checkpoint: Checkpoint, prefix: str, found: dict[str, TensorInfo], is_merged: bool) -> Projection:
    projection = recognize(prefix, found, checkpoint.declared_block)
    if projection.format != "fp8_block" or is_merged:
        rule = "quantised weights outside NVFP4 experts must be FP8 blocks, one weight a parameter"
        got = f"{projection.format}{', merged by transformers' if is_merged else ''}"
        raise UnsupportedError(prefix, rule, got, 'if it is an expert, pass Nvfp4ExpertsConfig(experts="all")')
    return projection
