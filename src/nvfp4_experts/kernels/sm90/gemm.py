# SPDX-License-Identifier: Apache-2.0
"""More tokens than decode.cu takes, on Hopper: gemm.cu for each half of the layer, straight from packed weights.

    enter.cu      nvfp4 alone: x to NVFP4 values and their scale
    gemm.cu       x @ W1.T, x @ W3.T, clamp and SwiGLU -> h      (static: quantised there; bf16: rounded once)
    enter.cu      nvfp4 dynamic and per_token: h, fp32, to values and scale
    gemm.cu       h @ W2.T -> y

Every operand is exact in bf16 and every sum fp32, as in kernels/reference.py. Scratch: h, and the values of x where
they are not x itself.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...layouts.fragments import CHUNK_BYTES, COLUMNS, ROWS
from ..cuda.workspace import Part, carve
from ..dispatch import Call, Problem
from ..target import target_of
from .choice import choose
from .compile import check_status, compile_all, launch_kernel, launch_structure, load_kernel
from .config import GemmConfig
from .table import token_ranges

BF16, NVFP4 = 0, 3
OUT = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ENTER_THREADS, ENTER_VALUES = 256, 8  # THREADS and VALUES of enter.cu
SCALE_OF_ALL, SCALE_OF_TOKEN, SCALE_OF_EXPERT = 0, 1, 2  # of gemm.cu
_BOX_BYTES = 128  # of a row of activations
# ACTIVATIONS of decode.cu and routed_decode.cu; enter.cu has no fp8.
MODE = {"bf16": 0, "static": 1, "dynamic": 2, "per_token": 3, "fp8": 4}


def shared_expert(x: Tensor, weights: list[Tensor], call: Call, size: int, out: Tensor) -> None:
    """x (T, H) to out (T, H), both aligned to 16 bytes; weights as `Sm90Backend.pack` made them; not for "fp8"."""
    gate_up, global_scales, _, down, down_global_scale, _ = weights
    tokens, hidden = x.shape
    first, second = choose(hidden, size, tokens, target_of(x.device))
    mode = call.activation_scale if call.activations == "nvfp4" else "bf16"
    layout = scratch(mode, hidden, size, tokens, x.dtype)
    made = dict(zip(layout, carve(x.device, *layout.values()), strict=True))
    h, values = made["h"], made.get("values", x)
    scale = made.get("scale", call.input_scale if mode == "static" else None)
    scaling = SCALE_OF_TOKEN if mode == "per_token" else SCALE_OF_ALL
    if mode != "bf16":
        enter(x, mode, scale, values, made.get("partials"))
    elif values is not x:
        values.copy_(x)
    run_half(
        values,
        gate_up,
        2 * size,
        global_scales,
        h,
        first,
        gate_up=True,
        limit=call.clamp,
        token_scales=scale,
        hidden_scale=call.hidden_scale if mode == "static" else None,
        scaling=scaling,
    )
    if mode == "static":
        scale = call.hidden_scale
    elif mode != "bf16":
        enter(h, mode, scale, made["h_values"], made["partials"])
        h = made["h_values"]
    run_half(
        h,
        down,
        hidden,
        down_global_scale,
        out,
        second,
        gate_up=False,
        token_scales=scale,
        scaling=scaling,
    )


def scratch(mode: str, hidden: int, intermediate: int, tokens: int, dtype: torch.dtype) -> dict[str, Part]:
    """What `shared_expert` carves for x of a dtype; mode is "bf16" or an activation scale."""
    whole = mode in ("bf16", "static")
    parts: dict[str, Part] = {"h": ((tokens, intermediate), torch.bfloat16 if whole else torch.float32)}
    if mode != "bf16" or dtype != torch.bfloat16:
        parts["values"] = (tokens, hidden), torch.bfloat16
    if not whole:
        parts["h_values"] = (tokens, intermediate), torch.bfloat16
        parts["scale"] = (tokens,), torch.float32
        parts["partials"] = (ENTER_THREADS,), torch.int32
    return parts


@dataclass(frozen=True)
class Groups:
    """Rows of activations by expert, as group.cu leaves them; for `run_half`.

    Args:
        tiles: (.., 4) int32: expert, first row and end of at most `config.tokens` rows of one expert.
        counts: (2,) int32: of tiles and of rows.
        weights: (rows,) fp32, multiply the result; None: no weights.
    """

    tiles: Tensor
    counts: Tensor
    weights: Tensor | None = None


def run_half(
    values: Tensor,
    packed: Tensor,
    rows: int,
    weight_scales: Tensor,
    out: Tensor,
    config: GemmConfig,
    *,
    gate_up: bool,
    limit: float = math.inf,
    token_scales: Tensor | None = None,
    hidden_scale: Tensor | None = None,
    scaling: int = SCALE_OF_ALL,
    groups: Groups | None = None,
    row_amax: Tensor | None = None,
) -> None:
    """One GEMM of the layer with what follows it; gemm.cu says what is computed.

    Args:
        values: (T, K) bf16, or e4m3 as `fp8.enter_rows` writes it (`config.fp8`, K then a multiple of 64); aligned
            to 16 bytes.
        packed: `rows` packed weight rows of K columns; with groups of each expert, one after the other.
        weight_scales: (2,) fp32 of gate and up, or (1,) of down; with groups (E, 2) or (E, 1).
        out: (T, rows / 2) or (T, rows), rows of any stride, aligned to 4 bytes; with groups, a row for each of theirs.
        limit: L of the clamp, for gate_up; infinity is off.
        token_scales: (), (T,) or (E,) fp32, the activations' scale; None is 1.
        hidden_scale: () or (E,) fp32: h is quantised to NVFP4 values with it; None leaves it as `out.dtype` holds it.
        scaling: whose token_scales are: SCALE_OF_ALL, SCALE_OF_TOKEN or SCALE_OF_EXPERT.
        groups: which rows belong to which expert; None: all to the only one.
        row_amax: (E, 2, I) or (E, H) bf16, for e4m3.
    """
    tokens, columns = values.shape
    out_kind = NVFP4 if hidden_scale is not None else OUT[out.dtype]
    kernel = gemm_kernel(config, gate_up, out_kind, values.device, groups is not None)
    chunks = -(-columns // COLUMNS)
    tiles = packed.numel() // (chunks * CHUNK_BYTES)
    box_tokens = _box_tokens(config, groups is not None)
    arguments = struct.pack(
        "<128s128s4Q5ifQ",
        _weight_map(packed.data_ptr(), tiles, chunks, config.rows // ROWS, config.stage_chunks),
        _activation_map(values.data_ptr(), tokens, columns, box_tokens, values.dtype.itemsize),
        weight_scales.data_ptr(),
        _address(token_scales),
        _address(hidden_scale),
        out.data_ptr(),
        scaling,
        tokens,
        rows,
        chunks,
        out.stride(0),
        limit,
        _address(row_amax),
    )
    multiprocessors = target_of(values.device).multiprocessors or 1
    if groups is None:
        blocks = -(-rows // config.rows) * -(-tokens // config.tokens)
        if config.parts == 1:
            blocks = min(blocks, multiprocessors)
    else:
        blocks = multiprocessors
        more = groups.tiles, groups.counts, groups.weights
        arguments += struct.pack("<3Q40x", *map(_address, more))
    shape = blocks * config.split, config.threads, config.shared_bytes
    launch_structure(kernel, *shape, arguments, values.device, cluster=config.split)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def prepare(problem: Problem, device: torch.device, max_tokens: int, result: torch.dtype = torch.bfloat16) -> None:
    """Compile and load what `shared_expert` runs for bf16 hidden states, up to a number of tokens (fp8: the GEMMs)."""
    modes = ("static", "dynamic", "per_token") if problem.activations == "nvfp4" else (problem.activations,)
    gemms = []
    for tokens in token_ranges(max_tokens):
        first, second = choose(problem.hidden, problem.intermediate, tokens, problem.target)
        for mode in modes:
            h = {"bf16": BF16, "fp8": BF16, "static": NVFP4}.get(mode, OUT[torch.float32])
            cuts = [replace(config, fp8=mode == "fp8") for config in (first, second)]
            gemms += [(cuts[0], True, h), (cuts[1], False, OUT[result])]
    compile_all(("gemm.cu", macros_of(*gemm)) for gemm in gemms)
    for gemm in gemms:
        gemm_kernel(*gemm, device)
    for mode in modes:
        if mode not in ("bf16", "fp8"):
            for dtype in {torch.bfloat16, torch.bfloat16 if mode == "static" else torch.float32}:
                enter_kernel("enter_nvfp4", mode, dtype, device)
                if mode == "dynamic":
                    enter_kernel("amax_partials", mode, dtype, device)


def enter(x: Tensor, mode: str, scale: Tensor | None, values: Tensor, partials: Tensor | None) -> None:
    """x (T, K) to NVFP4 values (T, K) bf16; scale is read (static) or written."""
    if mode == "dynamic":
        assert partials is not None, "scratch has them"
        amax_partials(x, partials)
    kernel = enter_kernel("enter_nvfp4", mode, x.dtype, x.device)
    given, made = (scale, None) if mode == "static" else (None, scale)
    tokens, columns = x.shape
    along = 1 if mode == "per_token" else -(-columns // (ENTER_THREADS * ENTER_VALUES))  # a row's amax is one block's
    launch_kernel(kernel, (tokens, along), ENTER_THREADS, x, np.int32(columns), given, partials, made, values)


def amax_partials(x: Tensor, partials: Tensor) -> None:
    """To (ENTER_THREADS,) int32: bits of largest |x| of parts of x; the largest of them is that of all."""
    kernel = enter_kernel("amax_partials", "dynamic", x.dtype, x.device)
    launch_kernel(kernel, (ENTER_THREADS,), ENTER_THREADS, x, np.int64(x.numel() // ENTER_VALUES), partials)


def enter_kernel(name: str, mode: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A kernel of enter.cu for x of a dtype."""
    return load_kernel(name, "enter.cu", (("ACTIVATIONS", MODE[mode]), ("ELEMENT", OUT[dtype])), device)


