# SPDX-License-Identifier: Apache-2.0
"""Hopper: which kernel runs a shared expert at which number of tokens.

    tokens            bf16, nvfp4 static, nvfp4 per_token    nvfp4 dynamic    fp8
    1 .. 8            decode.cu                              decode.cu        unpack.cu + GEMM
    9 .. 48           decode.cu, 8 tokens a launch           unpack + GEMM    unpack.cu + GEMM
    more              unpack.cu + GEMM                       unpack + GEMM    unpack.cu + GEMM

decode.cu keeps rows apart, so within its range a token's result does not depend on the others (but for "dynamic", whose
scale is theirs). The GEMM is the vendor's, bf16 in and fp32 out, over tiles of TILE_VALUES weights unpacked to bf16.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...formats.codes import decode_blocks
from ...formats.nvfp4 import Nvfp4Tensor
from ...layouts.fragments import COLUMNS, ROWS, fragment_bytes, pack_fragments, unpack_fragments
from ...layouts.weights import deinterleave_rows, interleave_gate_up
from .. import tiled
from ..dispatch import Call, Problem
from ..target import target_of
from .compile import load_kernel
from .workspace import counters

DECODE_TOKENS = 8
DECODE_LIMIT = 48
TILE_VALUES = 1 << 21
STAGES = 6
_THREADS = 640
_STAGE_BYTES, _PARTIAL_BYTES, _SMALL_BYTES = 9216, 16384, 1024
_MODE = {"bf16": 0, "static": 1, "dynamic": 2, "per_token": 3}
_ELEMENT = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Sm90Backend:
    """See the module docstring; packed as layouts/fragments.py says, gate and up interleaved by 8 rows."""

    name = "sm90"

    def refusal(self, problem: Problem) -> str | None:
        if problem.target.capability != (9, 0):
            return "needs a Hopper GPU (compute capability 9.0)"
        if not _has_cuda_core():
            return "needs cuda-core to compile its kernels (pip install 'nvfp4-experts[gpu]')"
        return None

    def pack(self, gate: Nvfp4Tensor, up: Nvfp4Tensor, down: Nvfp4Tensor) -> dict[str, Tensor]:
        return {
            "gate_up_fragments": pack_fragments(*interleave_gate_up(gate, up)),
            "gate_up_global_scales": torch.stack((gate.global_scale, up.global_scale)),
            "down_fragments": pack_fragments(down.codes, down.block_scales),
            "down_global_scale": down.global_scale.reshape(1),
        }

    def unpack(self, weights: Mapping[Any, Tensor], hidden: int, intermediate: int) -> tuple[Nvfp4Tensor, ...]:
        gate_up, global_scales, down, down_global_scale = weights.values()
        codes, block_scales = unpack_fragments(gate_up, 2 * intermediate, hidden)
        gate_codes, up_codes = deinterleave_rows(codes)
        gate_bytes, up_bytes = deinterleave_rows(block_scales.view(torch.uint8))
        return (
            Nvfp4Tensor(gate_codes, gate_bytes.view(torch.float8_e4m3fn), global_scales[0]),
            Nvfp4Tensor(up_codes, up_bytes.view(torch.float8_e4m3fn), global_scales[1]),
            Nvfp4Tensor(*unpack_fragments(down, hidden, intermediate), down_global_scale[0]),
        )

    def prepare(self, problem: Problem, device: torch.device) -> None:
        """Compile and load what a call with bf16 hidden states runs, and allocate the hand-over counters."""
        modes = {"nvfp4": ("static", "dynamic", "per_token"), "bf16": ("bf16",), "fp8": ()}[problem.activations]
        for mode in modes:
            _decode_kernel(problem.hidden, problem.intermediate, mode, torch.bfloat16, device)
        _unpack_kernel(problem.hidden, 8, device)
        _unpack_kernel(problem.intermediate, ROWS, device)
        counters(device, _blocks(problem.intermediate, device))
        empty = torch.zeros(1, 8, dtype=torch.uint8, device=device)
        decode_blocks(empty, empty[:, :1].view(torch.float8_e4m3fn))  # builds its table

    def shared_expert(self, x: Tensor, weights: list[Tensor], call: Call, out: Tensor) -> None:
        mode = call.activation_scale if call.activations == "nvfp4" else call.activations
        limit = {"fp8": 0, "dynamic": DECODE_TOKENS}.get(mode, DECODE_LIMIT)
        # Rows are whole tiles of 16: N of a packed matrix follows from its size and K.
        size = weights[0].numel() // fragment_bytes(ROWS, x.shape[1]) * ROWS // 2
        if x.shape[0] > limit:
            tiled.shared_expert(x, _tiles(weights, x.shape[1], size), size, call, out)
            return
        for start in range(0, x.shape[0], DECODE_TOKENS):
            rows = slice(start, start + DECODE_TOKENS)
            _decode(x[rows], weights, mode, call, size, out[rows])


def _decode(x: Tensor, weights: list[Tensor], mode: str, call: Call, size: int, out: Tensor) -> None:
    from cuda.core import LaunchConfig, launch

    kernel = _decode_kernel(x.shape[1], size, mode, x.dtype, x.device)
    blocks = _blocks(size, x.device)
    h_dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    hidden_states = torch.empty(x.shape[0], size, dtype=h_dtype, device=x.device)
    # Cooperative: all blocks resident or none, since they wait for each other. Serialisation relaxed: the weights of
    # this launch start to arrive while the kernel before it ends.
    config = LaunchConfig(
        grid=blocks,
        block=_THREADS,
        shmem_size=_shared_bytes(),
        is_cooperative=True,
        programmatic_stream_serialization=True,
    )
    launch(
        _stream(torch.cuda.current_stream(x.device).cuda_stream),
        config,
        kernel,
        x.data_ptr(),
        np.int32(x.shape[0]),
        *(weight.data_ptr() for weight in weights),
        0 if call.input_scale is None else call.input_scale.data_ptr(),
        0 if call.hidden_scale is None else call.hidden_scale.data_ptr(),
        np.float32(call.swiglu_limit),
        hidden_states.data_ptr(),
        counters(x.device, blocks).current().data_ptr(),
        out.data_ptr(),
    )


def _tiles(weights: list[Tensor], hidden: int, size: int) -> tiled.TiledWeights:
    gate_up, global_scales, down, down_global_scale = weights

    def gate_up_tile(rows: slice) -> tuple[Tensor, Tensor]:
        gate, up = _unpack(gate_up, rows.start * 2, rows.stop * 2, hidden, split=8).unbind(0)
        return gate, up

    def down_tile(rows: slice) -> Tensor:
        return _unpack(down, rows.start, rows.stop, size, split=ROWS)[0]

    scales = (global_scales[0], global_scales[1], down_global_scale[0])
    return tiled.TiledWeights(gate_up_tile, down_tile, scales, TILE_VALUES)


def _unpack(packed: Tensor, start: int, stop: int, columns: int, split: int) -> Tensor:
    """Rows start..stop of a packed matrix as bf16, (ROWS / split, rows * split / ROWS, columns)."""
    from cuda.core import LaunchConfig, launch

    tiles = (stop - start) // ROWS
    out = torch.empty(ROWS // split, tiles * split, columns, dtype=torch.bfloat16, device=packed.device)
    warps = tiles * -(-columns // COLUMNS)
    launch(
        _stream(torch.cuda.current_stream(packed.device).cuda_stream),
        LaunchConfig(grid=-(-warps // 8), block=256),
        _unpack_kernel(columns, split, packed.device),
        packed.data_ptr(),
        np.int32(start // ROWS),
        np.int32(tiles),
        out.data_ptr(),
    )
    return out


def _shared_bytes() -> int:
    return STAGES * _STAGE_BYTES + _PARTIAL_BYTES + _SMALL_BYTES


@functools.cache
def _has_cuda_core() -> bool:
    try:
        return importlib.util.find_spec("cuda.core") is not None
    except ModuleNotFoundError:  # not even the namespace it lives in
        return False


def _blocks(intermediate: int, device: torch.device) -> int:
    """One block per multiprocessor, and a tile of 8 gate and 8 up rows for each at least."""
    return min(target_of(device).multiprocessors or 1, intermediate // 8)


def _decode_kernel(hidden: int, intermediate: int, mode: str, dtype: torch.dtype, device: torch.device) -> Any:
    sizes = (("HIDDEN", hidden), ("INTERMEDIATE", intermediate))
    macros = (*sizes, ("ACTIVATIONS", _MODE[mode]), ("ELEMENT", _ELEMENT[dtype]), ("STAGES", STAGES))
    return load_kernel("shared_expert_decode", "decode.cu", macros, _shared_bytes(), _index(device))


def _unpack_kernel(columns: int, split: int, device: torch.device) -> Any:
    return load_kernel("unpack_fragments", "unpack.cu", (("COLUMNS", columns), ("SPLIT", split)), 0, _index(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.lru_cache(maxsize=1024)
def _stream(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


BACKEND = Sm90Backend()
