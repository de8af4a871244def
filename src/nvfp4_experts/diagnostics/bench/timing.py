# SPDX-License-Identifier: Apache-2.0
"""How one candidate is timed: a chain of calls, each on another copy of its weights, each fed by the one before.

CUDA (`GraphTimer`): the chain goes once over all copies, so one replay touches more distinct bytes than any cache
holds; it is captured once and replayed, without the cost of launching from Python. A sample is a run of replays
between two events, at least MIN_SAMPLE_SECONDS long, divided by its calls.

Elsewhere (`ClockTimer`): a sample is one call between two readings of the clock, on the next copy; what Python costs
is part of it, as it is for a caller.

Samples of all candidates are taken in turn (`measure`), so that what the machine does meanwhile hits all alike.

What a replay gave is compared call by call, each with the same call run alone on what entered it there. Ends of chains
cannot be compared: two inputs 0.1 % apart are 2.2 times farther apart after each expert, and unrelated after ten, so
that a kernel whose last bit varies would look wrong.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ...errors import UnsupportedError

MIN_SAMPLE_SECONDS = 2e-3
WARM_UP_CALLS = 3

Call = Callable[[Tensor], Tensor]


class Timer(Protocol):
    """Something that can be asked again and again how long a call takes."""

    def sample(self) -> float:
        """Seconds per call, measured now."""

    def outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What timed calls gave last, each with what it must be equal to but for rounding (or itself)."""


class GraphTimer:
    """A chain over all copies as one CUDA graph.

    Args:
        calls: one callable per copy of the weights.
        x: (T, H), where each replay starts.

    Raises:
        UnsupportedError: a call waits for the device, which no graph can hold.

    Cost: warms up on a side stream (compiling whatever compiles on first use), captures, replays a few times. The
        outputs of all calls stay in memory.
    """

    def __init__(self, calls: Sequence[Call], x: Tensor) -> None:
        self._calls, self._device = calls, x.device
        with torch.cuda.device(x.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    chain(calls[:1], x)
                chain(calls, x)
                with _waiting_refused():
                    chain(calls[:1], x)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._states = chain(calls, x)
            self._replays = 1
            self.sample()
            self._replays = max(1, math.ceil(MIN_SAMPLE_SECONDS / (self.sample() * len(calls))))

    def sample(self) -> float:
        return elapsed_on_cuda(self._graph.replay, self._replays, self._device) / len(self._calls)

    def outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for call, x, y in zip(self._calls, self._states, self._states[1:], strict=False):
            yield y, call(x)


class ClockTimer:
    """One call at a time by the clock, over the copies in turn; same arguments as GraphTimer."""

    def __init__(self, calls: Sequence[Call], x: Tensor) -> None:
        self._calls, self._next, self._x = calls, 0, x
        self.sample()

    def sample(self) -> float:
        call = self._calls[self._next]
        self._next = (self._next + 1) % len(self._calls)
        start = time.perf_counter()
        self._x = call(self._x)
        return time.perf_counter() - start

    def outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self._x, self._x


def timer_for(calls: Sequence[Call], x: Tensor) -> Timer:
    """The timer of the device x is on."""
    return GraphTimer(calls, x) if x.device.type == "cuda" else ClockTimer(calls, x)


def chain(calls: Sequence[Call], x: Tensor) -> list[Tensor]:
    """x, calls[0](x), calls[1](calls[0](x)), ..."""
    states = [x]
    for call in calls:
        states.append(call(states[-1]))
    return states


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """Where a call waits for the device, raise before a capture does, which would not say why."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        rule = "must not wait for the device, or no CUDA graph can hold it"
        raise UnsupportedError("the call", rule, "one that does", "name a backend that does not") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def seconds_per_call(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds per call of something simple, called `repeats` times back to back."""
    if device.type == "cuda":
        return elapsed_on_cuda(function, repeats, device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def elapsed_on_cuda(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds per call between two events around `repeats` calls, launched while the device is busy with one more."""
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        function()
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeats
