# SPDX-License-Identifier: Apache-2.0
"""Opens a checkpoint: a directory, one .safetensors file or a hub id in; experts and tensors by name out.

    open_checkpoint("ckpt/").shared_expert(3).projections["gate"].format      -> "fp8_block"

Opening reads headers, the index and the configs, all bounded, and no tensor. Structure that cannot be trusted
raises here; a module that is not well formed is kept as a problem of its entry, so that the rest can still be
inspected, and raises when that entry is asked for.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dialects import (
    PROJECTIONS,
    Block,
    ExpertName,
    Projection,
    RouterRole,
    parse_mtp_name,
    parse_name,
    parse_router_name,
    recognize,
)
from .errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    ConfigMismatchError,
    DuplicateTensorError,
    HubError,
    IndexMismatchError,
    InvalidConfigError,
    InvalidIndexError,
    MissingExpertError,
    MissingShardError,
    MissingTensorError,
    NotACheckpointError,
    UnsafePathError,
    WrongShapeError,
)
from .safetensors_file import TensorInfo, is_text, parse_json, read_bounded, read_header, read_tensor

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
CONFIG_FILE, MODELOPT_CONFIG_FILE = "config.json", "hf_quant_config.json"
HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE*")
_NAME_BYTES = 255  # what file systems take
_FP32_MAX = torch.finfo(torch.float32).max
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ExpertEntry:
    """One expert: `kind` is "shared" or "routed", `index` the routed expert's number (None: shared).

    `projections` holds the well-formed ones of gate, up and down; `problems` what is wrong with the others.
    """

    layer: int
    kind: str
    index: int | None
    prefix: str
    projections: dict[str, Projection]
    problems: tuple[CheckpointError, ...] = field(default=(), repr=False)

    def check(self) -> ExpertEntry:
        """Itself, if it is well formed; otherwise raises its first problem."""
        if self.problems:
            raise self.problems[0]
        return self


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; see `open_checkpoint`.

    path: what was opened, resolved. directory: where its files lie. metadata: the `__metadata__` of each shard.
    tensors: every tensor by name, in file order. config, modelopt_config: {} where there is no such file.
    """

    path: Path
    directory: Path
    config: dict[str, Any] = field(repr=False)
    modelopt_config: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    metadata: dict[str, dict[str, str]] = field(repr=False)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in its own dtype, on the CPU, in fresh memory."""
        info = self.info(name)
        return read_tensor(self.directory / info.shard, info)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor `name`; reads those bytes only."""
        info = self.info(name)
        return read_tensor(self.directory / info.shard, info, (start, stop))

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of the tensor `name`."""
        if name not in self.tensors:
            raise MissingTensorError(
                name, f"must be one of the {len(self.tensors)} tensors", "no such name", "inspect them"
            )
        return self.tensors[name]

    @property
    def shards(self) -> list[str]:
        """The names of the files that hold tensors."""
        return list(self.metadata)

    @property
    def quantization(self) -> dict[str, Any]:
        """What config.json says of quantisation (`quantization_config`), else what hf_quant_config.json says."""
        declared = self.config.get("quantization_config") or self.modelopt_config.get("quantization") or {}
        if not isinstance(declared, dict):
            raise InvalidConfigError(
                "quantization_config", "must be an object", type(declared).__name__, "correct config.json"
            )
        return declared

    def setting(self, key: str) -> Any:
        """A setting of the language model: at the top of config.json, or in its `text_config`; None if it is absent."""
        nested = self.config.get("text_config")
        return self.config.get(key, nested.get(key) if isinstance(nested, dict) else None)

    @cached_property
    def swiglu_limit(self) -> float | None:
        """The clamp of gate and up in config.json; None where it is absent, null or 0 (off)."""
        limit = self.setting("swiglu_limit")
        if limit is None or limit == 0:
            return None
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit <= _FP32_MAX:
            raise InvalidConfigError(
                "swiglu_limit", "must be a positive fp32 number, 0 or null", limit, "correct config.json"
            )
        return float(limit)

    @cached_property
    def declared_block(self) -> Block | None:
        """The FP8 block of config.json (`weight_block_size`); None where it says nothing."""
        return _declared_block(self)

    @cached_property
    def experts(self) -> list[ExpertEntry]:
        """Every expert the names tell of, by layer, the shared one first. MTP layers are not among them."""
        return self._all_experts[0]

    @cached_property
    def mtp_experts(self) -> list[ExpertEntry]:
        """Experts of layers that predict further tokens: `mtp.N.*`, or beyond the last layer. Nothing runs them."""
        return self._all_experts[1]

    @cached_property
    def _all_experts(self) -> tuple[list[ExpertEntry], list[ExpertEntry]]:
        return _find_experts(self)

    @cached_property
    def routers(self) -> dict[int, list[tuple[RouterRole, TensorInfo]]]:
        """The tensors of each layer's router, by layer, as the names tell."""
        found: dict[int, list[tuple[RouterRole, TensorInfo]]] = defaultdict(list)
        for name, info in self.tensors.items():
            parts = parse_router_name(name)
            if parts is not None:
                found[parts[0]].append((parts[1], info))
        return dict(found)

    @cached_property
    def problems(self) -> list[CheckpointError]:
        """Everything that is wrong with any expert."""
        return [problem for entry in self.experts for problem in entry.problems]

    @property
    def layers(self) -> list[int]:
        """The layers that have a shared expert."""
        return [entry.layer for entry in self.experts if entry.kind == "shared"]

    def shared_expert(self, layer: int) -> ExpertEntry:
        """The shared expert of a layer; raises its problem if it is not well formed."""
        found = [entry for entry in self.experts if entry.layer == layer and entry.kind == "shared"]
        if len(found) > 1:
            rule, got = "must have one shared expert", " and ".join(entry.prefix for entry in found)
            raise AmbiguousCheckpointError(f"layer {layer}", rule, got, "remove the tensors of one")
        if found:
            return found[0].check()
        rule = f"layers with a shared expert are {self.layers or 'none'}"
        raise MissingExpertError(f"shared expert of layer {layer}", rule, f"layer {layer}", "choose one of these")

    def routed_experts(self, layer: int) -> list[ExpertEntry]:
        """The routed experts of a layer by number, well formed or not.

        Raises:
            MissingExpertError: there is none.
            AmbiguousCheckpointError: two have one number.
        """
        found = [entry for entry in self.experts if entry.layer == layer and entry.kind == "routed"]
        for one, next_one in pairwise(found):
            if one.index == next_one.index:
                rule, got = "must have one expert of a number", f"{one.prefix} and {next_one.prefix}"
                raise AmbiguousCheckpointError(f"layer {layer}", rule, got, "remove the tensors of one")
        if not found:
            layers = sorted({entry.layer for entry in self.experts if entry.kind == "routed"})
            rule = f"layers with routed experts are {layers or 'none'}"
            raise MissingExpertError(f"routed experts of layer {layer}", rule, f"layer {layer}", "choose one of these")
        return found

    @cached_property
    def dialect(self) -> str:
        """Of the experts: "plain", "deepseek", "modelopt", "compressed-tensors"; "mixed" if two, plain aside."""
        found = {projection.dialect for entry in self.experts for projection in entry.projections.values()} - {"plain"}
        return "mixed" if len(found) > 1 else found.pop() if found else "plain"


