# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel: every tier of this machine against the reference, and the promises that are about bits."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvfp4_experts.errors import UnsupportedError
from nvfp4_experts.formats.activations import quantize_activation
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor, quantize
from nvfp4_experts.kernels import native, reference
from nvfp4_experts.kernels.cpu import backend
from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES, Call, Problem, choose_backend
from nvfp4_experts.kernels.target import cpu_threads, target_of
from nvfp4_experts.layers.shared_expert import Nvfp4SharedExpert
from tests.fuzz.cpu import disagreement, draw, draw_routed
from tests.kernels.test_shared_expert import make_expert, rel_l2, run
from tests.tolerances import AGAINST_REFERENCE

LOADED, REASON = native.load()
if LOADED is None:
    pytest.skip(f"the native library is not here: {REASON}", allow_module_level=True)
TIERS = [tier.name for tier in LOADED.tiers if tier.present]
ABSENT = [tier.name for tier in LOADED.tiers if not tier.present]
MODES = [*(("nvfp4", mode) for mode in ACTIVATION_SCALES), ("bf16", "dynamic"), ("fp8", "dynamic")]
ALONE = [mode for mode in MODES if mode != ("nvfp4", "dynamic")]  # a token's result does not depend on the others
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALES = torch.tensor(5.0 / 2688), torch.tensor(8.0 / 2688)
# Odd multiples of 16 on either side, one block, an odd number of tiles of 16 rows, runs of K that do not fill a panel.
SHAPES = [(16, 16), (48, 16), (16, 48), (272, 288), (288, 272), (528, 144), (64, 1408)]
TOKENS = [1, 2, 3, 5, 8, 9, 17, 63, 130]


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each tier in turn, forced."""
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    return str(request.param)


def call_of(mode: tuple[str, str], limit: float = 10.0) -> Call:
    return Call(limit, *mode, *SCALES)


def wanted(x: Tensor, weights: tuple[Nvfp4Tensor, ...], mode: tuple[str, str], limit: float = 10.0) -> Tensor:
    names = "activations", "activation_scale"
    options = dict(zip(names, mode, strict=True))
    scales = {"input_scale": SCALES[0], "hidden_scale": SCALES[1]}
    return reference.shared_expert(x, *weights, swiglu_limit=limit, **options, **scales)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bytes, NaN included: the kernel writes one pattern for it."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def in_each_tier(monkeypatch: pytest.MonkeyPatch, x: Tensor, weights: tuple[Nvfp4Tensor, ...], call: Call) -> Iterator:
    for name in TIERS:
        monkeypatch.setenv(native.ISA_VARIABLE, name)
        yield name, run("cpu", x, weights, call)


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_tier_matches_the_reference(tier: str, mode: tuple[str, str], shape: tuple[int, int]) -> None:
    weights = make_expert(*shape)
    for tokens, dtype in zip(TOKENS, itertools.cycle(DTYPES)):
        x = torch.randn(tokens, shape[0]).to(dtype)
        got, want = run("cpu", x, weights, call_of(mode)), wanted(x, weights, mode)
        spacing = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)  # y is rounded; seldom apart
        assert rel_l2(got, want) <= AGAINST_REFERENCE["shared_expert", mode[0]] + spacing / 2, (tokens, dtype)


# The last two: blocks of x under a zero scale against weights under a zero scale, in a panel, once gave NaN.
@pytest.mark.parametrize("seed", [*range(1, 61), 569, 696])
def test_drawn_cases_equal_the_definition_to_the_bit(seed: int) -> None:
    for case in (draw(seed), draw_routed(seed)):
        for name in TIERS:
            assert disagreement(case, name) is None, (name, str(case))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", [m for m in MODES if m[0] == "nvfp4"], ids=str)
def test_tiers_agree_to_the_bit(mode: tuple[str, str], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = make_expert(*shape)
    for tokens, dtype in zip(TOKENS, itertools.cycle(DTYPES)):
        x = torch.randn(tokens, shape[0]).to(dtype)
        results = dict(in_each_tier(monkeypatch, x, weights, call_of(mode)))
        for name, got in results.items():
            assert same_bits(got, results["portable"]), (name, tokens, dtype)


@pytest.mark.parametrize("mode", [m for m in MODES if m[0] != "nvfp4"], ids=str)
def test_tiers_that_multiply_in_fp32_agree_to_the_bit(mode: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = make_expert(272, 288), torch.randn(9, 272)
    results = dict(in_each_tier(monkeypatch, x, weights, call_of(mode)))
    results.pop("avx512bf16", None)  # its instruction adds products in pairs
    assert all(same_bits(got, results["portable"]) for got in results.values())


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_number_of_threads_changes_no_bit(
    tier: str, mode: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, x = make_expert(272, 288), torch.randn(130, 272)
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(backend, "cpu_threads", lambda threads=threads: threads)
        results.append(run("cpu", x, weights, call_of(mode)))
    assert all(same_bits(got, results[0]) for got in results)


@pytest.mark.parametrize("mode", [m for m in ALONE if m[0] == "nvfp4"], ids=str)
def test_other_tokens_change_no_bit(tier: str, mode: tuple[str, str]) -> None:
    weights, x = make_expert(272, 288), torch.randn(140, 272)
    whole = run("cpu", x, weights, call_of(mode))
    for rows in (slice(0, 1), slice(1, 4), slice(5, 14), slice(60, 135)):
        assert same_bits(run("cpu", x[rows].contiguous(), weights, call_of(mode)), whole[rows]), rows


def test_batches_beyond_a_chunk_are_cut_without_changing_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = make_expert(64, 48), torch.randn(100, 64)
    for mode in MODES:
        whole = run("cpu", x, weights, call_of(mode))
        monkeypatch.setattr(backend, "CHUNK", 33)
        assert same_bits(run("cpu", x, weights, call_of(mode)), whole) or mode[0] == "bf16"
        assert rel_l2(run("cpu", x, weights, call_of(mode)), whole) < 2.0**-12
        monkeypatch.undo()


def test_one_hot_tokens_print_every_code_under_every_scale(tier: str) -> None:
    """All 256 scale bytes, NaN and negative ones too, at few tokens and many: h is one-hot, y a column of down."""
    size = 256
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8).repeat(size, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].view(torch.float8_e4m3fn)
    down = Nvfp4Tensor(codes, scales, torch.ones(()))
    identity = quantize(torch.eye(16, size))
    unit = float(identity.dequantize()[0, 0])
    for mode in [("nvfp4", "per_token"), ("bf16", "dynamic")]:
        for tokens in (1, 4, 16):
            x = 64.0 * torch.eye(16, size)[:tokens]
            got = run("cpu", x, (identity, identity, down), call_of(mode, limit=0.0))
            h = torch.tensor(64.0 * unit) ** 2  # silu(64) is 64 to the last bit
            values = reference.weight(down, "bf16")[0].T[:tokens]
            if mode[0] == "bf16":
                h = h.bfloat16().float()
            else:
                q = quantize_activation(torch.eye(16)[:1] * h, "per_token")
                h = (6 * q.block_scales.float() * q.global_scale).flatten()[0]
            scaled = values * h
            torch.testing.assert_close(got, scaled, rtol=2.0**-22, atol=0.0, equal_nan=True)
            assert same_bits(got.isnan(), values.isnan())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_what_is_not_finite_stays_in_its_row(tier: str, mode: tuple[str, str], value: float) -> None:
    weights = make_expert(272, 288)
    for tokens, dtype in [(3, torch.float32), (9, torch.bfloat16), (70, torch.float16)]:
        x = torch.randn(tokens, 272).to(dtype)
        x[tokens // 2, 37] = value
        got, want = run("cpu", x, weights, call_of(mode)), wanted(x, weights, mode)
        assert torch.equal(got.isnan(), want.isnan()), (tokens, dtype)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_zeros_denormals_and_huge_values(tier: str, mode: tuple[str, str]) -> None:
    weights = make_expert(64, 48)
    for factor in (0.0, -0.0, 1e-38, 1e-33, 1e30):
        x = torch.randn(10, 64) * factor
        got, want = run("cpu", x, weights, call_of(mode)), wanted(x, weights, mode)
        if mode[0] == "nvfp4" or factor in (0.0, 1e30):  # bf16 instructions flush denormals
            assert torch.isfinite(got).all()
            assert float((got - want).norm()) <= 2.0**-6 * float(want.norm()) + 1e-30, factor


def test_flushing_denormals_in_the_caller_changes_no_bit(tier: str) -> None:
    weights, x = make_expert(64, 48), torch.randn(20, 64) * 1e-20
    calls = [call_of(("nvfp4", mode)) for mode in ACTIVATION_SCALES]
    before = [run("cpu", x, weights, call) for call in calls]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        after = [run("cpu", x, weights, call) for call in calls]
    finally:
        torch.set_flush_denormal(False)
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_any_address_and_any_strides(tier: str, mode: tuple[str, str]) -> None:
    weights = make_expert(48, 80)
    expert = Nvfp4SharedExpert(*weights, activations=mode[0], activation_scale=mode[1], backend="cpu")
    expert._input_scale, expert._hidden_scale = SCALES
    for dtype in DTYPES:
        wide = torch.randn(11, 51).to(dtype)
        x = wide[:, 3:]
        assert x.stride(0) == 51
        want = expert(x.clone())
        assert same_bits(expert(x), want)
        storage = torch.full((11 * 48 + 1,), 3.0, dtype=dtype)
        out = storage[1:].view(11, 48)  # begins at an odd element
        expert(x.clone(), out=out)
        assert same_bits(out, want) and storage[0] == 3.0


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_what_scratch_held_before_does_not_matter(tier: str, mode: tuple[str, str]) -> None:
    weights, x = make_expert(272, 288), torch.randn(70, 272)
    want = run("cpu", x, weights, call_of(mode))
    for byte in (0xFF, 0x7F, 0x00):
        backend._local.holder.block.fill_(byte)
        assert same_bits(run("cpu", x, weights, call_of(mode)), want)


def test_scratch_is_kept_and_reported() -> None:
    expert = Nvfp4SharedExpert(*make_expert(64, 48), activations="bf16", backend="cpu")
    expert(torch.randn(40, 64))
    before = expert.scratch_bytes
    block = backend._local.holder.block
    expert(torch.randn(40, 64))
    expert(torch.randn(2, 64))
    assert backend._local.holder.block is block and expert.scratch_bytes == before >= block.nbytes


def test_resident_bytes_of_a_real_size() -> None:
    hidden, intermediate = 2048, 512
    packed = backend.BACKEND.pack(*make_expert(hidden, intermediate))
    assert sum(w.nbytes for w in packed.values()) <= 0.5625 * 3 * hidden * intermediate * 1.02


# --- threads and processes ----------------------------------------------------------------------------------------


def test_threads_of_python_do_not_meet() -> None:
    weights = make_expert(272, 288)
    expert = Nvfp4SharedExpert(*weights, activations="nvfp4", activation_scale="per_token", backend="cpu")
    inputs = [torch.randn(t, 272) for t in (1, 70, 9, 33)] * 6
    want = [expert(x) for x in inputs]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(2,)) as pool:
        for got, expected in zip(pool.map(expert, inputs), want, strict=True):
            assert same_bits(got, expected)


def test_scratch_of_a_thread_that_ended_is_given_back() -> None:
    expert = Nvfp4SharedExpert(*make_expert(64, 48), activations="bf16", backend="cpu")
    expert(torch.randn(3, 64))
    before = expert.scratch_bytes
    thread = threading.Thread(target=expert, args=(torch.randn(200, 64),))
    thread.start()
    thread.join()
    assert expert.scratch_bytes == before


def _in_child(expert: Nvfp4SharedExpert, x: Tensor, queue: multiprocessing.Queue) -> None:
    queue.put(expert(x).tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_computes_what_its_parent_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent has run OpenMP teams, whose threads the child does not have; it asks for three all the same."""
    monkeypatch.setattr(backend, "cpu_threads", lambda: 3)
    expert = Nvfp4SharedExpert(*make_expert(272, 288), activations="bf16", backend="cpu")
    x = torch.randn(40, 272)
    want = expert(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(expert, x, queue))
    child.start()
    got = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0 and same_bits(torch.tensor(got), want)


