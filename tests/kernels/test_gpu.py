# SPDX-License-Identifier: Apache-2.0
"""On a GPU: every backend against the reference, no hidden synchronisation, graph capture and replay."""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from nvfp4_experts.formats.codes import decode_blocks
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor, quantize
from nvfp4_experts.kernels import reference
from nvfp4_experts.kernels.dispatch import ACTIVATIONS, BACKENDS, Problem, get_backend
from nvfp4_experts.kernels.sm90 import gemm
from nvfp4_experts.kernels.sm90.choice import decode_limit
from nvfp4_experts.kernels.sm90.config import GemmConfig, GemmProblem, refusal
from nvfp4_experts.kernels.sm90.table import TOKEN_LIMITS
from nvfp4_experts.kernels.target import target_of
from nvfp4_experts.layers.shared_expert import Nvfp4SharedExpert
from nvfp4_experts.layouts.fragments import pack_fragments
from tests.tolerances import against_reference

pytestmark = pytest.mark.gpu

MODES = [("bf16", "dynamic"), ("fp8", "dynamic"), ("nvfp4", "static"), ("nvfp4", "dynamic"), ("nvfp4", "per_token")]
# V4-Flash, V4-Pro, V4.1-Flash, tensor-parallel slices of theirs, and odd multiples of 16.
SMALL = [(256, 256), (144, 80), (272, 1104)]
SHAPES = [*SMALL, (8208, 80), (5120, 288), (4096, 256), (7168, 384), (4096, 2048), (5120, 2304), (7168, 3072)]
TOKENS = (1, 2, 4, 7, 8, 9, 20, 33, 100, 129, 300)
ROW_APART = [m for m in MODES if m not in (("fp8", "dynamic"), ("nvfp4", "dynamic"))]
INPUT_SCALE, HIDDEN_SCALE = 5 / 2688, 8 / 2688


@functools.cache
def weights_of(shape: tuple[int, int]) -> tuple[Nvfp4Tensor, ...]:
    hidden, intermediate = shape
    shapes = (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)
    return tuple(quantize(torch.randn(s) * s[1] ** -0.5) for s in shapes)


def make(shape: tuple[int, int], mode: tuple[str, str], backend: str, max_tokens: int = 512) -> Nvfp4SharedExpert:
    return Nvfp4SharedExpert(
        *(w.to("cuda") for w in weights_of(shape)),
        activations=mode[0],
        activation_scale=mode[1],
        backend=backend,
        max_tokens=max_tokens,
        input_scale=INPUT_SCALE,
        hidden_scale=HIDDEN_SCALE,
    )


@functools.cache
def example(shape: tuple[int, int], mode: tuple[str, str], tokens: int) -> tuple[Tensor, Tensor]:
    """Hidden states, and the reference's result in fp32 on the CPU: no TF32, no other matmul than the definition's."""
    x = torch.randn(tokens, shape[0], generator=torch.Generator().manual_seed(tokens))
    x = x if shape in SMALL else x.bfloat16()  # fp32 asks for kernels of its own, which take time to compile
    y = reference.shared_expert(
        x,
        *weights_of(shape),
        swiglu_limit=10.0,
        activations=mode[0],
        activation_scale=mode[1],
        input_scale=torch.tensor(INPUT_SCALE),
        hidden_scale=torch.tensor(HIDDEN_SCALE),
    )
    return x, y.double()


@pytest.mark.parametrize("backend", [*BACKENDS, "sm90-fp8", "sm100-decode", "sm100-torch", "sm100-flashinfer"])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape: tuple[int, int], mode: tuple[str, str], backend: str) -> None:
    refusal = get_backend(backend).refusal(Problem(*shape, mode[0], target_of("cuda")))
    if refusal is not None:
        pytest.skip(f"{backend} {refusal}")
    expert = make(shape, mode, backend)
    for tokens in TOKENS:
        x, expected = example(shape, mode, tokens)
        got = expert(x.cuda()).cpu().double()
        bound = against_reference(mode[0], expert.backend, tokens * shape[1], rounded=x.dtype == torch.bfloat16)
        assert (got - expected).norm() <= bound * expected.norm(), tokens


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


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("tokens", [4, 64])
def test_out_in_fp32_is_the_sum_before_it_is_rounded(mode: tuple[str, str], tokens: int) -> None:
    expert = make((256, 256), mode, "auto")
    x, out = torch.randn(tokens, 256, device="cuda").bfloat16(), torch.empty(tokens, 256, device="cuda")
    y = expert(x)
    assert expert(x, out=out) is out
    assert torch.equal(out, expert(x.float())) and (out - y.float()).norm() <= 2.0**-8 * out.norm()


