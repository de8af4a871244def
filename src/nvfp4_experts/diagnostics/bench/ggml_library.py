# SPDX-License-Identifier: Apache-2.0
"""A user's own ggml, reached through ctypes: found, checked, and ready with its CPU backend; or the reason why not.

    NVFP4_EXPERTS_GGML    the directory of libggml.so and what comes with it (libggml-base.so, libggml-cpu*.so);
                          unset or empty: where the system's loader finds libggml.so

Its NVFP4 block holds 64 values of a row in 36 bytes, and no global scale:

    byte s            e4m3 scale of values 16s .. 16s + 15, without a sign; 0x7F is read as zero          s = 0 .. 3
    byte 4 + 8s + j   code of value 16s + j in the low nibble, of value 16s + j + 8 in the high one       j = 0 .. 7

so our codes and scales go in byte for byte (`to_blocks`) and nothing is quantised again: ggml's own quantiser, which
stores scales of 248 and more as 448, never runs.

A struct or an enum that changed would crash rather than raise. So the library must have every function named here, call
type 40 "nvfp4", measure its block as above, and decode every code under every scale to the value it has here.

Source: https://github.com/ggml-org/ggml, the public headers of version 0.21.0. `dequantize_row_nvfp4` is exported, but
not in them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch  # first: on Linux its OpenMP runtime then serves ggml too, and no second team competes for the cores
from torch import Tensor

from ...errors import FormatError, LayoutError
from ...formats.codes import pack_codes, unpack_codes
from ...formats.nvfp4 import Nvfp4Tensor

VARIABLE = "NVFP4_EXPERTS_GGML"
F32, NVFP4 = 0, 40  # of enum ggml_type
BLOCK_VALUES, BLOCK_BYTES = 64, 36
_CPU_DEVICE = 0  # of enum ggml_backend_dev_type
_LARGEST_SCALE = 0x7E  # 448
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


class InitParams(ctypes.Structure):
    """`struct ggml_init_params`: memory that a context places tensors in."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_INT, _LONG, _SIZE, _FLOAT = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_float
_TEXT, _POINTER = ctypes.c_char_p, ctypes.c_void_p
# name: result, arguments
_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "ggml_version": (_TEXT, ()),
    "ggml_commit": (_TEXT, ()),
    "ggml_type_name": (_TEXT, (_INT,)),
    "ggml_blck_size": (_LONG, (_INT,)),
    "ggml_type_size": (_SIZE, (_INT,)),
    "dequantize_row_nvfp4": (None, (_POINTER, _POINTER, _LONG)),
    "ggml_init": (_POINTER, (InitParams,)),
    "ggml_free": (None, (_POINTER,)),
    "ggml_tensor_overhead": (_SIZE, ()),
    "ggml_graph_overhead": (_SIZE, ()),
    "ggml_get_data": (_POINTER, (_POINTER,)),
    "ggml_new_tensor_2d": (_POINTER, (_POINTER, _INT, _LONG, _LONG)),
    "ggml_view_2d": (_POINTER, (_POINTER, _POINTER, _LONG, _LONG, _SIZE, _SIZE)),
    "ggml_mul_mat": (_POINTER, (_POINTER, _POINTER, _POINTER)),
    "ggml_scale_inplace": (_POINTER, (_POINTER, _POINTER, _FLOAT)),
    "ggml_clamp": (_POINTER, (_POINTER, _POINTER, _FLOAT, _FLOAT)),
    "ggml_swiglu_split": (_POINTER, (_POINTER, _POINTER, _POINTER)),
    "ggml_new_graph": (_POINTER, (_POINTER,)),
    "ggml_build_forward_expand": (None, (_POINTER, _POINTER)),
    "ggml_backend_load_all_from_path": (None, (_TEXT,)),
    "ggml_backend_init_by_type": (_POINTER, (_INT, _TEXT)),
    "ggml_backend_get_device": (_POINTER, (_POINTER,)),
    "ggml_backend_dev_backend_reg": (_POINTER, (_POINTER,)),
    "ggml_backend_reg_get_proc_address": (_POINTER, (_POINTER, _TEXT)),
    "ggml_backend_graph_compute": (_INT, (_POINTER, _POINTER)),
}


@dataclass(frozen=True)
class Ggml:
    """A library that passed its checks.

    Args:
        functions: those of _FUNCTIONS, declared.
        backend: its CPU backend, one for the process.
        version: what it calls itself.
    """

    functions: ctypes.CDLL
    backend: int
    version: str

    def set_threads(self, threads: int) -> None:
        """How many threads `ggml_backend_graph_compute` uses from now on."""
        of = self.functions
        registry = of.ggml_backend_dev_backend_reg(of.ggml_backend_get_device(self.backend))
        address = of.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        ctypes.CFUNCTYPE(None, _POINTER, _INT)(address)(self.backend, threads)


