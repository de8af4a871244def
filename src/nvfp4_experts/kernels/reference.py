# SPDX-License-Identifier: Apache-2.0
"""The contract of every op, in plain fp32 torch: what a backend must compute, with no thought for speed.

    gate, up = enter(x) @ W1.T, enter(x) @ W3.T                    fp32 out of the sum
    h        = silu(min(gate, L)) * clamp(up, -L, L)               fp32; L = 0 is off
    y        = enter(h) @ W2.T                                     fp32, cast once to the dtype of x

`enter` is the activation format: it turns a row into values that bf16 holds exactly and one fp32 scale, and the
scales (activation's and weight's) multiply the fp32 sum, never the operands:

    y[t, n] = (sum_k a[t, k] * v[n, k]) * (activation_scale[t] * weight_scale[n])

| activations | a                                   | v                                  | weight_scale          |
|-------------|-------------------------------------|------------------------------------|-----------------------|
| "bf16"      | bf16(x)                             | e2m1 * block scale (exact)         | global scale          |
| "nvfp4"     | e2m1 * block scale of x (exact)     | e2m1 * block scale (exact)         | global scale          |
| "fp8"       | e4m3 of x, one scale per token      | e4m3 of (e2m1 * block scale),      | row scale * global    |
|             |                                     | one scale per output row           |                       |

Routed experts are such experts, chosen and weighted by token. For slot s of token t, with e = indices[t, s] in [0, E)
and w = weights[t, s] in fp32:

    row_s = enter(h * w) @ W2[e].T            weighting "before_down": h of expert e, times w in fp32
    row_s = (enter(h) @ W2[e].T) * w          weighting "after_down"
    y[t]  = ((0 + row_0) + row_1) + ...       fp32, slots in ascending order, cast once to the dtype of x

The order of that last sum is part of the contract. A slot whose index is outside [0, E) is not here (another rank has
the expert, or nobody) and adds nothing, even if x is NaN. Slots count one by one: an expert named twice adds twice. A
weight of 0 is a weight like any other: NaN times 0 is NaN. Global scales in "nvfp4", of expert e:

| activation_scale | of x                                | of what enters down                                    |
|------------------|-------------------------------------|--------------------------------------------------------|
| "static"         | input_scale[e]                      | hidden_scale[e]                                        |
| "dynamic"        | amax of x, all T tokens             | amax of the rows that this call has for e              |
| "per_token"      | amax of the row                     | amax of the row                                        |

Backends may differ from this file in the order of the sums over k and in nothing else, but for sm90-fp8 (sm90/fp8.py,
sm90/grouped.py) and sm100-flashinfer (sm100/vendor_flashinfer.py). No kernel calls this file and it calls no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.activations import quantize_activation, quantize_fp8_rows
from ..formats.codes import decode_blocks
from ..formats.nvfp4 import Nvfp4Tensor
from ..formats.stack import Nvfp4Stack


def enter(x: Tensor, activations: str, activation_scale: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bring (T, K) into an activation format.

    Args:
        x: (T, K) bf16, fp16 or fp32.
        activations: "bf16", "nvfp4" or "fp8".
        activation_scale: "static", "dynamic" or "per_token"; used by "nvfp4" alone.
        scale: () fp32, decode direction, for "static"; else None.

    Returns:
        values (T, K) fp32, each exactly representable in bf16, and their scale, () or (T, 1) fp32.
    """
    if activations == "bf16":
        return x.to(torch.bfloat16).float(), torch.ones((), device=x.device)
    if activations == "fp8":
        values, row_scale = quantize_fp8_rows(x)
        return values.float(), row_scale
    q = quantize_activation(x, activation_scale, scale if activation_scale == "static" else None)
    return decode_blocks(q.codes, q.block_scales, torch.float32), q.global_scale


