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

from ..._version import __version__
from ...errors import InputError, UnsupportedError
from ...kernels.dispatch import ACTIVATION_SCALES, ACTIVATIONS
from ...kernels.target import Target, target_of
from ..metrics import rel_l2
from .candidates import Candidate, Ours, Prepared, TorchBf16, TorchFp8
from .ceilings import Ceilings, measure_ceilings
from .ggml_peer import GgmlCpu
from .humming_peer import Humming, HummingMoe
from .machine import default_device, describe_machine, rotation_bytes
from .moe import MoeTask
from .moe_candidates import OursMoe, TorchBf16Moe
from .report import BenchReport, Row
from .task import SharedExpertTask, Task
from .timing import Timer, timer_for
from .work import SWIGLU_LIMIT, MoeWork, Work

PEERS: tuple[Candidate, ...] = (TorchBf16(), TorchFp8(), Humming(), GgmlCpu())
MOE_PEERS: tuple[Candidate, ...] = (TorchBf16Moe(), HummingMoe())
MIN_SAMPLES, MAX_SAMPLES = 5, 201
CUDA_TOKENS, OTHER_TOKENS = (1, 16, 64, 128, 256, 512, 1024, 8192), (1, 4, 16, 64, 256, 1024)
CUDA_MOE_TOKENS, OTHER_MOE_TOKENS = (1, 8, 64, 256, 1024, 4096), (1, 4, 16, 64)
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
    return tuple(Ours(*mode) for mode in _modes(activations, activation_scale, backends))


def our_moe_candidates(
    activations: Sequence[str], activation_scale: str = "dynamic", backends: Sequence[str] = ("auto",)
) -> tuple[OursMoe, ...]:
    """The same of the whole mixture."""
    return tuple(OursMoe(*mode) for mode in _modes(activations, activation_scale, backends))


def _modes(activations: Sequence[str], activation_scale: str, backends: Sequence[str]) -> list[tuple[str, str, str]]:
    for name, allowed in [(a, ACTIVATIONS) for a in activations] + [(activation_scale, ACTIVATION_SCALES)]:
        if name not in allowed:
            raise InputError("activations", f"must be among {allowed}", repr(name), "pick one of them")
    return [(a, activation_scale, backend) for backend in backends for a in activations]


def bench(
    work: Work | MoeWork,
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
    """Check and time candidates on one shared expert or on a mixture of experts.

    Args:
        work: the shape; see `work.find_work` and `work.find_moe`.
        candidates: who takes part, e.g. `our_candidates(...) + PEERS`, or `our_moe_candidates(...) + MOE_PEERS`.
        tokens: numbers of tokens, each >= 1; None is the default of the work and the device.
        device: None is the first CUDA device, or the CPU where there is none.
        seconds: for the samples, all together; building, checking and compiling come on top. At least MIN_SAMPLES are
            taken, however long that is.
        rotate: bytes of distinct weights a chain of calls goes through; None is more than the caches of the device.
        matmul_size: see `measure_ceilings`.
        command: how this was started, for the report.
        progress: called with (done, total, label).

    Raises:
        InputError: tokens or seconds out of range.
        UnsupportedError: the device is not there.
    """
    where = checked_device(device)
    counts = tuple(dict.fromkeys(tokens or _default_tokens(work, where)))
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
        task = _task(work, where, counts, rotate)
        entries = [Entry(candidate) for candidate in candidates]
        copies: dict[str, list[Prepared]] = {}
        for step, entry in enumerate(entries, 1):
            advance(step, steps, f"checking {entry.candidate.name}")
            copies[entry.candidate.name] = _check(entry, task, counts, target_of(where))
        task.forget()
        for step, count in enumerate(counts, 1 + len(entries)):
            advance(step, steps, f"timing {count} tokens")
            _time(entries, copies, task, count, seconds / len(counts))
        advance(steps, steps, "done")
    return BenchReport(
        version=__version__,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        machine=describe_machine(where),
        work=work,
        swiglu_limit=SWIGLU_LIMIT,
        rotation_bytes=rotate,
        ceilings=ceilings,
        rows=tuple(_row(entry, count, task, ceilings) for count in counts for entry in entries),
    )


def checked_device(device: torch.device | str | None, way_out: str = "try cpu") -> torch.device:
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
        raise UnsupportedError("device", "must be there", f"{device!r}: {brief(error)}", way_out) from error
    return where


def _default_tokens(work: Work | MoeWork, device: torch.device) -> tuple[int, ...]:
    cuda, other = (CUDA_TOKENS, OTHER_TOKENS) if isinstance(work, Work) else (CUDA_MOE_TOKENS, OTHER_MOE_TOKENS)
    return cuda if device.type == "cuda" else other


def _task(work: Work | MoeWork, device: torch.device, counts: Sequence[int], rotate: int) -> Task:
    if isinstance(work, Work):
        return SharedExpertTask(work, device, rotate)
    return MoeTask(work, device, counts, rotate)


def _check(entry: Entry, task: Task, counts: Sequence[int], target: Target) -> list[Prepared]:
    """Compare one copy with the reference at every number of tokens; all copies of a candidate that may be timed."""
    candidate = entry.candidate
    refusal = candidate.refusal(target)
    if refusal is not None:
        entry.unavailable.update(dict.fromkeys(counts, refusal))
        return []
    try:
        first = candidate.prepare(task.weights, max(counts))
    except Exception as error:
        _raised(entry, counts, error)
        return []
    entry.detail, entry.resident_bytes = first.detail, first.nbytes
    for count in counts:
        try:
            y = task.calls([first], count)[0](task.input(count))
            entry.errors[count] = rel_l2(y, task.output(count, *candidate.reference))
        except Exception as error:
            _raised(entry, [count], error)
            continue
        if not entry.errors[count] <= candidate.bound:
            got = f"rel-L2 {entry.errors[count]:.3g} at {count} tokens"
            entry.failure = entry.failure or f"{got} is past the bound of {candidate.bound:.3g}"
    if entry.failure or len(entry.unavailable) == len(counts):
        return []
    entry.copies = task.copies(first.nbytes)
    try:
        return [first, *(candidate.prepare(task.weights, max(counts)) for _ in range(entry.copies - 1))]
    except Exception as error:
        _raised(entry, counts, error)
        return []


def _time(entries: Sequence[Entry], copies: dict[str, list[Prepared]], task: Task, count: int, seconds: float) -> None:
    """Sample all candidates in turn until the seconds are used up."""
    x = task.start(count)
    timers: list[tuple[Entry, Timer]] = []
    for entry in entries:
        own = copies[entry.candidate.name]
        if not own or entry.failure or count in entry.unavailable:
            continue
        try:
            timer = timer_for(task.calls(own, count), x)
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
    """What is wrong with the values of the timed calls; None if nothing is."""
    low, high = _RMS_RANGE
    for timed, alone in timer.outputs():
        rms = float(timed.float().square().mean().sqrt())
        if not low <= rms <= high:
            return f"the timed calls gave values of rms {rms:.3g}, which must stay near 1"
        error = rel_l2(timed, alone)
        if not error <= 2 * bound:
            return f"replayed as a graph, a call gave other values than alone: rel-L2 {error:.3g}"
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


def _row(entry: Entry, count: int, task: Task, ceilings: Ceilings) -> Row:
    candidate = entry.candidate
    floor = task.floor_seconds(count, ceilings.read_bytes_per_second, ceilings.matmul_flop_per_second)
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
        hits=task.hits(count),
    )