def gemm_kernel(config: GemmConfig, gate_up: bool, out: int, device: torch.device, grouped: bool = False) -> Any:
    """gemm.cu in a configuration; out: BF16, NVFP4 or a value of OUT."""
    macros = macros_of(config, gate_up, out, grouped)
    return load_kernel("shared_expert_gemm", "gemm.cu", macros, device, config.shared_bytes)


def macros_of(config: GemmConfig, gate_up: bool, out: int = BF16, grouped: bool = False) -> tuple[tuple[str, int], ...]:
    """What gemm.cu is compiled with, for a result of bf16 or of another kind."""
    return (
        ("GATE_UP", int(gate_up)),
        ("ROW_GROUPS", config.row_groups),
        ("STRIPS", config.strips),
        ("COLUMN_GROUPS", config.column_groups),
        ("TOKENS", config.tokens),
        ("BOX_TOKENS", _box_tokens(config, grouped)),
        ("SPLIT", config.split),
        ("STAGES", config.stages),
        ("REGISTERS", config.registers),
        ("SHARED_BYTES", config.shared_bytes),
        ("OUT", out),
        ("GROUPED", int(grouped)),
        ("FP8", int(config.fp8)),
    )


def _box_tokens(config: GemmConfig, grouped: bool) -> int:
    """Rows of activations that are copied at a time: a tile of few rows does without the rest."""
    return config.tokens // 4 if grouped else config.tokens


