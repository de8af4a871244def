# SPDX-License-Identifier: Apache-2.0
"""What `save_pretrained` writes: the tensors of the checkpoint a model came from, under their names, byte for byte.

experts that were NVFP4     codes and block scales from the layer, scalars as they were read, in the same dialect
experts quantised on load   in the checkpoint's NVFP4 dialect, else ModelOpt's
input scales                as they were read, unless calibration has changed them since
FP8 blocks                  encoded under their old scales, which is exact for weights that nobody changed
the rest                    under the old name; in the old dtype where that holds the values
no place in the model       read again from the checkpoint, as MTP layers, which transformers leaves out
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from ...checkpoints import Checkpoint, ExpertEntry, Projection
from ...checkpoints.dialects import NVFP4_LAYOUTS, output_specs
from ...checkpoints.quant_config import build_configs
from ...checkpoints.safetensors_file import DTYPES, TensorSpec, dtype_name
from ...errors import InputError, UnsupportedError
from ...formats.codes import E4M3_MAX, decode_e8m0
from ...formats.fp8_block import Fp8BlockTensor
from ...formats.nvfp4 import Nvfp4Tensor, reciprocal_scale
from ...layers.packed import PROJECTIONS
from .source import Source
from .swap import Experts, experts_of

_SCALARS = ("global_scale", "input_scale")
_StaticScales = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class _Stored:
    """One projection of one expert on disk: tensors by role, and the scalars as they were read."""

    dialect: str
    specs: dict[str, TensorSpec]
    scalars: dict[str, Tensor]

    def in_dialect(self, scale: Tensor) -> Tensor:
        """A scale in decode direction, as this dialect stores it; and back, since that is its own inverse."""
        return reciprocal_scale(scale) if NVFP4_LAYOUTS[self.dialect].reciprocal else scale


class Saver:
    """How a loaded model goes back to disk.

    Args:
        source: what it was loaded from, traced.
        model: loaded, its experts ours.
        recipe: how experts were quantised, if some were.
    """

    def __init__(self, source: Source, model: Any, recipe: str) -> None:
        self._names, self._recipe, self._declared = source.names, recipe, source.checkpoint.quantization
        self._checkpoint, self._unplaced = source.checkpoint, sorted(source.unplaced)
        projections = [p for entries in source.experts.values() for e in entries for p in e.projections.values()]
        nvfp4 = sorted({p.dialect for p in projections} & NVFP4_LAYOUTS.keys())
        self._dialect = nvfp4[0] if len(nvfp4) == 1 else "modelopt"
        self._is_new = any(p.format != "nvfp4" for p in projections)
        self._fp8 = {key: (p, source.checkpoint.read(p.names["scales"])) for key, p in source.fp8.items()}
        self._stored = {
            name: [_layouts(source.checkpoint, entry, self._dialect) for entry in entries]
            for name, entries in source.experts.items()
        }
        self._scales = {name: _static_scales(model.get_submodule(name)) for name in self._stored}
        # What transformers would turn names back with; here they are known, so it is left with nothing to turn.
        self._conversions, model._weight_conversions = model._weight_conversions, []

    def tensors(self, model: Any) -> dict[str, Tensor]:
        """Every tensor by its name on disk.

        Raises:
            InputError: FP8 weights have changed since they were loaded, or NVFP4 experts were taken out.
            UnsupportedError: the checkpoint is gone, and held tensors that the model has no place for.

        Cost: the experts once more, in the form of the checkpoint, on the host; and what the model has no place for.
        """
        experts = experts_of(model)
        if missing := sorted(self._stored.keys() - experts.keys()):
            rule, way_out = "must be the NVFP4 experts they were loaded as", "save before parallelize() or an exchange"
            raise InputError(missing[0], rule, type(model.get_submodule(missing[0])).__name__, way_out)
        tensors = {name: self._read(name) for name in self._unplaced}
        for name in self._stored:
            tensors.update(self._experts(name, experts[name]))
        state: dict[str, Tensor] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if name not in self._stored:
                module._save_to_state_dict(state, f"{name}." if name else "", keep_vars=False)
        for key, (projection, scales) in self._fp8.items():
            tensors[projection.names["values"]] = _encode_fp8(key, state.pop(key), projection, scales)
            tensors[projection.names["scales"]] = scales
        for key, (name, dtype) in self._names.items():
            tensors[name] = _as_stored(state.pop(key), DTYPES[dtype][1])
        rest = {key: t for key, t in state.items() if key not in model.all_tied_weights_keys}
        model._weight_conversions = self._conversions
        try:
            return tensors | revert_weight_conversion(model, rest)
        finally:
            model._weight_conversions = []

    def declared(self, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Any]:
        """`quantization_config` for these tensors: the checkpoint's own, unless experts or their scales are new."""
        experts = experts_of(model)
        same = all(_equal(scales, _static_scales(experts[name])) for name, scales in self._scales.items())
        if self._declared and same and not self._is_new:
            return self._declared
        specs = {name: TensorSpec(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
        return build_configs({}, self._declared, specs, self._dialect, self._recipe)[0]["quantization_config"]

    def _read(self, name: str) -> Tensor:
        try:
            return self._checkpoint.read(name)
        except OSError as gone:
            rule = f"must find {name}, which the model has no place for, where it was loaded from"
            raise UnsupportedError("save_pretrained", rule, gone, f"put back {self._checkpoint.path}") from gone

    def _experts(self, name: str, experts: Experts) -> Iterator[tuple[str, Tensor]]:
        weights = dict(zip(PROJECTIONS, experts._projections(), strict=True))
        read, scales = self._scales[name], _static_scales(experts)
        for number, expert in enumerate(self._stored[name]):
            for projection, stored in expert.items():
                of_all, which = weights[projection], projection == "down"
                w = of_all if isinstance(of_all, Nvfp4Tensor) else of_all[number]
                yield from _projection(stored, w, _new_scale(read[which], scales[which], number))


def _layouts(checkpoint: Checkpoint, entry: ExpertEntry, dialect: str) -> dict[str, _Stored]:
    """How an expert is stored, or will be if it is not NVFP4 yet."""
    stored = {}
    for name, p in entry.projections.items():
        if p.format == "nvfp4":
            infos = {role: checkpoint.info(tensor) for role, tensor in p.names.items()}
            specs = {role: TensorSpec(i.name, i.dtype, i.shape) for role, i in infos.items()}
            scalars = {role: checkpoint.read(p.names[role]) for role in _SCALARS if role in p.names}
            stored[name] = _Stored(p.dialect, specs, scalars)
        else:
            stored[name] = _Stored(dialect, output_specs(dialect, p.prefix, p.shape, False), {})
    return stored


def _projection(stored: _Stored, w: Nvfp4Tensor, input_scale: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one projection; a new static scale, decode direction, if there is one."""
    for role, part in (("codes", w.codes), ("block_scales", w.block_scales)):
        yield stored.specs[role].name, part.to("cpu", copy=True)  # not a view: files hold no shared memory
    scalars = dict(stored.scalars)
    read = scalars.get("global_scale")
    if read is None or stored.in_dialect(read).reshape(()) != w.global_scale.cpu():
        scalars["global_scale"] = stored.in_dialect(w.global_scale)
    if input_scale is not None:
        scalars["input_scale"] = stored.in_dialect(input_scale)
    shape = stored.specs["global_scale"].shape
    prefix = stored.specs["codes"].name.rpartition(".")[0]
    for role, scalar in scalars.items():
        name = f"{prefix}.{NVFP4_LAYOUTS[stored.dialect].roles[role].suffix}"
        yield name, scalar.reshape(shape).clone()


def _static_scales(experts: Any) -> _StaticScales:
    """(input scales, hidden scales), each (E,) or (1,) on the CPU, NaN where unknown, or None."""
    scales = (experts.input_scale, experts.hidden_scale)
    found = [None if s is None else torch.as_tensor(s, dtype=torch.float32).reshape(-1).cpu() for s in scales]
    return found[0], found[1]


def _new_scale(read: Tensor | None, scales: Tensor | None, number: int) -> Tensor | None:
    """The static scale of an expert, if it is known and is not the one that was read."""
    if scales is None or scales[number].isnan() or (read is not None and read[number] == scales[number]):
        return None
    return scales[number]


def _equal(one: _StaticScales, other: _StaticScales) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a is b if a is None or b is None else bool((a.eq(b) | a.isnan() & b.isnan()).all()) for a, b in pairs)


def _as_stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In the dtype it was read in, if that holds the same values."""
    if dtype is None or tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    return cast if torch.equal(cast.to(tensor.dtype), tensor) else tensor


def _encode_fp8(key: str, w: Tensor, projection: Projection, scales: Tensor) -> Tensor:
    """The e4m3 values that decode to w under the scales they were read with."""
    assert projection.block is not None
    stored = scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales
    stored = stored.to(w.device)
    decoded = decode_e8m0(stored) if stored.dtype == torch.uint8 else stored
    height, width = projection.block
    wide = decoded.repeat_interleave(height, 0)[: w.shape[0]].repeat_interleave(width, 1)[:, : w.shape[1]]
    values = torch.where(wide > 0, w.float() / wide, 0).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    if not torch.equal(Fp8BlockTensor(values, stored, projection.block).dequantize(w.dtype), w):
        rule = "must be as it was loaded, to be stored in FP8 again"
        raise InputError(key, rule, "other values", "save the model before changing weights outside experts")
    return values
