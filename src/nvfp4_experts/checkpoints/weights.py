# SPDX-License-Identifier: Apache-2.0
"""Converts one weight to NVFP4 in bands of rows: rows in, bytes of its output tensors at their offsets out.

    bf16, fp16, fp32, fp8_block   amax over all bands (of gate and up together, by default), then quantize each band
    mxfp4                         largest exponent over all bands, then the exact cast of each; code bytes are kept
    nvfp4                         codes and block scales are kept; the global scale is re-expressed

A band holds about `BAND_VALUES` values, so memory does not grow with the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import FormatError
from ..formats.fp8_block import Fp8BlockTensor
from ..formats.mxfp4 import Mxfp4Tensor, exponent_max, mxfp4_to_nvfp4
from ..formats.nvfp4 import Nvfp4Tensor, quantize, reciprocal_scale
from .dialects import NVFP4_LAYOUTS, Projection
from .errors import InexactCastError, NonFiniteWeightError
from .plan import Options, WeightPlan
from .projections import load_projection, projection_input_scale
from .reader import Checkpoint
from .safetensors_file import SafetensorsWriter

BAND_VALUES = 1 << 20

Format = TypeVar("Format", Mxfp4Tensor, Nvfp4Tensor)


def bands(projection: Projection) -> Iterator[tuple[int, int]]:
    """Row ranges of about `BAND_VALUES` values that cover a projection; whole blocks of rows for FP8."""
    rows, columns = projection.shape
    height = projection.block[0] if projection.block else 1
    step = max(1, BAND_VALUES // (columns * height)) * height
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


class WeightConverter:
    """Converts the weights of one plan; remembers the scales of pairs so that gate and up are measured once."""

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        self._checkpoint, self._options = checkpoint, options
        self._amax: dict[str, float] = {}
        self._exponent: dict[str, int] = {}

    def write(self, weight: WeightPlan, writer: SafetensorsWriter) -> None:
        """Write every output tensor of `weight`."""
        if "codes" in weight.outputs:
            self._write_scale(weight, writer, "global_scale", self._write_values(weight, writer))
        if "input_scale" in weight.outputs:
            scale = weight.input_scale
            scale = projection_input_scale(self._checkpoint, weight.source) if scale is None else scale
            self._write_scale(weight, writer, "input_scale", torch.tensor(scale, dtype=torch.float32))

    def _write_scale(self, weight: WeightPlan, writer: SafetensorsWriter, role: str, scale: Tensor) -> None:
        """A scale in decode direction, in the direction of the output's dialect."""
        reciprocal = NVFP4_LAYOUTS[self._options.dialect].reciprocal
        writer.write(weight.outputs[role].name, reciprocal_scale(scale) if reciprocal else scale)

    def _write_values(self, weight: WeightPlan, writer: SafetensorsWriter) -> Tensor:
        """Write codes and block scales; the global scale they came out with."""
        cast = self._caster(weight)
        global_scale = torch.ones(())
        for start, stop in bands(weight.source):
            made = cast(start, stop)
            global_scale = made.global_scale
            for role, part in (("codes", made.codes), ("block_scales", made.block_scales)):
                writer.write(weight.outputs[role].name, part, start * part.shape[-1])
        return global_scale

    def _caster(self, weight: WeightPlan) -> Callable[[int, int], Nvfp4Tensor]:
        source, partner = weight.source, weight.partner
        if source.format == "nvfp4":
            return lambda start, stop: self._load(source, Nvfp4Tensor, start, stop)
        if source.format == "mxfp4":
            exponent = self._exponents(source, partner)
            return lambda start, stop: mxfp4_to_nvfp4(self._load(source, Mxfp4Tensor, start, stop), exponent)
        amax = max(self._measure_amax(p) for p in (source, partner) if p is not None)
        return lambda start, stop: quantize(self._floating(source, start, stop), self._options.recipe, amax)

    def _load(self, projection: Projection, kind: type[Format], start: int, stop: int) -> Format:
        loaded = load_projection(self._checkpoint, projection, start, stop)
        assert isinstance(loaded, kind)
        return loaded

    # --- floating weights --------------------------------------------------------------------------------------

    def _floating(self, projection: Projection, start: int, stop: int) -> Tensor:
        loaded = load_projection(self._checkpoint, projection, start, stop)
        if isinstance(loaded, Fp8BlockTensor):
            return loaded.dequantize()
        assert isinstance(loaded, Tensor)
        return loaded

    def _measure_amax(self, projection: Projection) -> float:
        if projection.prefix not in self._amax:
            largest = 0.0
            for start, stop in bands(projection):
                low, high = (float(x) for x in torch.aminmax(self._floating(projection, start, stop)))
                amax = max(abs(low), abs(high))
                if not math.isfinite(amax):
                    rule, got = "a weight must be finite", f"NaN or infinity in rows {start}..{stop}"
                    raise NonFiniteWeightError(projection.prefix, rule, got, "repair the source checkpoint")
                largest = max(largest, amax)
            self._amax[projection.prefix] = largest
        return self._amax[projection.prefix]

    # --- MXFP4 -------------------------------------------------------------------------------------------------

    def _exponents(self, source: Projection, partner: Projection | None) -> int:
        """The exponent both can be cast under, else the source's own; raises `InexactCastError` if that fails too."""
        own = self._measure_exponent(source)
        if partner is not None:
            joint = max(own, self._measure_exponent(partner))
            if all(self._cast_error(p, joint) is None for p in (source, partner)):
                return joint
        if (problem := self._cast_error(source, own)) is not None:
            rule = "block exponents must span at most 17 powers of two"
            raise InexactCastError(source.prefix, rule, problem, "convert other experts only") from problem
        return own

    def _measure_exponent(self, projection: Projection) -> int:
        """`exponent_max` of the whole weight; a band of zeros has the least there is, so it does not count."""
        if projection.prefix not in self._exponent:
            try:
                largest = max(exponent_max(self._load(projection, Mxfp4Tensor, *band)) for band in bands(projection))
            except FormatError as bad:
                rule = "a weight must be finite"
                raise NonFiniteWeightError(projection.prefix, rule, bad, "repair the source checkpoint") from bad
            self._exponent[projection.prefix] = largest
        return self._exponent[projection.prefix]

    def _cast_error(self, projection: Projection, exponent: int) -> FormatError | None:
        for start, stop in bands(projection):
            try:
                mxfp4_to_nvfp4(self._load(projection, Mxfp4Tensor, start, stop), exponent)
            except FormatError as bad:
                return bad
        return None
