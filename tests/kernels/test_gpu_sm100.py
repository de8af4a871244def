# SPDX-License-Identifier: Apache-2.0
"""The Blackwell kernels with their FP4 instruction replaced, natively on any GPU of compute capability 8.0 or newer.

Every case of `sm100_cases.py` and `sm100_routed_cases.py`, and what only a GPU shows: real sizes, streams, graphs,
allocations, synchronisation. `test_gpu.py` and `test_routed_experts.py` run the backend as they do every backend. On a
Blackwell GPU the last tests here hold the FP4 instruction itself against the decoded product.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

triton = pytest.importorskip("triton")

from nvfp4_experts.formats.nvfp4 import quantize  # noqa: E402
from nvfp4_experts.formats.stack import Nvfp4Stack  # noqa: E402
from nvfp4_experts.kernels import reference  # noqa: E402
from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES, WEIGHTINGS, Problem, get_backend  # noqa: E402
from nvfp4_experts.kernels.sm100 import warm  # noqa: E402
from nvfp4_experts.kernels.sm100.config import TOKEN_LIMITS, routed_ranges  # noqa: E402
from nvfp4_experts.kernels.sm100.pipeline import Launch  # noqa: E402
from nvfp4_experts.kernels.target import target_of  # noqa: E402
from nvfp4_experts.layers.routed_experts import Nvfp4RoutedExperts  # noqa: E402
from nvfp4_experts.layers.shared_expert import Nvfp4SharedExpert  # noqa: E402
from tests.kernels import sm100_cases, sm100_routed_cases  # noqa: E402
from tests.kernels.sm100_cases import *  # noqa: E402, F403
from tests.kernels.sm100_routed_cases import *  # noqa: E402, F403
from tests.kernels.test_gpu import example, make  # noqa: E402
from tests.tolerances import against_reference  # noqa: E402

pytestmark = pytest.mark.gpu

DECODE = "sm100-decode"


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """What the tables of both files of cases launch, compiled side by side: one after another it is a minute."""
    if not torch.cuda.is_available():
        return

    def layers(launch: Launch) -> None:
        for mode, (chip, cuts) in itertools.product(ACTIVATION_SCALES, sm100_cases.LAYERS.items()):
            for shape, tokens, multiprocessors in cuts:
                x, weights = torch.randn(tokens, shape[0]), sm100_cases.weights_of(*shape)
                options = mode, sm100_cases.CHIP_CASES[chip], multiprocessors
                sm100_cases.run_layer(x, weights, *options, launch=launch)
        for (dtype, mode), (tokens, shape) in itertools.product(sm100_cases.ENTERED, sm100_cases.AWKWARD):
            x = torch.randn(tokens, shape[0], dtype=dtype)
            sm100_cases.run_layer(x, sm100_cases.weights_of(*shape), mode, launch=launch)
        for mode, (chip, cuts) in itertools.product(ACTIVATION_SCALES, sm100_routed_cases.CUTS.items()):
            for tokens, top_k in cuts:
                x, routing = torch.randn(tokens, 144), sm100_routed_cases.routing_of(tokens, top_k)
                options = mode, sm100_cases.CHIP_CASES[chip]
                sm100_routed_cases.run_layer(x, (144, 80), routing, *options, launch=launch)

    warm.compile_side_by_side(layers)


def expert_of(shape: tuple[int, int], mode: str, backend: str = DECODE, max_tokens: int = 512) -> Nvfp4SharedExpert:
    return make(shape, ("nvfp4", mode), backend, max_tokens)


def hidden_states(tokens: int, hidden: int) -> torch.Tensor:
    return torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
@pytest.mark.parametrize("shape", [(144, 80), (4096, 2048), (7168, 3072), (5120, 288)], ids=str)
def test_many_tokens_match_the_reference(shape: tuple[int, int], mode: str) -> None:
    expert = expert_of(shape, mode, max_tokens=1000)
    for tokens in (40, 1000):
        x, want = example(shape, ("nvfp4", mode), tokens)
        got = expert(x.cuda()).cpu().double()
        bound = against_reference("nvfp4", DECODE, tokens * shape[1], rounded=x.dtype == torch.bfloat16)
        assert (got - want).norm() <= bound * want.norm(), tokens


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
@pytest.mark.parametrize("tokens", [1, 20, 40, 129, 512])
def test_captured_without_a_call_before(mode: str, tokens: int) -> None:
    """Building the layer compiles and loads all that a call launches; then nothing is left for a capture."""
    expert, x = expert_of((1024, 512), mode), hidden_states(tokens, 1024)
    out, compiled = torch.empty_like(x), []
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(what)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            expert(x, out=out)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    assert not compiled
    for seed in range(3):
        x.copy_(torch.randn(tokens, 1024, generator=torch.Generator().manual_seed(seed)) * 10**seed)
        for _ in range(2):
            graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, expert(x))


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
def test_never_synchronises_and_allocates_its_result_alone(mode: str) -> None:
    expert = expert_of((1024, 512), mode)
    for tokens in (1, 20, 40, 129, 512):
        x = hidden_states(tokens, 1024)
        out = torch.empty_like(x)
        expert(x, out=out)
        before, scratch = torch.cuda.memory_stats()["allocation.all.allocated"], expert.scratch_bytes
        torch.cuda.set_sync_debug_mode("error")
        try:
            expert(x, out=out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        assert expert.scratch_bytes == scratch > 0


@pytest.mark.parametrize("mode", ["static", "per_token"])
def test_a_tokens_result_is_its_own_within_a_range_of_tokens(mode: str) -> None:
    expert, x = expert_of((4096, 2048), mode), hidden_states(512, 4096)
    begin = 0
    for limit in TOKEN_LIMITS:
        whole = expert(x[:limit])
        for tokens in {begin + 1, (begin + limit) // 2 + 1, limit}:
            order = torch.randperm(limit, device="cuda")[:tokens]
            assert torch.equal(expert(x[order]), whole[order]), tokens
        begin = limit


def test_the_same_bits_every_time_on_many_streams_and_threads() -> None:
    """The last to arrive goes on, whoever it is; scratch belongs to a stream."""
    work = []
    for mode in ACTIVATION_SCALES:
        expert = expert_of((1024, 512), mode)
        work += [(expert, x, expert(x)) for x in (hidden_states(t, 1024) for t in (1, 20, 40, 129, 300))]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]

    def call(job: int) -> bool:
        expert, x, want = work[job % len(work)]
        with torch.cuda.stream(streams[job % 4] if job % 3 else torch.cuda.current_stream()):
            return torch.equal(expert(x), want)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(40 * len(work))))


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
def test_views_that_begin_anywhere(mode: str) -> None:
    expert = expert_of((256, 256), mode)
    memory = torch.randn(40 * 256 + 1, device="cuda", dtype=torch.bfloat16)
    x, out = memory[1:].view(40, 256), torch.empty_like(memory)[1:].view(40, 256)
    want = expert(x.clone())
    assert torch.equal(expert(x, out=out), want)
    assert torch.equal(expert(x), want)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiles_whole_with_torch_compile(mode: str | None) -> None:
    expert = expert_of((256, 256), "per_token")
    compiled = torch.compile(lambda x: expert(x) * 2, fullgraph=True, mode=mode)
    for tokens in (4, 40):
        x = hidden_states(tokens, 256)
        for _ in range(3):
            assert torch.equal(compiled(x), expert(x) * 2)


# --- routed experts ---------------------------------------------------------------------------------------------------


@functools.cache
def stacks_of(experts: int, hidden: int, intermediate: int) -> tuple[Nvfp4Stack, ...]:
    """gate, up and down, each expert's values of another size."""

    def stack(rows: int, columns: int, size: float) -> Nvfp4Stack:
        g = torch.Generator("cuda").manual_seed(rows)
        weights = (torch.randn(rows, columns, device="cuda", generator=g) for _ in range(experts))
        return Nvfp4Stack.of([quantize(w * size * (1 + e % 4) * columns**-0.5) for e, w in enumerate(weights)])

    return stack(intermediate, hidden, 1.0), stack(intermediate, hidden, 2.0), stack(hidden, intermediate, 1.0)


