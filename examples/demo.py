# SPDX-License-Identifier: Apache-2.0
"""A trained DeepSeek-V4-architecture model, its shared experts in NVFP4: what it costs and what it saves.

    make demo        or        python -m examples.demo [--windows 256] [--output demo.png] [--json demo.json]

Calibrates, writes an NVFP4 checkpoint, loads it back into the transformers model, and measures on held-out text: nats
per byte with every activation format, the error of each layer's output, and sizes on disk and in memory. The error has
two yardsticks: exact math on the original weights (all that quantisation costs) and exact math on the NVFP4 weights
(the activation format alone). Two controls show what each figure can see: exchanged gate and up, and a gate scale 5 %
too large, which the loss does not notice.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from examples.demo_picture import draw
from examples.heldout import CHECKPOINT, load_windows, nats_per_byte
from nvfp4_experts import Nvfp4SharedExpert
from nvfp4_experts.checkpoints import convert, open_checkpoint
from nvfp4_experts.diagnostics.metrics import rel_l2
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor
from nvfp4_experts.integrations.transformers import (
    SwapHandle,
    calibrate_model,
    find_shared_experts,
    swap_shared_experts,
)

MODES = {
    "bf16": ("bf16", "dynamic"),
    "fp8": ("fp8", "dynamic"),
    "nvfp4 static": ("nvfp4", "static"),
    "nvfp4 dynamic": ("nvfp4", "dynamic"),
    "nvfp4 per-token": ("nvfp4", "per_token"),
}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
CONTROLS = ("gate, up exchanged", "gate scale x 1.05")


@dataclass
class Row:
    """One line of the result: a loss, and per layer the relative L2 error of the output by both yardsticks."""

    name: str
    nats_per_byte: float
    against_original: list[float] = field(default_factory=list)
    against_nvfp4: list[float] = field(default_factory=list)
    is_control: bool = False


@dataclass
class Result:
    """Everything the demo measured."""

    rows: list[Row]
    weight_errors: list[float]
    disk_bytes: tuple[int, int]
    memory_bytes: tuple[int, int]
    windows: int
    backend: str
    seconds: float


def main(
    windows: Annotated[int, typer.Option(help="Held-out windows of 256 bytes, 1 to 256.", min=1, max=256)] = 256,
    output: Annotated[Path, typer.Option(help="Where to draw the picture.")] = Path("demo.png"),
    json_output: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Quantise the embedded checkpoint's shared experts to NVFP4 and show what that changes."""
    console = Console()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    result = measure(windows, console)
    show(result, console)
    draw(result, output)
    console.print(f"Picture: [bold]{output}[/]   ({result.seconds:.0f} s)")
    if json_output:
        json_output.write_text(json.dumps(asdict(result), indent=1) + "\n")


