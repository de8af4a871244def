# SPDX-License-Identifier: Apache-2.0
"""Reads and writes .safetensors files a slice at a time; a header in, bytes of one row range out, and the reverse.

    byte 0..8        little-endian u64 H, the header's length
    byte 8..8+H      JSON {name: {"dtype", "shape", "data_offsets": [a, b]}, "__metadata__": {str: str}}
    byte 8+H..       data; a tensor's bytes are 8+H+a .. 8+H+b, row-major, little-endian

Rules checked before a tensor is trusted: H is at most `MAX_HEADER_BYTES`; no name twice; b - a = shape x dtype;
sorted by a, the ranges touch each other without overlap or hole and end where the file ends. (The format's own
library maps or loads whole files; row ranges and a write at a known offset are what keeps a conversion's memory
bounded, hence this module.)
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .errors import (
    DuplicateTensorError,
    HeaderTooLargeError,
    IncompleteWriteError,
    InvalidHeaderError,
    OverlappingTensorsError,
    TensorSizeError,
    TruncatedFileError,
    UnknownDtypeError,
    UnusedBytesError,
)

MAX_HEADER_BYTES = 100_000_000
COPY_BYTES = 8 << 20

# name -> (bits of one value, torch dtype); None: torch has no dtype of that name, the bytes can only be copied
DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool), "U8": (8, torch.uint8), "I8": (8, torch.int8),
    "U16": (16, torch.uint16), "I16": (16, torch.int16), "U32": (32, torch.uint32), "I32": (32, torch.int32),
    "U64": (64, torch.uint64), "I64": (64, torch.int64),
    "F16": (16, torch.float16), "BF16": (16, torch.bfloat16), "F32": (32, torch.float32), "F64": (64, torch.float64),
    "C64": (64, torch.complex64),
    "F8_E4M3": (8, torch.float8_e4m3fn), "F8_E5M2": (8, torch.float8_e5m2), "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz), "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "F4": (4, None), "F6_E2M3": (6, None), "F6_E3M2": (6, None),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: its safetensors dtype name, shape, and byte range [start, stop) in the file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    return next(name for name, (_, known) in DTYPES.items() if known == dtype)


def tensor_bytes(what: str, dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor: values x bits / 8, which must be whole."""
    if dtype not in DTYPES:
        raise UnknownDtypeError(
            what, f"dtype must be one of {', '.join(DTYPES)}", dtype, "write it again in one of these"
        )
    bits = prod(shape) * DTYPES[dtype][0]
    if bits % 8:
        raise TensorSizeError(what, "must fill whole bytes", f"{bits} bits", "the file is damaged or not safetensors")
    return bits // 8


# --- reading ----------------------------------------------------------------------------------------------


def parse_json(what: str, text: bytes, error: type[InvalidHeaderError] | Any) -> dict[str, Any]:
    """A JSON object with no key twice; anything else raises `error` (a key twice: `DuplicateTensorError`)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DuplicateTensorError(what, "each key may stand once", f"{twice!r} twice", "write the file again")
        return made

    try:
        made = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as bad:
        raise error(what, "must be JSON", f"{type(bad).__name__}: {bad}", "fetch or write the file again") from bad
    if not isinstance(made, dict):
        raise error(what, "must be a JSON object", type(made).__name__, "fetch or write the file again")
    return made


def is_text(name: str) -> bool:
    """Whether a name out of JSON can be written again: a lone surrogate, which JSON can spell, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def read_bounded(path: Path) -> bytes:
    """The bytes of a small file (an index, a config), refused beyond `MAX_HEADER_BYTES`."""
    with open(path, "rb") as file:
        text = file.read(MAX_HEADER_BYTES + 1)
    if len(text) > MAX_HEADER_BYTES:
        raise HeaderTooLargeError(
            str(path), f"at most {MAX_HEADER_BYTES} bytes", "more", "this is no file of that kind"
        )
    return text


