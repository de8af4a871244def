# SPDX-License-Identifier: Apache-2.0
"""Fuzzes the CPU kernel over shapes, bytes and options, in every tier of this machine.

    python -m tests.fuzz.cpu --seconds 600 --seed 1

Each case is drawn from its own seed, printed when it fails: `--seed N --cases 1` repeats it. Results must equal
`tests/kernels/cpu_oracle.py` to the bit (NaN for NaN); the bf16 instruction, which adds in another order, to a bound.
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
from nvfp4_experts.kernels import native
from nvfp4_experts.kernels.cpu import backend
from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES, ACTIVATIONS, Call
from tests.kernels import cpu_oracle

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PAIRS_BOUND = (
    2.0**-5
)  # of the largest magnitude: sums in another order may move a value of h by one step of its format


@dataclass(frozen=True)
class Case:
    """One drawn problem."""

    x: Tensor
    weights: tuple[Nvfp4Tensor, Nvfp4Tensor, Nvfp4Tensor]
    call: Call
    threads: int

    def __str__(self) -> str:
        mode = f"{self.call.activations} {self.call.activation_scale}, limit {self.call.swiglu_limit}"
        return f"x {tuple(self.x.shape)} {self.x.dtype}, I {self.weights[0].shape[0]}, {mode}, {self.threads} threads"


def draw(seed: int) -> Case:
    """The case of a seed: any code bytes, mostly ordinary scales, sometimes zero, negative, subnormal or NaN ones."""
    g = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    hidden, intermediate = (16 * integer(1, integer(1, 36)) for _ in range(2))
    tokens = integer(1, integer(1, 150))

    def weight(rows: int, columns: int) -> Nvfp4Tensor:
        codes = torch.randint(0, 256, (rows, columns // 2), generator=g, dtype=torch.uint8)
        low = integer(1, 110)
        scales = torch.randint(low, integer(low, 126) + 1, (rows, columns // 16), generator=g, dtype=torch.uint8)
        kind = torch.rand(scales.shape, generator=g)
        odd = torch.randint(0, 256, scales.shape, generator=g, dtype=torch.uint8)
        if integer(0, 2) == 0:
            scales = torch.where(kind < 0.02, odd, scales)
        scales = torch.where(kind > 0.98, torch.zeros_like(scales), scales)
        spread = 2.0 ** integer(-20, 3)
        return Nvfp4Tensor(codes, scales.view(torch.float8_e4m3fn), torch.rand((), generator=g) * spread + 2.0**-24)

    weights = weight(intermediate, hidden), weight(intermediate, hidden), weight(hidden, intermediate)
    x = torch.randn(tokens, hidden, generator=g) * 2.0 ** integer(-12, 12)
    x = torch.where(torch.rand(x.shape, generator=g) < 0.1, torch.zeros_like(x), x)
    if integer(0, 3) == 0:
        x[integer(0, tokens - 1), integer(0, hidden - 1)] = (float("nan"), float("inf"), -float("inf"))[integer(0, 2)]
    scales = [torch.rand((), generator=g) * 2.0 ** integer(-16, 4) + 2.0**-30 for _ in range(2)]
    mode = ACTIVATIONS[integer(0, 2)], ACTIVATION_SCALES[integer(0, 2)]
    limit = (0.0, 10.0, 0.5)[integer(0, 2)]
    return Case(x.to(_DTYPES[integer(0, 2)]), weights, Call(limit, *mode, *scales), integer(1, 3))


def disagreement(case: Case, tier: str) -> str | None:
    """What is wrong with a tier's result; None if nothing is."""
    packed = list(backend.BACKEND.pack(*case.weights).values())
    got = torch.empty_like(case.x)
    settings = mock.patch.object(backend, "cpu_threads", lambda: case.threads)
    with settings, mock.patch.dict(os.environ, {native.ISA_VARIABLE: tier}):
        backend.BACKEND.shared_expert(case.x, packed, case.call, got)
    want = cpu_oracle.shared_expert(case.x, *case.weights, case.call)
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
        case = draw(options.seed + done)
        for tier in tiers:
            if wrong := disagreement(case, tier):
                failed += 1
                print(f"seed {options.seed + done}, {tier}: {wrong}; {case}", flush=True)
        done += 1
    print(f"{done} cases from seed {options.seed}, tiers {', '.join(tiers)}: {failed} failures")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
