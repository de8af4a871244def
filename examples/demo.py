# SPDX-License-Identifier: Apache-2.0
"""A trained DeepSeek-V4-architecture model, all its experts in NVFP4: what it costs, what it saves, what it writes.

    make demo        or        python -m examples.demo [--windows 256] [--output demo.png] [--json demo.json]

The road of a user: quantise while loading, calibrate, `save_pretrained`, load the NVFP4 checkpoint, `generate`.
Measured on held-out text: nats per byte with every activation format, the error of each layer's experts, sizes, and
speed of `generate` next to transformers' own bf16 experts. The error has two yardsticks: exact math on the
original weights (all that quantisation costs) and exact math on the NVFP4 weights (the activation format alone). Two
controls show what each figure can see: exchanged gate and up, and a gate scale 5 % too large, which the loss hardly
notices.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from examples.demo_layers import Seen, damaged, exact_outputs, outputs_of, record, weight_error, weights_of_layers
from examples.demo_picture import draw
from examples.heldout import BEGIN, CHECKPOINT, load_windows, nats_per_byte
from nvfp4_experts.checkpoints import open_checkpoint
from nvfp4_experts.diagnostics.metrics import rel_l2
from nvfp4_experts.integrations.transformers import Nvfp4ExpertsConfig, calibrate_model, experts_of, set_activations

MODES = {
    "bf16": ("bf16", "dynamic"),
    "fp8": ("fp8", "dynamic"),
    "nvfp4 static": ("nvfp4", "static"),
    "nvfp4 dynamic": ("nvfp4", "dynamic"),
    "nvfp4 per-token": ("nvfp4", "per_token"),
}
WRITES = ("bf16", "nvfp4 static")  # the modes that write text
CONTROLS = ("gate, up exchanged", "gate scale x 1.05")
PROMPTS = (  # of one length: a batch without padding
    b"class Node(object):\n    def __init__(self, ",
    b"        self._lock.release()\n\n    def __rep",
    b"import os\nimport sys\n\ndef parse(self, text)",
)
NEW_BYTES, TIMED_BYTES, ROUNDS = 96, 32, 7


@dataclass
class Row:
    """One line of the result: a loss, and per layer the relative L2 error of the experts' output by both yardsticks."""

    name: str
    nats_per_byte: float
    against_original: list[float] = field(default_factory=list)
    against_nvfp4: list[float] = field(default_factory=list)
    is_control: bool = False


@dataclass
class Writing:
    """What a model wrote after each prompt, greedily, and how fast it writes one text: per second of CPU time."""

    name: str
    texts: list[str]
    bytes_per_second: float = 0.0


