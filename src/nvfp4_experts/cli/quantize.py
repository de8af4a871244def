# SPDX-License-Identifier: Apache-2.0
"""`nvfp4-experts quantize`: a checkpoint in, a checkpoint with NVFP4 experts out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import render
from .options import AsJson, Dialect, Experts, Recipe, Shared

if TYPE_CHECKING:
    from ..checkpoints.convert import ConversionReport
    from ..diagnostics.facts import FormatTotals

NAME = "quantize"
HELP = "Convert the experts of a checkpoint to NVFP4, shard by shard; every other tensor passes through unchanged."
EXAMPLE = "Example: [bold]nvfp4-experts quantize tiny-bf16 tiny-nvfp4 --experts all[/]"


def command(
    src: Annotated[
        str,
        typer.Argument(metavar="SRC", help="Checkpoint directory, .safetensors file or Hub id.", show_default=False),
    ],
    dst: Annotated[
        Path,
        typer.Argument(
            metavar="DST", help="New directory; appears whole when everything is written.", show_default=False
        ),
    ],
    dialect: Annotated[Dialect, typer.Option(help="How the NVFP4 tensors are named and scaled.")] = "modelopt",
    experts: Annotated[Experts, typer.Option(help="Which experts to convert.")] = "shared",
    shared: Annotated[
        Shared, typer.Option(help="keep: leave shared experts as they are, whatever --experts says.")
    ] = "nvfp4",
    recipe: Annotated[
        Recipe, typer.Option(help="How scales are chosen. MXFP4 is cast exactly whatever it is.")
    ] = "modelopt",
    separate_scales: Annotated[
        bool, typer.Option("--separate-scales", help="Give gate and up a global scale each, not one for both.")
    ] = False,
    input_scales: Annotated[
        Path | None,
        typer.Option(help="Static activation scales: a file that save_input_scales wrote.", show_default="none stored"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    from ..checkpoints import convert, load_input_scales, open_checkpoint
    from ..diagnostics.facts import totals

    options: dict[str, Any] = {
        "dialect": dialect,
        "experts": experts,
        "shared": shared,
        "recipe": recipe,
        "separate_scales": separate_scales,
        "input_scales": {} if input_scales is None else load_input_scales(input_scales),
    }
    if dry_run:
        _dry_run(src, dst, options, as_json)
        return
    start = time.perf_counter()
    with render.progress(as_json) as progress:
        report = convert(src, dst, **options, progress=progress)
    seconds = time.perf_counter() - start
    before, after = totals(open_checkpoint(src)), totals(open_checkpoint(dst))
    if as_json:
        render.print_json(
            {
                **vars(report),
                "path": str(report.path),
                "before": [total.to_dict() for total in before],
                "after": [total.to_dict() for total in after],
                "seconds": seconds,
                "peak_memory_bytes": peak_memory(),
            }
        )
    else:
        _print(report, before, after, seconds)


def _dry_run(src: str, dst: Path, options: dict[str, Any], as_json: bool) -> None:
    from ..checkpoints import open_checkpoint
    from ..checkpoints.plan import Options, make_plan
    from ..diagnostics.facts import totals

    checkpoint = open_checkpoint(src)
    plan = make_plan(checkpoint, Options(**options))
    formats = [weight.source.format for weight in plan.weights]
    converted = {name: formats.count(name) for name in dict.fromkeys(formats)}
    source_bytes = sum(info.nbytes for info in checkpoint.tensors.values())
    output_bytes = sum(spec.nbytes for spec in plan.tensors.values())
    copied = sum(len(shard.copies) for shard in plan.shards)
    if as_json:
        render.print_json(
            {
                "dry_run": True, "path": str(dst), "dialect": options["dialect"], "converted": converted,
                "copied": copied, "source_bytes": source_bytes, "output_bytes": output_bytes,
                "before": [total.to_dict() for total in totals(checkpoint)],
            }
        )  # fmt: skip
        return
    out = render.console()
    out.print(
        render.facts(
            {
                "would write": f"{dst}, {options['dialect']} dialect, {len(plan.shards)} shard(s)",
                "would convert": _counts(converted),
                "would copy": f"{copied} tensors byte for byte",
                "size": _sizes(source_bytes, output_bytes),
            }
        )
    )


def _print(report: ConversionReport, before: list[FormatTotals], after: list[FormatTotals], seconds: float) -> None:
    out = render.console()
    out.print(
        render.facts(
            {
                "wrote": f"{report.path}, {report.dialect} dialect",
                "converted": _counts(report.converted),
                "copied": f"{report.copied} tensors byte for byte",
                "size": _sizes(report.source_bytes, report.output_bytes),
                "two scales": f"gate and up differ in {len(report.separate)} experts" if report.separate else None,
                "resumed": f"{len(report.reused_shards)} shard(s) were finished before"
                if report.reused_shards
                else None,
                "left out": ", ".join(report.left_out) or None,
                "took": f"{seconds:.1f} s, peak memory of the process {render.size(peak_memory())}",
            }
        )
    )
    table = render.table("", ("experts", "format"), ("weight matrices", "bytes", "bits/weight"))
    for when, found in (("before", before), ("after", after)):
        for i, total in enumerate(found):
            bits = f"{total.bits_per_weight:.3g}"
            table.add_row("" if i else when, total.format, str(total.modules), render.size(total.nbytes), bits)
    out.print(table)


def _counts(converted: dict[str, int]) -> str:
    return ", ".join(f"{count} weight matrices from {name}" for name, count in converted.items())


def _sizes(before: int, after: int) -> str:
    return f"{render.size(before)} → {render.size(after)}"


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
