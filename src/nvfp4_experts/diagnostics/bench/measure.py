# SPDX-License-Identifier: Apache-2.0
"""The benchmark: ceilings, then every candidate checked, then those that passed timed side by side.

    1  ceilings      read and matmul rates of this device, now
    2  check         each candidate, each number of tokens, against kernels/reference.py on fresh random input
    3  time          per number of tokens: all candidates that passed, in turn, sample by sample; medians

Nothing wrong is timed: one failed check withdraws the candidate at every number of tokens. A peer that raises is
reported with its reason; one of ours that raises anything but "cannot run here" has failed.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import quantiles

import torch
from torch import Tensor

from ..._version import __version__
from ...errors import InputError, UnsupportedError
from ...kernels import reference
from ...kernels.dispatch import ACTIVATION_SCALES, ACTIVATIONS
from ...kernels.target import target_of
from ..metrics import rel_l2
from .candidates import Candidate, Ours, Prepared, TorchBf16, TorchFp8
from .ceilings import Ceilings, measure_ceilings
from .ggml_peer import GgmlCpu
from .humming_peer import Humming
from .machine import default_device, describe_machine, rotation_bytes
from .report import BenchReport, Row
from .timing import Timer, timer_for
from .work import HIDDEN_SCALE, INPUT_SCALE, SWIGLU_LIMIT, Weights, Work

PEERS: tuple[Candidate, ...] = (TorchBf16(), TorchFp8(), Humming(), GgmlCpu())
MIN_SAMPLES, MAX_SAMPLES = 5, 201
CUDA_TOKENS, OTHER_TOKENS = (1, 16, 64, 128, 256, 512, 1024, 8192), (1, 4, 16, 64, 256, 1024)
_RMS_RANGE = (0.5, 2.0)  # of what the chain of calls carries; 1 by construction

Progress = Callable[[int, int, str], None]


@dataclass
class Entry:
    """What is known of a candidate while the benchmark runs."""

    candidate: Candidate
    detail: str = ""
    resident_bytes: int | None = None
    copies: int = 0
    failure: str | None = None
    unavailable: dict[int, str] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    samples: dict[int, list[float]] = field(default_factory=dict)


def our_candidates(
    activations: Sequence[str], activation_scale: str = "dynamic", backends: Sequence[str] = ("auto",)
) -> tuple[Ours, ...]:
    """This library's layer in each activation format on each backend.

    Raises:
        InputError: a name that is none.
    """
    for name, allowed in [(a, ACTIVATIONS) for a in activations] + [(activation_scale, ACTIVATION_SCALES)]:
        if name not in allowed:
            raise InputError("activations", f"must be among {allowed}", repr(name), "pick one of them")
    return tuple(Ours(a, activation_scale, backend) for backend in backends for a in activations)


def bench(
    work: Work,
    candidates: Sequence[Candidate],
    *,
    tokens: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    seconds: float = 60.0,
    rotate: int | None = None,
    matmul_size: int | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> BenchReport:
    """Check and time candidates on one shared expert.

    Args:
        work: the shape; see `work.find_work`.
        candidates: who takes part, e.g. `our_candidates(...) + PEERS`.
        tokens: numbers of tokens, each >= 1; None is CUDA_TOKENS or OTHER_TOKENS.
        device: None is the first CUDA device, or the CPU where there is none.
        seconds: for the samples, all together; building, checking and compiling come on top. At least MIN_SAMPLES are
            taken, however long that is.
        rotate: bytes of distinct weights each candidate cycles through; None is more than the caches of the device.
        matmul_size: see `measure_ceilings`.
        command: how this was started, for the report.
        progress: called with (done, total, label).

    Raises:
        InputError: tokens or seconds out of range.
        UnsupportedError: the device is not there.
    """
    where = checked_device(device)
    counts = tuple(dict.fromkeys(tokens or (CUDA_TOKENS if where.type == "cuda" else OTHER_TOKENS)))
    if min(counts) < 1:
        raise InputError("tokens", "must be at least 1 each", counts, "leave the others out")
    if not (math.isfinite(seconds) and seconds > 0):
        raise InputError("seconds", "must be finite and above 0", seconds, "give the seconds to spend on samples")
    advance = progress or (lambda done, total, label: None)
    rotate = rotation_bytes(where) if rotate is None else rotate
    steps = 1 + len(candidates) + len(counts)
    with torch.no_grad():
        advance(0, steps, "ceilings")
        ceilings = measure_ceilings(where, rotate, matmul_size)
        weights = work.weights(where)
        entries = [Entry(candidate) for candidate in candidates]
        truths = Truths(work, weights)
        calls: dict[str, list[Prepared]] = {}
        for step, entry in enumerate(entries, 1):
            advance(step, steps, f"checking {entry.candidate.name}")
            calls[entry.candidate.name] = _check(entry, weights, truths, counts, rotate)
        truths.clear()
        for step, count in enumerate(counts, 1 + len(entries)):
            advance(step, steps, f"timing {count} tokens")
            _time(entries, calls, work.hidden_states(count, where), seconds / len(counts))
        advance(steps, steps, "done")
    return BenchReport(
        version=__version__,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        machine=describe_machine(where),
        shape=work.shape,
        hidden_size=work.hidden,
        intermediate_size=work.intermediate,
        swiglu_limit=SWIGLU_LIMIT,
        rotation_bytes=rotate,
        ceilings=ceilings,
        rows=tuple(_row(entry, count, work, ceilings) for count in counts for entry in entries),
    )


def checked_device(device: torch.device | str | None) -> torch.device:
    """A device that can be used.

    Raises:
        UnsupportedError: torch does not know it, or it is not there.
    """
    if device is None:
        return default_device()
    try:
        where = torch.device(device)
        target_of(where)
        torch.empty(0, device=where)
    except (AssertionError, RuntimeError) as error:
        raise UnsupportedError("device", "must be there", f"{device!r}: {brief(error)}", "try cpu") from error
    return where


class Truths:
    """What is right for each number of tokens and activation format, computed once each."""

    def __init__(self, work: Work, weights: Weights) -> None:
        self._work, self._weights = work, weights
        self._known: dict[tuple[int, str, str], Tensor] = {}

    def input(self, tokens: int) -> Tensor:
        """x (T, H) bf16."""
        return self._work.check_states(tokens, self._weights.gate.device)

    def output(self, tokens: int, activations: str, activation_scale: str) -> Tensor:
        """y (T, H) bf16 by `kernels/reference.py`."""
        key = (tokens, activations, activation_scale if activations == "nvfp4" else "")
        if key not in self._known:
            w, device = self._weights, self._weights.gate.device
            self._known[key] = reference.shared_expert(
                self.input(tokens),
                w.gate,
                w.up,
                w.down,
                swiglu_limit=SWIGLU_LIMIT,
                activations=activations,
                activation_scale=activation_scale,
                input_scale=torch.tensor(INPUT_SCALE, device=device),
                hidden_scale=torch.tensor(HIDDEN_SCALE, device=device),
            )
        return self._known[key]

    def clear(self) -> None:
        """Give the memory back."""
        self._known.clear()


def _check(entry: Entry, weights: Weights, truths: Truths, counts: Sequence[int], rotate: int) -> list[Prepared]:
    """Compare one copy with the reference at every number of tokens; all copies of a candidate that may be timed."""
    candidate = entry.candidate
    refusal = candidate.refusal(target_of(weights.gate.device))
    if refusal is not None:
        entry.unavailable.update(dict.fromkeys(counts, refusal))
        return []
    try:
        first = candidate.prepare(weights, max(counts))
    except Exception as error:
        _raised(entry, counts, error)
        return []
    entry.detail, entry.resident_bytes = first.detail, first.nbytes
    for count in counts:
        try:
            y = first.run(truths.input(count))
            entry.errors[count] = rel_l2(y, truths.output(count, *candidate.reference))
        except Exception as error:
            _raised(entry, [count], error)
            continue
        if not entry.errors[count] <= candidate.bound:
            got = f"rel-L2 {entry.errors[count]:.3g} at {count} tokens"
            entry.failure = entry.failure or f"{got} is past the bound of {candidate.bound:.3g}"
    if entry.failure or len(entry.unavailable) == len(counts):
        return []
    entry.copies = max(2, -(-rotate // first.nbytes))
    try:
        return [first, *(candidate.prepare(weights, max(counts)) for _ in range(entry.copies - 1))]
    except Exception as error:
        _raised(entry, counts, error)
        return []


def _time(entries: Sequence[Entry], calls: dict[str, list[Prepared]], x: Tensor, seconds: float) -> None:
    """Sample all candidates in turn until the seconds are used up."""
    count = x.shape[0]
    timers: list[tuple[Entry, Timer]] = []
    for entry in entries:
        copies = calls[entry.candidate.name]
        if not copies or entry.failure or count in entry.unavailable:
            continue
        try:
            timer = timer_for([copy.run for copy in copies], x)
            entry.failure = _disagreement(timer, entry.candidate.bound)
        except Exception as error:
            _raised(entry, [count], error)
            continue
        if entry.failure is None:
            timers.append((entry, timer))
    start = _now(x.device)
    done = 0
    while timers and done < MAX_SAMPLES and (done < MIN_SAMPLES or _now(x.device) - start < seconds):
        for entry, timer in timers:
            entry.samples.setdefault(count, []).append(timer.sample())
        done += 1
    for entry, timer in timers:
        entry.failure = entry.failure or _disagreement(timer, entry.candidate.bound)


def _disagreement(timer: Timer, bound: float) -> str | None:
    """What is wrong with the values in the timed chain; None if nothing is."""
    timed, expected = timer.outputs()
    rms = float(timed.float().square().mean().sqrt())
    low, high = _RMS_RANGE
    if not low <= rms <= high:
        return f"the timed calls gave values of rms {rms:.3g}, which must stay near 1"
    error = rel_l2(timed, expected)
    if not error <= 2 * bound:
        return f"replayed as a graph, the calls gave other values than run one by one: rel-L2 {error:.3g}"
    return None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _raised(entry: Entry, counts: Sequence[int], error: Exception) -> None:
    """Note an exception: a reason, unless it is one of ours that broke."""
    if entry.candidate.ours and not isinstance(error, UnsupportedError):
        entry.failure = entry.failure or brief(error)
    else:
        entry.unavailable.update(dict.fromkeys(counts, brief(error)))


def brief(error: Exception) -> str:
    """An exception in one line: its type, and the first line of its text."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _row(entry: Entry, count: int, work: Work, ceilings: Ceilings) -> Row:
    candidate = entry.candidate
    floor = work.floor_seconds(count, ceilings.read_bytes_per_second, ceilings.matmul_flop_per_second)
    reason = entry.failure or entry.unavailable.get(count)
    status = "failed" if entry.failure else "unavailable" if reason else "timed"
    low = middle = high = None
    samples = entry.samples.get(count, []) if status == "timed" else []
    if samples:
        low, middle, high = (1e6 * quarter for quarter in quantiles(samples, n=4, method="inclusive"))
    return Row(
        candidate=candidate.name,
        ours=candidate.ours,
        detail=entry.detail,
        tokens=count,
        status=status,
        reason=reason,
        floor_us=1e6 * floor,
        median_us=middle,
        low_us=low,
        high_us=high,
        samples=len(samples),
        times_floor=middle / (1e6 * floor) if middle else None,
        rel_l2=entry.errors.get(count),
        bound=candidate.bound,
        resident_bytes=entry.resident_bytes,
        copies=entry.copies,
    )
