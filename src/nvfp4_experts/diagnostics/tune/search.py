# SPDX-License-Identifier: Apache-2.0
"""The search: per layer size and range of tokens, candidates by the rule, checked, timed in turn, the best pair kept.

    1  candidates   of each half: what runs now, and the legal configurations the rule estimates within NEAR of its best
    2  check        each against fp32 math, and against the first that passed; nothing wrong is timed
    3  time         each half alone, all candidates in turn, medians; then the FINALISTS of both halves as pairs
    4  decode       the largest number of tokens for which decode.cu beats the pair just found

What runs now stays unless a pair is faster by more than NOISE.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, TypeVar

import torch

from ...errors import InputError, UnsupportedError
from ...kernels.dispatch import Problem, get_backend
from ...kernels.sm90.choice import choose, choose_by_rule, estimate
from ...kernels.sm90.config import GemmConfig, GemmProblem, halves, legal_configs
from ...kernels.sm90.table import DECODE_LIMIT, TOKEN_LIMITS, Choice, Run, Shape, Table, range_limit, tokens_of_range
from ...kernels.target import Target, target_of
from ..bench.candidates import OUR_BOUNDS
from ..bench.measure import checked_device
from ..bench.timing import Timer
from ..bench.work import Work
from ..metrics import rel_l2

if TYPE_CHECKING:
    from .halves import Layer

RANGES: tuple[int | None, ...] = (*TOKEN_LIMITS, None)
NEAR, MOST, FINALISTS, NOISE = 1.5, 8, 2, 0.01
MIN_SAMPLES, MAX_SAMPLES = 5, 101
# Two orders of one fp32 sum are 2e-5 apart at most (tensor cores truncate: 2^-23 a step of 16 columns), which moves
# bf16 values, 2^-7.5 apart, across rounding boundaries: sqrt(2^-7.5 * 2e-5) = 3e-4.
CANDIDATE_BOUND = 2.0**-10
REFERENCE_BOUND = OUR_BOUNDS["bf16"]

Pair = tuple[GemmConfig, GemmConfig]
Progress = Callable[[int, int, str], None]
_K = TypeVar("_K", bound=Hashable)


@dataclass(frozen=True)
class Row:
    """One layer size and range: what ran (no microseconds: it is wrong), what is to run, and what else is wrong."""

    shape: str
    limit: int | None
    old: Pair
    new: Pair
    old_us: float | None
    new_us: float
    wrong: tuple[str, ...]


def hopper(device: torch.device | str | None) -> tuple[torch.device, Target]:
    """The device, if the kernels that are tuned run on it.

    Raises:
        UnsupportedError: they do not, with the reason.
    """
    way_out = "tune on the GPU that the table is for"
    where = checked_device(device, way_out)
    target = target_of(where)
    reason = get_backend("sm90").refusal(Problem(64, 64, "bf16", target))
    if reason is not None:
        got = f"{target.name}: {reason}"
        raise UnsupportedError("device", "must run the sm90 kernels", got, way_out)
    return where, target


def candidates(problem: GemmProblem, multiprocessors: int, now: GemmConfig) -> tuple[GemmConfig, ...]:
    """What runs now, then the most promising others, best estimate first."""
    bound = NEAR * estimate(choose_by_rule(problem, multiprocessors), problem, multiprocessors)
    estimates = {config: estimate(config, problem, multiprocessors) for config in legal_configs(problem)}
    near = sorted((config for config in estimates if estimates[config] <= bound), key=lambda c: (estimates[c], c))
    return tuple(dict.fromkeys((now, *near[:MOST])))


@torch.no_grad()
def tune(
    works: Sequence[Work],
    layer_of: Callable[[Work], Layer],
    target: Target,
    table: Table,
    run: Run,
    *,
    tokens: Sequence[int] | None = None,
    seconds: float = 120.0,
    progress: Progress | None = None,
) -> tuple[Table, tuple[Row, ...]]:
    """A table with new choices, measured by `run`, for layers of some sizes; what is not tuned stays.

    Args:
        layer_of: makes a size ready on the GPU that `target` describes, e.g. `halves.Layer`.
        tokens: numbers of tokens whose ranges are tuned; None is all ranges.
        seconds: for the samples, all together; at least MIN_SAMPLES are taken each time.

    Raises:
        InputError: tokens or seconds out of range.
        UnsupportedError: no configuration gives right results.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise InputError("seconds", "must be finite and above 0", seconds, "give the seconds to spend on samples")
    if tokens is not None and min(tokens, default=0) < 1:
        raise InputError("tokens", "must be at least 1 each", tuple(tokens), "leave the others out")
    wanted = RANGES if tokens is None else {range_limit(count) for count in tokens}
    limits = [limit for limit in RANGES if limit in wanted]
    share = seconds / (len(works) * len(limits) * 4)  # two halves, their pairs, decode.cu
    rows: list[Row] = []
    for work in works:
        layer = layer_of(work)
        for limit in limits:
            if progress:
                progress(len(rows), len(works) * len(limits), f"{work.shape}, {tokens_of_range(limit)} tokens")
            row = _range(layer, work, limit, target, share)
            rows.append(row)
            shape = table.shape(work.hidden, work.intermediate) or Shape(work.hidden, work.intermediate, DECODE_LIMIT)
            if limit == RANGES[0]:
                shape = replace(shape, decode_limit=_decode_limit(layer, row.new, share))
            table = table.having(shape.having(Choice(limit, *row.new, row.new_us, run)))
    return table, tuple(rows)


