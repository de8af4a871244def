# SPDX-License-Identifier: Apache-2.0
"""Reading the embedded byte-level checkpoint: windows of text in, nats per byte out.

Token id = byte value, 256 = beginning of text. A window of 256 bytes is predicted byte by byte, each from the bytes
before it in the window.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

CHECKPOINT = Path(__file__).resolve().parent.parent / "data" / "tiny-deepseek-v4"
WINDOW = 256
BEGIN = 256


def load_windows(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """`count` windows spread evenly over a file: token ids (count, 256) from BEGIN on, and the bytes to predict."""
    text = np.fromfile(path, dtype=np.uint8)
    text = text[: len(text) // WINDOW * WINDOW].reshape(-1, WINDOW)
    chosen = np.linspace(0, len(text) - 1, min(count, len(text))).round().astype(int)
    targets = torch.from_numpy(text[chosen].astype(np.int64))
    return torch.cat([torch.full((len(targets), 1), BEGIN), targets[:, :-1]], dim=1), targets


@torch.inference_mode()
def nats_per_byte(
    model: nn.Module,
    tokens: Tensor,
    targets: Tensor,
    batch: int = 16,
    advance: Callable[[int], object] = lambda n: None,
) -> float:
    """Mean cross-entropy of the model on the windows; `advance` hears of every batch done."""
    total = 0.0
    for start in range(0, len(tokens), batch):
        rows = slice(start, start + batch)
        logits = model(input_ids=tokens[rows], use_cache=False).logits.float()
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets[rows].flatten(), reduction="sum"))
        advance(len(tokens[rows]))
    return total / targets.numel()
