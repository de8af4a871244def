# SPDX-License-Identifier: Apache-2.0
"""Converts a whole checkpoint to NVFP4, shard by shard, in bounded memory: `convert(SRC, DST)`.

    DST.partial.lock   held while a process works; holds the fingerprint of the plan
    DST.partial/       finished shards under their names, the one at work under its name + ".tmp"
    DST/               appears by one rename when everything is written and synced

A conversion that was killed is started again in the same words: shards that are finished are kept if the source, the
options and the package are the same (the fingerprint) and their headers are the planned ones; else it starts afresh.
Memory: one band of rows and its temporaries, see `weights.BAND_VALUES`; docs/measured.md has the measurement.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ConversionRunningError, DiskFullError, OutputExistsError, OutputInsideSourceError, UnsafePathError
from .input_scales import InputScales
from .plan import Options, Plan, ShardPlan, make_plan
from .quant_config import build_configs
from .reader import CONFIG_FILE, INDEX_FILE, MODELOPT_CONFIG_FILE, Checkpoint, contained, open_checkpoint
from .safetensors_file import COPY_BYTES, SafetensorsWriter, layout_header, read_range
from .weights import WeightConverter

Progress = Callable[[int, int, str], None]

_WRITTEN_ANEW = {CONFIG_FILE, MODELOPT_CONFIG_FILE, INDEX_FILE}
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did.

    path: the finished directory. converted: weights by the format they had. separate: experts whose gate and up kept
    two global scales. copied: tensors passed through. reused_shards: finished by an earlier, interrupted run.
    left_out: files of the source that hold weights in another form and are not part of the checkpoint.
    """

    path: Path
    dialect: str
    converted: dict[str, int]
    separate: list[str]
    copied: int
    source_bytes: int
    output_bytes: int
    reused_shards: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dialect: str = "modelopt",
    experts: str = "shared",
    shared: str = "nvfp4",
    recipe: str = "modelopt",
    separate_scales: bool = False,
    input_scales: InputScales | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write a checkpoint whose experts are NVFP4 and whose other tensors are those of SRC, byte for byte.

    Args:
        src: directory, .safetensors file or hub id; only read.
        dst: a directory that does not exist; appears when it is finished.
        dialect: "modelopt" or "compressed-tensors".
        experts: "shared", "routed" or "all".
        shared: "nvfp4", or "keep" to leave shared experts as they are whatever `experts` says. With experts="all", the
            output is then a hybrid as NVIDIA's exports of DeepSeek V4 are.
        recipe: how scales are chosen where values are rounded (bf16, fp16, fp32, FP8); see `formats.recipes`.
        separate_scales: give gate and up their own global scale; default one for both.
        input_scales: {layer: (input_scale, hidden_scale)} of shared experts, {(layer, number): ...} of routed ones,
            decode direction; as `calibrate_model` of integrations/transformers returns them.
        progress: called with (bytes written, bytes in all, name of the shard).

    Returns:
        ConversionReport.

    Raises:
        InputError: an unknown dialect, experts, shared or recipe; experts and shared that leave nothing.
        OutputExistsError, OutputInsideSourceError, ConversionRunningError, DiskFullError: the destination.
        NothingToConvertError, MixedOutputError, InputScalesError, NonFiniteWeightError, InexactCastError: the request.
        Any error of `open_checkpoint` and `ExpertEntry.check`: the source.

    Numerics: MXFP4 is cast exactly, under one exponent for gate and up if that is exact, else each under its own.
        NVFP4 of another dialect keeps codes and block scales; a global scale turned into its reciprocal is the fp32
        number whose reciprocal is the old one, where there is such a number.

    Cost: reads a converted weight twice (MXFP4 four times), everything else once; writes once.
    """
    options = Options(dialect, experts, recipe, separate_scales, input_scales or {}, shared)
    target = Path(dst)
    _check_target(target)
    checkpoint = open_checkpoint(src)
    if target.resolve().is_relative_to(checkpoint.directory):
        rule = "must lie outside the source, which is never touched"
        raise OutputInsideSourceError(str(dst), rule, f"inside {checkpoint.directory}", "choose another place")
    files, left_out = _other_files(checkpoint)
    plan = make_plan(checkpoint, options, files)
    configs = build_configs(checkpoint.config, checkpoint.quantization, plan.tensors, dialect, recipe)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _disk_errors(target), _workplace(target, plan) as place:
        finished = [shard.name for shard in plan.shards if _is_finished(place, shard)]
        _check_space(place, plan, finished, files, checkpoint)
        _write_shards(place, plan, finished, progress)
        for name in files:
            _copy_file(checkpoint.directory / name, place / name)
        if checkpoint.path.is_dir() and (checkpoint.directory / INDEX_FILE).exists():
            _write_json(place / INDEX_FILE, _index(plan))
        for name, config in zip((CONFIG_FILE, MODELOPT_CONFIG_FILE), configs, strict=True):
            if config is not None:
                _write_json(place / name, config)
        _sync_directory(place)
        _check_target(target)
        os.rename(place, target)
        _sync_directory(target.parent)
    converted: dict[str, int] = {}
    for weight in plan.weights:
        converted[weight.source.format] = converted.get(weight.source.format, 0) + 1
    return ConversionReport(
        target,
        dialect,
        converted,
        _separate(open_checkpoint(target)),
        sum(len(shard.copies) for shard in plan.shards),
        sum(info.nbytes for info in checkpoint.tensors.values()),
        sum(spec.nbytes for spec in plan.tensors.values()),
        finished,
        left_out,
    )


# --- the destination -----------------------------------------------------------------------------------------


def _check_target(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise OutputExistsError(
            str(target), "must not exist: nothing is overwritten", "it exists", "choose another name"
        )


@contextmanager
def _workplace(target: Path, plan: Plan) -> Iterator[Path]:
    """DST.partial, locked; emptied unless it was made by the same plan."""
    place = target.with_name(target.name + ".partial")
    lock_path = target.with_name(target.name + ".partial.lock")
    with open(lock_path, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as held:
            rule = "one conversion at a time may write to a destination"
            raise ConversionRunningError(str(target), rule, "another is running", "wait for it or stop it") from held
        _check_target(target)  # another run may have finished between the first check and the lock
        lock.seek(0)
        fingerprint = lock.read()
        if not fingerprint and place.exists():  # every conversion writes its fingerprint before it makes the directory
            lock_path.unlink()
            rule = "must not exist, unless an interrupted conversion left it"
            raise OutputExistsError(
                str(place), rule, "a directory of someone else's", "move it, or choose another name"
            )
        if fingerprint != plan.fingerprint:
            if place.exists():
                shutil.rmtree(place)
            lock.truncate(0)
            lock.write(plan.fingerprint)
            lock.flush()
            os.fsync(lock.fileno())
        place.mkdir(exist_ok=True)
        yield place
        lock_path.unlink()


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        way_out = "make room and start it again in the same words: finished shards are kept"
        raise DiskFullError(str(target), "the disk must hold the output", error.strerror, way_out) from error


def _check_space(place: Path, plan: Plan, finished: list[str], files: list[str], checkpoint: Checkpoint) -> None:
    needed = sum(spec.nbytes for shard in plan.shards if shard.name not in finished for spec in shard.specs)
    needed += sum((checkpoint.directory / name).stat().st_size for name in files)
    free = shutil.disk_usage(place).free
    if needed > free:
        rule = f"{needed} bytes are left to write"
        raise DiskFullError(str(place), rule, f"{free} bytes free", "make room, or choose another disk")


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- shards --------------------------------------------------------------------------------------------------


def _is_finished(place: Path, shard: ShardPlan) -> bool:
    """Whether an earlier run finished this shard: it has its name only then; its header and size are as planned."""
    path = place / shard.name
    planned = layout_header(shard.specs, shard.metadata)[0]
    size = len(planned) + sum(spec.nbytes for spec in shard.specs)
    return path.exists() and path.stat().st_size == size and read_range(path, 0, len(planned)) == planned


def _write_shards(place: Path, plan: Plan, finished: list[str], progress: Progress | None) -> None:
    converter = WeightConverter(plan.checkpoint, plan.options)
    total = sum(spec.nbytes for spec in plan.tensors.values())
    done = 0
    for shard in plan.shards:

        def advance(count: int, name: str = shard.name) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total, name)

        if shard.name in finished:
            advance(sum(spec.nbytes for spec in shard.specs))
            continue
        with SafetensorsWriter(place / shard.name, shard.specs, shard.metadata) as writer:
            for info in shard.copies:
                source = plan.checkpoint.directory / info.shard
                for start in range(info.start, info.stop, COPY_BYTES):
                    part = read_range(source, start, min(start + COPY_BYTES, info.stop))
                    writer.write(info.name, part, start - info.start)
                    advance(len(part))
            for weight in shard.weights:
                converter.write(weight, writer)
                advance(sum(spec.nbytes for spec in weight.outputs.values()))


def _index(plan: Plan) -> dict[str, object]:
    weight_map = {spec.name: shard.name for shard in plan.shards for spec in shard.specs}
    total = sum(spec.nbytes for spec in plan.tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _separate(output: Checkpoint) -> list[str]:
    """Experts of the finished output whose gate and up are NVFP4 under different global scales."""
    found = []
    for entry in output.experts:
        if not entry.problems and all(entry.projections[name].format == "nvfp4" for name in ("gate", "up")):
            gate, up = entry.projections["gate"], entry.projections["up"]
            scales = (output.read(p.names["global_scale"]).item() for p in (gate, up))
            if len(set(scales)) > 1:
                found.append(entry.prefix)
    return found


# --- other files ---------------------------------------------------------------------------------------------


def _other_files(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Files to copy as they are (tokenizer, code, licence, ...), and files of weights that are left out.

    Hidden files and folders (a download's own bookkeeping) are passed over. A single .safetensors file has no others.
    """
    copied: list[str] = []
    left_out: list[str] = []
    if not checkpoint.path.is_dir():
        return copied, left_out
    for folder, folders, names in os.walk(checkpoint.directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            relative = str(path.relative_to(checkpoint.directory))
            if name.startswith(".") or relative in _WRITTEN_ANEW or relative in checkpoint.metadata:
                continue
            if path.suffix in _OTHER_WEIGHTS:
                left_out.append(relative)
            else:
                if not contained(checkpoint.directory, path).is_file():
                    rule = "must be a file, to be copied"
                    raise UnsafePathError(relative, rule, "a link to nothing, or a device", "remove it")
                copied.append(relative)
    return copied, left_out


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _whole_file(target) as temporary:
        shutil.copyfile(source, temporary)


def _write_json(target: Path, content: object) -> None:
    with _whole_file(target) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="ascii")


@contextmanager
def _whole_file(target: Path) -> Iterator[Path]:
    """A temporary path that becomes `target`, synced, or is removed if writing it fails."""
    temporary = target.with_name(target.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
