# SPDX-License-Identifier: Apache-2.0
"""Routed experts on a CPU: the whole layer in one native call (csrc/routed_experts.cpp).

    scratch    per calling thread, for T * k rows: h as it enters, and for each thread that works 128 bytes (of few rows
               up to 1 KiB); for 4096 of them at most ("dynamic": all) x as it enters, and h in fp32

A shared expert of their size and format is one of them, the one that every token goes to last; another one runs after
them. For nvfp4 every tier and any number of threads give the same bits. Weights of an expert that no token goes to are
not read, the others once for each 128 of its rows.
"""

from __future__ import annotations

from ctypes import byref, pointer

from torch import Tensor

from .. import native
from ..dispatch import Beside, Call, Routing
from ..one_by_one import StackedExperts
from .backend import BACKEND, ELEMENT, loaded_library, native_call, native_expert, scratch
from .pages import on_large_pages


class CpuRoutedExperts(StackedExperts):
    """See the module docstring."""

    def room(self, tensor: Tensor, experts: int) -> Tensor:
        return on_large_pages(super().room(tensor, experts))

    def routed_experts(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor) -> None:
        _run(x, weights, routing, call, None, out)

    def moe(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, beside: Beside, out: Tensor) -> None:
        same_size = [w.shape for w in beside.weights] == [w.shape[1:] for w in weights]
        if beside.backend is BACKEND and same_size and _format(beside.call) == _format(call):
            _run(x, weights, routing, call, native_expert(beside.weights, beside.call), out)
        else:
            super().moe(x, weights, routing, call, beside, out)


def _format(call: Call) -> tuple[str, str, float]:
    """What a shared expert must have in common with the routed ones to be one of them."""
    return call.activations, call.activation_scale, call.clamp


def _run(
    x: Tensor, weights: list[Tensor], routing: Routing, call: Call, shared: native.Call | None, out: Tensor
) -> None:
    loaded, layer = loaded_library(), native_call(x, weights, call)
    layer.x, layer.y, layer.tokens = x.data_ptr(), out.data_ptr(), x.shape[0]
    routed = native.RoutedCall(
        layer=layer,
        indices=routing.indices.data_ptr(),
        weights=routing.weights.data_ptr(),
        shared=None if shared is None else pointer(shared),
        top_k=routing.indices.shape[1],
        experts=len(weights[0]),
        index_bytes=routing.indices.itemsize,
        out_element=ELEMENT[out.dtype],
        weigh_after_down=routing.weighting == "after_down",
    )
    routed.layer.scratch = scratch(loaded.routed_scratch_bytes(byref(routed)))
    loaded.routed_experts(byref(routed))


ROUTED = CpuRoutedExperts(BACKEND)