def _parse_entry(what: str, name: str, entry: Any, shard: str, data_start: int) -> TensorInfo:
    def natural(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    fits = (
        is_text(name)
        and isinstance(entry, dict)
        and entry.keys() == {"dtype", "shape", "data_offsets"}
        and isinstance(entry["dtype"], str)
    )
    if not (fits and natural(entry["shape"]) and natural(entry["data_offsets"]) and len(entry["data_offsets"]) == 2):
        rule = "each entry must be name: {dtype: text, shape: [n, ...], data_offsets: [a, b]}"
        raise InvalidHeaderError(f"{what}: {name!a}", rule, str(entry)[:200], "write the file again")
    a, b = entry["data_offsets"]
    info = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), shard, data_start + a, data_start + b)
    if (expected := tensor_bytes(f"{what}: {name}", info.dtype, info.shape)) != b - a:
        rule = f"{info.dtype} {list(info.shape)} takes {expected} bytes"
        raise TensorSizeError(f"{what}: {name}", rule, f"offsets {a}..{b}", "the header is wrong; write the file again")
    return info


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a file, in file order, and its `__metadata__`.

    Raises:
        TruncatedFileError, HeaderTooLargeError, InvalidHeaderError, DuplicateTensorError, UnknownDtypeError,
        TensorSizeError, OverlappingTensorsError, UnusedBytesError: one per rule of the module docstring.

    Cost: reads the header and nothing else.
    """
    what = path.name
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise TruncatedFileError(what, "at least 8 bytes", size, "fetch the file again")
        if length > MAX_HEADER_BYTES:
            rule = f"a header is at most {MAX_HEADER_BYTES} bytes"
            raise HeaderTooLargeError(what, rule, length, "this is not a safetensors file, or it is damaged")
        text = file.read(length)
    if len(text) < length:
        raise TruncatedFileError(what, f"a header of {length} bytes", f"{len(text)} bytes", "fetch the file again")
    header = parse_json(what, text, InvalidHeaderError)
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise InvalidHeaderError(
            f"{what}: __metadata__", "must map text to text", str(metadata)[:200], "write it again"
        )
    found = sorted(
        (_parse_entry(what, name, entry, path.name, 8 + length) for name, entry in header.items()),
        key=lambda info: (info.start, info.stop),
    )
    end = 8 + length
    for info in found:
        if info.start < end:
            rule = f"must start at or after byte {end}, where the tensor before it ends"
            raise OverlappingTensorsError(
                f"{what}: {info.name}", rule, info.start, "the header is wrong; do not trust it"
            )
        if info.start > end:
            rule = f"must start at byte {end}, where the tensor before it ends"
            raise UnusedBytesError(f"{what}: {info.name}", rule, info.start, "bytes without a name are not allowed")
        end = info.stop
    if size < end:
        raise TruncatedFileError(what, f"{end} bytes, as the header says", f"{size} bytes", "fetch the file again")
    if size > end:
        raise UnusedBytesError(
            what, f"{end} bytes, as the header says", f"{size} bytes", "bytes without a name are not allowed"
        )
    return {info.name: info for info in found}, metadata


def read_range(path: Path, start: int, stop: int) -> bytearray:
    """Bytes [start, stop) of a file; a file that has become shorter raises `TruncatedFileError`."""
    data = bytearray(stop - start)
    with memoryview(data) as view, open(path, "rb", buffering=0) as file:
        done = 0
        while done < len(data):
            count = os.preadv(file.fileno(), [view[done : done + (1 << 30)]], start + done)
            if count == 0:
                raise TruncatedFileError(path.name, f"bytes up to {stop}", start + done, "fetch the file again")
            done += count
    return data


def read_tensor(path: Path, info: TensorInfo, rows: tuple[int, int] | None = None) -> Tensor:
    """A tensor, or its rows [start, stop) along the first dimension, read into fresh memory.

    Cost: one allocation of the bytes asked for; no map, no copy.
    """
    dtype = DTYPES[info.dtype][1]
    if dtype is None:
        raise UnknownDtypeError(info.name, "must be a dtype torch can hold", info.dtype, "copy its bytes instead")
    start, stop, shape = info.start, info.stop, info.shape
    if rows is not None:
        if not shape or not 0 <= rows[0] <= rows[1] <= shape[0]:
            rule = f"rows must lie in 0..{shape[0] if shape else 0}, the first not behind the last"
            raise InputError(info.name, rule, f"{rows[0]}..{rows[1]} of a tensor {list(shape)}", "look at its shape")
        row_bytes = info.nbytes // shape[0] if shape[0] else 0
        start, stop, shape = (
            start + rows[0] * row_bytes,
            start + rows[1] * row_bytes,
            (rows[1] - rows[0], *shape[1:]),
        )
    if start == stop:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(read_range(path, start, stop), dtype=torch.uint8).view(dtype).reshape(shape)


# --- writing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.name, self.dtype, self.shape)


def layout_header(specs: Iterable[TensorSpec], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that holds `specs`, and the byte at which each tensor starts.

    Wide dtypes come first, so that with the header padded to 8 bytes every tensor is aligned to its own value.
    """
    ordered = sorted(specs, key=lambda spec: -DTYPES[spec.dtype][0])  # stable: file order within a width
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    starts, end = {}, 0
    for spec in ordered:
        starts[spec.name] = end
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {name: start + len(first) for name, start in starts.items()}


class SafetensorsWriter:
    """Writes a file whose tensors arrive in any order and in pieces; the name appears only when every byte is there.

        with SafetensorsWriter(path, specs, metadata) as writer:
            writer.write("w", tensor_or_bytes, offset=0)

    The bytes go to `path` + ".tmp"; a clean exit checks that each tensor was written once in full, syncs and renames.
    An exit by an exception removes the temporary file. Pieces of one tensor must not overlap.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec], metadata: dict[str, str] | None = None) -> None:
        specs = list(specs)
        self._path, self._temporary = path, path.with_name(path.name + ".tmp")
        first, self._starts = layout_header(specs, metadata or {})
        self._missing = {spec.name: spec.nbytes for spec in specs}
        self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115  closed by __exit__
        try:
            self._put(memoryview(first), 0)
        except BaseException:
            self._discard()
            raise

    def write(self, name: str, data: Tensor | bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Put `data` (its bytes) at byte `offset` of the tensor `name`."""
        if isinstance(data, Tensor):
            data = data.detach().contiguous().cpu()
            view = memoryview((ctypes.c_ubyte * data.nbytes).from_address(data.data_ptr())).cast("B")
        else:
            view = memoryview(data)
        if len(view) > self._missing[name]:
            raise IncompleteWriteError(
                name, f"{self._missing[name]} bytes are left to write", len(view), "write each once"
            )
        self._put(view, self._starts[name] + offset)
        self._missing[name] -= len(view)

    def _put(self, view: memoryview, position: int) -> None:
        while view:
            count = os.pwrite(self._file.fileno(), view[: 1 << 30], position)
            view, position = view[count:], position + count

    def _discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            short = {name: left for name, left in self._missing.items() if left}
            if short:
                rule = "every byte must be written before the file is closed"
                raise IncompleteWriteError(
                    self._path.name, rule, f"{len(short)} short, e.g. {next(iter(short))}", "write them"
                )
            os.fsync(self._file.fileno())
        except BaseException:
            self._discard()
            raise
        self._file.close()
        os.replace(self._temporary, self._path)