def measure(windows: int, console: Console) -> Result:
    """Run the whole road: calibrate, convert, load, evaluate."""
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16).eval()
    tokens, targets = load_windows(CHECKPOINT / "heldout.txt", windows)
    columns = TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as scratch:

        def evaluate(name: str) -> float:
            task = progress.add_task(name, total=len(tokens))
            return nats_per_byte(model, tokens, targets, advance=lambda n: progress.advance(task, n))

        rows = [Row("original", evaluate("original"))]
        inputs = record_inputs(model, tokens[:: max(1, len(tokens) // 8)])

        quantised = Path(scratch) / "nvfp4"
        scales = calibrate(model)
        convert(CHECKPOINT, quantised, input_scales=scales)
        handle = swap_shared_experts(model, checkpoint=quantised)
        weights = {n: (e.gate, e.up, e.down) for n, e in handle.experts.items()}
        originals = {n: tuple(getattr(m, p).weight for p in PROJECTIONS) for n, m in handle.originals.items()}
        limit = model.config.swiglu_limit
        yardsticks = (
            {n: in_fp64(inputs[n], originals[n], limit) for n in weights},
            {n: in_fp64(inputs[n], [w.dequantize() for w in weights[n]], limit) for n in weights},
        )
        for name, mode in MODES.items():
            handle.set_activations(*mode)
            rows.append(Row(name, evaluate(name), *(layer_errors(handle, inputs, exact) for exact in yardsticks)))
        for name, damage in zip(CONTROLS, (exchanged, louder), strict=True):
            for module_name, three in weights.items():
                handle.experts[module_name] = Nvfp4SharedExpert(*damage(*three), activations="bf16")
            handle.set_activations("bf16")
            errors = (layer_errors(handle, inputs, exact) for exact in yardsticks)
            rows.append(Row(name, evaluate(name), *errors, is_control=True))
        return Result(
            rows=rows,
            weight_errors=[weight_error(originals[name], three) for name, three in weights.items()],
            disk_bytes=(shared_expert_bytes(CHECKPOINT), shared_expert_bytes(quantised)),
            memory_bytes=(
                sum(w.nbytes for three in originals.values() for w in three),
                sum(e.resident_bytes for e in handle.experts.values()),
            ),
            windows=len(tokens),
            backend=next(iter(handle.experts.values())).backend,
            seconds=time.perf_counter() - started,
        )


def calibrate(model: nn.Module) -> dict[int, tuple[float, float]]:
    """Static scales from 16 windows of text that is not the held-out text; the model is as before afterwards."""
    handle = swap_shared_experts(model)
    try:
        return calibrate_model(model, load_windows(CHECKPOINT / "calibration.txt", 16)[0].split(4))
    finally:
        handle.restore()


@torch.inference_mode()
def record_inputs(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """What enters each shared expert of the original model, (T, H) bf16."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, -2)}))
        for name, module in find_shared_experts(model).items()
    ]
    model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs


@torch.inference_mode()
def in_fp64(x: Tensor, weights: Sequence[Tensor], limit: float) -> Tensor:
    """The expert in exact math: gate, up and down weights of any dtype, nothing rounded on the way."""
    gate, up = (x.double() @ w.double().T for w in weights[:2])
    h = nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return h @ weights[2].double().T


@torch.inference_mode()
def layer_errors(handle: SwapHandle, inputs: dict[str, Tensor], exact: dict[str, Tensor]) -> list[float]:
    return [rel_l2(expert(inputs[name].float()), exact[name]) for name, expert in handle.experts.items()]


def weight_error(originals: Sequence[Tensor], weights: Sequence[Nvfp4Tensor]) -> float:
    got = torch.cat([w.dequantize().flatten() for w in weights])
    return rel_l2(got, torch.cat([w.detach().flatten() for w in originals]))


def exchanged(gate: Nvfp4Tensor, up: Nvfp4Tensor, down: Nvfp4Tensor) -> tuple[Nvfp4Tensor, ...]:
    return up, gate, down


def louder(gate: Nvfp4Tensor, up: Nvfp4Tensor, down: Nvfp4Tensor) -> tuple[Nvfp4Tensor, ...]:
    return Nvfp4Tensor(gate.codes, gate.block_scales, gate.global_scale * 1.05), up, down


def shared_expert_bytes(path: Path) -> int:
    tensors = open_checkpoint(path).tensors.values()
    return sum(t.stop - t.start for t in tensors if "shared_experts" in t.name)


def show(result: Result, console: Console) -> None:
    """Print the result as tables."""
    base = result.rows[0].nats_per_byte
    table = Table(
        title=f"Shared experts in NVFP4: {result.windows * 256:,} held-out bytes, backend {result.backend}",
        box=SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("activations", no_wrap=True)
    for heading in ("nats/byte", "change", *(f"L{i}" for i in range(len(result.weight_errors))), "alone"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        if row.name == CONTROLS[0]:
            table.add_section()
        change = "" if row is result.rows[0] else f"{row.nats_per_byte - base:+.4f}"
        label = f"[yellow]{row.name}[/]" if row.is_control else row.name
        errors = [f"{e:.3f}" for e in row.against_original]
        alone = [f"{max(row.against_nvfp4):.4f}"] if row.against_nvfp4 else []
        table.add_row(label, f"{row.nats_per_byte:.4f}", change, *errors, *alone)
    console.print(table)
    console.print(
        "[bold]L0..[/]: relative L2 error of the layer's output against exact math on the original weights (the "
        f"weights alone: {', '.join(f'{e:.3f}' for e in result.weight_errors)}). [bold]alone[/]: the activation "
        "format alone, the worst layer against exact math on the NVFP4 weights. [yellow]The last two rows are wrong on "
        "purpose[/]: the loss does not notice a 5 % scale error, the outputs do.",
    )
    sizes = Table(title="Shared experts", box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("", "bf16", "NVFP4", "ratio"):
        sizes.add_column(heading, justify="right")
    for name, (before, after) in (("on disk", result.disk_bytes), ("in memory", result.memory_bytes)):
        sizes.add_row(name, f"{before:,} B", f"{after:,} B", f"{before / after:.2f}x smaller")
    console.print(sizes)


if __name__ == "__main__":
    typer.run(main)
