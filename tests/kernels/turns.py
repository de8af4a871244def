# SPDX-License-Identifier: Apache-2.0
"""Processes that take turns on one GPU: launches are put aside in the middle, and what is a few instructions apart in a
launch alone is then a long time apart. Run by test_gpu_turns.py; each process prints how many calls gave other bits
than the most of them do, for each activation format and number of tokens, as JSON.

    python -m tests.kernels.turns DEVICE CALLS
"""

from __future__ import annotations

import json
import sys

import torch

from nvfp4_experts.layers.routed_experts import Nvfp4RoutedExperts
from tests.kernels.test_routed_experts import LIMIT, MODES, draw_routing, make_experts, static_scales

E, K, SHAPE = 9, 6, (4096, 2048)
TOKENS = (8, 2, 40)  # static scales: 2 are one launch
AT_ONCE = 20


def main(device: str, calls: int) -> None:
    stacks = [stack.to(device) for stack in make_experts(E, *SHAPE)]
    input_scale, hidden_scale = static_scales(E)
    found = {}
    for mode in MODES:
        layer = Nvfp4RoutedExperts(
            *stacks,
            swiglu_limit=LIMIT,
            activations=mode[0],
            activation_scale=mode[1],
            input_scale=input_scale,
            hidden_scale=hidden_scale,
            top_k=K,
            max_tokens=max(TOKENS),
        )
        for tokens in TOKENS:
            x, routing = torch.randn(tokens, SHAPE[0]).bfloat16().to(device), draw_routing(tokens, K, experts=E)
            chosen = routing.indices.to(device), routing.weights.to(device)
            votes = [layer(x, *chosen) for _ in range(3)]
            right = votes[0] if torch.equal(votes[0], votes[1]) else votes[2]
            different = 0
            for _ in range(-(-calls // AT_ONCE)):
                outs = torch.stack([layer(x, *chosen) for _ in range(AT_ONCE)])
                different += int((outs != right).flatten(1).any(1).sum())
            found[f"{'-'.join(mode)} {tokens}"] = different
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
