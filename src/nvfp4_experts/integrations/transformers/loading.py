# SPDX-License-Identifier: Apache-2.0
"""Stand-in until checkpoints has it."""

from __future__ import annotations

from ...checkpoints import projection_input_scale
from ...checkpoints.load import _as_weight
from ...formats.nvfp4 import Nvfp4Tensor, quantize, joint_amax
from ...formats.stack import Nvfp4Stack
from ...layers.routed_experts import Nvfp4RoutedExperts
import torch


def load_routed_experts(checkpoint, layer, device="cpu", max_tokens=8192, *, activations="auto", activation_scale=None,
                        backend="auto", recipe="modelopt", weighting="before_down", top_k=8):
    entries = [e.check() for e in checkpoint.experts if e.layer == layer and e.kind == "routed"]
    parts = {"gate": [], "up": [], "down": []}
    scales = []
    for e in entries:
        w = {n: _as_weight(checkpoint, e, n) for n in parts}
        amax = None
        if not isinstance(w["gate"], Nvfp4Tensor):
            amax = joint_amax(w["gate"], w["up"])
        for n in parts:
            parts[n].append(w[n] if isinstance(w[n], Nvfp4Tensor) else quantize(w[n], recipe, amax if n != "down" else None))
        s = {n: projection_input_scale(checkpoint, p) for n, p in e.projections.items()}
        scales.append((None if None in (s["gate"], s["up"]) else max(s["gate"], s["up"]), s["down"]))
    ins = None if any(s[0] is None for s in scales) else torch.tensor([s[0] for s in scales])
    hid = None if any(s[1] is None for s in scales) else torch.tensor([s[1] for s in scales])
    if activation_scale is None:
        activation_scale = "dynamic" if ins is None or hid is None else "static"
    return Nvfp4RoutedExperts(*(Nvfp4Stack.of(parts[n]).to(device) for n in parts), swiglu_limit=checkpoint.swiglu_limit,
        activations=activations, activation_scale=activation_scale, input_scale=ins, hidden_scale=hid,
        weighting=weighting, top_k=top_k, max_tokens=max_tokens, backend=backend)
