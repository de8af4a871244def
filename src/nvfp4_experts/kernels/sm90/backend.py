# SPDX-License-Identifier: Apache-2.0
"""Hopper: which kernel runs a shared expert at which number of tokens.

    tokens       bf16, nvfp4 static, nvfp4 per_token    nvfp4 dynamic       fp8
    1 .. 8       decode.cu                              decode.cu           unpack.cu + GEMM
    9 .. 56      decode.cu, 8 tokens a launch           unpack.cu + GEMM    unpack.cu + GEMM
    more         unpack.cu + GEMM                       unpack.cu + GEMM    unpack.cu + GEMM

decode.cu keeps rows apart, so within its range a token's result does not depend on the others (but for "dynamic", whose
scale is theirs). "unpack.cu + GEMM" is prefill.py.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...formats.codes import decode_blocks
from ...formats.nvfp4 import Nvfp4Tensor
from ...layouts.fragments import ROWS, fragment_bytes, pack_fragments, unpack_fragments
from ...layouts.weights import deinterleave_rows, interleave_gate_up
from ..dispatch import Call, Problem
from ..target import target_of
from . import prefill
from .compile import current_stream, load_kernel
from .workspace import counters

DECODE_TOKENS = 8
DECODE_LIMIT = 56
STAGES = 6
_THREADS = 640
_AMAX_ROWS = 512
_STAGE_BYTES, _PARTIAL_BYTES, _SMALL_BYTES = 9216, 16384, 1024
_MODE = {"bf16": 0, "static": 1, "dynamic": 2, "per_token": 3}
_ELEMENT = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Sm90Backend:
    """See the module docstring; packed as layouts/fragments.py says, gate and up interleaved by 8 rows."""

    name = "sm90"

    def refusal(self, problem: Problem) -> str | None:
        if problem.target.capability != (9, 0):
            return "needs a Hopper GPU (compute capability 9.0)"
        return _compiler_problem()

    def pack(self, gate: Nvfp4Tensor, up: Nvfp4Tensor, down: Nvfp4Tensor) -> dict[str, Tensor]:
        return {
            "gate_up_fragments": pack_fragments(*interleave_gate_up(gate, up)),
            "gate_up_global_scales": torch.stack((gate.global_scale, up.global_scale)),
            "gate_up_row_amax": torch.stack((_row_amax(gate), _row_amax(up))),
            "down_fragments": pack_fragments(down.codes, down.block_scales),
            "down_global_scale": down.global_scale.reshape(1),
            "down_row_amax": _row_amax(down),
        }

    def unpack(self, weights: Mapping[Any, Tensor], hidden: int, intermediate: int) -> tuple[Nvfp4Tensor, ...]:
        gate_up, global_scales, _, down, down_global_scale, _ = weights.values()
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
        prefill.prepare(problem, device)
        counters(device, _blocks(problem.intermediate, device))

    def shared_expert(self, x: Tensor, weights: list[Tensor], call: Call, out: Tensor) -> None:
        mode = call.activation_scale if call.activations == "nvfp4" else call.activations
        limit = {"fp8": 0, "dynamic": DECODE_TOKENS}.get(mode, DECODE_LIMIT)
        # Rows are whole tiles of 16: N of a packed matrix follows from its size and K.
        size = weights[0].numel() // fragment_bytes(ROWS, x.shape[1]) * ROWS // 2
        if x.shape[0] > limit:
            prefill.shared_expert(x, weights, call, size, out)
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
        current_stream(x.device),
        config,
        kernel,
        x.data_ptr(),
        np.int32(x.shape[0]),
        *(weights[index].data_ptr() for index in (0, 1, 3, 4)),
        0 if call.input_scale is None else call.input_scale.data_ptr(),
        0 if call.hidden_scale is None else call.hidden_scale.data_ptr(),
        np.float32(call.swiglu_limit),
        hidden_states.data_ptr(),
        counters(x.device, blocks).current().data_ptr(),
        out.data_ptr(),
    )


def _row_amax(w: Nvfp4Tensor) -> Tensor:
    """Largest |e2m1 * block scale| of each row, (N,) bf16, exact: the unit of its e4m3 rounding."""
    rows = zip(w.codes.split(_AMAX_ROWS), w.block_scales.split(_AMAX_ROWS), strict=True)
    return torch.cat([decode_blocks(codes, scales).abs().amax(-1) for codes, scales in rows])


def _shared_bytes() -> int:
    return STAGES * _STAGE_BYTES + _PARTIAL_BYTES + _SMALL_BYTES


@functools.cache
def _compiler_problem() -> str | None:
    """Why kernels cannot be compiled here, in the words of what failed, with a warning; None if they can.

    The warning comes once: who asked for "auto" on a Hopper would not otherwise hear that its backend was passed over.
    """
    try:
        importlib.import_module("cuda.core")
        importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as problem:  # no package, or no NVRTC library behind it
        what = str(problem).partition("\n")[0]
        reason = f"needs cuda-core and NVRTC to compile its kernels (pip install 'nvfp4-experts[gpu]'): {what}"
        warnings.warn(f"backend 'sm90' cannot run on this Hopper GPU: it {reason}", stacklevel=2)
        return reason
    return None


def _blocks(intermediate: int, device: torch.device) -> int:
    """One block per multiprocessor, and a tile of 8 gate and 8 up rows for each at least."""
    return min(target_of(device).multiprocessors or 1, intermediate // 8)


def _decode_kernel(hidden: int, intermediate: int, mode: str, dtype: torch.dtype, device: torch.device) -> Any:
    sizes = (("HIDDEN", hidden), ("INTERMEDIATE", intermediate))
    macros = (*sizes, ("ACTIVATIONS", _MODE[mode]), ("ELEMENT", _ELEMENT[dtype]), ("STAGES", STAGES))
    return load_kernel("shared_expert_decode", "decode.cu", macros, device, _shared_bytes())


BACKEND = Sm90Backend()