@dataclass
class Result:
    """Everything the demo measured."""

    rows: list[Row]
    writings: list[Writing]
    prompts: list[str]
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
    """Run the embedded model on NVFP4 experts and show what that changes."""
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
    """Run the whole road: quantise, calibrate, save, load, evaluate, generate."""
    started = time.perf_counter()
    tokens, targets = load_windows(CHECKPOINT / "heldout.txt", windows)
    columns = TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as scratch:

        def evaluate(model: nn.Module, name: str) -> float:
            task = progress.add_task(name, total=len(tokens))
            return nats_per_byte(model, tokens, targets, advance=lambda n: progress.advance(task, n))

        def write(model: Any, name: str) -> Writing:
            task = progress.add_task(f"{name}: generate", total=1)
            writing = Writing(name, texts_of(generate(model, PROMPTS)))
            progress.advance(task)
            return writing

        original = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
        rows, writings = [Row("original", evaluate(original, "original"))], [write(original, "original")]
        seen = record(original, tokens[:: max(1, len(tokens) // 8)])
        limit, before = original.config.swiglu_limit, weights_of_layers(original)

        quantised = Path(scratch) / "nvfp4"
        quantise(quantised)
        model = AutoModelForCausalLM.from_pretrained(quantised)
        after = weights_of_layers(model)
        yardsticks = exact_outputs(seen, before, limit), exact_outputs(seen, after, limit)
        for name, mode in MODES.items():
            set_activations(model, *mode)
            rows.append(Row(name, evaluate(model, name), *(errors(model, seen, exact) for exact in yardsticks)))
            if name in WRITES:
                writings.append(write(model, name))
        time_writing(writings, original, model, progress)
        resident = sum(experts.resident_bytes for experts in experts_of(model).values())
        for name in CONTROLS:
            damaged(model, after, exchange=name == CONTROLS[0])
            layers = (errors(model, seen, exact) for exact in yardsticks)
            rows.append(Row(name, evaluate(model, name), *layers, is_control=True))
        return Result(
            rows=rows,
            writings=writings,
            prompts=[prompt.decode() for prompt in PROMPTS],
            weight_errors=[weight_error(*pair) for pair in zip(before, after, strict=True)],
            disk_bytes=(expert_bytes(CHECKPOINT), expert_bytes(quantised)),
            memory_bytes=(sum(w.nbytes for layer in before for three in layer for w in three), resident),
            windows=len(tokens),
            backend=next(iter(experts_of(model).values())).backend,
            seconds=time.perf_counter() - started,
        )


def quantise(path: Path) -> None:
    """The embedded checkpoint with all experts in NVFP4, and static scales from text that is not the held-out text."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, quantization_config=Nvfp4ExpertsConfig(experts="all"))
    calibrate_model(model, load_windows(CHECKPOINT / "calibration.txt", 16)[0].split(4))
    model.save_pretrained(path)


@torch.inference_mode()
def generate(model: Any, prompts: tuple[bytes, ...], count: int = NEW_BYTES) -> Tensor:
    """The bytes a model writes after prompts of one length, greedily, (B, count)."""
    ids = torch.tensor([[BEGIN, *prompt] for prompt in prompts])
    asked = {"max_new_tokens": count, "do_sample": False, "pad_token_id": model.config.pad_token_id}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **asked)[:, ids.shape[1] :]


def texts_of(written: Tensor) -> list[str]:
    return [bytes(b for b in text if b < BEGIN).decode(errors="replace") for text in written.tolist()]


def time_writing(writings: list[Writing], original: Any, model: Any, progress: Progress) -> None:
    """Fill in bytes per second of CPU time on one thread, the best of some rounds in which models take turns.

    CPU time, since other work on the machine would count in any other; one thread, since a token of this model is a
    hundred small operations that two threads only wait for.
    """
    task, threads = progress.add_task("speed of generate", total=ROUNDS), torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(ROUNDS):
        for writing in writings:
            if writing.name in MODES:
                set_activations(model, *MODES[writing.name])
            started = time.process_time()
            generate(model if writing.name in MODES else original, PROMPTS[:1], TIMED_BYTES)
            speed = TIMED_BYTES / (time.process_time() - started)
            writing.bytes_per_second = max(writing.bytes_per_second, speed)
        progress.advance(task)
    torch.set_num_threads(threads)


def errors(model: nn.Module, seen: list[Seen], exact: list[Tensor]) -> list[float]:
    return [rel_l2(got, want) for got, want in zip(outputs_of(model, seen), exact, strict=True)]


def expert_bytes(path: Path) -> int:
    """What experts take on disk, routed and shared."""
    checkpoint = open_checkpoint(path)
    names = [n for entry in checkpoint.experts for p in entry.projections.values() for n in p.names.values()]
    return sum(checkpoint.info(name).nbytes for name in names)


# --- showing it ------------------------------------------------------------------------------------------------------


def show(result: Result, console: Console) -> None:
    """Print the result as tables, and the texts side by side."""
    base = result.rows[0].nats_per_byte
    table = Table(
        title=f"All experts in NVFP4: {result.windows * 256:,} held-out bytes, backend {result.backend}",
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
        layers = [f"{e:.3f}" for e in row.against_original]
        alone = [f"{max(row.against_nvfp4):.4f}"] if row.against_nvfp4 else []
        table.add_row(label, f"{row.nats_per_byte:.4f}", change, *layers, *alone)
    console.print(table)
    console.print(
        "[bold]L0..[/]: relative L2 error of what a layer's experts add, against exact math on the original weights "
        f"(the weights alone: {', '.join(f'{e:.3f}' for e in result.weight_errors)}). [bold]alone[/]: the activation "
        "format alone, the worst layer against exact math on the NVFP4 weights. [yellow]The last two rows are wrong on "
        "purpose[/]: the loss hardly notices a 5 % scale error, the outputs do.",
    )
    sizes = Table(title="Experts", box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("", "bf16", "NVFP4", "ratio"):
        sizes.add_column(heading, justify="right")
    for name, (before, after) in (("on disk", result.disk_bytes), ("in memory", result.memory_bytes)):
        sizes.add_row(name, f"{before:,} B", f"{after:,} B", f"{before / after:.2f}x smaller")
    console.print(sizes)
    speeds = ", ".join(f"{w.name} {w.bytes_per_second:.1f}" for w in result.writings)
    console.print(
        f"[bold]generate[/], bytes per CPU second, one thread (a tiny model: most of it is not experts): {speeds}"
    )
    for number, prompt in enumerate(result.prompts):
        panels = [Panel(told(prompt, w.texts[number]), title=w.name, width=46) for w in result.writings]
        console.print(Columns(panels))


def told(prompt: str, text: str) -> Text:
    """A prompt, dim, and what came after it."""
    return Text(prompt, style="dim").append(text.rstrip(), style="not dim")


if __name__ == "__main__":
    typer.run(main)
