# SPDX-License-Identifier: Apache-2.0
"""Static activation scales of experts, {expert: (input_scale, hidden_scale)}, and a small .safetensors file of them.

    expert           in the file
    N                layers.<N>.              the shared expert of layer N
    (N, E)           layers.<N>.experts.<E>.  routed expert E of layer N

    input_scale   F32 []    scale of x, which enters gate and up
    hidden_scale  F32 []    scale of h, which enters down

Both in decode direction, amax / 2688: what calibration measures and what ModelOpt checkpoints store.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .dialects import NUMBER
from .errors import InputScalesError
from .safetensors_file import SafetensorsWriter, TensorSpec, read_header, read_tensor

Expert = int | tuple[int, int]
InputScales = dict[Expert, tuple[float, float]]

_KINDS = ("input_scale", "hidden_scale")
_NAME = re.compile(rf"layers\.{NUMBER}\.(?:experts\.{NUMBER}\.)?(input_scale|hidden_scale)")
_NAMED = 4  # experts in a message
_METADATA = {"format": "nvfp4-experts input scales", "direction": "decode, amax / 2688"}


def check_input_scales(what: str, scales: InputScales) -> InputScales:
    """`scales` as Python floats, by layer and expert in ascending order, if each is positive and finite in fp32."""
    checked: InputScales = {}
    for expert, pair in scales.items():
        try:
            numbers = tuple(operator.index(n) for n in (expert if isinstance(expert, tuple) else (expert,)))
            values = [torch.tensor(float(value), dtype=torch.float32).item() for value in pair]
        except (TypeError, ValueError):
            numbers, values = (), []
        fits = len(numbers) in (1, 2) and min(numbers) >= 0 and len(values) == 2
        if not fits or not all(math.isfinite(value) and value > 0 for value in values):
            rule = "must be {layer or (layer, routed expert): (input_scale, hidden_scale)}, both positive and finite"
            raise InputScalesError(f"{what}: {_described(expert)}", rule, pair, "calibrate again")
        checked[numbers if len(numbers) == 2 else numbers[0]] = (values[0], values[1])
    return dict(sorted(checked.items(), key=lambda item: _order(item[0])))


def save_input_scales(path: str | os.PathLike[str], scales: InputScales) -> None:
    """Write scales to a file; an existing one is replaced whole or not at all."""
    names = {
        f"{_prefix(expert)}.{kind}": value
        for expert, pair in check_input_scales(str(path), scales).items()
        for kind, value in zip(_KINDS, pair, strict=True)
    }
    with SafetensorsWriter(Path(path), [TensorSpec(name, "F32", ()) for name in names], _METADATA) as writer:
        for name, value in names.items():
            writer.write(name, torch.tensor(value, dtype=torch.float32))


def load_input_scales(path: str | os.PathLike[str]) -> InputScales:
    """Read scales from a file that `save_input_scales` wrote.

    Raises:
        InputScalesError: another tensor, one of a pair missing, a value that is not positive and finite.
    """
    found: dict[Expert, dict[str, float]] = {}
    for name, info in read_header(Path(path))[0].items():
        match = _NAME.fullmatch(name)
        if match is None or info.dtype != "F32" or info.shape:
            rule = "must hold input_scale and hidden_scale of layers.<N> or layers.<N>.experts.<E>, F32 [], alone"
            raise InputScalesError(str(path), rule, f"{name} {info.dtype} {list(info.shape)}", "calibrate again")
        layer, number, kind = match.groups()
        expert = int(layer) if number is None else (int(layer), int(number))
        found.setdefault(expert, {})[kind] = read_tensor(Path(path), info).item()
    for expert, pair in found.items():
        if missing := [kind for kind in _KINDS if kind not in pair]:
            what, rule = f"{path}: {_described(expert)}", "both scales must be there"
            raise InputScalesError(what, rule, f"no {missing[0]}", "calibrate again")
    return check_input_scales(str(path), {e: (pair[_KINDS[0]], pair[_KINDS[1]]) for e, pair in found.items()})


def check_experts(scales: InputScales, converted: Mapping[Expert, bool]) -> None:
    """Raise InputScalesError unless each expert with scales is among those of a checkpoint, and converted.

    Args:
        converted: every expert of the checkpoint: whether it is.
    """
    if unknown := [expert for expert in scales if expert not in converted]:
        shared = [expert for expert in converted if isinstance(expert, int)]
        rule = f"must be of experts that are there: shared ones in layers {shared}, and the routed ones"
        raise InputScalesError("input_scales", rule, _listed(unknown), "calibrate this checkpoint")
    if left := [expert for expert in scales if not converted[expert]]:
        rule = "must be of experts that are converted"
        way_out = "convert these too (experts='all', shared='nvfp4'), or leave their scales out"
        raise InputScalesError("input_scales", rule, f"{_listed(left)}, which would stay as they are", way_out)


def _prefix(expert: Expert) -> str:
    return f"layers.{expert[0]}.experts.{expert[1]}" if isinstance(expert, tuple) else f"layers.{expert}"


def _order(expert: Expert) -> tuple[int, int]:
    return expert if isinstance(expert, tuple) else (expert, -1)


def _described(expert: Any) -> str:
    if isinstance(expert, tuple) and len(expert) == 2:
        return f"layer {expert[0]} routed expert {expert[1]}"
    return f"layer {expert}"


def _listed(experts: Sequence[Expert]) -> str:
    more = f" and {len(experts) - _NAMED} more" if len(experts) > _NAMED else ""
    return ", ".join(map(_described, experts[:_NAMED])) + more
