# SPDX-License-Identifier: Apache-2.0
"""The errors of this package.

Each says what is wrong, the rule, what it got, and the way out:

    FormatError("codes", "must be uint8", "int8", "view them as torch.uint8")
    -> codes: must be uint8, got int8; view them as torch.uint8
"""

from __future__ import annotations


class Nvfp4Error(Exception):
    """Base of every error raised on purpose by this package.

    Args:
        what: the thing that is wrong (an argument, a tensor name, a file).
        rule: what it must be.
        got: what it is; shapes and dtypes rather than values.
        way_out: what the reader can do about it.
    """

    def __init__(self, what: str, rule: str, got: object, way_out: str) -> None:
        super().__init__(what, rule, got, way_out)
        self.what, self.rule, self.got, self.way_out = what, rule, got, way_out

    def __str__(self) -> str:
        return f"{self.what}: {self.rule}, got {self.got}; {self.way_out}"


class FormatError(Nvfp4Error, ValueError):
    """Values, codes or scales that are not the number format they claim to be."""


class LayoutError(Nvfp4Error, ValueError):
    """A tensor whose shape or byte order does not fit the layout asked for."""


class InputError(Nvfp4Error, ValueError):
    """Hidden states or options that do not fit the layer they were given to."""


class CalibrationError(Nvfp4Error, RuntimeError):
    """Static activation scales that are missing, or that calibration could not determine."""


class CheckpointError(Nvfp4Error, RuntimeError):
    """A checkpoint that cannot be read, trusted or written."""


class TableError(Nvfp4Error, RuntimeError):
    """A table of launch configurations that cannot be read or trusted."""


class UnsupportedError(Nvfp4Error, RuntimeError):
    """No backend can run this here; the message carries every backend's reason."""