@functools.lru_cache(maxsize=4096)
def _weight_map(address: int, tiles: int, chunks: int, box_tiles: int, box_chunks: int) -> bytes:
    """(tiles, chunks, 144) 32-bit words of packed fragments, a box of box_tiles x box_chunks."""
    from cuda.bindings import driver

    words, kind = CHUNK_BYTES // 4, driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT32
    none = driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE
    strides = (CHUNK_BYTES, chunks * CHUNK_BYTES)
    return _tensor_map(kind, address, (words, chunks, tiles), strides, (words, box_chunks, box_tiles), none)


@functools.lru_cache(maxsize=4096)
def _activation_map(address: int, tokens: int, columns: int, box_tokens: int, value_bytes: int) -> bytes:
    """(tokens, columns) bf16 or e4m3, a box of box_tokens rows of 128 bytes as wgmma wants it; zeros outside."""
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8 if value_bytes == 1 else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    swizzle = driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B
    box = _BOX_BYTES // value_bytes, box_tokens
    return _tensor_map(kind, address, (columns, tokens), (value_bytes * columns,), box, swizzle)


def _tensor_map(
    kind: Any, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: Any
) -> bytes:
    """The 128 bytes that describe a tensor to the copy engine; sizes and box in elements, strides in bytes."""
    from cuda.bindings import driver

    status, made = driver.cuTensorMapEncodeTiled(
        kind,
        len(sizes),
        address,
        [driver.cuuint64_t(size) for size in sizes],
        [driver.cuuint64_t(stride) for stride in strides],
        [driver.cuuint32_t(length) for length in box],
        [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    check_status(status, f"cuTensorMapEncodeTiled of {sizes}")
    return ctypes.string_at(made.getPtr(), 128)
