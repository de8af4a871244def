# SPDX-License-Identifier: Apache-2.0
"""Static activation scales of shared experts as a small .safetensors file: {layer: (input_scale, hidden_scale)}.

    layers.<N>.input_scale   F32 []    scale of x, which enters gate and up
    layers.<N>.hidden_scale  F32 []    scale of h, which enters down

Both in decode direction, amax / 2688: what calibration measures and what ModelOpt checkpoints store.
"""

from __future__ import annotations

import math
import operator
import os
import re
from pathlib import Path

import torch

from .dialects import NUMBER
from .errors import InputScalesError
from .safetensors_file import SafetensorsWriter, TensorSpec, read_header, read_tensor

InputScales = dict[int, tuple[float, float]]

_KINDS = ("input_scale", "hidden_scale")
_NAME = re.compile(rf"layers\.{NUMBER}\.(input_scale|hidden_scale)")
_METADATA = {"format": "nvfp4-experts input scales", "direction": "decode, amax / 2688"}


def check_input_scales(what: str, scales: InputScales) -> InputScales:
    """`scales` as Python floats by layer number, if every one is positive and finite in fp32."""
    checked = {}
    for layer, pair in scales.items():
        try:
            number = operator.index(layer)
            values = [torch.tensor(float(value), dtype=torch.float32).item() for value in pair]
        except (TypeError, ValueError):
            number, values = -1, []
        if number < 0 or len(values) != 2 or not all(math.isfinite(value) and value > 0 for value in values):
            rule = "must be {layer number: (input_scale, hidden_scale)}, both positive and finite"
            raise InputScalesError(f"{what}: layer {layer}", rule, pair, "calibrate again")
        checked[number] = (values[0], values[1])
    return checked


def save_input_scales(path: str | os.PathLike[str], scales: InputScales) -> None:
    """Write scales to a file; an existing one is replaced whole or not at all."""
    names = {
        f"layers.{layer}.{kind}": value
        for layer, pair in sorted(check_input_scales(str(path), scales).items())
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
    found: dict[int, dict[str, float]] = {}
    for name, info in read_header(Path(path))[0].items():
        match = _NAME.fullmatch(name)
        if match is None or info.dtype != "F32" or info.shape:
            rule = "must hold layers.<N>.input_scale and .hidden_scale, F32 [], and nothing else"
            raise InputScalesError(str(path), rule, f"{name} {info.dtype} {list(info.shape)}", "calibrate again")
        found.setdefault(int(match[1]), {})[match[2]] = read_tensor(Path(path), info).item()
    for layer, pair in found.items():
        if missing := [kind for kind in _KINDS if kind not in pair]:
            raise InputScalesError(
                f"{path}: layer {layer}", "both scales must be there", f"no {missing[0]}", "calibrate again"
            )
    return check_input_scales(str(path), {n: (pair[_KINDS[0]], pair[_KINDS[1]]) for n, pair in sorted(found.items())})