def requested_bytes() -> int:
    """What tensors hold, whatever the allocator adds where a free block fits almost."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_memory_is_the_packed_weights_and_scratch_that_layers_share(activations: str) -> None:
    values = 3 * 4096 * 2048
    first = make((4096, 2048), (activations, "dynamic"), "auto")
    before, scratch = requested_bytes(), first.scratch_bytes
    second = make((4096, 2048), (activations, "dynamic"), "auto")
    assert requested_bytes() - before <= 0.5625 * 1.02 * values
    if first.backend != "torch":
        assert first.scratch_bytes == scratch == second.scratch_bytes > 0
    del second


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 9, 64, 512])
def test_forward_allocates_nothing_but_its_result(mode: tuple[str, str], tokens: int) -> None:
    expert = make((1024, 512), mode, "auto")
    if expert.backend == "torch":
        pytest.skip("the torch backend decodes into temporaries")
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(x)
    expert(x, out=out)

    def allocations() -> int:
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    before, scratch = allocations(), expert.scratch_bytes
    expert(x, out=out)
    assert allocations() == before and expert.scratch_bytes == scratch
    y = expert(x)
    assert allocations() == before + 1
    assert torch.equal(y, out)


@pytest.mark.parametrize("mode", [m for m in MODES if m[1] != "static"], ids=str)  # whose scale of h saturates here
def test_no_limit_is_no_limit(mode: tuple[str, str]) -> None:
    expert = make((256, 256), mode, "auto")
    expert.swiglu_limit = 0.0
    for tokens in (3, 40):
        x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(tokens)) * 40
        scales = {"input_scale": torch.tensor(INPUT_SCALE), "hidden_scale": torch.tensor(HIDDEN_SCALE)}
        modes = {"activations": mode[0], "activation_scale": mode[1]}
        expected = reference.shared_expert(x, *weights_of((256, 256)), swiglu_limit=0.0, **modes, **scales).double()
        limited = reference.shared_expert(x, *weights_of((256, 256)), swiglu_limit=10.0, **modes, **scales).double()
        bound = against_reference(mode[0], expert.backend, tokens * 256) * expected.norm()
        assert (expert(x.cuda()).cpu().double() - expected).norm() <= bound < (limited - expected).norm() / 4


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_views_that_begin_anywhere(mode: tuple[str, str]) -> None:
    """Kernels move 16 bytes at a time; a tensor may begin at any element."""
    expert = make((256, 256), mode, "auto")
    for tokens in (3, 40):
        memory = torch.randn(tokens * 256 + 1, device="cuda", dtype=torch.bfloat16)
        x, out = memory[1:].view(tokens, 256), torch.empty_like(memory)[1:].view(tokens, 256)
        expected = expert(x.clone())
        assert torch.equal(expert(x, out=out), expected)
        assert torch.equal(expert(x), expected)


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
    inputs = [
        torch.randn(t, e.hidden_size, device="cuda", dtype=torch.bfloat16) for e in experts for t in (1, 8, 20, 200)
    ]
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


@pytest.mark.parametrize("mode", [("bf16", "dynamic"), ("fp8", "dynamic"), ("nvfp4", "per_token")], ids=str)
@pytest.mark.parametrize("tokens", [4, 40, 300])
def test_graphs_replayed_at_once_do_not_meet(mode: tuple[str, str], tokens: int) -> None:
    expert = make((1024, 512), mode, "auto")
    graphs, outs, x = [], [], torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
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


@pytest.mark.parametrize("mode", [("bf16", "dynamic"), ("fp8", "dynamic"), ("nvfp4", "per_token")], ids=str)
def test_error_against_exact_math_is_that_of_the_activation_format(mode: tuple[str, str]) -> None:
    """fp64 on the decoded weights: the kernels' own part is at most a tenth of what the format costs."""
    shape = 4096, 2048
    gate, up, down = (w.to("cuda") for w in weights_of(shape))
    x = torch.randn(64, shape[0], device="cuda")
    exact = [w.dequantize().double() for w in (gate, up, down)]
    h = reference.swiglu(x.double() @ exact[0].T, x.double() @ exact[1].T, 10.0)
    want = h @ exact[2].T
    of_format = reference.shared_expert(
        x, gate, up, down, swiglu_limit=10.0, activations=mode[0], activation_scale=mode[1]
    )
    got = make(shape, mode, "auto")(x)
    error, least = ((y.double() - want).norm() / want.norm() for y in (got, of_format))
    assert error <= 1.1 * least, (error, least)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_results_are_the_same_run_to_run_while_blocks_wait_for_each_other(mode: tuple[str, str]) -> None:
    """A ring slot given back while its loads queued behind those of waiting warps made a tile wrong now and then."""
    expert = make((7168, 3072), mode, "auto")
    x = torch.randn(8, 7168, device="cuda", dtype=torch.bfloat16)
    expected = [expert(x[:tokens]) for tokens in range(1, 9)]
    got = [[expert(x[:tokens]) for tokens in range(1, 9)] for _ in range(40)]
    assert all(torch.equal(y, want_) for run in got for y, want_ in zip(run, expected, strict=True))


