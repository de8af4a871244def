# SPDX-License-Identifier: Apache-2.0
"""A transformers model whose experts are spread over the processes that torchrun starts.

    torchrun --nproc_per_node 2 -m examples.parallel --plan tp          (or ep)

Each process loads the embedded model, exchanges its experts for NVFP4 ones and runs it whole; then it keeps its part
of every expert layer and runs the model with the others. The two results differ by the order of sums.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from nvfp4_experts.integrations.transformers import swap_experts
from nvfp4_experts.layers.parallel import parallelize

from .heldout import CHECKPOINT, load_windows


def packed_bytes(model: nn.Module) -> int:
    """Bytes of packed weights of all expert layers in a model."""
    return sum(getattr(module, "resident_bytes", 0) for module in model.modules())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", default="tp", choices=["tp", "ep"])
    plan = parser.parse_args().plan
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16).eval().to(device)
    swap_experts(model, activations="bf16")
    tokens = load_windows(CHECKPOINT / "heldout.txt", 4)[0].to(device)
    with torch.inference_mode():
        before, whole = model(input_ids=tokens, use_cache=False).logits.float(), packed_bytes(model)
        parallelize(model, plan=plan)
        after = model(input_ids=tokens, use_cache=False).logits.float()

    difference = float((after - before).norm() / before.norm())
    others = [torch.empty_like(after) for _ in range(dist.get_world_size())]
    dist.all_gather(others, after)
    alike = all(torch.equal(other, after) for other in others)
    share = packed_bytes(model) / whole
    rank = dist.get_rank()
    line = f"rank {rank}: {share:.3f} of the bytes, logits {difference:.1e} apart, alike on all ranks: {alike}"
    lines = [line] * dist.get_world_size()
    dist.all_gather_object(lines, line)
    if rank == 0:  # one process prints: lines of several may run into each other
        print(*lines, sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
