# SPDX-License-Identifier: Apache-2.0
"""The `nvfp4-experts` application: its commands, its version, and what an error looks like."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .._version import __version__
from ..errors import Nvfp4Error
from . import bench, inspect, quantize, render, run, tune, verify

EXIT_CHECK_FAILED = 1
EXIT_INPUT = 2


class Command(TyperCommand):
    """A command whose errors are printed and not raised: every Nvfp4Error, and what the file system refuses."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Nvfp4Error as error:
            reported = error
        except OSError as error:
            place = str(error.filename or ctx.info_name)
            way_out = "check the path, its permissions and the free space"
            reported = Nvfp4Error(place, "must be readable or writable", error.strerror or error, way_out)
        render.failure(reported, as_json=bool(ctx.params.get("as_json")))
        raise typer.Exit(EXIT_INPUT)


app = typer.Typer(
    name="nvfp4-experts",
    help="The expert layers of DeepSeek-V4-class models in NVFP4: make them, look into them, run and verify them.",
    epilog="Exit codes: 0 fine · 1 a check failed · 2 usage or input. Paths may be Hugging Face Hub ids.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nvfp4-experts {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for _module in (quantize, inspect, run, verify, bench, tune):
    app.command(_module.NAME, cls=Command, help=_module.HELP, epilog=_module.EXAMPLE)(_module.command)


def main() -> None:
    """Entry point of the `nvfp4-experts` command."""
    app()
