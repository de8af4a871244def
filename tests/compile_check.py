# SPDX-License-Identifier: Apache-2.0
"""Every kernel of every layer for every Blackwell chip, compiled here: `make compile-check`, a table and a verdict.

    shapes     V4-Pro, V4-Flash, a tensor-parallel slice of V4.1-Flash, odd multiples of 16; routed experts of V4-Pro,
               V4-Flash and of odd multiples of 16
    tokens     a number for each cut in config.py's tables, and with K in one run and in several
    modes      static, dynamic, per_token

The table has one row for each chip, kernel and cut: the largest figures over all that was compiled.
"""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import triton

from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES
from nvfp4_experts.kernels.sm100.backend import OLDEST_TRITON_OF_SM_121
from nvfp4_experts.kernels.sm100.compile import Compiled, compile_layer
from nvfp4_experts.kernels.sm100.config import CHIPS, Chip, choose_routed, refusal, routed_ranges

SHAPES = [(7168, 3072), (4096, 2048), (5120, 288), (144, 80)]
ROUTED = {(7168, 3072): 384, (4096, 2048): 256, (144, 80): 5}  # H, I: E
TOKENS, TOP_K = [1, 32, 64, 128, 8192], 6
# A GEMM on sm_100 multiplies out of tensor memory, where the scales are copied as they lie; on sm_120 from registers.
_FORMS = {
    10: (r"tcgen05\.mma\.cta_group::1\.kind::mxf4nvf4\.block_scale\S*", r"tcgen05\.cp\S*"),
    12: (r"mma\.sync\.aligned\.m16n8k64\.row\.col\.kind::mxf4nvf4\.block_scale\S*\.f32\.e2m1\.e2m1\.f32\.ue4m3",),
}
_OTHER_PRODUCTS = re.compile(r"\b(?:wgmma\S*|mma\.sync\S*f16\S*|tcgen05\.mma\S*kind::f16\S*|tcgen05\.mma\S*mxf8\S*)")


def triton_version() -> tuple[int, ...]:
    """(3, 6)"""
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def problems_of(kernel: Compiled, chip: Chip) -> list[str]:
    """What is wrong with a compiled kernel: another instruction than it must have, spills, too much shared memory."""
    if kernel.config is None:
        found = [f"{kernel.fp4_instructions} in {kernel.kernel}"] if kernel.fp4_instructions else []
        return found + ([f"{kernel.kernel} spills"] if kernel.spilled_bytes else [])
    major = next(capability[0] for capability, known in CHIPS.items() if known.name == chip.name)
    wanted = [form for form in _FORMS[major] if not re.search(form, kernel.ptx)]
    problems = [f"no {form}" for form in wanted]
    if not kernel.fp4_instructions:
        problems.append("no FP4 instruction with a scale for 16 values")
    problems += [f"also {other}" for other in set(_OTHER_PRODUCTS.findall(kernel.ptx))]
    reason = refusal(kernel.config, chip, kernel.shared_bytes, kernel.spilled_bytes, kernel.tensor_columns)
    return [f"{kernel.config}: {problem}" for problem in (*problems, *([reason] if reason else []))]


Layer = tuple[tuple[int, int], str, tuple[int, int], int, int, int]


def layers() -> Iterator[Layer]:
    """Chip, mode, (H, I), tokens, experts and top_k of each layer."""
    for capability, chip in CHIPS.items():
        if capability == (12, 1) and triton_version() < OLDEST_TRITON_OF_SM_121:
            print(f"{chip.name}: left out, Triton {triton.__version__} does not know it", file=sys.stderr)
            continue
        for mode, shape, tokens in itertools.product(ACTIVATION_SCALES, SHAPES, TOKENS):
            yield capability, mode, shape, tokens, 1, 0
        for (hidden, intermediate), experts in ROUTED.items():
            # Tokens for each cut and split of routed experts: the most slots of a range.
            tokens_of = {}
            for slots in routed_ranges(max(TOKENS) * TOP_K, experts):
                cuts = [
                    choose_routed(chip, *rows_and_columns, slots, experts, 148)
                    for rows_and_columns in ((2 * intermediate, hidden), (hidden, intermediate))
                ]
                tokens_of.setdefault(tuple(cuts), max(1, slots // TOP_K))
            for mode, tokens in itertools.product(ACTIVATION_SCALES, tokens_of.values()):
                yield capability, mode, (hidden, intermediate), tokens, experts, TOP_K


def compile_one(layer: Layer) -> list[Compiled]:
    """The kernels of a layer."""
    capability, mode, shape, tokens, experts, top_k = layer
    return compile_layer(capability, mode, *shape, tokens, experts, top_k)


def main() -> int:
    """Print the table; 1 if anything is wrong."""
    begin = time.monotonic()
    wrong: list[str] = []
    rows: dict[tuple[str, ...], list[int]] = {}
    every = list(layers())
    with ProcessPoolExecutor() as pool:
        kernels = [
            (CHIPS[layer[0]], kernel)
            for layer, made in zip(every, pool.map(compile_one, every, chunksize=8), strict=True)
            for kernel in made
        ]
    for chip, kernel in kernels:
        wrong += [f"{chip.name} {kernel.kernel} {kernel.constants}: {what}" for what in problems_of(kernel, chip)]
        half = {True: ", gate and up", False: ", down", None: ""}[kernel.constants.get("GATE_UP")]
        row = chip.name, kernel.kernel + half, str(kernel.config or "")
        figures = kernel.registers, kernel.spilled_bytes, kernel.shared_bytes, kernel.tensor_columns
        rows[row] = [max(pair) for pair in zip(rows.get(row, [0] * 4), figures, strict=True)]
    print(
        "| chip | kernel | cut | registers | spilled | shared memory | tensor columns |\n|---|---|---|---|---|---|---|"
    )
    for row, figures in rows.items():
        print("| " + " | ".join((*row, *map(str, figures))) + " |")
    seconds = time.monotonic() - begin
    print(f"\n{len(kernels)} kernels with Triton {triton.__version__} in {seconds:.0f} s, {len(wrong)} problems")
    print("\n".join(dict.fromkeys(wrong)))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
