# SPDX-License-Identifier: Apache-2.0
"""Blackwell: NVFP4 weights times NVFP4 activations on FP4 tensor cores, in Triton.

    pipeline.py   the launches of a call        config.py    how they are cut up, for which chip
    gemm.py       a half of the layer           compile.py   what the assembler makes of it, without the chip
    enter.py      hidden states to NVFP4        dot.py       the one instruction that other machines lack
    numbers.py    the formats, bit for bit      tiles.py     what lies where
    slots.py      which rows an expert has      warm.py      kernels compiled side by side, and loaded

routed.py is the backend's routed experts. The same kernels run everywhere with that instruction replaced: decoding.py
is the backend that does so.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import LayoutError
from ...formats.nvfp4 import Nvfp4Tensor
from ...layouts.scales import swizzle_scales, unswizzle_scales
from ...layouts.weights import deinterleave_rows, interleave_gate_up
from ..cuda import workspace
from ..cuda.alignment import run_aligned
from ..dispatch import Call, Problem, Routing
from ..target import Target, target_of
from .config import DECODING_CHIP, chip_of, ranges

if TYPE_CHECKING:
    from .pipeline import Plan

OLDEST_TRITON, OLDEST_TRITON_OF_SM_121 = (3, 6), (3, 8)


class Sm100Backend:
    """See the module docstring; weights in the order of layouts/scales.py and layouts/weights.py.

    Args:
        name: in dispatch's table.
        decoding: replace the FP4 instruction by decoding and an ordinary product, on any machine Triton runs on.
    """

    def __init__(self, name: str, decoding: bool = False) -> None:
        self.name, self.decoding = name, decoding

    def refusal(self, problem: Problem) -> str | None:
        if problem.activations != "nvfp4":
            return "multiplies NVFP4 by NVFP4 alone (activations='nvfp4')"
        capability = problem.target.capability
        if self.decoding:
            if capability is None and not (problem.target.device_type == "cpu" and _interpreted()):
                return "needs an NVIDIA GPU, or Triton's interpreter (TRITON_INTERPRET=1) on a CPU"
            if capability is not None and capability < (8, 0):
                return "needs compute capability 8.0 or newer"
        elif chip_of(problem.target) is None:
            return "needs FP4 tensor cores (compute capability 10.0, 10.3, 12.0 or 12.1)"
        reason = _missing(capability)
        if reason is not None and not self.decoding:
            _warn_once(reason)
        return reason

    def pack(self, gate: Nvfp4Tensor, up: Nvfp4Tensor, down: Nvfp4Tensor) -> dict[str, Tensor]:
        for projection in (gate, up, down):
            if (projection.block_scales.view(torch.uint8) & 0x80).any():
                way_out = "quantise the weight again"
                raise LayoutError("block_scales", "must not be negative: FP4 hardware reads no sign", "one", way_out)
        codes, block_scales = interleave_gate_up(gate, up)
        return {
            "gate_up_codes": codes,
            "gate_up_block_scales": swizzle_scales(block_scales.view(torch.uint8)),
            "gate_up_global_scales": torch.stack((gate.global_scale, up.global_scale)),
            "down_codes": down.codes.contiguous(),
            "down_block_scales": swizzle_scales(down.block_scales.view(torch.uint8)),
            "down_global_scale": down.global_scale.reshape(1),
        }

    def unpack(self, weights: Mapping[Any, Tensor], hidden: int, intermediate: int) -> tuple[Nvfp4Tensor, ...]:
        codes, scales, global_scales, down_codes, down_scales, down_global_scale = weights.values()
        gate_codes, up_codes = deinterleave_rows(codes)
        gate_scales, up_scales = deinterleave_rows(unswizzle_scales(scales, 2 * intermediate, hidden // 16))
        down_block_scales = unswizzle_scales(down_scales, hidden, intermediate // 16)
        return (
            Nvfp4Tensor(gate_codes, gate_scales.view(torch.float8_e4m3fn), global_scales[0]),
            Nvfp4Tensor(up_codes, up_scales.view(torch.float8_e4m3fn), global_scales[1]),
            Nvfp4Tensor(down_codes, down_block_scales.view(torch.float8_e4m3fn), down_global_scale[0]),
        )

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """Reserve scratch; compile and load what calls with bf16 hidden states run."""
        self.prepare_for(torch.bfloat16, problem, device, max_tokens)

    def prepare_for(self, dtype: torch.dtype, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """As `prepare`, with hidden states and a result of that dtype; kernels know the one or the other."""
        from .warm import make_ready

        layer = problem.target, problem.activation_scale, problem.hidden, problem.intermediate
        if device.type != "cpu":
            make_ready(device, [self.plan(*layer, tokens) for tokens in ranges(max_tokens)], (dtype,))

    def scratch_bytes(self, device: torch.device) -> int:
        return 0 if device.type == "cpu" else workspace.scratch_bytes(device)

    def shared_expert(self, x: Tensor, weights: list[Tensor], call: Call, out: Tensor) -> None:
        size = weights[0].shape[0] // 2
        plan = self.plan(target_of(x.device), call.activation_scale, x.shape[1], size, x.shape[0])
        run_aligned(self.launch, x, weights, call, plan, None, out=out)

    def launch(
        self, x: Tensor, weights: list[Tensor], call: Call, plan: Plan, routing: Routing | None, out: Tensor
    ) -> None:
        """One call, of routed experts where there is a routing; x and out begin at multiples of 16."""
        from .pipeline import Activations, Experts, run, scratch_of

        scales = (call.input_scale, call.hidden_scale) if call.activation_scale == "static" else (None, None)
        activations = Activations(*scales, call.clamp, routing)
        with _launching_on(x.device):
            run(x, Experts(*weights), activations, plan, scratch_of(plan, x.device), out)

    def plan(
        self, target: Target, mode: str, hidden: int, intermediate: int, tokens: int, groups: int = 1, slots: int = 0
    ) -> Plan:
        """How a call is cut up on that machine."""
        chip = DECODING_CHIP if self.decoding else chip_of(target)
        assert chip is not None, "refused"
        return _cached_plan(chip, mode, hidden, intermediate, groups, tokens, target.multiprocessors or 1, slots)


@functools.lru_cache(maxsize=4096)
def _cached_plan(*arguments: Any) -> Plan:
    from .pipeline import Plan

    return Plan(*arguments)


@contextlib.contextmanager
def _launching_on(device: torch.device) -> Iterator[None]:
    """Launches go to the current device; those of one call share scratch."""
    if device.type == "cpu":
        yield
        return
    with torch.cuda.device(device), workspace.exclusive(device):
        yield


def _interpreted() -> bool:
    """Whether Triton runs kernels in Python; without Triton, no."""
    with contextlib.suppress(ImportError):
        return bool(importlib.import_module("triton").knobs.runtime.interpret)
    return False


@functools.cache
def _missing(capability: tuple[int, int] | None) -> str | None:
    """What kernels need and this environment lacks, as a clause; None if nothing."""
    try:
        version = importlib.import_module("triton").__version__
        if capability is not None:
            importlib.import_module("cuda.bindings.runtime")
    except (ImportError, RuntimeError, OSError) as problem:
        what = str(problem).partition("\n")[0]
        return f"needs Triton and cuda-core (pip install 'nvfp4-experts[gpu]'): {what}"
    oldest = OLDEST_TRITON_OF_SM_121 if capability == (12, 1) else OLDEST_TRITON
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < oldest:
        return f"needs Triton {'.'.join(map(str, oldest))} or newer, and {version} is here"
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    """Who asked for "auto" on a Blackwell GPU would not otherwise hear that its backend was passed over."""
    warnings.warn(f"backend 'sm100' cannot run on this Blackwell GPU: it {reason}", stacklevel=3)


BACKEND = Sm100Backend("sm100")
