# SPDX-License-Identifier: Apache-2.0
"""Cross-compilation: what Triton and the assembler make of a kernel for a chip that is not here.

    kernel + constants + types of its arguments  ->  PTX, machine code  ->  registers, shared memory, spills

Needs no GPU: Triton's wheel brings the assembler (ptxas) and the tool that reads machine code (cuobjdump).
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .config import CHIPS, TOKEN_LIMITS, Chip, GemmConfig, ranges, refusal
from .enter import amax_partials, enter
from .gemm import gemm
from .pipeline import PARTIALS, Plan, enter_constants, gemm_constants

_FP4 = re.compile(r"\b(?:tcgen05\.mma|mma\.sync)\S*kind::mxf4nvf4\S*")
_BLOCK_OF_16 = re.compile(r"scale_vec::4X|block16")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """One kernel as the assembler sees it.

    Args:
        what: which kernel, half, mode and cut.
        chip: for which.
        ptx: the text.
        registers: of a thread.
        spilled_bytes: of a thread, in local memory.
        shared_bytes: of a program, dynamic and static.
    """

    what: str
    chip: Chip
    ptx: str
    registers: int
    spilled_bytes: int
    shared_bytes: int

    @property
    def fp4_instructions(self) -> set[str]:
        """The FP4 instructions in it, with one e4m3 scale per 16 values."""
        return {found for found in _FP4.findall(self.ptx) if _BLOCK_OF_16.search(found)}


def compile_kernel(kernel: Any, what: str, capability: tuple[int, int], signature: dict[str, str],
                   constants: dict[str, Any], **options: Any) -> Compiled:
    """Compile for a chip; `signature`: types of the arguments that are not constants, pointers aligned to 16 bytes."""
    chip = CHIPS[capability]
    names = kernel.arg_names
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, kind in signature.items() if kind.startswith("*")}
    missing = {name: None for name in names if name not in signature and name not in constants}
    source = ASTSource(kernel, signature | {n: "constexpr" for n in (*constants, *missing)}, constants | missing, aligned)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    made = triton.compile(source, target=target, options={**options, "enable_fp_fusion": False})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, static, local = (int(n) for n in _USAGE.search(said).groups())
    return Compiled(what, chip, made.asm["ptx"], registers, stack + local, made.metadata.shared + static)