def weight(w: Nvfp4Tensor, activations: str) -> tuple[Tensor, Tensor]:
    """Values (N, K) fp32 of a weight, exact in bf16, and their scale, () or (N,) fp32, as the table above says."""
    values = decode_blocks(w.codes, w.block_scales, torch.float32)
    if activations != "fp8":
        return values, w.global_scale
    rounded, row_scale = quantize_fp8_rows(values)
    return rounded.float(), row_scale[:, 0] * w.global_scale


def linear(values: Tensor, scale: Tensor, w: Nvfp4Tensor, activations: str) -> Tensor:
    """(T, K) entered values times an NVFP4 weight (N, K): (T, N) fp32, scales applied to the sum."""
    weight_values, weight_scale = weight(w, activations)
    return (values @ weight_values.T) * (scale * weight_scale)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, L)) * clamp(up, -L, L) in fp32; L = 0 turns the clamp off. NaN passes through."""
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate) * up


def shared_expert(
    x: Tensor,
    gate: Nvfp4Tensor,
    up: Nvfp4Tensor,
    down: Nvfp4Tensor,
    *,
    swiglu_limit: float,
    activations: str,
    activation_scale: str = "dynamic",
    input_scale: Tensor | None = None,
    hidden_scale: Tensor | None = None,
) -> Tensor:
    """One shared expert as the module docstring defines it.

    Args:
        x: (T, H) bf16, fp16 or fp32.
        gate, up: (I, H) NVFP4; their global scales may differ.
        down: (H, I) NVFP4.
        swiglu_limit: L of the clamp; 0 is off.
        activations, activation_scale: see `enter`.
        input_scale, hidden_scale: () fp32 decode-direction scales of x and of h, for "static".

    Returns:
        (T, H) in the dtype of x.
    """
    values, scale = enter(x, activations, activation_scale, input_scale)
    h = swiglu(linear(values, scale, gate, activations), linear(values, scale, up, activations), swiglu_limit)
    values, scale = enter(h, activations, activation_scale, hidden_scale)
    return linear(values, scale, down, activations).to(x.dtype)


def routed_experts(
    x: Tensor,
    gate: Nvfp4Stack,
    up: Nvfp4Stack,
    down: Nvfp4Stack,
    indices: Tensor,
    weights: Tensor,
    *,
    swiglu_limit: float,
    activations: str,
    activation_scale: str = "dynamic",
    input_scale: Tensor | None = None,
    hidden_scale: Tensor | None = None,
    weighting: str = "before_down",
) -> Tensor:
    """Routed experts as the module docstring defines them.

    Args:
        x: (T, H) bf16, fp16 or fp32.
        gate, up: (E, I, H) NVFP4; each expert has global scales of its own, and those of gate and up may differ.
        down: (E, H, I) NVFP4.
        indices: (T, k) integers.
        weights: (T, k) floating.
        swiglu_limit: L of the clamp; 0 is off.
        activations, activation_scale: see `enter`.
        input_scale, hidden_scale: (E,) fp32 decode-direction scales of x and of h, for "static".
        weighting: "before_down" or "after_down".

    Returns:
        (T, H) in the dtype of x.
    """
    rows = torch.zeros(*indices.shape, x.shape[1], device=x.device)
    for expert in range(len(gate)):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        weight = weights.float()[token, slot, None]
        x_scale, h_scale = (None if s is None else s[expert] for s in (input_scale, hidden_scale))
        # All of x enters and rows are taken afterwards: the amax of "dynamic" is that of the batch.
        values, scale = enter(x, activations, activation_scale, x_scale)
        values, scale = values[token], scale[token] if scale.ndim else scale
        h = swiglu(
            linear(values, scale, gate[expert], activations),
            linear(values, scale, up[expert], activations),
            swiglu_limit,
        )
        if weighting == "before_down":
            h = h * weight
        values, scale = enter(h, activations, activation_scale, h_scale)
        row = linear(values, scale, down[expert], activations)
        rows[token, slot] = row if weighting == "before_down" else row * weight
    total = torch.zeros(x.shape, device=x.device)
    for of_slot in rows.unbind(1):
        total = total + of_slot
    return total.to(x.dtype)
