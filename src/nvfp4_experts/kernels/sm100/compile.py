# SPDX-License-Identifier: Apache-2.0
"""Cross-compilation: what Triton and the assembler make of a kernel for a chip that is not here.

    kernel + constants + types of its arguments  ->  PTX  ->  machine code, registers, shared memory, spills

Needs no GPU: Triton's wheel brings the assembler, ptxas.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..dispatch import Routing
from .config import CHIPS, Chip, GemmConfig
from .pipeline import Activations, Experts, Plan, run, scratch_of

_FP4 = re.compile(r"\b(?:tcgen05\.mma|mma\.sync)\S*kind::mxf4nvf4\S*")
_BLOCK_OF_16 = re.compile(r"scale_vec::4X|block16")
_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_TYPES = {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


@dataclass(frozen=True)
class Compiled:
    """One kernel as the assembler sees it.

    Args:
        kernel: its name.
        constants: what it was compiled with.
        ptx: the text.
        registers: of a thread.
        spilled_bytes: of a thread, in local memory.
        shared_bytes: of a program.
        tensor_columns: of tensor memory, of the 512 that a multiprocessor of sm_100 has.
    """

    kernel: str
    constants: dict[str, Any]
    ptx: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_columns: int

    @property
    def config(self) -> GemmConfig | None:
        """The cut of a GEMM; None for other kernels."""
        of = self.constants
        if "SWAP" not in of:
            return None
        return GemmConfig(of["TOKENS"], of["ROWS"], of["COLUMNS"], of["num_warps"], of["num_stages"], of["SWAP"])

    @property
    def fp4_instructions(self) -> set[str]:
        """The FP4 instructions in it that take one e4m3 scale for 16 values."""
        return {found for found in _FP4.findall(self.ptx) if _BLOCK_OF_16.search(found)}


def compile_layer(
    capability: tuple[int, int],
    mode: str,
    hidden: int,
    intermediate: int,
    tokens: int,
    groups: int = 1,
    top_k: int = 0,
    multiprocessors: int = 148,
    dtype: torch.dtype = torch.bfloat16,
    chip: Chip | None = None,
) -> list[Compiled]:
    """Compile what a call launches, in that order, for a chip of that compute capability.

    Args:
        capability: a key of config.CHIPS.
        mode: one of dispatch.ACTIVATION_SCALES.
        hidden, intermediate, tokens: H, I, T.
        groups, top_k: E and k of routed experts; k is 0 for a shared one.
        multiprocessors: of the device.
        dtype: of x and y.
        chip: with another table than that of config.CHIPS.
    """
    slots = tokens * top_k
    plan = Plan(chip or CHIPS[capability], mode, hidden, intermediate, groups, tokens, multiprocessors, slots)

    def meta(*shape: int, kind: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    scale = meta(kind=torch.float32)
    static = scale if mode == "static" else None
    indices, factors = meta(tokens, top_k, kind=torch.int64), meta(tokens, top_k, kind=torch.float32)
    routing = Routing(indices, factors, "before_down") if top_k else None
    weights = Experts(meta(), meta(), scale, meta(), meta(), scale)
    compiled: list[Compiled] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        compiled.append(_compile(kernel, capability, arguments, constants))

    x, y = (meta(tokens, hidden, kind=dtype) for _ in range(2))
    made = scratch_of(plan, x.device)
    run(x, weights, Activations(static, static, 10.0, routing), plan, made, y, launch)
    return compiled


def _compile(
    kernel: Any, capability: tuple[int, int], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> Compiled:
    options = {name: constants.pop(name) for name in _OPTIONS if name in constants}
    values = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants}
    signature = {name: _type(value) if name not in constants else "constexpr" for name, value in values.items()}
    fixed = {name: value for name, value in values.items() if signature[name] == "constexpr"}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True))
        if signature[name].startswith("*") and not parameter.do_not_specialize_on_alignment
    }
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    made = triton.compile(ASTSource(kernel, signature, fixed, aligned), target=target, options=options)
    registers, spilled = _assembler_says(made.asm["ptx"], CHIPS[capability].name)
    return Compiled(
        kernel=kernel.__name__,
        constants={**constants, **options},
        ptx=made.asm["ptx"],
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=made.metadata.shared,
        tensor_columns=getattr(made.metadata, "tmem_size", None) or 0,
    )


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return {int: "i32", float: "fp32", type(None): "constexpr"}[type(value)]


@functools.cache
def _assembler_says(ptx: str, architecture: str) -> tuple[int, int]:
    """Registers of a thread and bytes it spills, of the one kernel in a text; assembled as Triton does."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas_blackwell.path, "-v", "--fmad=false", f"--gpu-name={architecture}"]
        command += [file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled, registers = _SPILLED.findall(said), _REGISTERS.findall(said)
    assert len(spilled) == len(registers) == 1, said
    return int(registers[0]), max(int(number) for number in spilled[0])
