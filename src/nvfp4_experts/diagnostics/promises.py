# SPDX-License-Identifier: Apache-2.0
"""Where a conversion promises bits, the bits: what they must be, and the first one that is not.

| original | checkpoint | promise                                                    |
|----------|------------|------------------------------------------------------------|
| any      | same       | "passed through": the same bytes in every part             |
| mxfp4    | nvfp4      | "exact cast": the code bytes, and the value of each scale  |
| other    | nvfp4      | "requantised", where a recipe is named: what it gives      |

The scale of a block of zeros is free. A global scale that passed from one dialect to another was stored as its
reciprocal and may come back one rounding away, so it is held to a relative 2^-22 and everything else to equality.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..formats.codes import BLOCK_SIZE, decode_e2m1, decode_e8m0, unpack_codes
from ..formats.mxfp4 import Mxfp4Tensor
from ..formats.nvfp4 import Nvfp4Tensor, quantize
from .weights import Weight, parts

_GLOBAL_SCALE_TOLERANCE = 2.0**-22
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Mismatch:
    """The first place, in row-major order, where promised bits differ, and how many places do."""

    part: str
    row: int
    column: int
    expected: str
    actual: str
    count: int

    def __str__(self) -> str:
        place = f"{self.part}[{self.row}, {self.column}]"
        return f"{place} must be {self.expected}, is {self.actual} ({self.count} stored elements differ)"

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class BitCheck:
    """A promise about one projection, and the first mismatch; None where it was kept."""

    projection: str
    promise: str
    mismatch: Mismatch | None

    def to_dict(self) -> dict[str, object]:
        mismatch = self.mismatch.to_dict() if self.mismatch else None
        return {"projection": self.projection, "promise": self.promise, "kept": mismatch is None, "mismatch": mismatch}


def check_bits(actual: dict[str, Weight], original: dict[str, Weight], recipe: str | None) -> list[BitCheck]:
    """Check every promise between the projections of one expert and its original.

    Args:
        actual, original: gate, up and down by name.
        recipe: the recipe the checkpoint is said to have been made with; None promises nothing about rounding.
    """
    checks = []
    for name, weight in actual.items():
        together = [original[other] for other in _sharing(name, actual)]
        promise = _promised(weight, original[name], together, recipe)
        if promise is not None:
            text, given, expected = promise
            checks.append(BitCheck(name, text, first_mismatch(given, expected)))
    return checks


def first_mismatch(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> Mismatch | None:
    """The first differing element among parts of the same names; None where all bits are equal."""
    found = (_first_difference(name, part, expected[name]) for name, part in actual.items())
    return next((mismatch for mismatch in found if mismatch is not None), None)


def _sharing(name: str, actual: dict[str, Weight]) -> list[str]:
    """The projections whose global scale was set together with this one's: gate and up, where theirs are equal."""
    pair = ["gate", "up"]
    scales = [w.global_scale for other in pair if isinstance(w := actual.get(other), Nvfp4Tensor)]
    joint = name in pair and len(scales) == 2 and bool(scales[0] == scales[1])
    return pair if joint else [name]


def _promised(
    actual: Weight, original: Weight, together: list[Weight], recipe: str | None
) -> tuple[str, dict[str, Tensor], dict[str, Tensor]] | None:
    """The promise, the parts that are to keep it, and what they must be."""
    if _dtypes(actual) == _dtypes(original):
        return "passed through", parts(actual), parts(original)
    if not isinstance(actual, Nvfp4Tensor):
        return None
    if isinstance(original, Mxfp4Tensor):
        return "exact cast", *_effective_scales(actual, original)
    if recipe is None:
        return None
    amax = torch.stack([_floating(t).abs().amax().float() for t in together]).amax()
    return f"requantised by {recipe}", parts(actual), parts(quantize(_floating(original), recipe, amax))


def _effective_scales(actual: Nvfp4Tensor, original: Mxfp4Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Codes, and what each block of 16 is multiplied by: powers of two, so the products are exact."""
    given = actual.block_scales.float() * actual.global_scale
    expected = decode_e8m0(original.scales).repeat_interleave(2, dim=-1)
    zero = (original.codes & 0x77).unflatten(-1, (-1, BLOCK_SIZE // 2)).amax(-1) == 0
    return (
        {"codes": actual.codes, "scales": given.masked_fill(zero, 0)},
        {"codes": original.codes, "scales": expected.masked_fill(zero, 0)},
    )


def _floating(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dequantize()


def _dtypes(weight: Weight) -> dict[str, torch.dtype]:
    return {name: part.dtype for name, part in parts(weight).items()}


def _first_difference(name: str, actual: Tensor, expected: Tensor) -> Mismatch | None:
    if actual.shape != expected.shape:
        return Mismatch(name, 0, 0, f"shape {tuple(expected.shape)}", f"shape {tuple(actual.shape)}", expected.numel())
    if name == "global_scale" and torch.allclose(actual, expected, rtol=_GLOBAL_SCALE_TOLERANCE, atol=0):
        return None
    rows = [_bits(tensor).reshape(-1, tensor.shape[-1] if tensor.ndim else 1) for tensor in (actual, expected)]
    differs = rows[0] != rows[1]
    count = int(differs.sum())
    if count == 0:
        return None
    row, column = divmod(int(differs.flatten().byte().argmax()), differs.shape[1])
    if name == "codes":
        pair = [unpack_codes(side[row, column : column + 1]) for side in rows]
        nibble = int(pair[0][0] == pair[1][0])
        texts = [f"{int(codes[nibble]):#x} ({float(decode_e2m1(codes[nibble])):g})" for codes in pair]
        return Mismatch(name, row, 2 * column + nibble, texts[1], texts[0], count)
    texts = [
        f"{float(tensor.reshape(rows[0].shape)[row, column]):.9g} ({_hex(side[row, column])})"
        for tensor, side in zip((actual, expected), rows, strict=True)
    ]
    return Mismatch(name, row, column, texts[1], texts[0], count)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(_BITS[tensor.element_size()]).reshape(tensor.shape)


def _hex(bits: Tensor) -> str:
    width = 8 * bits.element_size()
    return f"0x{int(bits) % (1 << width):0{width // 4}x}"
