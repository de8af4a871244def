# SPDX-License-Identifier: Apache-2.0
"""Hopper: which kernel runs a shared expert at which number of tokens.

    1 .. decode limit (8) tokens    decode.cu, the whole layer
    more                            gemm.cu, each half of the layer

choice.py says where the limit lies and which configuration of gemm.cu runs at how many tokens; gemm.py launches it.
fp8 is another backend, `sm90-fp8` (fp8_backend.py): its weights are packed otherwise. Kernels keep tokens apart, so a
token's result does not depend on the others (but for "dynamic", whose scale is theirs) within a range of tokens that
choice.py gives one configuration.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...formats.nvfp4 import Nvfp4Tensor
from ...layouts.fragments import ROWS, fragment_bytes, pack_fragments, unpack_fragments
from ...layouts.weights import deinterleave_rows, interleave_gate_up, row_amax
from ..cuda.alignment import run_aligned
from ..cuda.workspace import bytes_of, exclusive, reserve, scratch_bytes
from ..dispatch import Call, Problem
from ..target import target_of
from . import gemm
from .choice import decode_limit
from .compile import compile_all, current_stream, load_kernel
from .mailbox import all_bytes, decode_box, mailbox_bytes, mailboxes
from .over_shards import OverShards

STAGES = 6
THREADS = 640
STAGE_BYTES, PARTIAL_BYTES, SMALL_BYTES = 9216, 16384, 1024


class Sm90Backend:
    """See the module docstring; packed as layouts/fragments.py says, gate and up interleaved by 8 rows."""

    name = "sm90"
    for_fp8 = False  # what the packed weights are for
    pack_matrix, unpack_matrix = staticmethod(pack_fragments), staticmethod(unpack_fragments)
    # More tokens than decode.cu takes.
    prepare_gemms: Callable[[Problem, torch.device, int, torch.dtype], None] = staticmethod(gemm.prepare)
    by_gemms: Callable[[Tensor, list[Tensor], Call, int, Tensor], None] = staticmethod(gemm.shared_expert)
    over_shards = OverShards

    def refusal(self, problem: Problem) -> str | None:
        if problem.target.capability != (9, 0):
            return "needs a Hopper GPU (compute capability 9.0)"
        if (problem.activations == "fp8") != self.for_fp8:
            return "packs weights for fp8 activations alone" if self.for_fp8 else "leaves fp8 activations to sm90-fp8"
        return _compiler_problem()

    def pack(self, gate: Nvfp4Tensor, up: Nvfp4Tensor, down: Nvfp4Tensor) -> dict[str, Tensor]:
        return {
            "gate_up_fragments": self.pack_matrix(*interleave_gate_up(gate, up)),
            "gate_up_global_scales": torch.stack((gate.global_scale, up.global_scale)),
            "gate_up_row_amax": torch.stack((row_amax(gate), row_amax(up))),
            "down_fragments": self.pack_matrix(down.codes, down.block_scales),
            "down_global_scale": down.global_scale.reshape(1),
            "down_row_amax": row_amax(down),
        }

    def unpack(self, weights: Mapping[Any, Tensor], hidden: int, intermediate: int) -> tuple[Nvfp4Tensor, ...]:
        gate_up, global_scales, _, down, down_global_scale, _ = weights.values()
        codes, block_scales = self.unpack_matrix(gate_up, 2 * intermediate, hidden)
        gate_codes, up_codes = deinterleave_rows(codes)
        gate_bytes, up_bytes = deinterleave_rows(block_scales.view(torch.uint8))
        return (
            Nvfp4Tensor(gate_codes, gate_bytes.view(torch.float8_e4m3fn), global_scales[0]),
            Nvfp4Tensor(up_codes, up_bytes.view(torch.float8_e4m3fn), global_scales[1]),
            Nvfp4Tensor(*self.unpack_matrix(down, hidden, intermediate), down_global_scale[0]),
        )

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """Compile and load what a call with bf16 hidden states runs, reserve its scratch and a mailbox.

        Waits for the device at the end: launches read weights before they wait for what runs in front of them, so
        nothing that writes weights may still be on its way.
        """
        with torch.cuda.device(device):
            self.prepare_result(problem, device, max_tokens, torch.bfloat16)
            sizes = problem.activations, problem.hidden, problem.intermediate, max_tokens
            reserve(device, self.most_scratch(*sizes, torch.bfloat16, torch.bfloat16))
            self.prepare_mailboxes(problem, device)
        torch.cuda.synchronize(device)

    def prepare_result(self, problem: Problem, device: torch.device, max_tokens: int, result: torch.dtype) -> None:
        """Compile and load what a call runs for bf16 hidden states and a result of that dtype."""
        kinds = [
            (problem.hidden, problem.intermediate, mode, torch.bfloat16, result) for mode in _modes(problem.activations)
        ]
        compile_all(("decode.cu", _decode_macros(*kind)) for kind in kinds)
        for kind in kinds:
            _decode_kernel(*kind, device)
        self.prepare_gemms(problem, device, max_tokens, result)

    def prepare_mailboxes(self, problem: Problem, device: torch.device) -> None:
        """Make what blocks of one launch hand each other words through."""
        mailboxes(device, decode_box(problem.hidden, problem.intermediate)).current()

    def most_scratch(
        self, activations: str, hidden: int, intermediate: int, max_tokens: int, x: torch.dtype, result: torch.dtype
    ) -> int:
        """Bytes that a call carves, up to a number of tokens, for hidden states and a result of these dtypes."""
        sizes = hidden, intermediate, max_tokens, x
        return max(bytes_of(list(gemm.scratch(mode, *sizes).values())) for mode in _modes(activations))

    def scratch_bytes(self, device: torch.device) -> int:
        return scratch_bytes(device) + all_bytes(device)

    def shared_expert(self, x: Tensor, weights: list[Tensor], call: Call, out: Tensor) -> None:
        run_aligned(self._run, x, weights, call, out=out)

    def _run(self, x: Tensor, weights: list[Tensor], call: Call, out: Tensor) -> None:
        # Rows are whole tiles of 16: N of a packed matrix follows from its size and K.
        size = weights[0].numel() // fragment_bytes(ROWS, x.shape[1]) * ROWS // 2
        # Launches go to the current device; those of one call share scratch.
        with torch.cuda.device(x.device), exclusive(x.device):
            self.launch(x, weights, call, size, out)

    def launch(self, x: Tensor, weights: list[Tensor], call: Call, size: int, out: Tensor) -> None:
        """x (T, H) to out (T, H), both aligned to 16 bytes, on the current device."""
        few = len(x) <= decode_limit(x.shape[1], size, target_of(x.device))
        (decode if few else self.by_gemms)(x, weights, call, size, out)


def decode(x: Tensor, weights: list[Tensor], call: Call, size: int, out: Tensor) -> None:
    """The whole layer by decode.cu, x (T, H) to out (T, H), T at most DECODE_LIMIT."""
    from cuda.core import LaunchConfig, launch

    mode = call.activation_scale if call.activations == "nvfp4" else call.activations
    kernel = _decode_kernel(x.shape[1], size, mode, x.dtype, out.dtype, x.device)
    # Cooperative: all blocks resident or none, since they wait for each other. Serialisation relaxed: the weights of
    # this launch start to arrive while the kernel before it ends.
    config = LaunchConfig(
        grid=_blocks(size, x.device),
        block=THREADS,
        shmem_size=_shared_bytes(x.shape[1], x.dtype),
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
        np.float32(call.clamp),
        mailboxes(x.device, decode_box(x.shape[1], size)).current().data_ptr(),
        out.data_ptr(),
        *(weights[index].data_ptr() for index in (2, 5)),
    )


def _modes(activations: str) -> tuple[str, ...]:
    return ("static", "dynamic", "per_token") if activations == "nvfp4" else (activations,)


def _shared_bytes(hidden: int, dtype: torch.dtype) -> int:
    """Of decode.cu's Shared: the ring, partial sums of two tiles, x of a lone token, and the small rest."""
    return STAGES * STAGE_BYTES + PARTIAL_BYTES + hidden * dtype.itemsize + SMALL_BYTES


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
    """One block per multiprocessor, each with a tile of 8 gate and 8 up rows; an even number, for decode.cu."""
    return min((target_of(device).multiprocessors or 2) // 2 * 2, intermediate // 8)


def _decode_kernel(
    hidden: int, intermediate: int, mode: str, dtype: torch.dtype, result: torch.dtype, device: torch.device
) -> Any:
    macros = _decode_macros(hidden, intermediate, mode, dtype, result)
    return load_kernel("shared_expert_decode", "decode.cu", macros, device, _shared_bytes(hidden, dtype))


def _decode_macros(
    hidden: int, intermediate: int, mode: str, dtype: torch.dtype, result: torch.dtype
) -> tuple[tuple[str, int], ...]:
    sizes = (("HIDDEN", hidden), ("INTERMEDIATE", intermediate))
    kinds = (("ACTIVATIONS", gemm.MODE[mode]), ("ELEMENT", gemm.OUT[dtype]), ("RESULT", gemm.OUT[result]))
    room = (
        ("SHARED_BYTES", _shared_bytes(hidden, dtype)),
        ("MAILBOX_BYTES", mailbox_bytes(decode_box(hidden, intermediate))),
    )
    return (*sizes, *kinds, ("STAGES", STAGES), *room)


BACKEND = Sm90Backend()
