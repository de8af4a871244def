# SPDX-License-Identifier: Apache-2.0
"""The layer that `tune` times, without a GPU: its halves get the right weights, scales and shapes, and make a chain."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nvfp4_experts.diagnostics.bench.timing import ClockTimer
from nvfp4_experts.diagnostics.bench.work import find_work
from nvfp4_experts.diagnostics.metrics import rel_l2
from nvfp4_experts.diagnostics.tune import halves, search
from nvfp4_experts.formats.codes import decode_blocks
from nvfp4_experts.kernels import reference
from nvfp4_experts.kernels.dispatch import Call
from nvfp4_experts.kernels.sm90 import backend, gemm
from nvfp4_experts.kernels.sm90.config import GemmConfig
from nvfp4_experts.layouts.fragments import unpack_fragments
from nvfp4_experts.layouts.weights import deinterleave_rows

CONFIG = GemmConfig(2, 1, 32, 1)


def run_half(
    values: Tensor,
    packed: Tensor,
    rows: int,
    weight_scales: Tensor,
    out: Tensor,
    config: GemmConfig,
    *,
    gate_up: bool,
    limit: float = math.inf,
) -> None:
    """What gemm.cu computes, from the packed bytes, in fp32."""
    weights = decode_blocks(*unpack_fragments(packed, rows, values.shape[1]), torch.float32)
    if gate_up:
        gate, up = (
            values.float() @ w.T * scale for w, scale in zip(deinterleave_rows(weights), weight_scales, strict=True)
        )
        out.copy_(reference.swiglu(gate, up, limit))
    else:
        out.copy_(values.float() @ weights.T * weight_scales)


def decode(x: Tensor, weights: list[Tensor], call: Call, size: int, out: Tensor) -> None:
    """What decode.cu computes, by the halves."""
    gate_up, global_scales, _, down, down_global_scale, _ = weights
    h = torch.empty(x.shape[0], size, dtype=torch.bfloat16)
    run_half(x, gate_up, 2 * size, global_scales, h, CONFIG, gate_up=True, limit=call.swiglu_limit)
    run_half(h, down, x.shape[1], down_global_scale, out, CONFIG, gate_up=False)


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> halves.Layer:
    monkeypatch.setattr(gemm, "run_half", run_half)
    monkeypatch.setattr(backend, "decode", decode)
    monkeypatch.setattr(halves, "GraphTimer", ClockTimer)
    monkeypatch.setattr(halves, "rotation_bytes", lambda device: 50_000)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return halves.Layer(find_work("128x96"), torch.device("cpu"))


@pytest.mark.parametrize("gate_up", [True, False])
def test_a_half_is_the_reference(layer: halves.Layer, gate_up: bool) -> None:
    result, truth = layer.result(gate_up, 5, CONFIG), layer.truth(gate_up, 5)
    assert result.shape == truth.shape == (5, 96 if gate_up else 128)
    assert 0 < rel_l2(result, truth) < search.REFERENCE_BOUND
    assert torch.equal(result, layer.result(gate_up, 5, CONFIG))


def test_timers_go_over_copies_of_their_own(layer: halves.Layer) -> None:
    assert len(layer._copies) == 3  # 23,040 bytes of weights each, with K padded to 64
    assert len({w.data_ptr() for copy in layer._copies for w in copy}) == sum(map(len, layer._copies))
    assert layer.half_timer(True, 4, CONFIG).sample() > 0
    pair = layer.pair_timer(4, CONFIG, CONFIG)
    assert pair.sample() > 0
    ((chained, _),) = pair.outputs()
    assert chained.shape == (4, 128) and 0.3 < float(chained.float().square().mean().sqrt()) < 3


def test_decode_goes_the_same_way_as_the_pair(layer: halves.Layer) -> None:
    timers = layer.decode_timer(4), layer.pair_timer(4, CONFIG, CONFIG)
    assert torch.equal(*(y for timer in timers for y, _ in timer.outputs()))


@pytest.mark.parametrize("gate_up", [True, False])
def test_what_is_compiled_is_what_a_half_runs(
    layer: halves.Layer, gate_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[str, dict[str, int]]] = []
    monkeypatch.setattr(
        halves, "compile_all", lambda sources: found.extend((file, dict(macros)) for file, macros in sources)
    )
    layer.compile(gate_up, (CONFIG, GemmConfig(1, 2, 64, 4)))
    assert {file for file, _ in found} == {"gemm.cu"}
    names = ("GATE_UP", "ROW_GROUPS", "COLUMN_GROUPS", "TOKENS", "SPLIT", "OUT")
    assert [tuple(macros[name] for name in names) for _, macros in found] == [
        (gate_up, 2, 1, 32, 1, 0),
        (gate_up, 1, 2, 64, 4, 0),
    ]
