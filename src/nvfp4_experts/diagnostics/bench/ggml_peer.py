# SPDX-License-Identifier: Apache-2.0
"""ggml's CPU backend as a candidate, on a user's own library (`ggml_library`): NVFP4 weights, activations in its q8_0.

    gate_up = s * mul_mat(W13, x)                  W13: gate's rows, then up's, our codes and block scales
    h = swiglu(min(gate, L), clamp(up, -L, L))     fp32
    y = s * mul_mat(W2, h)                         s: global scales, which its blocks have no place for

One graph; x enters and y leaves in fp32; as many threads as torch has. Gate and up are one product, which works because
they share a global scale here, and saves ggml one quantisation of x.

mul_mat quantises its activations, 32 values of a token to int8 under one scale d = amax / 127 (q8_0). Rounding errs by
d / sqrt(12) rms, and amax is at most sqrt(32) times the rms of the 32, so by sqrt(32/12) / 127 = 0.013 of them at most,
whatever the data. x (in gate and in up) and h do so: 0.013 sqrt(3) = sqrt(8) / 127 = 0.022 in y, the bound. On Gaussian
data half of it is seen.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...kernels.target import Target
from .candidates import Prepared
from .ggml_library import F32, NVFP4, Ggml, InitParams, find, to_blocks
from .work import SWIGLU_LIMIT, Weights

_BOUND = math.sqrt(8) / 127
_FP32_BYTES = 4
_GRAPH_TENSORS = 10  # x, gate_up and y with their scaled views, two halves and their clamps, h
_ALIGNMENT = 64  # more than a context rounds a tensor's bytes up by


@dataclass(frozen=True)
class GgmlCpu:
    """One ggml graph on its CPU backend."""

    name = "ggml"
    ours = False
    reference = ("bf16", "dynamic")
    bound = _BOUND

    def refusal(self, target: Target) -> str | None:
        if target.device_type != "cpu":
            return "its CPU backend is meant, which needs --device cpu"
        _, reason = find()
        return reason or None

    def prepare(self, weights: Weights, max_tokens: int) -> Prepared:
        ggml, reason = find()
        if ggml is None:
            raise UnsupportedError("ggml", "must be there", reason, "leave it out")
        ggml.set_threads(torch.get_num_threads())
        expert = GgmlExpert(ggml, weights, max_tokens)
        return Prepared(expert, expert.tensors, expert.nbytes, f"{ggml.version}, activations in q8_0")


class Pool:
    """A ggml context, and the torch tensor it places its tensors in.

    Args:
        ggml: the library.
        nbytes: of the values of all tensors.
        tensors: how many there will be; views count.
    """

    def __init__(self, ggml: Ggml, nbytes: int, tensors: int) -> None:
        of = ggml.functions
        nbytes += tensors * (of.ggml_tensor_overhead() + _ALIGNMENT) + of.ggml_graph_overhead()
        self._functions = of
        self.memory = torch.empty(nbytes, dtype=torch.uint8).fill_(0)  # touched here, not in the first timed call
        self._begin()

    def clear(self) -> None:
        """Forget all tensors and graphs in it."""
        self._free()
        self._begin()

    def _begin(self) -> None:
        self.context: int = self._functions.ggml_init(InitParams(self.memory.nbytes, self.memory.data_ptr(), False))
        self._free = weakref.finalize(self, self._functions.ggml_free, self.context)

    def values(self, tensor: int, nbytes: int) -> Tensor:
        """The bytes of one of its tensors, (nbytes,) uint8."""
        start = self._functions.ggml_get_data(tensor) - self.memory.data_ptr()
        return self.memory[start : start + nbytes]


class GgmlExpert:
    """One copy of the weights, and the graph for as many tokens as it was last called with.

    Args:
        ggml: the library.
        weights: gate and up under one global scale; H and I multiples of 64.
        max_tokens: of a call.
    """

    def __init__(self, ggml: Ggml, weights: Weights, max_tokens: int) -> None:
        self._ggml, self._tokens = ggml, 0
        self._intermediate, self._hidden = weights.gate.shape
        self._scales = float(weights.gate.global_scale), float(weights.down.global_scale)
        gate_up = torch.cat((to_blocks(weights.gate), to_blocks(weights.up)))
        down = to_blocks(weights.down)
        self.nbytes = gate_up.nbytes + down.nbytes
        self._weights = Pool(ggml, self.nbytes, 2)
        self._gate_up = self._weight(gate_up, self._hidden)
        self._down = self._weight(down, self._intermediate)
        values = max_tokens * (2 * self._hidden + 3 * self._intermediate)
        self._activations = Pool(ggml, values * _FP32_BYTES, _GRAPH_TENSORS)
        self.tensors = self._weights.memory, self._activations.memory

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] != self._tokens:
            self._build(x.shape[0])
        self._x.copy_(x)
        status = self._ggml.functions.ggml_backend_graph_compute(self._ggml.backend, self._graph)
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return self._y.to(x.dtype)

    def _weight(self, blocks: Tensor, columns: int) -> int:
        tensor: int = self._ggml.functions.ggml_new_tensor_2d(self._weights.context, NVFP4, columns, blocks.shape[0])
        self._weights.values(tensor, blocks.nbytes).copy_(blocks.flatten())
        return tensor

    def _build(self, tokens: int) -> None:
        """The graph of the module docstring; ggml counts the columns of a row first, (K, T)."""
        of, wide, limit = self._ggml.functions, self._intermediate, SWIGLU_LIMIT
        self._activations.clear()
        context = self._activations.context
        gate_up_scale, down_scale = self._scales

        row, start_of_up = 2 * wide * _FP32_BYTES, wide * _FP32_BYTES

        x = of.ggml_new_tensor_2d(context, F32, self._hidden, tokens)
        gate_up = of.ggml_scale_inplace(context, of.ggml_mul_mat(context, self._gate_up, x), gate_up_scale)
        gate = of.ggml_clamp(context, of.ggml_view_2d(context, gate_up, wide, tokens, row, 0), -math.inf, limit)
        up = of.ggml_clamp(context, of.ggml_view_2d(context, gate_up, wide, tokens, row, start_of_up), -limit, limit)
        h = of.ggml_swiglu_split(context, gate, up)
        y = of.ggml_scale_inplace(context, of.ggml_mul_mat(context, self._down, h), down_scale)
        self._graph = of.ggml_new_graph(context)
        of.ggml_build_forward_expand(self._graph, y)
        self._x, self._y = (
            self._activations.values(tensor, tokens * self._hidden * _FP32_BYTES).view(torch.float32).view(tokens, -1)
            for tensor in (x, y)
        )
        self._tokens = tokens