def find() -> tuple[Ggml | None, str]:
    """The ggml that NVFP4_EXPERTS_GGML or the system's loader leads to, or None and the reason, as a clause."""
    return _load(os.environ.get(VARIABLE, ""))


@functools.cache
def _load(directory: str) -> tuple[Ggml | None, str]:
    try:
        functions = _open(directory)
    except OSError as bad:
        where = f"in {directory}" if directory else f"by the system's loader; {VARIABLE}=DIR names its directory"
        return None, f"libggml{_SUFFIX} not found or not loadable {where} ({bad})"
    reason = declare(functions) or mismatch(functions)
    if reason:
        return None, reason
    version = f"{functions.ggml_version().decode()} ({functions.ggml_commit().decode()})"
    backend = functions.ggml_backend_init_by_type(_CPU_DEVICE, None)
    if not backend and directory:  # backends that are files of their own, one per instruction set
        functions.ggml_backend_load_all_from_path(directory.encode())
        backend = functions.ggml_backend_init_by_type(_CPU_DEVICE, None)
    if not backend:
        return None, f"ggml {version} has no CPU backend here; {VARIABLE}=DIR names the directory of libggml-cpu*"
    return Ggml(functions, backend, version), ""


def _open(directory: str) -> ctypes.CDLL:
    """libggml, whose handle also finds the functions of what it is linked with."""
    if directory:
        for name in ("libggml-base", "libggml-cpu"):  # so that the loader need not look for them
            if (file := Path(directory, name + _SUFFIX)).exists():
                ctypes.CDLL(str(file))
    return ctypes.CDLL(str(Path(directory, "libggml" + _SUFFIX)))


def declare(functions: ctypes.CDLL) -> str | None:
    """Give every function its types; the clause that names those it lacks, if any."""
    missing = [name for name in _FUNCTIONS if not hasattr(functions, name)]
    if missing:
        return f"too old to know NVFP4, or too new: lacks {', '.join(missing)}"
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    return None


def mismatch(functions: ctypes.CDLL) -> str | None:
    """What its NVFP4 is, if it is not the one this file describes."""
    name = functions.ggml_type_name(NVFP4)
    if name != b"nvfp4":
        return f"its type {NVFP4} is {name!r}, not nvfp4"
    sizes = functions.ggml_blck_size(NVFP4), functions.ggml_type_size(NVFP4)
    if sizes != (BLOCK_VALUES, BLOCK_BYTES):
        return f"its NVFP4 block has {sizes[0]} values in {sizes[1]} bytes, not {BLOCK_VALUES} in {BLOCK_BYTES}"
    every = every_code_and_scale()
    blocks, decoded = to_blocks(every), torch.full(every.shape, torch.nan)
    functions.dequantize_row_nvfp4(blocks.data_ptr(), decoded.data_ptr(), decoded.numel())
    return None if torch.equal(decoded, every.dequantize()) else "its NVFP4 blocks decode to other values than ours"


def every_code_and_scale() -> Nvfp4Tensor:
    """(1, 2048): all 16 codes under each scale byte from 0 to 0x7E, and under 0 once more; global scale 1."""
    scales = torch.arange(128, dtype=torch.uint8) % (_LARGEST_SCALE + 1)
    codes = pack_codes(torch.arange(16, dtype=torch.uint8).repeat(128))
    return Nvfp4Tensor(codes[None], scales.view(torch.float8_e4m3fn)[None], torch.tensor(1.0))


def to_blocks(w: Nvfp4Tensor) -> Tensor:
    """Codes and block scales in ggml's order, (N, K) -> (N, K/64, 36) uint8; the global scale is not in it.

    Raises:
        LayoutError: K is no multiple of 64.
        FormatError: a block scale is NaN or has a sign.
    """
    n, k = w.shape
    if k % BLOCK_VALUES:
        raise LayoutError("columns", f"must be a multiple of {BLOCK_VALUES}, ggml's block", k, "take another shape")
    scales = w.block_scales.view(torch.uint8).view(n, -1, 4)
    if (scales > _LARGEST_SCALE).any():
        raise FormatError("block_scales", "must be 0 to 448", "NaN or a sign", "ggml reads neither; quantise again")
    low, high = unpack_codes(w.codes).view(n, -1, 4, 2, 8).unbind(3)
    return torch.cat((scales, (low | high << 4).flatten(2)), dim=2)