class Results(torch.utils.data.Dataset):
    """Hidden states through an expert, computed where the data loader wants them."""

    def __init__(self, expert: Nvfp4SharedExpert, x: Tensor) -> None:
        self.expert, self.x = expert, x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.expert(self.x[index])


def test_workers_of_a_data_loader() -> None:
    expert = Nvfp4SharedExpert(*make_expert(64, 48), activations="nvfp4", activation_scale="per_token", backend="cpu")
    x = torch.randn(8, 64)
    want = expert(x)
    loader = torch.utils.data.DataLoader(Results(expert, x), batch_size=4, num_workers=2, timeout=120)
    assert same_bits(torch.cat(list(loader)), want)


def test_threads_respect_torch_and_the_affinity_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert cpu_threads() == 1
        torch.set_num_threads(8)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
        assert cpu_threads() == 3
    finally:
        torch.set_num_threads(before)


# --- which tier, and which library --------------------------------------------------------------------------------


def test_the_best_tier_of_the_machine_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    assert native.tier().name == TIERS[0] and TIERS[-1] == "portable"


@pytest.mark.parametrize("name", ["sse9", *ABSENT])
def test_forcing_a_tier_that_is_not_here_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, name)
    with pytest.raises(UnsupportedError, match=rf"{native.ISA_VARIABLE}: must name a tier.*got '{name}'.*unset it"):
        choose_backend("auto", Problem(64, 32, "bf16", target_of("cpu")))
    with pytest.raises(UnsupportedError, match=native.ISA_VARIABLE):
        Nvfp4SharedExpert(*make_expert(16, 16))


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """What is known of the library is forgotten before and after the test."""
    caches = native.load, native._tier
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("fresh_library")
def test_without_the_library_torch_runs_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_NAME", "no such library")
    assert Nvfp4SharedExpert(*make_expert(16, 16)).backend == "torch"
    reason = r"cpu: was installed without its native library: no C\+\+ compiler.*make native.*; torch: can run this"
    with pytest.raises(UnsupportedError, match=reason):
        Nvfp4SharedExpert(*make_expert(16, 16), backend="cpu")


@pytest.mark.usefixtures("fresh_library")
def test_a_library_of_other_sources_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert LOADED is not None
    shutil.copytree(native._HERE / "csrc", tmp_path / "csrc")
    shutil.copy(LOADED.file, tmp_path)
    with open(tmp_path / "csrc" / "api.h", "a") as file:
        file.write("// edited\n")
    monkeypatch.setattr(native, "_HERE", tmp_path)
    loaded, reason = native.load()
    assert loaded is None
    assert "was built from other sources" in reason and "build it again" in reason


@pytest.mark.usefixtures("fresh_library")
def test_a_file_that_is_no_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / native._NAME).write_text("not a library")
    monkeypatch.setattr(native, "_HERE", tmp_path)
    monkeypatch.setattr(native.importlib.metadata, "distributions", lambda **_: [])
    loaded, reason = native.load()
    assert loaded is None and "does not load" in reason
