# SPDX-License-Identifier: Apache-2.0
"""The native library: found, checked and loaded once; or the reason why not, with the command that mends it.

It lies in cpu/, beside its sources, or where the installed distribution has it (an editable install leaves the sources
in the checkout). A library built from other sources than those in cpu/csrc/ is not loaded: an edited checkout would run
old code. Two backends call it, cpu and exact.

    NVFP4_EXPERTS_CPU_ISA    name of the tier to run (see `tiers`); unset or empty: the best that this machine has
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401  its OpenMP runtime must be in the process before the library looks for it

from ..errors import UnsupportedError

ISA_VARIABLE = "NVFP4_EXPERTS_CPU_ISA"
BUILD = "pip install . (or, in a checkout, make native) with a C++17 compiler: GCC 12 or later, or Clang 15 or later"
_NAME = "libnvfp4_experts_cpu" + (".dylib" if sys.platform == "darwin" else ".so")
_HERE = Path(__file__).parent / "cpu"
_WEIGHTS = ("gate_up", "gate_up_global_scales", "gate_up_row_amax", "down", "down_global_scale", "down_row_amax")
_POINTERS = ("x", "y", *_WEIGHTS, "input_scale", "hidden_scale", "scratch")


class Call(ctypes.Structure):
    """`Call` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "intermediate")),
        ("clamp", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("element", "activations", "scale_mode", "threads", "tier")),
    )


class RoutedCall(ctypes.Structure):
    """`RoutedCall` of csrc/api.h, field by field."""

    _fields_ = (
        ("layer", Call),
        *((name, ctypes.c_void_p) for name in ("indices", "weights")),
        ("shared", ctypes.POINTER(Call)),
        *((name, ctypes.c_int64) for name in ("top_k", "experts")),
        *((name, ctypes.c_int32) for name in ("index_bytes", "out_element", "weigh_after_down")),
    )


class Exact(ctypes.Structure):
    """`Exact` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a_codes", "a_scales", "b_codes", "b_scales", "out", "entered")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "columns")),
        *((name, ctypes.c_int32) for name in ("threads", "tier")),
    )


@dataclass(frozen=True)
class Tier:
    """One instruction set the library was built for.

    Args:
        name: what NVFP4_EXPERTS_CPU_ISA calls it.
        index: what the library calls it; smaller is better.
        needs: what a processor must have, in words.
        present: whether this one has it.
    """

    name: str
    index: int
    needs: str
    present: bool


class Library:
    """The loaded library with its functions declared."""

    def __init__(self, file: Path) -> None:
        self.file = file
        handle = ctypes.CDLL(str(file))
        self.shared_expert = _declared(handle.nvfp4_shared_expert, None, ctypes.POINTER(Call))
        self.scratch_bytes = _declared(handle.nvfp4_scratch_bytes, ctypes.c_int64, ctypes.POINTER(Call))
        self.routed_experts = _declared(handle.nvfp4_routed_experts, None, ctypes.POINTER(RoutedCall))
        self.routed_scratch_bytes = _declared(
            handle.nvfp4_routed_scratch_bytes, ctypes.c_int64, ctypes.POINTER(RoutedCall)
        )
        self.exact = _declared(handle.nvfp4_exact, None, ctypes.POINTER(Exact))
        self.exact_entered_bytes = _declared(
            handle.nvfp4_exact_entered_bytes, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64
        )
        self.threads = _declared(handle.nvfp4_threads, ctypes.c_char_p)
        self.source_digest = _declared(handle.nvfp4_source_digest, ctypes.c_char_p)().decode()
        self.call_bytes = _declared(handle.nvfp4_call_bytes, ctypes.c_int64)()
        name = _declared(handle.nvfp4_tier_name, ctypes.c_char_p, ctypes.c_int)
        needs = _declared(handle.nvfp4_tier_needs, ctypes.c_char_p, ctypes.c_int)
        present = _declared(handle.nvfp4_tier_present, ctypes.c_int, ctypes.c_int)
        count = _declared(handle.nvfp4_tier_count, ctypes.c_int)()
        self.tiers = tuple(Tier(name(i).decode(), i, needs(i).decode(), bool(present(i))) for i in range(count))


def _declared(function, result, *arguments):  # type: ignore[no-untyped-def]
    function.restype, function.argtypes = result, arguments
    return function


@functools.cache
def load() -> tuple[Library | None, str]:
    """The library, or None and the reason, as a clause."""
    reasons = []
    for file in dict.fromkeys(_places()):
        try:
            library = Library(file)
        except (OSError, AttributeError) as bad:
            reasons.append(f"{file} does not load: {bad}")
            continue
        expected = source_digest()
        if expected is not None and library.source_digest != expected:
            reasons.append(f"{file} was built from other sources than {_HERE / 'csrc'}; build it again: {BUILD}")
        elif library.call_bytes != sum(ctypes.sizeof(structure) for structure in (Call, RoutedCall, Exact)):
            reasons.append(f"{file} is of another version of this package; build it again: {BUILD}")
        else:
            return library, ""
    return None, "; ".join(reasons) or f"was installed without its native library: no C++ compiler then; {BUILD}"


def tier() -> Tier:
    """The tier that runs: the one NVFP4_EXPERTS_CPU_ISA names, or the best of this machine.

    Raises:
        UnsupportedError: the variable names a tier that is unknown or that this machine lacks.
    """
    return _tier(os.environ.get(ISA_VARIABLE, ""))


@functools.cache
def _tier(forced: str) -> Tier:
    library, reason = load()
    if library is None:
        raise UnsupportedError("backend 'cpu'", "needs its native library", reason, "use backend='torch'")
    here = [t for t in library.tiers if t.present]
    if not forced:
        return here[0]
    names = ", ".join(t.name for t in here)
    for known in library.tiers:
        if known.name == forced:
            if not known.present:
                got = f"{forced!r}, which needs {known.needs}"
                raise UnsupportedError(ISA_VARIABLE, f"must name a tier of this machine ({names})", got, "unset it")
            return known
    raise UnsupportedError(ISA_VARIABLE, f"must name a tier of this machine ({names})", repr(forced), "unset it")


def source_digest() -> str | None:
    """SHA-256 over the names and SHA-256 sums of the files in csrc/, as CMakeLists.txt takes it; None without them."""
    files = sorted((_HERE / "csrc").glob("*.*"), key=lambda file: file.name)
    if not files:
        return None
    lines = "".join(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _places() -> Iterator[Path]:
    folders = [_HERE]
    for distribution in importlib.metadata.distributions(name="nvfp4-experts"):
        folders.append(Path(str(distribution.locate_file("nvfp4_experts/kernels/cpu"))))
    yield from (folder / _NAME for folder in folders if (folder / _NAME).exists())