# --- opening ----------------------------------------------------------------------------------------------


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint for reading.

    Args:
        path: a directory with model.safetensors or model.safetensors.index.json, one .safetensors file, or a hub id
            `org/name`. What exists locally is never looked up on the hub.

    Raises:
        NotACheckpointError, HubError, UnsafePathError, InvalidIndexError, MissingShardError, IndexMismatchError,
        InvalidConfigError, AmbiguousCheckpointError, and the file errors of `read_header`.

    Cost: reads headers only; about 1 s per 100,000 tensors.
    """
    place = Path(path)
    if not place.exists():
        place = _download(path)
    place = place.resolve()
    directory = place if place.is_dir() else place.parent
    if place.is_dir():
        shards, index = _find_shards(directory)
    elif place.suffix == ".safetensors":
        shards, index = [place.name], None
    else:
        raise NotACheckpointError(
            str(path), "must be a directory or a .safetensors file", place.name, "pass the directory"
        )
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, dict[str, str]] = {}
    for shard in shards:
        found, metadata[shard] = read_header(safe_path(directory, shard))
        if twice := tensors.keys() & found.keys():
            name = min(twice)
            got = f"in {tensors[name].shard} and {shard}"
            raise DuplicateTensorError(name, "must be in one shard", got, "write the checkpoint again")
        tensors.update(found)
    if index is not None:
        _check_index(index, tensors)
    config, modelopt_config = (_read_config(directory, name) for name in (CONFIG_FILE, MODELOPT_CONFIG_FILE))
    return Checkpoint(place, directory, config, modelopt_config, tensors, metadata)


def _download(path: str | os.PathLike[str]) -> Path:
    if not _HUB_ID.fullmatch(str(path)):
        raise NotACheckpointError(str(path), "must exist, or be a hub id org/name", "neither", "check the path")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(path), allow_patterns=list(HUB_PATTERNS)))
    except Exception as bad:  # the hub's client raises errors of many libraries; none of them is ours to tell apart
        rule = "there is no such path here, so it must be a hub id that can be downloaded"
        got = f"{type(bad).__name__}: {bad}"
        raise HubError(str(path), rule, got, "check the spelling, the network and your access") from bad


def safe_path(directory: Path, name: str) -> Path:
    """The path of the file `name` in `directory`; a name or link that leads out of it raises `UnsafePathError`."""
    plain = name not in ("", ".", "..") and "\0" not in name and Path(name).name == name and "\\" not in name
    if not plain or len(name.encode(errors="surrogatepass")) > _NAME_BYTES or not is_text(name):
        raise UnsafePathError(name[:200], "must be a plain file name", "a path", "do not trust this checkpoint")
    return contained(directory, directory / name)


def contained(directory: Path, path: Path) -> Path:
    """`path`, unless it is a link that leads out of `directory`.

    The hub's cache holds snapshots/<revision>/<file> as links into ../../blobs: there the repository is the bound.
    """
    bound = directory.parent.parent if directory.parent.name == "snapshots" else directory
    if not path.resolve().is_relative_to(bound):
        rule = f"must stay inside {bound}"
        raise UnsafePathError(path.name, rule, "a link out of it", "copy the file in, or open the directory it lies in")
    return path


def _find_shards(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file() and index.is_file():
        raise AmbiguousCheckpointError(
            str(directory), f"{SINGLE_FILE} or {INDEX_FILE}", "both", "remove the one not meant"
        )
    if single.is_file():
        return [SINGLE_FILE], None
    if not index.is_file():
        rule = f"must hold {SINGLE_FILE} or {INDEX_FILE}"
        raise NotACheckpointError(
            str(directory), rule, "neither", "pass the checkpoint's own directory, or one .safetensors file"
        )
    weight_map = parse_json(INDEX_FILE, read_bounded(safe_path(directory, INDEX_FILE)), InvalidIndexError).get(
        "weight_map"
    )
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(v, str) for v in weight_map.values())):
        rule = "must hold a weight_map of tensor name -> file name"
        raise InvalidIndexError(INDEX_FILE, rule, type(weight_map).__name__, "fetch the index again")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not safe_path(directory, shard).is_file():
            raise MissingShardError(shard, f"{INDEX_FILE} names it, so it must be there", "no such file", "fetch it")
    return shards, weight_map


def _check_index(index: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name in sorted(index.keys() | tensors.keys()):
        listed, actual = index.get(name), tensors[name].shard if name in tensors else None
        if listed != actual:
            got = f"{listed or 'nowhere'} in the index, {actual or 'nowhere'} in the shards"
            raise IndexMismatchError(name, "index and shards must agree", got, "fetch the index and the shards again")


def _read_config(directory: Path, name: str) -> dict[str, Any]:
    if not (directory / name).exists():
        return {}
    if not (directory / name).is_file():
        raise InvalidConfigError(name, "must be a file", "a directory or device", "put the original's there")
    return parse_json(name, read_bounded(safe_path(directory, name)), InvalidConfigError)


# --- experts ----------------------------------------------------------------------------------------------


def _declared_block(checkpoint: Checkpoint) -> Block | None:
    block = checkpoint.quantization.get("weight_block_size")
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
        raise InvalidConfigError("weight_block_size", "must be [rows, columns]", block, "correct config.json")
    return (block[0], block[1])


def _find_experts(checkpoint: Checkpoint) -> tuple[list[ExpertEntry], list[ExpertEntry]]:
    """The experts of the layers, and those of MTP layers."""
    block = _declared_block(checkpoint)
    layers = checkpoint.setting("num_hidden_layers")
    grouped: tuple[dict[str, list[tuple[ExpertName, TensorInfo]]], ...] = defaultdict(list), defaultdict(list)
    for name, info in checkpoint.tensors.items():
        parts = parse_name(name)
        is_mtp = parts is None or (isinstance(layers, int) and parts.layer >= layers)
        parts = parts or parse_mtp_name(name)
        if parts is not None:
            grouped[is_mtp][parts.prefix].append((parts, info))
    own, mtp = (
        [_make_entry(checkpoint, prefix, members, block, bool(is_mtp)) for prefix, members in group.items()]
        for is_mtp, group in enumerate(grouped)
    )
    return sorted(own, key=_order), sorted(mtp, key=_order)


def _order(entry: ExpertEntry) -> tuple[int, bool, int]:
    return entry.layer, entry.kind == "routed", entry.index or 0


def _make_entry(
    checkpoint: Checkpoint,
    prefix: str,
    members: Iterable[tuple[ExpertName, TensorInfo]],
    block: Block | None,
    is_mtp: bool,
) -> ExpertEntry:
    modules: dict[tuple[str, str], dict[str, TensorInfo]] = defaultdict(dict)
    for parts, info in members:
        modules[parts.projection, parts.word][parts.suffix] = info
    projections: dict[str, Projection] = {}
    problems: list[CheckpointError] = []
    for (projection, word), found in modules.items():
        try:
            projections[projection] = recognize(f"{prefix}.{word}", found, block)
        except CheckpointError as problem:
            problems.append(problem)
    for projection in PROJECTIONS:
        if not any(projection == known for known, _ in modules):
            got = sorted(word for _, word in modules)
            way_out = "fetch the shard that holds it again"
            problems.append(
                MissingTensorError(f"{prefix}: {projection}", "an expert has gate, up and down", got, way_out)
            )
    if not problems:
        problems.extend(_disagreements(checkpoint, prefix, projections))
        if parts.index is not None and not is_mtp:
            problems.extend(_not_as_declared(checkpoint, projections))
    ordered = {name: projections[name] for name in PROJECTIONS if name in projections}
    kind = "shared" if parts.index is None else "routed"
    return ExpertEntry(parts.layer, kind, parts.index, prefix, ordered, tuple(problems))


def _disagreements(
    checkpoint: Checkpoint, prefix: str, projections: dict[str, Projection]
) -> Iterable[CheckpointError]:
    """Shapes of gate, up and down that do not fit each other, or the config's hidden size and dialect."""
    gate, up, down = (projections[name].shape for name in PROJECTIONS)
    hidden = checkpoint.setting("hidden_size")
    if not gate == up == down[::-1]:
        rule, got = "gate and up must be (I, H) and down (H, I)", f"gate {gate}, up {up}, down {down}"
        yield WrongShapeError(prefix, rule, got, "a shard of another model, or exchanged projections")
    elif isinstance(hidden, int) and gate[1] != hidden:
        rule, got = f"hidden_size {hidden} of config.json", f"gate {gate}"
        yield ConfigMismatchError(prefix, rule, got, "the config is another model's, or gate and down are exchanged")
    declared = checkpoint.quantization.get("quant_method")
    for projection in projections.values():
        if (
            projection.format == "nvfp4"
            and declared in ("modelopt", "compressed-tensors")
            and declared != projection.dialect
        ):
            rule, got = f"quant_method of the config is {declared}", f"tensors of {projection.dialect}"
            yield ConfigMismatchError(projection.prefix, rule, got, "correct quantization_config, or export again")


def _not_as_declared(checkpoint: Checkpoint, projections: dict[str, Projection]) -> Iterable[CheckpointError]:
    """Routed experts that are not what `moe_quant_algo` says; it goes before `expert_dtype`, which exports leave be."""
    for projection in projections.values():
        if checkpoint.quantization.get("moe_quant_algo") == "NVFP4" and projection.format != "nvfp4":
            rule, got = "moe_quant_algo of the config is NVFP4", f"tensors of {projection.dialect} {projection.format}"
            way_out = "fetch the export's own shard, or remove moe_quant_algo from quantization_config"
            yield ConfigMismatchError(projection.prefix, rule, got, way_out)
