# SPDX-License-Identifier: Apache-2.0
"""Fuzzes the CPU kernel over shapes, bytes and options, in every tier of this machine.

    python -m tests.fuzz.cpu --seconds 600 --seed 1

Each seed draws a shared expert and routed ones; it is printed when one fails: `--seed N --cases 1` repeats it. Results
must equal `tests/kernels/cpu_oracle.py` to the bit (NaN for NaN); the bf16 instruction, which adds in another order, to
a bound.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor
from nvfp4_experts.formats.stack import Nvfp4Stack
from nvfp4_experts.kernels import native
from nvfp4_experts.kernels.cpu import backend, routed
from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES, ACTIVATIONS, WEIGHTINGS, Call, Routing
from tests.kernels import cpu_oracle

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PAIRS_BOUND = (
    2.0**-5
)  # of the largest magnitude: sums in another order may move a value of h by one step of its format


class Draw:
    """What a seed draws: any code bytes, mostly ordinary scales, sometimes zero, negative, subnormal or NaN ones."""

    def __init__(self, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.g))

    def weight(self, rows: int, columns: int) -> Nvfp4Tensor:
        g = self.g
        codes = torch.randint(0, 256, (rows, columns // 2), generator=g, dtype=torch.uint8)
        low = self.integer(1, 110)
        scales = torch.randint(low, self.integer(low, 126) + 1, (rows, columns // 16), generator=g, dtype=torch.uint8)
        kind = torch.rand(scales.shape, generator=g)
        odd = torch.randint(0, 256, scales.shape, generator=g, dtype=torch.uint8)
        if self.integer(0, 2) == 0:
            scales = torch.where(kind < 0.02, odd, scales)
        scales = torch.where(kind > 0.98, torch.zeros_like(scales), scales)
        spread = 2.0 ** self.integer(-20, 3)
        return Nvfp4Tensor(codes, scales.view(torch.float8_e4m3fn), torch.rand((), generator=g) * spread + 2.0**-24)

    def x(self, tokens: int, hidden: int) -> Tensor:
        x = torch.randn(tokens, hidden, generator=self.g) * 2.0 ** self.integer(-12, 12)
        x = torch.where(torch.rand(x.shape, generator=self.g) < 0.1, torch.zeros_like(x), x)
        if self.integer(0, 3) == 0:
            value = (float("nan"), float("inf"), -float("inf"))[self.integer(0, 2)]
            x[self.integer(0, tokens - 1), self.integer(0, hidden - 1)] = value
        return x

    def call(self, *experts: int) -> Call:
        scales = [torch.rand(experts, generator=self.g) * 2.0 ** self.integer(-16, 4) + 2.0**-30 for _ in range(2)]
        mode = ACTIVATIONS[self.integer(0, 2)], ACTIVATION_SCALES[self.integer(0, 2)]
        return Call((0.0, 10.0, 0.5)[self.integer(0, 2)], *mode, *scales)


@dataclass(frozen=True)
class Case:
    """One drawn problem: a shared expert."""

    x: Tensor
    weights: tuple[Nvfp4Tensor, Nvfp4Tensor, Nvfp4Tensor]
    call: Call
    threads: int

    def run(self) -> Tensor:
        packed = list(backend.BACKEND.pack(*self.weights).values())
        got = torch.empty_like(self.x)
        backend.BACKEND.shared_expert(self.x, packed, self.call, got)
        return got

    def wanted(self) -> Tensor:
        return cpu_oracle.shared_expert(self.x, *self.weights, self.call)

    def __str__(self) -> str:
        mode = f"{self.call.activations} {self.call.activation_scale}, limit {self.call.swiglu_limit}"
        return f"x {tuple(self.x.shape)} {self.x.dtype}, I {self.weights[0].shape[-2]}, {mode}, {self.threads} threads"


@dataclass(frozen=True)
class RoutedCase(Case):
    """One drawn problem: routed experts, their result in the dtype of x or in fp32."""

    weights: tuple[Nvfp4Stack, Nvfp4Stack, Nvfp4Stack]  # type: ignore[assignment]
    routing: Routing
    out: torch.dtype

    def run(self) -> Tensor:
        packed = list(routed.ROUTED.pack(*self.weights).values())
        got = torch.empty_like(self.x, dtype=self.out)
        routed.ROUTED.routed_experts(self.x, packed, self.routing, self.call, got)
        return got

    def wanted(self) -> Tensor:
        return cpu_oracle.routed_experts(self.x, *self.weights, self.routing, self.call).to(self.out)

    def __str__(self) -> str:
        indices, weighting = self.routing.indices, self.routing.weighting
        routing = f"indices {tuple(indices.shape)} {indices.dtype}, {weighting}, out {self.out}"
        return f"E {len(self.weights[0])}, {routing}, {super().__str__()}"


def draw(seed: int) -> Case:
    """The shared expert of a seed."""
    d = Draw(seed)
    hidden, intermediate = (16 * d.integer(1, d.integer(1, 36)) for _ in range(2))
    tokens = d.integer(1, d.integer(1, 150))
    weights = d.weight(intermediate, hidden), d.weight(intermediate, hidden), d.weight(hidden, intermediate)
    x, call = d.x(tokens, hidden), d.call()
    return Case(x.to(_DTYPES[d.integer(0, 2)]), weights, call, d.integer(1, 3))


def draw_routed(seed: int) -> RoutedCase:
    """The routed experts of a seed: any routing, slots that are not here and experts named twice included."""
    d = Draw(seed)
    hidden, intermediate = (16 * d.integer(1, d.integer(1, 20)) for _ in range(2))
    experts, top_k, tokens = d.integer(1, 9), d.integer(1, 5), d.integer(1, d.integer(1, 60))
    weights = tuple(
        Nvfp4Stack.of([d.weight(*size) for _ in range(experts)])
        for size in ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    )
    indices = torch.randint(-1, experts + 1, (tokens, top_k), generator=d.g)
    if d.integer(0, 1):
        indices = indices.clamp(max=d.integer(0, 2))  # most tokens in the same few
    factors = torch.randn(tokens, top_k, generator=d.g)
    routing = Routing(indices.to((torch.int32, torch.int64)[d.integer(0, 1)]), factors, WEIGHTINGS[d.integer(0, 1)])
    x, call, dtype = d.x(tokens, hidden), d.call(experts), _DTYPES[d.integer(0, 2)]
    out = (dtype, torch.float32)[d.integer(0, 1)]
    return RoutedCase(x.to(dtype), weights, call, d.integer(1, 3), routing, out)  # type: ignore[arg-type]


def disagreement(case: Case, tier: str) -> str | None:
    """What is wrong with a tier's result; None if nothing is."""
    settings = mock.patch.object(backend, "cpu_threads", lambda: case.threads)
    with settings, mock.patch.dict(os.environ, {native.ISA_VARIABLE: tier}):
        got = case.run()
    want = case.wanted()
    if not torch.equal(got.isnan(), want.isnan()):
        return "NaN where there should be none, or none where there should be"
    got, want = got.nan_to_num(0.0), want.nan_to_num(0.0)
    if tier == "avx512bf16" and case.call.activations != "nvfp4":
        error, size = float((got.double() - want.double()).abs().amax()), float(want.double().abs().amax())
        return None if error <= _PAIRS_BOUND * size else f"off by {error:.3g} of {size:.3g}"
    return None if torch.equal(got, want) else f"{int((got != want).sum())} of {got.numel()} values differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the first case; the others count up from it")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--cases", type=int, default=None, help="stop after so many")
    options = parser.parse_args()
    loaded, reason = native.load()
    assert loaded is not None, reason
    tiers = [tier.name for tier in loaded.tiers if tier.present]
    start, done, failed = time.monotonic(), 0, 0
    while time.monotonic() - start < options.seconds and (options.cases is None or done < options.cases):
        for case in (draw(options.seed + done), draw_routed(options.seed + done)):
            for tier in tiers:
                if wrong := disagreement(case, tier):
                    failed += 1
                    print(f"seed {options.seed + done}, {tier}: {wrong}; {case}", flush=True)
        done += 1
    print(f"{2 * done} cases from seed {options.seed}, tiers {', '.join(tiers)}: {failed} failures")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
