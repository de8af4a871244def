# SPDX-License-Identifier: Apache-2.0
"""How one launch of gemm.cu is cut up, and which cuts are legal for which half of a layer.

    a block     64 * strips * row_groups weight rows x `tokens` tokens, all columns or one of `split` runs of them
    a warpgroup `strips` times 64 rows, and two chunks (of 64 columns) of each stage; row_groups * column_groups of them
                multiply
    a part      what one warpgroup sums of a tile: split * column_groups parts, added in the order of K
    a stage     2 * column_groups chunks of both operands in shared memory; a block keeps a ring of `stages` of them

gemm.cu's head says what each part does; the numbers here are the macros it is compiled with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ...layouts.fragments import CHUNK_BYTES, COLUMNS, ROWS

ROW_GROUPS, COLUMN_GROUPS, TOKENS, SPLITS = (1, 2, 3, 4), (1, 2, 3, 4), (32, 64, 128, 256), (1, 2, 4)
MAX_STAGES, MIN_STAGES = 6, 2
SHARED_BYTES, RESERVED_BYTES = 232448, 8192  # what a block may have; of it for barriers, amax and alignment
_REGISTERS = {1: 232, 2: 232, 3: 152, 4: 112}  # of a consumer thread, by warpgroups, after the producer gave up its own
# Beside the accumulators, by fp8: decoded weights of two chunks, and the rest.
_OTHER_REGISTERS = {False: 32 + 40, True: 16 + 32}
_WARPS = 4  # of a warpgroup, each of ROWS rows


@dataclass(frozen=True, order=True)
class GemmConfig:
    """One launch configuration.

    Args:
        row_groups: warpgroups side by side, 64 weight rows each.
        column_groups: warpgroups that take turns along K.
        tokens: of a block.
        split: blocks of a cluster, each with its run of K.
        strips: of 64 rows, of a warpgroup. Of routed experts alone; tables do not have this and the next.
        fp8: activations are e4m3, in place of bf16.
    """

    row_groups: int
    column_groups: int
    tokens: int
    split: int
    strips: int = 1
    fp8: bool = False

    @property
    def warpgroups(self) -> int:
        """That multiply."""
        return self.row_groups * self.column_groups

    @property
    def parts(self) -> int:
        """Sums that are added up for each result."""
        return self.column_groups * self.split

    @property
    def threads(self) -> int:
        """Of a block: the multiplying warpgroups and the one that loads."""
        return 128 * (self.warpgroups + 1)

    @property
    def registers(self) -> int:
        """Of a thread that multiplies."""
        return _REGISTERS[self.warpgroups]

    @property
    def rows(self) -> int:
        """Weight rows of a block."""
        return ROWS * _WARPS * self.strips * self.row_groups

    @property
    def stage_chunks(self) -> int:
        """Chunks of a stage."""
        return 2 * self.column_groups

    @property
    def stage_bytes(self) -> int:
        """Both operands of a stage."""
        activations = self.tokens * COLUMNS * (1 if self.fp8 else 2)
        return self.stage_chunks * (activations + self.rows // ROWS * CHUNK_BYTES)

    @property
    def stages(self) -> int:
        """As many as fit, and no more than MAX_STAGES."""
        return min(MAX_STAGES, (SHARED_BYTES - RESERVED_BYTES) // self.stage_bytes)

    @property
    def sum_bytes(self) -> int:
        """fp32 sums that come to a block from all parts; they lie in the ring's place, once it is empty."""
        share = -(-self.tokens // 8 // self.parts) * 8
        return self.parts * self.column_groups * share * self.rows * 4 if self.parts > 1 else 0

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return max(self.stages * self.stage_bytes, self.sum_bytes) + RESERVED_BYTES

    def to_list(self) -> list[int]:
        """As tables write it."""
        return [self.row_groups, self.column_groups, self.tokens, self.split]

    def __str__(self) -> str:
        return "/".join(map(str, self.to_list()))


@dataclass(frozen=True)
class GemmProblem:
    """One half of a layer: GATE_UP has 2I rows and H columns, DOWN has H rows and I columns."""

    rows: int
    columns: int
    tokens: int

    @property
    def chunks(self) -> int:
        """Of 64 columns, the last one padded."""
        return -(-self.columns // COLUMNS)


def halves(hidden: int, intermediate: int, tokens: int) -> tuple[GemmProblem, GemmProblem]:
    """The two problems of a layer: gate_up and down."""
    return GemmProblem(2 * intermediate, hidden, tokens), GemmProblem(hidden, intermediate, tokens)


def refusal(config: GemmConfig, problem: GemmProblem) -> str | None:
    """Why gemm.cu cannot run a problem in this configuration, as a clause; None if it can."""
    for name, value, allowed in (
        ("row_groups", config.row_groups, ROW_GROUPS),
        ("column_groups", config.column_groups, COLUMN_GROUPS),
        ("tokens", config.tokens, TOKENS),
        ("split", config.split, SPLITS),
    ):
        if value not in allowed:
            return f"{name} must be one of {allowed}, not {value}"
    if config.warpgroups not in _REGISTERS:
        return f"a block has at most {max(_REGISTERS)} warpgroups, not {config.warpgroups}"
    if config.parts > config.tokens // 8:
        return f"{config.tokens // 8} groups of 8 tokens are too few for {config.parts} parts"
    if config.stages < MIN_STAGES:
        return f"{MIN_STAGES} stages of {config.stage_bytes} bytes must fit in shared memory"
    if config.shared_bytes > SHARED_BYTES:
        return f"{config.sum_bytes} bytes of sums must fit in shared memory"
    if config.strips > 1 and config.parts > 1:
        return f"{config.strips} strips must be one part, not {config.parts}"
    needed = config.strips * config.tokens // 2 + _OTHER_REGISTERS[config.fp8]
    if needed > config.registers:
        return f"{needed} registers must fit in the {config.registers} of {config.warpgroups} warpgroups"
    stages = -(-problem.chunks // config.stage_chunks)
    if config.split > stages:
        return f"{problem.columns} columns make {stages} of the stages, too few for a split in {config.split}"
    return None


def config_is_legal(config: GemmConfig, problem: GemmProblem) -> bool:
    """Whether gemm.cu can run a problem in this configuration; `refusal` says why not."""
    return refusal(config, problem) is None


def legal_configs(problem: GemmProblem) -> Iterator[GemmConfig]:
    """Every legal configuration, in order."""
    every = (GemmConfig(*parts) for parts in itertools.product(ROW_GROUPS, COLUMN_GROUPS, TOKENS, SPLITS))
    return (config for config in every if config_is_legal(config, problem))