def _range(layer: Layer, work: Work, limit: int | None, target: Target, seconds: float) -> Row:
    tokens = tokens_of_range(limit)
    old = choose(work.hidden, work.intermediate, tokens, target)
    wrong: list[str] = []
    finalists = []
    for gate_up, problem, now in zip((True, False), halves(work.hidden, work.intermediate, tokens), old, strict=True):
        tried = candidates(problem, target.multiprocessors or 1, now)
        layer.compile(gate_up, tried)
        right = _right(layer, gate_up, tokens, tried, wrong)
        times = _medians({config: layer.half_timer(gate_up, tokens, config) for config in right}, seconds)
        best = sorted(times, key=lambda config: times[config])[:FINALISTS]
        finalists.append(dict.fromkeys((*best, now) if now in times else best))
    timers = {(a, b): layer.pair_timer(tokens, a, b) for a, b in itertools.product(*finalists)}
    for pair in list(timers):
        errors = [rel_l2(*outputs) for outputs in timers[pair].outputs()]
        if not all(error <= CANDIDATE_BOUND for error in errors):
            wrong.append(f"{pair[0]} then {pair[1]} replayed: rel-L2 {max(errors):.3g} from its calls one by one")
            del timers[pair]
    _require(bool(timers), f"{work.shape}, {tokens} tokens", wrong)
    times_of = _medians(timers, seconds)
    new = min(times_of, key=lambda pair: times_of[pair])
    if old in times_of and times_of[old] <= (1 + NOISE) * times_of[new]:
        new = old
    old_us = 1e6 * times_of[old] if old in times_of else None
    return Row(work.shape, limit, old, new, old_us, 1e6 * times_of[new], tuple(wrong))


def _right(
    layer: Layer, gate_up: bool, tokens: int, configs: Sequence[GemmConfig], wrong: list[str]
) -> list[GemmConfig]:
    """The configurations with right results; the others are appended to `wrong`."""
    truth, first, right = layer.truth(gate_up, tokens), None, []
    name = "gate_up" if gate_up else "down"
    for config in configs:
        result = layer.result(gate_up, tokens, config)
        errors = rel_l2(result, truth), 0.0 if first is None else rel_l2(result, first)
        if errors[0] <= REFERENCE_BOUND and errors[1] <= CANDIDATE_BOUND:
            first = result if first is None else first
            right.append(config)
        else:
            wrong.append(f"{name} {config}: rel-L2 {errors[0]:.3g} from fp32 math, {errors[1]:.3g} from the others")
    _require(bool(right), f"{name}, {tokens} tokens", wrong)
    return right


def _require(fine: bool, what: str, wrong: Sequence[str]) -> None:
    if not fine:
        raise UnsupportedError(
            what, "one configuration must be right", "; ".join(wrong), "report it: a kernel is wrong"
        )


def _decode_limit(layer: Layer, pair: Pair, seconds: float) -> int:
    """The largest number of tokens for which decode.cu is not slower than a pair."""
    for tokens in range(DECODE_LIMIT, 0, -1):
        timers = {"decode": layer.decode_timer(tokens), "pair": layer.pair_timer(tokens, *pair)}
        times = _medians(timers, seconds / DECODE_LIMIT)
        if times["decode"] <= times["pair"]:
            return tokens
    return 0


def _medians(timers: Mapping[_K, Timer], seconds: float) -> dict[_K, float]:
    """Median seconds per call of each, sampled in turn."""
    samples: dict[_K, list[float]] = {name: [] for name in timers}
    start, done = time.perf_counter(), 0
    while done < MIN_SAMPLES or (done < MAX_SAMPLES and time.perf_counter() - start < seconds):
        for name, timer in timers.items():
            samples[name].append(timer.sample())
        done += 1
    return {name: median(found) for name, found in samples.items()}
