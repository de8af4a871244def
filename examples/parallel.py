# SPDX-License-Identifier: Apache-2.0
"""A transformers model whose experts are spread over the processes that torchrun starts.

    torchrun --nproc_per_node 2 -m examples.parallel --plan ep          (or tp, or dispatch)

The first process quantises the embedded model. Then each one loads it, reading its own part of the experts and no more,
and they run it together: tokens are the same on all of them, or with "dispatch" each one's own. For comparison each
process has loaded the whole model too; the results differ by the order of sums.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from nvfp4_experts.checkpoints import convert
from nvfp4_experts.integrations.transformers import Nvfp4ExpertsConfig
from nvfp4_experts.layers.parallel import PLANS, parallelize

from .heldout import CHECKPOINT, load_windows

PROMPTS = (
    b"class Node(object):\n    def __init__(self, ",
    b"import os\nimport sys\n",
    b"for i in range(",
    b"    return ",
)


def packed_bytes(model: nn.Module) -> int:
    """Bytes of packed weights of all expert layers in a model."""
    return sum(getattr(module, "resident_bytes", 0) for module in model.modules())


def said_by_all(mine: Any) -> list[Any]:
    """What every process says, in order."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", default="ep", choices=PLANS)
    plan = parser.parse_args().plan
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    rank = dist.get_rank()

    with tempfile.TemporaryDirectory() as folder:
        path = said_by_all(f"{folder}/nvfp4")[0]
        if rank == 0:
            convert(CHECKPOINT, path, experts="all")
        dist.barrier()
        load = AutoModelForCausalLM.from_pretrained
        whole = load(path, quantization_config=Nvfp4ExpertsConfig(activations="bf16")).to(device)
        model = load(path, quantization_config=Nvfp4ExpertsConfig(activations="bf16", plan=plan)).to(device)
        share = packed_bytes(model) / packed_bytes(whole)
        model = parallelize(model, plan=plan)
        dist.barrier()  # everyone has read

    number = rank if plan == "dispatch" else 0
    tokens = load_windows(CHECKPOINT / "heldout.txt", 8)[0][2 * number : 2 * number + 2].to(device)
    prompt = torch.tensor([[256, *PROMPTS[number % len(PROMPTS)]]], device=device)
    with torch.inference_mode():
        before, after = (m(input_ids=tokens, use_cache=False).logits.float() for m in (whole, model))
        # With "dispatch" processes whose texts have ended go on, since the others need their experts.
        ids = model.generate(prompt, max_new_tokens=24 + 8 * number, do_sample=False, synced_gpus=plan == "dispatch")

    text = bytes(t for t in ids[0].tolist() if t < 256).decode(errors="replace")
    difference = float((after - before).norm() / before.norm())
    alike = len({logits.cpu().numpy().tobytes() for logits in said_by_all(after)}) == 1
    line = (
        f"rank {rank}: {share:.3f} of the bytes, logits {difference:.1e} apart, alike on all ranks: {alike}, {text!r}"
    )
    lines = said_by_all(line)
    if rank == 0:  # one process prints: lines of several may run into each other
        print(*lines, sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