def experts_of(
    shape: tuple[int, int], mode: str, experts: int = 9, top_k: int = 4, max_tokens: int = 300, **options: str
) -> Nvfp4RoutedExperts:
    """Every expert has weights and scales of its own; shape is (H, I)."""
    options = {"backend": DECODE, "weighting": "before_down", **options}
    scales = {
        "input_scale": torch.linspace(4, 8, experts, device="cuda") / 2688,
        "hidden_scale": torch.linspace(20, 8, experts, device="cuda") / 2688,
    }
    modes = {"activations": "nvfp4", "activation_scale": mode}
    sizes = {"top_k": top_k, "max_tokens": max_tokens}
    return Nvfp4RoutedExperts(*stacks_of(experts, *shape), **modes, **scales, **sizes, **options)


def routed_reference(
    experts: Nvfp4RoutedExperts, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    stacks = stacks_of(experts.num_experts, experts.hidden_size, experts.intermediate_size)
    return reference.routed_experts(
        x.float(),
        *stacks,
        indices,
        weights,
        swiglu_limit=experts.swiglu_limit,
        activations="nvfp4",
        activation_scale=experts.activation_scale,
        input_scale=experts.input_scale,
        hidden_scale=experts.hidden_scale,
        weighting=experts.weighting,
    ).double()


def routing_on_gpu(tokens: int, top_k: int, experts: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random experts, one slot in eight not here; seed 1 sends everything to one expert, seed 2 nothing anywhere."""
    g = torch.Generator().manual_seed(seed)
    indices = torch.randint(experts, (tokens, top_k), generator=g)
    indices[torch.rand(tokens, top_k, generator=g) < 0.125] = -1
    if seed in (1, 2):
        indices.fill_({1: 3, 2: experts}[seed])
    return indices.cuda(), torch.randn(tokens, top_k, generator=g).cuda()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
def test_routed_experts_of_real_sizes_match_the_reference(mode: str, weighting: str) -> None:
    """V4-Flash, few of its experts: one token, and as many as make whole tiles."""
    experts = experts_of((4096, 2048), mode, 4, weighting=weighting)
    for tokens in (1, 7, 300):
        x, routing = hidden_states(tokens, 4096), routing_on_gpu(tokens, 4, 4)
        got, want = experts(x, *routing).double(), routed_reference(experts, x, *routing)
        bound = against_reference("nvfp4", DECODE, tokens * 4 * 2048, rounded=True)
        assert (got - want).norm() <= bound * want.norm(), tokens


@pytest.fixture
def nothing_compiles() -> Iterator[None]:
    """Kernels that Triton compiles during the test fail it at its end."""
    compiled: list[object] = []
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(what["repr"])
    yield
    triton.knobs.runtime.jit_post_compile_hook = before
    assert not compiled


@pytest.fixture(scope="module", params=ACTIVATION_SCALES)
def routed(request: pytest.FixtureRequest) -> Nvfp4RoutedExperts:
    return experts_of((1024, 512), request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 4), (7, 1), (40, 3), (129, 4), (300, 4)])
def test_a_captured_call_is_replayed_with_another_routing(
    routed: Nvfp4RoutedExperts, tokens: int, top_k: int, dtype: torch.dtype, nothing_compiles: None
) -> None:
    x, (indices, weights) = hidden_states(tokens, 1024).to(dtype), routing_on_gpu(tokens, top_k)
    out = torch.empty_like(x, dtype=torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routed(x, indices, weights, out)
    for seed in range(4):
        x.copy_(torch.randn(tokens, 1024, generator=torch.Generator().manual_seed(seed)) * 3**seed)
        for held, new in zip((indices, weights), routing_on_gpu(tokens, top_k, seed=seed), strict=True):
            held.copy_(new)
        for _ in range(2):
            graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, routed(x, indices, weights, torch.empty_like(out)))
        assert torch.equal(replayed.to(dtype), routed(x, indices.int(), weights))
        assert seed != 2 or not replayed.any()


def test_routed_experts_never_synchronise_and_allocate_their_result_alone(routed: Nvfp4RoutedExperts) -> None:
    for tokens in (1, 20, 129, 300):
        x, (indices, weights) = hidden_states(tokens, 1024), routing_on_gpu(tokens, 4)
        out = torch.empty_like(x)
        routed(x, indices, weights, out)
        before, scratch = torch.cuda.memory_stats()["allocation.all.allocated"], routed.scratch_bytes
        torch.cuda.set_sync_debug_mode("error")
        try:
            routed(x, indices, weights, out)
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
            routed(x, indices, weights)
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert routed.scratch_bytes == scratch > 0


@pytest.mark.parametrize("mode", ["static", "per_token"])
def test_a_tokens_routed_result_is_its_own_within_a_range_of_slots(mode: str) -> None:
    experts = experts_of((1024, 512), mode)
    x, (indices, weights) = hidden_states(300, 1024), routing_on_gpu(300, 4)
    begin = 0
    for slots in routed_ranges(1200, 9):
        whole = experts(x[: slots // 4], indices[: slots // 4], weights[: slots // 4])
        for tokens in {begin // 4 + 1, slots // 4}:
            order = torch.randperm(slots // 4, device="cuda")[:tokens]
            assert torch.equal(experts(x[order], indices[order], weights[order]), whole[order]), tokens
        begin = slots


def test_routed_views_that_begin_anywhere(routed: Nvfp4RoutedExperts) -> None:
    memory = torch.randn(40 * 1024 + 1, device="cuda", dtype=torch.bfloat16)
    x, out = memory[1:].view(40, 1024), torch.empty_like(memory)[1:].view(40, 1024)
    indices, weights = (
        torch.cat((part.flatten()[:1], part.flatten()))[1:].view(40, 4) for part in routing_on_gpu(40, 4)
    )
    assert indices.data_ptr() % 16
    want = routed(x.clone(), indices.clone(), weights.clone())
    assert torch.equal(routed(x, indices, weights, out), want)


def test_many_experts_and_slots() -> None:
    """512 experts, 8192 tokens of 8: whole blocks of slots, and offsets beyond what one expert has."""
    experts = experts_of((64, 32), "per_token", 512, 8, 8192)
    x, (indices, weights) = hidden_states(8192, 64), routing_on_gpu(8192, 8, 512)
    some = torch.randperm(8192, device="cuda")[:200]
    got = experts(x, indices, weights)[some].double()
    want = routed_reference(experts, x[some], indices[some], weights[some])
    bound = against_reference("nvfp4", DECODE, 200 * 8 * 32, rounded=True)
    assert (got - want).norm() <= bound * want.norm()


def test_routed_experts_on_many_streams_and_threads() -> None:
    work = []
    for mode in ACTIVATION_SCALES:
        experts = experts_of((1024, 512), mode)
        for tokens in (1, 20, 129, 300):
            call = hidden_states(tokens, 1024), *routing_on_gpu(tokens, 4, seed=tokens)
            work.append((experts, call, experts(*call)))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]

    def call(job: int) -> bool:
        experts, arguments, want = work[job % len(work)]
        with torch.cuda.stream(streams[job % 4] if job % 3 else torch.cuda.current_stream()):
            return torch.equal(experts(*arguments), want)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(20 * len(work))))


# --- on a Blackwell GPU alone: the one thing that nothing above proves ------------------------------------------------


def fp4_or_skip() -> None:
    reason = get_backend("sm100").refusal(Problem(256, 256, "nvfp4", target_of("cuda")))
    if reason:
        pytest.skip(f"backend sm100 {reason}")


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
@pytest.mark.parametrize("shape", [(144, 80), (4096, 2048), (7168, 3072)], ids=str)
def test_the_fp4_instruction_against_the_decoded_product(shape: tuple[int, int], mode: str) -> None:
    fp4_or_skip()
    native, decoded = (expert_of(shape, mode, backend, max_tokens=1000) for backend in ("sm100", DECODE))
    for tokens in (1, 20, 40, 129, 1000):
        x = hidden_states(tokens, shape[0])
        want = decoded(x).double()
        bound = against_reference("nvfp4", "sm100", tokens * shape[1], rounded=True)
        assert (native(x).double() - want).norm() <= bound * want.norm(), tokens


def test_the_fp4_instruction_keeps_nan_in_its_row() -> None:
    fp4_or_skip()
    x = hidden_states(40, 1024)
    x[3, 5] = torch.nan
    y = expert_of((1024, 512), "per_token", "sm100")(x)
    assert y[3].isnan().all() and y[torch.arange(40) != 3].isfinite().all()


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
def test_the_fp4_instruction_in_routed_experts(mode: str) -> None:
    fp4_or_skip()
    native, decoded = (experts_of((4096, 2048), mode, 4, backend=backend) for backend in ("sm100", DECODE))
    for tokens in (1, 7, 40, 300):
        call = hidden_states(tokens, 4096), *routing_on_gpu(tokens, 4, 4)
        want = decoded(*call).double()
        bound = against_reference("nvfp4", "sm100", tokens * 4 * 2048, rounded=True)
        assert (native(*call).double() - want).norm() <= bound * want.norm(), tokens
