# SPDX-License-Identifier: Apache-2.0
"""What the CPU kernel computes, to the bit, in a few lines of torch: `formats/activations.py`, then sums in order.

    sum[t, n] = ((0 + term_0) + term_1) + ...      fp32, one rounding each, in the order of K

A term is a block of 16 for nvfp4 and one column for bf16 and fp8; both are exact in fp32. `kernels/reference.py` leaves
the order of the sum open and torch's exponential is torch's; this file has the kernel's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor
from nvfp4_experts.formats.stack import Nvfp4Stack
from nvfp4_experts.kernels import reference
from nvfp4_experts.kernels.dispatch import Call, Routing


def shared_expert(x: Tensor, gate: Nvfp4Tensor, up: Nvfp4Tensor, down: Nvfp4Tensor, call: Call) -> Tensor:
    """(T, H) to (T, H), dtype of x."""
    values, scale = reference.enter(x, call.activations, call.activation_scale, call.input_scale)
    h = swiglu(linear(values, scale, gate, call), linear(values, scale, up, call), call.clamp)
    values, scale = reference.enter(h, call.activations, call.activation_scale, call.hidden_scale)
    return linear(values, scale, down, call).to(x.dtype)


def routed_experts(
    x: Tensor, gate: Nvfp4Stack, up: Nvfp4Stack, down: Nvfp4Stack, routing: Routing, call: Call
) -> Tensor:
    """(T, H) to (T, H) fp32: h times its weight as one fp32 product (or the row), then slots in ascending order."""
    before, mode = routing.weighting == "before_down", (call.activations, call.activation_scale)
    rows = torch.zeros(*routing.indices.shape, x.shape[1])
    for e in range(len(gate)):
        token, slot = (routing.indices == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        factor = routing.weights[token, slot, None]
        input_scale, hidden_scale = (None if s is None else s[e] for s in (call.input_scale, call.hidden_scale))
        values, scale = reference.enter(x, *mode, input_scale)
        values, scale = values[token], scale[token] if scale.ndim else scale
        h = swiglu(linear(values, scale, gate[e], call), linear(values, scale, up[e], call), call.clamp)
        entered = reference.enter(h * factor if before else h, *mode, hidden_scale)
        row = linear(*entered, down[e], call)
        rows[token, slot] = row if before else row * factor
    total = torch.zeros(x.shape)
    for row_of_slot in rows.unbind(1):
        total = total + row_of_slot
    return total


def linear(values: Tensor, scale: Tensor, w: Nvfp4Tensor, call: Call) -> Tensor:
    """(T, K) times (N, K): terms of one block or one column each, added in order; then the scales."""
    weight, weight_scale = reference.weight(w, call.activations)
    step = 16 if call.activations == "nvfp4" else 1
    total = torch.zeros(values.shape[0], weight.shape[0])
    for k in range(0, values.shape[1], step):
        total = total + (values[:, k : k + step].double() @ weight[:, k : k + step].double().T).float()
    return total * (scale * weight_scale)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """gate / (1 + exp(-gate)) * up after the clamp; `torch.where` because a comparison with NaN is false."""
    gate = torch.where(gate > limit, limit, gate)
    up = torch.where(up > limit, limit, up)
    up = torch.where(up < -limit, -limit, up)
    return gate / (1 + exponential(-gate)) * up


def exponential(v: Tensor) -> Tensor:
    """exp by ln 2 = 355/512 + rest and Taylor to r^7, each operation rounded to fp32; v is held to [-87, 88]."""
    v = torch.where(v > 88, 88.0, v)
    v = torch.where(v < -87, -87.0, v)
    n = (v * 1.44269504 + 1.5 * 2.0**23) - 1.5 * 2.0**23
    r = (v - n * (355 / 512)) - n * -2.12194440e-4
    total = torch.full_like(v, 1 / math.factorial(7))
    for k in range(6, -1, -1):
        total = total * r + 1 / math.factorial(k)
    return torch.where(v.isnan(), v, total * torch.exp2(n.nan_to_num(0.0)))
