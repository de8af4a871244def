# SPDX-License-Identifier: Apache-2.0
"""Every backend x activation format against the reference, and the reference against exact math."""

import pytest
import torch
from torch import Tensor

from nvfp4_experts.errors import UnsupportedError
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor, quantize
from nvfp4_experts.kernels import ops, reference, tiled, torch_backend
from nvfp4_experts.kernels.dispatch import (
    ACTIVATION_SCALES,
    ACTIVATIONS,
    ALL_BACKENDS,
    Call,
    Problem,
    choose_backend,
    get_backend,
)
from nvfp4_experts.kernels.target import Target, target_of
from tests.tolerances import AGAINST_EXACT_MATH, AGAINST_REFERENCE

# (hidden, intermediate): ordinary, ragged, one block, V4.1-Flash's tensor-parallel slice, another MoE's size.
SHAPES = [(256, 256), (144, 80), (16, 16), (320, 288), (64, 1408)]
TOKENS = [1, 7, 127, 129]


def make_expert(hidden: int, intermediate: int, seed: int = 0) -> tuple[Nvfp4Tensor, Nvfp4Tensor, Nvfp4Tensor]:
    """gate, up, down; gate and up have different global scales."""
    g = torch.Generator().manual_seed(seed)
    gate = torch.randn(intermediate, hidden, generator=g) * 0.05
    up = torch.randn(intermediate, hidden, generator=g) * 0.15
    down = torch.randn(hidden, intermediate, generator=g) * 0.05
    return quantize(gate), quantize(up), quantize(down)


def run(backend: str, x: Tensor, weights: tuple[Nvfp4Tensor, ...], call: Call) -> Tensor:
    out = torch.empty_like(x)
    get_backend(backend).shared_expert(x, list(get_backend(backend).pack(*weights).values()), call, out)
    return out


def rel_l2(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def on_cpu(activations: str) -> list[str]:
    """Backends that take such a problem here; one that refuses one size refuses all: what it lacks is the machine."""
    problem = Problem(64, 32, activations, target_of("cpu"))
    return [name for name in ALL_BACKENDS if get_backend(name).refusal(problem) is None]


ON_CPU = on_cpu("bf16")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_backend_matches_reference(activations: str, shape: tuple[int, int]) -> None:
    weights = make_expert(*shape)
    scales = torch.tensor(5.0 / 2688), torch.tensor(8.0 / 2688)
    for backend in on_cpu(activations):
        for tokens in TOKENS:
            x = torch.randn(tokens, shape[0])
            for mode in ACTIVATION_SCALES if activations == "nvfp4" else ("dynamic",):
                call = Call(10.0, activations, mode, *scales)
                want = reference.shared_expert(
                    x,
                    *weights,
                    swiglu_limit=10.0,
                    activations=activations,
                    activation_scale=mode,
                    input_scale=scales[0],
                    hidden_scale=scales[1],
                )
                got = run(backend, x, weights, call)
                assert torch.isfinite(got).all()
                assert rel_l2(got, want) <= AGAINST_REFERENCE["shared_expert", activations], (
                    backend,
                    tokens,
                    mode,
                )


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_pack_and_unpack_are_inverse_byte_for_byte(backend: str) -> None:
    weights = make_expert(144, 80)
    again = get_backend(backend).unpack(get_backend(backend).pack(*weights), 144, 80)
    for before, after in zip(weights, again, strict=True):
        assert torch.equal(before.codes, after.codes)
        assert torch.equal(before.block_scales.view(torch.uint8), after.block_scales.view(torch.uint8))
        assert torch.equal(before.global_scale, after.global_scale)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_weights_stay_packed(backend: str) -> None:
    hidden, intermediate = 256, 512
    packed = get_backend(backend).pack(*make_expert(hidden, intermediate))
    resident = sum(w.nbytes for w in packed.values())
    assert resident <= 0.5625 * 3 * hidden * intermediate * 1.02


@pytest.mark.parametrize("backend", ON_CPU)
def test_one_hot_rows_print_the_decoded_down_projection(backend: str) -> None:
    """h is made one-hot by the weights themselves, so the layer's output is a column of the decoded down matrix."""
    size = 64
    down = quantize(torch.randn(size, size) * torch.logspace(-2, 2, size)[:, None])
    one = quantize(torch.eye(size))
    # x = 4096 e_i: gate_i = 4096 with the clamp off, so silu(gate) = gate exactly, and h = 2^24 e_i: exact in bf16.
    x = 4096.0 * torch.eye(size)
    got = run(backend, x, (one, one, down), Call(0.0, "bf16", "dynamic"))
    unit = float(one.dequantize()[0, 0])
    h = (4096.0 * torch.tensor(unit)) ** 2
    values = reference.weight(down, "bf16")[0]
    want = (h.bfloat16().float() * values.T) * down.global_scale
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ON_CPU)
def test_every_code_and_block_scale_decodes_exactly(backend: str) -> None:
    """All 16 codes x 126 finite scale bytes through the kernel: one row per scale byte, one-hot x picks the code."""
    scale_bytes = torch.arange(1, 127, dtype=torch.uint8)
    rows = 128
    codes = torch.zeros(rows, 8, dtype=torch.uint8) + torch.tensor([1, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]).to(
        torch.uint8
    )
    block_scales = torch.zeros(rows, 1, dtype=torch.uint8)
    block_scales[:126, 0] = scale_bytes
    down_of_rows = Nvfp4Tensor(codes, block_scales.view(torch.float8_e4m3fn), torch.ones(()))
    eye = torch.zeros(16, rows)
    eye[:, :16] = torch.eye(16)
    gate = quantize(eye)
    x = torch.zeros(16, rows)
    x[:, :16] = 64.0 * torch.eye(16)
    got = run(backend, x, (gate, gate, down_of_rows), Call(0.0, "bf16", "dynamic"))
    unit = 64.0 * float(gate.dequantize()[0, 0])
    h = torch.tensor(unit).mul(torch.sigmoid(torch.tensor(unit))).mul(unit).bfloat16().float()
    assert torch.equal(got, (h * reference.weight(down_of_rows, "bf16")[0].T))


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_reference_is_close_to_exact_math(activations: str) -> None:
    gate, up, down = make_expert(512, 256)
    x = torch.randn(64, 512)
    exact_gate, exact_up = x.double() @ gate.dequantize().double().T, x.double() @ up.dequantize().double().T
    h = torch.nn.functional.silu(exact_gate.clamp(max=10)) * exact_up.clamp(-10, 10)
    want = h @ down.dequantize().double().T
    got = reference.shared_expert(
        x, gate, up, down, swiglu_limit=10.0, activations=activations, activation_scale="per_token"
    )
    assert rel_l2(got, want) <= AGAINST_EXACT_MATH[activations]


