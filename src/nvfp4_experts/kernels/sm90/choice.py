# SPDX-License-Identifier: Apache-2.0
"""Which configuration of gemm.cu runs at how many tokens: the checked-in table of the device's class, else a rule.

    range of tokens    1..16  17..32  33..64  ..  2049..4096  4097..
    table              tuned/<device class>.json, written by `nvfp4-experts tune`; see table.py
    rule               the legal configuration of the least estimated time at the upper end of the range

Both are functions of the range and not of the number of tokens. The order of the sum over K depends on the
configuration's parts alone, so within a range a token's result does not depend on how many others there are.

The rule's estimate, per launch:

    a step      two chunks of every warpgroup: the longest of the tensor cores' products with the part of the decoding
                that they do not hide, of all the decoding, of the bytes from L2 into the SM, and of one warp's way
    the launch  ramp + longest of (waves x steps x the above, bytes / DRAM rate) + waves x (epilogue + sum of the parts)

It ranks configurations, it does not predict: its constants were fitted to 160 launches on one H200 (V4-Pro and
V4-Flash, 16 to 8192 tokens, 2026-11-24). Among those its choice was within 6 % of the best each time; `tune`, which
tries more, then found pairs up to 1.17 times faster than the rule's.
"""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path

from ...errors import UnsupportedError
from ...layouts.fragments import CHUNK_BYTES, COLUMNS, ROWS
from ..target import Target
from .config import MIN_STAGES, GemmConfig, GemmProblem, halves, legal_configs
from .table import DECODE_LIMIT, Table, load_table, range_limit, tokens_of_range

_CYCLES = 1755.0  # per microsecond
_MACS = 2000  # bf16, of an SM per cycle; 2048 at best
_DRAM_BYTES = 4.4e6  # per microsecond, of the device
_SM_BYTES = 56  # per cycle, from L2 into one SM
_DECODE, _SHOWN = 320, 1 / 3  # cycles of a step to decode a warp's chunks; what of it adds to the products
_WAY, _FEW_STAGES = 640, 870  # cycles of a step: one warp's way through it; more where a ring has two stages
_EPILOGUE = 28  # cycles per value of a thread
_SUM, _SUM_BYTES = 2800, 18  # cycles of a hand-over; bytes per cycle that come to a block
_CLUSTER = 1250  # cycles that a cluster of several blocks costs beside
_RAMP = 0.9  # microseconds of a launch that its neighbours do not hide
_CLUSTER_LOSS = 0.9  # of the SMs that clusters of four can use: they stay within a GPC


def choose(hidden: int, intermediate: int, tokens: int, target: Target) -> tuple[GemmConfig, GemmConfig]:
    """The configurations of gate_up and of down for a number of tokens, >= 1, the same all over a range of tokens.

    Raises:
        TableError: the table of this device's class cannot be read or trusted.
        UnsupportedError: the target has no class.

    Cost: a dictionary look-up; the first call for a layer and range reads the table or runs the rule (milliseconds).
    """
    return _choose(hidden, intermediate, range_limit(tokens), target)


def decode_limit(hidden: int, intermediate: int, target: Target) -> int:
    """The largest number of tokens that decode.cu should take, from the table or DECODE_LIMIT; raises as `choose`."""
    shape = _table_of(target).shape(hidden, intermediate)
    return DECODE_LIMIT if shape is None else shape.decode_limit


@functools.cache
def choose_by_rule(problem: GemmProblem, multiprocessors: int) -> GemmConfig:
    """The legal configuration of the least estimate; of equal ones (to a nanosecond) that of the fewest parts."""

    def rank(config: GemmConfig) -> tuple[float, int, GemmConfig]:
        return round(estimate(config, problem, multiprocessors), 3), config.parts, config

    return min(legal_configs(problem), key=rank)


def estimate(config: GemmConfig, problem: GemmProblem, multiprocessors: int) -> float:
    """Microseconds of a launch, roughly, by the rule above; the configuration must be legal."""
    tiles = -(-problem.rows // config.rows) * -(-problem.tokens // config.tokens)
    waves = -(-tiles // cluster_slots(config.split, multiprocessors))
    steps = -(-problem.chunks // (config.stage_chunks * config.split))
    values = config.rows * config.tokens
    decode = _DECODE * config.warpgroups
    products = config.stage_chunks * values * COLUMNS / _MACS
    step = max(products + _SHOWN * decode, decode, config.stage_bytes / _SM_BYTES, _WAY)
    if config.stages == MIN_STAGES:
        step += _FEW_STAGES
    weights = problem.rows // ROWS * problem.chunks * CHUNK_BYTES
    dram = (weights + 2 * problem.tokens * (problem.columns + problem.rows)) / _DRAM_BYTES
    finish = _EPILOGUE * values / (128 * config.warpgroups * config.split)
    if config.parts > 1:
        finish += _SUM + config.sum_bytes / _SUM_BYTES
    if config.split > 1:
        finish += _CLUSTER
    return _RAMP + max(waves * steps * step / _CYCLES, dram) + waves * finish / _CYCLES


def cluster_slots(cluster: int, multiprocessors: int) -> int:
    """Clusters of that many blocks (1, 2, 4) that run at once, one block an SM; at least 1."""
    if cluster <= 2:
        return max(1, multiprocessors // cluster)
    return max(1, int(multiprocessors * _CLUSTER_LOSS) // cluster)


def device_class(target: Target) -> str:
    """What tables are kept by, e.g. "sm_90-132": capability and multiprocessors.

    Raises:
        UnsupportedError: no CUDA device.
    """
    if target.capability is None or target.multiprocessors is None:
        raise UnsupportedError("device", "must be a CUDA device", target.name, "use a Hopper GPU")
    major, minor = target.capability
    return f"sm_{major}{minor}-{target.multiprocessors}"


def table_path(target: Target) -> Path:
    """Where the checked-in table of a device's class lies; it need not exist."""
    return Path(str(resources.files(__package__) / "tuned" / f"{device_class(target)}.json"))


@functools.cache
def _choose(hidden: int, intermediate: int, limit: int | None, target: Target) -> tuple[GemmConfig, GemmConfig]:
    shape = _table_of(target).shape(hidden, intermediate)
    choice = None if shape is None else shape.choice(limit)
    if choice is not None:
        return choice.gate_up, choice.down
    gate_up, down = halves(hidden, intermediate, tokens_of_range(limit))
    return choose_by_rule(gate_up, target.multiprocessors or 1), choose_by_rule(down, target.multiprocessors or 1)


@functools.cache
def _table_of(target: Target) -> Table:
    path, name = table_path(target), device_class(target)
    return load_table(path, name) if path.exists() else Table(name)
