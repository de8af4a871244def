# SPDX-License-Identifier: Apache-2.0
"""Output files that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError


def check_output(path: Path | None, force: bool) -> None:
    """Refuse an output path that cannot or must not be written, before any work is done.

    Raises:
        InputError: the file exists and `force` is not given, or its folder does not exist.
    """
    if path is None:
        return
    if path.exists() and not force:
        raise InputError(str(path), "must not exist yet", "an existing file", "pass --force or choose another name")
    if not path.parent.is_dir():
        raise InputError(str(path), "must lie in an existing folder", f"no {path.parent}", "create the folder first")


def check_outputs(paths: dict[str, Path | None], force: bool) -> None:
    """`check_output` for several outputs, by option; no two may be the same file.

    Raises:
        InputError: as `check_output`, or two options name one file.
    """
    option_of: dict[Path, str] = {}
    for option, path in paths.items():
        check_output(path, force)
        if path is None:
            continue
        other = option_of.setdefault(path.resolve(), option)
        if other != option:
            raise InputError(f"{other} and {option}", "must be two files", path, "choose another name for one")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; rename it into place on success, remove it on failure.

    The suffix is kept, since writers choose their format by it.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