@pytest.mark.parametrize("mode", ROW_APART, ids=str)
def test_a_tokens_result_does_not_depend_on_the_batch(mode: tuple[str, str]) -> None:
    """Bit for bit within the token range of one kernel: alone or not, first or last; and run to run."""
    expert = make((4096, 2048), mode, "auto")  # whose table cuts K, in blocks and in clusters
    if expert.backend == "torch":
        pytest.skip("the vendor's GEMM chooses its order of summation by T")
    x = torch.randn(512, 4096, device="cuda", dtype=torch.bfloat16)
    decoded = decode_limit(4096, 2048, target_of("cuda"))
    limits = (0, decoded, *TOKEN_LIMITS)
    for begin, limit in itertools.pairwise(limits):
        if limit > 512 or limit <= begin:
            continue
        whole = expert(x[:limit])
        for tokens in {begin + 1, (begin + limit) // 2 + 1, limit}:
            assert torch.equal(expert(x[:tokens]), whole[:tokens]), tokens
            order = torch.randperm(limit, device="cuda")[:tokens]
            assert torch.equal(expert(x[order]), whole[order]), tokens


def test_threads_on_one_stream_do_not_mix_their_scratch() -> None:
    work = []
    for mode in (("bf16", "dynamic"), ("fp8", "dynamic"), ("nvfp4", "per_token")):
        expert = make((1024, 512), mode, "auto")
        for tokens in (4, 9, 40, 300):
            x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
            work.append((expert, x, expert(x)))
    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        for _, _, expected, got in pool.map(lambda job: (*job, job[0](job[1])), work * 25):
            assert torch.equal(got, expected)


# Every count of row and column groups, parts that do not divide the groups of tokens, clusters of two and four.
CONFIGS = [
    (1, 1, 32, 1),
    (1, 3, 64, 1),
    (1, 3, 128, 2),
    (1, 1, 32, 4),
    (1, 4, 32, 1),
    (2, 2, 64, 1),
    (1, 2, 128, 2),
    (4, 1, 64, 1),
]


@pytest.mark.parametrize("parts", [*CONFIGS, (2, 1, 256, 1), (3, 1, 128, 2)], ids=str)
@pytest.mark.parametrize("gate_up", [True, False])
def test_every_kind_of_configuration(parts: tuple[int, ...], gate_up: bool) -> None:
    """One half of the layer over ragged rows, columns and tokens; what is not written stays NaN and fails."""
    if get_backend("sm90").refusal(Problem(1040, 1552, "bf16", target_of("cuda"))):
        pytest.skip("needs a Hopper GPU")
    config, (hidden, size) = GemmConfig(*parts), (1552, 1040)
    gate, up, down = (w.to("cuda") for w in weights_of((hidden, size)))
    packed = list(get_backend("sm90").pack(gate, up, down).values())
    weights, scales = (packed[0], packed[1]) if gate_up else (packed[3], packed[4])
    rows, columns = (2 * size, hidden) if gate_up else (hidden, size)
    assert refusal(config, GemmProblem(rows, columns, 1)) is None
    for tokens, dtype in ((9, torch.bfloat16), (70, torch.float32), (300, torch.float16)):
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        token_scales = torch.rand(tokens, device="cuda") + 0.5
        out = torch.full((tokens, rows // 2 if gate_up else rows), torch.nan, device="cuda", dtype=dtype)
        options = {"token_scales": token_scales, "scaling": gemm.SCALE_OF_TOKEN}
        gemm.run_half(x, weights, rows, scales, out, config, gate_up=gate_up, limit=10.0, **options)
        entered = x.double() * token_scales.double()[:, None]
        if gate_up:
            want = reference.swiglu(*(entered @ w.dequantize().double().T for w in (gate, up)), 10.0)
        else:
            want = entered @ down.dequantize().double().T
        rounding = {torch.float32: 2.0**-14, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
        assert (out.double() - want).norm() <= rounding * want.norm()


@pytest.mark.parametrize("parts", CONFIGS, ids=str)
def test_one_hot_activations_print_the_decoded_weights(parts: tuple[int, ...]) -> None:
    """Bit for bit: all products but one are zero, so what comes out is a code times its scales, where it should be."""
    if get_backend("sm90").refusal(Problem(1552, 1040, "bf16", target_of("cuda"))):
        pytest.skip("needs a Hopper GPU")
    *_, down = (w.to("cuda") for w in weights_of((1552, 1040)))
    packed = pack_fragments(down.codes, down.block_scales)
    out = torch.full((1040, 1552), torch.nan, device="cuda")
    x = torch.eye(1040, device="cuda", dtype=torch.bfloat16)
    gemm.run_half(x, packed, 1552, down.global_scale.reshape(1), out, GemmConfig(*parts), gate_up=False)
    assert torch.equal(out.T, decode_blocks(down.codes, down.block_scales, torch.float32) * down.global_scale)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiles_whole_with_torch_compile(mode: str | None) -> None:
    expert = make((256, 256), ("bf16", "dynamic"), "auto")
    compiled = torch.compile(lambda x: expert(x) * 2, fullgraph=True, mode=mode)
    for tokens in (4, 40):
        x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
        for _ in range(3):
            assert torch.equal(compiled(x), expert(x) * 2)
