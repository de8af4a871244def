# SPDX-License-Identifier: Apache-2.0
"""How a launch of gemm.py is cut up, and which cut runs at how many tokens on which kind of chip.

    range of tokens   1..16  17..32  33..64  65..128  129..256  257..512  513..
    a cut             one row of the table of the chip, for a range; K is then cut into as many runs as there are
                      multiprocessors for each tile, and no more than _MAX_SPLIT

Both are functions of the range and not of the number of tokens: the order of the sum over K depends on the split
alone, so within a range a token's result does not depend on how many others there are. The tables were chosen by
reasoning and by what the assembler says of registers, spills and shared memory (compile.py). Nothing in them has been
timed: no such chip was at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..target import Target

TOKEN_LIMITS = (16, 32, 64, 128, 256, 512)
_MAX_SPLIT = 16
_FEWEST_STEPS = 2  # of COLUMNS columns in a run of K
_FEW_SLOTS = TOKEN_LIMITS[0]
_SPREAD = 3, 2  # rows of an expert that a cut is made for, over the mean

SCALE_TILE, TENSOR_COLUMNS = 128, 512


@dataclass(frozen=True)
class GemmConfig:
    """One cut.

    Args:
        tokens: rows of activations of a tile: 16, 32, 64, or 128 (a whole tile of scales).
        rows: weight rows of a tile; with gate and up, half of them are channels.
        columns: of K at a step.
        warps: of a program.
        stages: steps whose loads are under way at a time.
        swap: the weights are the left operand of the dot.
    """

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int
    swap: bool

    def __str__(self) -> str:
        order = "weights x tokens" if self.swap else "tokens x weights"
        sizes = f"{self.tokens} tokens, {self.rows} rows, {self.columns} columns"
        return f"{sizes}, {self.warps} warps, {self.stages} stages, {order}"


@dataclass(frozen=True)
class Chip:
    """What the kernels must know of a kind of GPU.

    Args:
        name: of the architecture, as compilers say it.
        shared_bytes: what a program may have of shared memory.
        table: the cut for each range of tokens of TOKEN_LIMITS, and for more.
        native: it multiplies FP4.
    """

    name: str
    shared_bytes: int
    table: tuple[GemmConfig, ...]
    native: bool = True


def _table(narrow: tuple[GemmConfig, ...], wide: GemmConfig) -> tuple[GemmConfig, ...]:
    return (*narrow, *(wide for _ in range(len(TOKEN_LIMITS) + 1 - len(narrow))))


_TABLE_100 = _table(
    tuple(GemmConfig(tokens, 128, 256, warps, 4, True) for tokens, warps in ((16, 4), (32, 4), (64, 8))),
    GemmConfig(128, 128, 256, 8, 3, False),  # two programs of three stages fit a multiprocessor, one of four
)
# 128 tokens a tile spill there: sums are in registers, not in a memory of their own.
_TABLE_120 = _table(
    tuple(GemmConfig(tokens, 128, 128, 4, 3, True) for tokens in (16, 32)),
    GemmConfig(64, 128, 128, 8, 3, True),
)
# Where operands are decoded: one stage, since Triton 3.6 was seen to overwrite the register operand of Hopper's
# products while they run (docs/measured.md), and fewer columns, since they are fp16 in shared memory.
_TABLE_DECODING = _table(
    tuple(GemmConfig(tokens, 128, 128, 4, 1, True) for tokens in (16, 32, 64)),
    GemmConfig(128, 128, 128, 8, 1, False),
)


CHIPS = {
    (10, 0): Chip("sm_100a", 232448, _TABLE_100),
    (10, 3): Chip("sm_103a", 232448, _TABLE_100),
    (12, 0): Chip("sm_120a", 101376, _TABLE_120),
    (12, 1): Chip("sm_121a", 101376, _TABLE_120),
}
DECODING_CHIP = Chip("decoding", 101376, _TABLE_DECODING, native=False)


def chip_of(target: Target) -> Chip | None:
    """The chip with FP4 tensor cores that a target is, if gemm.py is made for it."""
    return None if target.capability is None else CHIPS.get(target.capability)


def token_range(tokens: int) -> int:
    """Index of the range a number of tokens is in."""
    return next((i for i, limit in enumerate(TOKEN_LIMITS) if tokens <= limit), len(TOKEN_LIMITS))


def ranges(max_tokens: int) -> Iterator[int]:
    """The largest number of tokens of each range up to `max_tokens`."""
    yield from (limit for limit in TOKEN_LIMITS if limit < max_tokens)
    yield max_tokens


def choose(chip: Chip, rows: int, columns: int, tokens: int, multiprocessors: int) -> tuple[GemmConfig, int]:
    """The cut and the split of one half of a layer: `rows` weight rows of `columns` columns, `tokens` >= 1."""
    index = token_range(tokens)
    config = chip.table[index]
    if index == len(TOKEN_LIMITS):
        return config, 1
    tiles = -(-TOKEN_LIMITS[index] // config.tokens) * -(-rows // config.rows)
    steps = -(-columns // config.columns)
    return config, max(1, min(multiprocessors // tiles, steps // _FEWEST_STEPS, _MAX_SPLIT))


def routed_ranges(max_slots: int, groups: int) -> Iterator[int]:
    """The largest number of slots of each range up to `max_slots`, as `choose_routed` has them."""
    limits = (_FEW_SLOTS, *(limit * groups * _SPREAD[1] // _SPREAD[0] for limit in TOKEN_LIMITS))
    yield from (limit for limit in sorted(set(limits)) if _FEW_SLOTS <= limit < max_slots)
    yield max_slots


def choose_routed(
    chip: Chip, rows: int, columns: int, slots: int, groups: int, multiprocessors: int
) -> tuple[GemmConfig, int]:
    """As `choose`, of routed experts, `slots` >= 1 among `groups`; a function of the range of slots.

    The cut is that of the rows an expert has if all have as many, and half as many again: experts have more or less,
    and reading weights twice costs more than multiplying empty rows. Of few slots perhaps one expert is here, so K is
    cut as for that one.
    """
    if slots <= _FEW_SLOTS:
        return choose(chip, rows, columns, slots, multiprocessors)
    return chip.table[token_range(-(-slots * _SPREAD[0] // (groups * _SPREAD[1])))], 1


def refusal(
    config: GemmConfig, chip: Chip, shared_bytes: int, spilled_bytes: int, tensor_columns: int = 0
) -> str | None:
    """Why a cut must not be used on a chip, as a clause, given what compiling it has shown; None if it may."""
    if config.tokens not in (16, 32, 64, SCALE_TILE) or config.rows % SCALE_TILE or config.columns % 64:
        return "tokens must be 16, 32, 64 or 128, rows whole tiles of 128 scales, columns whole tiles of 64"
    if config.swap == (config.tokens == SCALE_TILE):
        return "weights are the left operand where tokens are fewer than 128, and only there"
    if shared_bytes > chip.shared_bytes:
        return f"{shared_bytes} bytes of shared memory must fit in the {chip.shared_bytes} of {chip.name}"
    if tensor_columns > TENSOR_COLUMNS:
        return f"{tensor_columns} columns of tensor memory must fit in {TENSOR_COLUMNS}"
    if spilled_bytes:
        return f"it spills {spilled_bytes} bytes of registers"
    return None


def config_is_legal(
    config: GemmConfig, chip: Chip, shared_bytes: int, spilled_bytes: int, tensor_columns: int = 0
) -> bool:
    """Whether a cut may be used on a chip; `refusal` says why not."""
    return refusal(config, chip, shared_bytes, spilled_bytes, tensor_columns) is None
