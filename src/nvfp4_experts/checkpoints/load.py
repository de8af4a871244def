# SPDX-License-Identifier: Apache-2.0
"""Loads layers from a checkpoint in any dialect: path and layer number in, a ready `Nvfp4SharedExpert` out.

NVFP4                    used as it is, gate and up under their own global scales
MXFP4                    cast exactly, each weight under its own global scale
bf16, fp16, fp32, FP8    decoded, then quantised with `recipe`, gate and up under one global scale
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..formats.fp8_block import Fp8BlockTensor
from ..formats.mxfp4 import Mxfp4Tensor, mxfp4_to_nvfp4
from ..formats.nvfp4 import Nvfp4Tensor
from ..kernels.target import usable_device
from ..layers.shared_expert import Nvfp4SharedExpert
from .errors import MissingConfigError
from .projections import load_projection, projection_input_scale
from .reader import CONFIG_FILE, Checkpoint, ExpertEntry, open_checkpoint


def load_shared_expert(
    path: str | os.PathLike[str] | Checkpoint,
    layer: int,
    device: str | torch.device = "cpu",
    max_tokens: int = 8192,
    *,
    activations: str = "auto",
    activation_scale: str | None = None,
    backend: str = "auto",
    recipe: str = "modelopt",
) -> Nvfp4SharedExpert:
    """The shared expert of one layer of a checkpoint.

    Args:
        path: directory, .safetensors file or hub id, in any dialect; or a checkpoint already open.
        layer: layer number, as in the tensor names.
        device: where the weights are prepared and the layer runs.
        max_tokens: the most tokens one call will bring.
        activations: "nvfp4", "fp8", "bf16" or "auto".
        activation_scale: "static", "dynamic" or "per_token"; default: static if the checkpoint has input scales for
            gate, up and down, else dynamic.
        backend: name of a backend, or "auto".
        recipe: how scales are chosen if the checkpoint is not NVFP4 yet.

    Returns:
        A prepared Nvfp4SharedExpert on `device`.

    Raises:
        MissingExpertError, MissingConfigError, SuspiciousScaleError, and the errors of `open_checkpoint`.
        UnsupportedError: a device or backend that does not work here.
        FormatError: weights that hold NaN or infinity; MXFP4 whose exponents span more than the exact cast holds.

    Numerics: one tensor enters both gate and up, so if their input scales differ the larger one is used: it covers
        the range of both. swiglu_limit is config.json's.

    Cost: reads the layer's tensors and nothing else; FP8 weights are held as fp32 until they are quantised.
    """
    device = usable_device(device)
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    entry = checkpoint.shared_expert(layer)
    if not checkpoint.config:
        rule = f"{CONFIG_FILE} must be there: it tells the limit at which the SwiGLU clamps"
        raise MissingConfigError(str(checkpoint.directory), rule, f"no {CONFIG_FILE}", "fetch it, or use from_weights")
    weights = {name: _as_weight(checkpoint, entry, name).to(device) for name in entry.projections}
    input_scale, hidden_scale = shared_input_scales(checkpoint, entry)
    if activation_scale is None:
        activation_scale = "dynamic" if input_scale is None or hidden_scale is None else "static"
    return Nvfp4SharedExpert.from_weights(
        **weights,
        swiglu_limit=checkpoint.swiglu_limit,
        activations=activations,
        activation_scale=activation_scale,
        input_scale=input_scale,
        hidden_scale=hidden_scale,
        recipe=recipe,
        max_tokens=max_tokens,
        backend=backend,
    )


def shared_input_scales(checkpoint: Checkpoint, entry: ExpertEntry) -> tuple[float | None, float | None]:
    """(input_scale, hidden_scale) of an expert; the input scale is the larger of gate's and up's."""
    scales = {name: projection_input_scale(checkpoint, p) for name, p in entry.projections.items()}
    gate, up = scales["gate"], scales["up"]
    return (None if gate is None or up is None else max(gate, up)), scales["down"]


def _as_weight(checkpoint: Checkpoint, entry: ExpertEntry, name: str) -> Tensor | Nvfp4Tensor:
    loaded = load_projection(checkpoint, entry.projections[name])
    if isinstance(loaded, Mxfp4Tensor):
        return mxfp4_to_nvfp4(loaded)
    return loaded.dequantize() if isinstance(loaded, Fp8BlockTensor) else loaded