@pytest.mark.parametrize("limit", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("backend", ON_CPU)
def test_clamp_is_one_sided_for_gate_and_two_sided_for_up(backend: str, limit: float) -> None:
    eye = quantize(torch.eye(16))
    x = torch.linspace(-8, 8, 33)[:, None].expand(33, 16).contiguous()
    got = run(backend, x, (eye, eye, eye), Call(limit, "bf16", "dynamic")).double()
    v = x.bfloat16().double() * float(eye.dequantize()[0, 0])
    gate, up = (v.clamp(max=limit), v.clamp(-limit, limit)) if limit else (v, v)
    want = torch.nn.functional.silu(gate) * up * float(eye.dequantize()[0, 0])
    assert rel_l2(got, want) < 2.0**-8


@pytest.mark.parametrize("backend", ON_CPU)
def test_gate_and_up_keep_their_own_global_scales(backend: str) -> None:
    gate, up, down = make_expert(64, 64)
    doubled = Nvfp4Tensor(up.codes, up.block_scales, up.global_scale * 2)
    x = torch.randn(5, 64)
    call = Call(0.0, "bf16", "dynamic")
    assert torch.equal(run(backend, x, (gate, doubled, down), call), 2 * run(backend, x, (gate, up, down), call))


def test_torch_backend_decodes_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    decode = tiled.decode_blocks

    def spy(codes: Tensor, *rest: object) -> Tensor:
        seen.append(codes.numel() * 2)
        return decode(codes, *rest)

    monkeypatch.setattr(tiled, "decode_blocks", spy)
    monkeypatch.setattr(torch_backend, "TILE_VALUES", 4096)
    weights = make_expert(256, 144)
    x = torch.randn(3, 256)
    got = run("torch", x, weights, Call(10.0, "bf16", "dynamic"))
    assert max(seen) <= 4096 and sum(seen) == 3 * 256 * 144
    want = reference.shared_expert(x, *weights, swiglu_limit=10.0, activations="bf16")
    assert rel_l2(got, want) <= AGAINST_REFERENCE["shared_expert", "bf16"]


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_opcheck(activations: str) -> None:
    weights = list(get_backend("torch").pack(*make_expert(64, 32)).values())
    scales = (torch.tensor(0.002), torch.tensor(0.002))
    x = torch.randn(3, 64)
    arguments = (x, weights, *scales, 10.0, activations, "static", "torch")
    torch.library.opcheck(ops.shared_expert, arguments)
    torch.library.opcheck(ops.shared_expert_out, (*arguments, torch.zeros_like(x)))


class TestDispatch:
    problem = Problem(64, 32, "bf16", Target("cpu", "cpu"))

    def test_auto_takes_the_first_that_does_not_refuse(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert choose_backend("auto", self.problem).name == "cpu"
        for name, reason in [("cpu", "needs a sun"), ("torch", "needs a moon")]:
            monkeypatch.setattr(type(get_backend(name)), "refusal", lambda self, problem, reason=reason: reason)
        with pytest.raises(UnsupportedError, match=r"sm90: needs a Hopper.*; cpu: needs a sun; torch: needs a moon"):
            choose_backend("auto", self.problem)

    def test_a_named_backend_that_refuses_raises_with_every_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(get_backend("torch")), "refusal", lambda self, problem: "needs a moon")
        with pytest.raises(UnsupportedError, match=r"got torch: needs a moon; .*sm90: needs a Hopper.*; cpu: can run"):
            choose_backend("torch", self.problem)

    def test_a_refusal_of_one_that_auto_never_takes_is_told(self) -> None:
        with pytest.raises(UnsupportedError, match=r"got exact: computes activations=\"nvfp4\" alone.*torch: can run"):
            choose_backend("exact", self.problem)

    def test_unknown_names_raise(self) -> None:
        with pytest.raises(UnsupportedError, match="must be one of"):
            choose_backend("abacus", self.problem)

    def test_features_by_capability(self) -> None:
        fp4 = {c: Target("cuda", "x", c).has_native_fp4 for c in [(8, 0), (9, 0), (10, 0), (10, 3), (12, 0)]}
        assert fp4 == {(8, 0): False, (9, 0): False, (10, 0): True, (10, 3): True, (12, 0): True}
        assert not target_of("cpu").has_native_fp4
