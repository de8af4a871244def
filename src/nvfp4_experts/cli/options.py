# SPDX-License-Identifier: Apache-2.0
"""The words the command line accepts, and the options that several commands share.

The vocabularies are spelled out so that `--help` need not import torch; a test holds them equal to the library's.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ..errors import InputError

Dialect = Literal["modelopt", "compressed-tensors"]
Experts = Literal["shared", "routed", "all"]
Shared = Literal["nvfp4", "keep"]
Recipe = Literal["modelopt", "torchao", "compressed-tensors", "kernel"]
Activations = Literal["auto", "nvfp4", "fp8", "bf16"]
ActivationScale = Literal["static", "dynamic", "per_token"]

Checkpoint = Annotated[
    str, typer.Argument(metavar="CKPT", help="Checkpoint directory, .safetensors file or Hub id.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite output files that exist.")]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1, …")]
Backend = Annotated[str, typer.Option(help="Backend by name, or auto. One that cannot run says why.")]
Layers = Annotated[
    list[int] | None,
    typer.Option("--layer", help="Layer number, from 0; repeat for several.", show_default="all"),
]


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[int]:
    """The whole numbers of `--tokens`.

    Raises:
        InputError: none, or something else among them.
    """
    found = words(text)
    if not found or not all(word.isdecimal() for word in found):
        raise InputError("--tokens", "must be whole numbers with commas between them", repr(text), "try 1,16,64")
    return [int(word) for word in found]
