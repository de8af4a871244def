# SPDX-License-Identifier: Apache-2.0
"""How fast routed experts are on this CPU, next to transformers' loop over bf16 experts, and next to what memory gives.

    python -m tests.speed.routed_cpu --seconds 10

One layer with random weights: --experts routed ones, of which each token takes --top-k, and one shared expert. Tokens
go to experts in turn, so that the weights a call reads were last used --experts / --top-k calls ago (for one token:
keep what lies between, 14 MB an expert of V4-Flash, above the size of the caches). Candidates are timed in turn, one
call at a time, Python included, and with them a sum over a large tensor, on large pages. Milliseconds of the median
call, and of the one that a tenth are faster than (what other work on the machine disturbs less); "of read": bytes of
the NVFP4 weights that the call must read over its time, over bytes of the large tensor over the time of its sum.

--cpu-time takes one thread and its CPU time in place of the clock: to compare two versions on a machine that is busy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import quantiles
from types import SimpleNamespace

import torch
from torch import Tensor

from nvfp4_experts import Nvfp4RoutedExperts, Nvfp4SharedExpert
from nvfp4_experts.formats.stack import Nvfp4Stack
from nvfp4_experts.kernels.cpu.pages import on_large_pages
from nvfp4_experts.kernels.target import cpu_threads

READ_BYTES = 512 << 20
BYTES_PER_WEIGHT = 0.5625
Candidate = Callable[[Tensor, Tensor, Tensor], Tensor]


def random_stack(experts: int, rows: int, columns: int) -> Nvfp4Stack:
    """Any codes, block scales from 0.5 to 1.9: what a value is makes no difference to the time."""
    codes = torch.randint(256, (experts, rows, columns // 2), dtype=torch.uint8)
    scales = torch.randint(0x30, 0x40, (experts, rows, columns // 16), dtype=torch.uint8)
    return Nvfp4Stack(codes, scales.view(torch.float8_e4m3fn), torch.full((experts,), 0.01))


def ours(options: argparse.Namespace, activations: str) -> tuple[Candidate, Candidate]:
    """The routed experts alone, and with the shared expert's result added in fp32."""
    shape = options.hidden, options.intermediate
    mode = {"activations": activations, "activation_scale": "per_token", "backend": options.backend}
    gate, up = (random_stack(options.experts, shape[1], shape[0]) for _ in range(2))
    routed = Nvfp4RoutedExperts(gate, up, random_stack(options.experts, *shape), **mode)
    shared = Nvfp4SharedExpert(gate[0], up[0], random_stack(1, *shape)[0], **mode)

    def both(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        total = routed(x, indices, weights, torch.empty(x.shape))
        return total.add_(shared(x.float())).to(x.dtype)

    return routed, both


def transformers_bf16(options: argparse.Namespace) -> tuple[Candidate, Candidate]:
    """The same from transformers' modules, weights in bf16."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts, DeepseekV4MLP

    config = SimpleNamespace(
        num_local_experts=options.experts,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        moe_intermediate_size=options.intermediate,
        hidden_act="silu",
        swiglu_limit=10.0,
        mlp_bias=False,
        _experts_implementation="eager",
    )
    with torch.device("meta"):
        modules = DeepseekV4Experts(config), DeepseekV4MLP(config)
    routed, shared = (m.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False) for m in modules)
    for parameter in (*routed.parameters(), *shared.parameters()):
        parameter.normal_(std=0.02)
    return routed, lambda x, indices, weights: routed(x, indices, weights) + shared(x)


def calls_in_turn(options: argparse.Namespace, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """(indices, weights) of calls whose tokens take the experts in turn."""
    slots = tokens * options.top_k
    return [
        (
            (torch.arange(slots).view(tokens, -1) + turn * slots) % options.experts,
            torch.rand(tokens, options.top_k).bfloat16(),
        )
        for turn in range(options.experts)
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of tokens")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
    candidates: dict[str, Candidate] = {}
    for activations in ("nvfp4", "bf16"):
        candidates[activations], candidates[f"{activations} + shared"] = ours(options, activations)
    candidates["torch bf16"], candidates["torch bf16 + shared"] = transformers_bf16(options)
    large = on_large_pages(torch.ones(READ_BYTES // 4))
    candidates["read"] = lambda *_: large.sum()
    expert = BYTES_PER_WEIGHT * 3 * options.hidden * options.intermediate
    print(f"{cpu_threads()} threads")
    for tokens in options.tokens:
        x, calls = torch.randn(tokens, options.hidden).bfloat16(), calls_in_turn(options, tokens)
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        start, turn = time.perf_counter(), 0
        while time.perf_counter() - start < options.seconds or turn < 10:
            for place, (name, candidate) in enumerate(candidates.items()):
                indices, weights = calls[(turn + place) % len(calls)]  # not what the one before has just read
                before = clock()
                candidate(x, indices, weights)
                samples[name].append(clock() - before)
            turn += 1
        deciles = {name: quantiles(taken, n=10) for name, taken in samples.items()}
        hit = len(calls[0][0].unique())
        rates = [READ_BYTES / deciles["read"][at] for at in (4, 0)]
        print(
            f"T {tokens}, {hit} experts hit, {turn} calls; read {rates[0] / 1e9:.1f} GB/s, a tenth {rates[1] / 1e9:.1f}"
        )
        for name, (fast, *_, mid, _, _, _, _) in deciles.items():
            if name != "read":
                weight_bytes = (hit + name.endswith("shared")) * expert
                shares = [f"{weight_bytes / s / r:.0%}" for s, r in zip((mid, fast), rates, strict=True)]
                print(f"  {name:20} {mid * 1e3:8.3f} ({shares[0]} of read)  {fast * 1e3:8.3f} ({shares[1]})")


if __name__ == "__main__":
    main()
