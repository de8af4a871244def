# SPDX-License-Identifier: Apache-2.0
"""One of the processes that take turns on a GPU in test_gpu_turns.py: launches are put aside in the middle, and what is
a few instructions apart in a launch alone is then a long time apart.

    python -m tests.kernels.turns CALLS

Prints, as JSON, how many calls gave other bits than the most of them do, for each activation format and number of
tokens.
"""

from __future__ import annotations

import json
import sys

import torch

from tests.kernels.test_gpu_routed import BIG, MODES, E, K, draw_routing, make, on_gpu

TOKENS = (8, 2, 40)  # static scales: 2 are one launch
AT_ONCE = 20


def main(calls: int) -> None:
    found = {}
    for mode in MODES:
        layer = make(BIG[0], mode)
        for tokens in TOKENS:
            x = torch.randn(tokens, BIG[0][0], device="cuda").bfloat16()
            chosen = on_gpu(draw_routing(tokens, K, experts=E))
            votes = [layer(x, *chosen) for _ in range(3)]
            right = votes[0] if torch.equal(votes[0], votes[1]) else votes[2]
            different = 0
            for _ in range(-(-calls // AT_ONCE)):
                outs = torch.stack([layer(x, *chosen) for _ in range(AT_ONCE)])
                different += int((outs != right).flatten(1).any(1).sum())
            found[f"{'-'.join(mode)} {tokens}"] = different
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
