# SPDX-License-Identifier: Apache-2.0
"""On a GPU: every backend against the reference, no hidden synchronisation, graph capture and replay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor, quantize
from nvfp4_experts.kernels import reference
from nvfp4_experts.kernels.dispatch import ACTIVATIONS, BACKENDS, Problem, get_backend
from nvfp4_experts.kernels.target import target_of
from nvfp4_experts.layers.shared_expert import Nvfp4SharedExpert
from tests.tolerances import AGAINST_REFERENCE

pytestmark = pytest.mark.gpu

MODES = [("bf16", "dynamic"), ("fp8", "dynamic"), ("nvfp4", "static"), ("nvfp4", "dynamic"), ("nvfp4", "per_token")]
SHAPES = [(256, 256), (144, 80), (5120, 288), (4096, 2048)]


def make(shape: tuple[int, int], mode: tuple[str, str], backend: str) -> Nvfp4SharedExpert:
    hidden, intermediate = shape
    weights = (
        torch.randn(s) * s[1] ** -0.5 for s in ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    )
    gate, up, down = (quantize(w).to("cuda") for w in weights)
    scales = {"input_scale": 5 / 2688, "hidden_scale": 8 / 2688}
    return Nvfp4SharedExpert(
        gate, up, down, activations=mode[0], activation_scale=mode[1], backend=backend, max_tokens=512, **scales
    )


def want(expert: Nvfp4SharedExpert, x: Tensor) -> Tensor:
    """The reference in fp32 on the CPU: no TF32, no other matmul than the definition's."""
    weights = (
        Nvfp4Tensor(w.codes, w.block_scales, w.global_scale).to("cpu") for w in (expert.gate, expert.up, expert.down)
    )
    return reference.shared_expert(
        x.cpu(),
        *weights,
        swiglu_limit=10.0,
        activations=expert.activations,
        activation_scale=expert.activation_scale,
        input_scale=torch.tensor(expert.input_scale),
        hidden_scale=torch.tensor(expert.hidden_scale),
    )


def runs_here(backend: str, shape: tuple[int, int], activations: str) -> bool:
    return get_backend(backend).refusal(Problem(*shape, activations, target_of("cuda"))) is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape: tuple[int, int], mode: tuple[str, str], backend: str) -> None:
    if not runs_here(backend, shape, mode[0]):
        pytest.skip(f"{backend} refuses {shape} with {mode[0]} on this GPU")
    expert = make(shape, mode, backend)
    for tokens in (1, 2, 4, 7, 20, 129):
        x = torch.randn(tokens, shape[0])
        got, expected = expert(x.cuda()).cpu().double(), want(expert, x).double()
        assert (got - expected).norm() <= AGAINST_REFERENCE["shared_expert", mode[0]] * expected.norm(), tokens


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_forward_never_synchronises(mode: tuple[str, str]) -> None:
    expert, x = make((256, 256), mode, "auto"), torch.randn(9, 256, device="cuda", dtype=torch.bfloat16)
    expert(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        expert(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_capture_once_replay_for_any_content(mode: tuple[str, str]) -> None:
    expert, x = make((256, 256), mode, "auto"), torch.randn(9, 256, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            expert(x, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        expert(x, out=out)
    for seed in range(3):
        x.copy_(torch.randn(9, 256, generator=torch.Generator().manual_seed(seed)) * 10**seed)
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, expert(x))


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_no_decoded_copy_of_the_weights_is_kept(activations: str) -> None:
    """Peak memory of a call stays far below a decoded bf16 copy; resident memory is the packed weights."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    expert = make((4096, 2048), (activations, "dynamic"), "auto")
    values = 3 * 4096 * 2048
    assert torch.cuda.memory_allocated() - before <= 0.5625 * 1.02 * values
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    expert(x)
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    expert(x)
    # Half of a bf16 copy; where no fused kernel runs (fp8), one matrix of the three is decoded at a time.
    assert torch.cuda.max_memory_allocated() - resident < (2 if activations == "fp8" else 1) * values


def test_moving_between_devices_keeps_every_byte() -> None:
    expert = make((144, 80), ("bf16", "dynamic"), "auto")
    before = expert.gate.to("cpu")
    after = expert.cpu().cuda().gate.to("cpu")
    assert torch.equal(before.codes, after.codes) and torch.equal(before.global_scale, after.global_scale)
    assert expert(torch.ones(2, 144, device="cuda")).device.type == "cuda"


def test_the_fused_kernel_runs_on_many_streams_at_once() -> None:
    """Launches on different streams wait for their own blocks only, also for the same layer; a mix-up would hang."""
    mode = ("nvfp4", "per_token")
    experts = [make((1024, 512), mode, "auto"), make((512, 1056), mode, "auto")]
    inputs = [torch.randn(t, e.hidden_size, device="cuda", dtype=torch.bfloat16) for e in experts for t in (1, 8, 20)]
    work = [(e, x) for e in experts for x in inputs if x.shape[1] == e.hidden_size]
    expected = [e(x) for e, x in work]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results: list[list[Tensor]] = [[] for _ in work]
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                for index, (expert, x) in enumerate(work):
                    results[index].append(expert(x))
    torch.cuda.synchronize()
    for got, want_ in zip(results, expected, strict=True):
        assert all(torch.equal(y, want_) for y in got)


def test_graphs_replayed_at_once_do_not_meet() -> None:
    expert = make((1024, 512), ("bf16", "dynamic"), "auto")
    graphs, outs, x = [], [], torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)
    expected = expert(x)
    for _ in range(3):
        graph, out = torch.cuda.CUDAGraph(), torch.empty_like(x)
        with torch.cuda.graph(graph):
            for _ in range(8):
                expert(x, out=out)
        graphs.append(graph)
        outs.append(out)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.parametrize("mode", [m for m in MODES if m not in (("fp8", "dynamic"), ("nvfp4", "dynamic"))], ids=str)
def test_a_tokens_result_does_not_depend_on_the_batch(mode: tuple[str, str]) -> None:
    """Bit for bit, within the token range of one kernel."""
    expert = make((1024, 512), mode, "auto")
    if expert.backend == "torch":
        pytest.skip("the vendor's GEMM chooses its order of summation by T")
    x = torch.randn(48, 1024, device="cuda", dtype=torch.bfloat16)
    alone = torch.cat([expert(row[None]) for row in x])
    for tokens in (2, 7, 8, 9, 31, 48):
        assert torch.equal(expert(x[:tokens]), alone[:tokens])
