# SPDX-License-Identifier: Apache-2.0
"""The Blackwell kernels with their FP4 instruction replaced, natively on any GPU of compute capability 8.0 or newer.

Every case of `sm100_cases.py`, and what only a GPU shows: real sizes, streams, graphs, allocations, synchronisation.
`test_gpu.py` runs the backend over its shapes as it does every backend. On a Blackwell GPU the last tests here hold the
FP4 instruction itself against the decoded product.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

triton = pytest.importorskip("triton")

from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES, Problem, get_backend  # noqa: E402
from nvfp4_experts.kernels.sm100.config import TOKEN_LIMITS  # noqa: E402
from nvfp4_experts.kernels.target import target_of  # noqa: E402
from nvfp4_experts.layers.shared_expert import Nvfp4SharedExpert  # noqa: E402
from tests.kernels.sm100_cases import *  # noqa: E402, F403
from tests.kernels.test_gpu import example, make  # noqa: E402
from tests.tolerances import against_reference  # noqa: E402

pytestmark = pytest.mark.gpu

DECODE = "sm100-decode"


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
