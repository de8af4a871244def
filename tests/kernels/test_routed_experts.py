# SPDX-License-Identifier: Apache-2.0
"""Routed experts: every backend that has them against the reference, and the reference against loops over tokens.

A backend runs where it can: on the CPU, else on a GPU (then its cases are marked so), else under Triton's interpreter
(test_sm100_interpreted.py), which is slow: fewer experts and tokens.
"""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from nvfp4_experts.errors import FormatError, UnsupportedError
from nvfp4_experts.formats.activations import quantize_activation, quantize_fp8_rows
from nvfp4_experts.formats.codes import decode_blocks
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor, quantize
from nvfp4_experts.formats.stack import Nvfp4Stack
from nvfp4_experts.kernels import native, ops, reference
from nvfp4_experts.kernels.dispatch import (
    ACTIVATION_SCALES,
    ACTIVATIONS,
    ALL_BACKENDS,
    ROUTED_BACKENDS,
    WEIGHTINGS,
    Call,
    Problem,
    Routing,
    choose_routed_backend,
    get_backend,
    get_routed_backend,
)
from nvfp4_experts.kernels.target import target_of
from tests.kernels import cpu_oracle
from tests.kernels.test_shared_expert import rel_l2
from tests.tolerances import AGAINST_EXACT_MATH, AGAINST_REFERENCE, against_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
E, H, I = 4 if INTERPRETED else 9, 64, 48  # noqa: E741
# k, T
SIZES = [(1, 1), (2, 7), (4, 40)] if INTERPRETED else list(zip(range(1, 9), (1, 7, 40, 1, 7, 40, 1, 129), strict=True))
LIMIT = 1.0
Weights = tuple[Nvfp4Stack, Nvfp4Stack, Nvfp4Stack]
MODES = [("bf16", "dynamic"), ("fp8", "dynamic"), *(("nvfp4", scale) for scale in ACTIVATION_SCALES)]
PROBLEM = Problem(H, I, "nvfp4", target_of("cpu"), experts=E, top_k=8)


def device_of(name: str, activations: str = "nvfp4") -> str | None:
    """Where a backend runs here."""
    for device in ("cpu", "cuda"):
        if device == "cpu" or torch.cuda.is_available():
            problem = dataclasses.replace(PROBLEM, activations=activations, target=target_of(device))
            try:
                if choose_routed_backend(name, problem).name == name:
                    return device
            except UnsupportedError:
                pass
    return None


def marked(name: str, *more: object) -> object:
    return pytest.param(name, *more, marks=[pytest.mark.gpu] if DEVICES[name] == "cuda" else [])


LIBRARY = native.load()[0]
TIERS = [tier.name for tier in LIBRARY.tiers if tier.present] if LIBRARY else []
DEVICES = {name: device for name in ALL_BACKENDS if (device := device_of(name))}
if INTERPRETED:
    DEVICES = {"sm100-decode": "cpu"}
BACKENDS = [marked(name) for name in DEVICES]
CASES = [marked(name, mode) for name in DEVICES for mode in MODES if device_of(name, mode[0])]


def bound(backend: str, mode: tuple[str, str], h_values: int) -> float:
    default = AGAINST_REFERENCE["routed_experts", mode[0]]
    derived = AGAINST_REFERENCE.get(("routed_experts", mode[0], backend), default)
    return max(derived, against_reference(mode[0], backend, h_values)) if DEVICES[backend] == "cuda" else derived


def make_experts(experts: int = E, hidden: int = H, intermediate: int = I) -> Weights:
    """gate, up, down whose values and global scales differ from expert to expert, by up to 4."""
    g = torch.Generator().manual_seed(0)

    def stack(rows: int, columns: int, size: float) -> Nvfp4Stack:
        sizes = size * 4 ** torch.rand(experts, generator=g)
        return Nvfp4Stack.of([quantize(s * torch.randn(rows, columns, generator=g)) for s in sizes])

    return stack(intermediate, hidden, 0.05), stack(intermediate, hidden, 0.1), stack(hidden, intermediate, 0.05)


def static_scales(experts: int = E) -> tuple[Tensor, Tensor]:
    """Of x and of h, (E,): every expert its own, over a factor of 4; the smallest saturate."""
    return torch.linspace(2, 8, experts) / 2688, torch.linspace(4, 1, experts) / 2688


def draw_routing(tokens: int, top_k: int, weighting: str = "before_down", experts: int = E) -> Routing:
    """Distinct experts, but for one token that names one twice and some slots that are not here."""
    indices = torch.rand(tokens, experts).argsort(-1)[:, :top_k].contiguous()
    indices[0] = indices[0, 0]
    outside = torch.rand(tokens, top_k) < 0.1
    outside[0] = False
    indices[outside] = torch.tensor([-1, experts, 2**40])[torch.randint(3, (int(outside.sum()),))]
    return Routing(indices, torch.randn(tokens, top_k), weighting)


def call_of(mode: tuple[str, str], experts: int = E) -> Call:
    return Call(LIMIT, *mode, *static_scales(experts))


@pytest.mark.parametrize("backend", ROUTED_BACKENDS)
def test_packed_experts_are_the_stack_of_each_ones_packed_form(backend: str) -> None:
    weights, kernels = make_experts(), get_routed_backend(backend)
    packed, one = kernels.pack(*weights), get_backend(backend) if backend in ALL_BACKENDS else kernels.one
    for expert in range(E):
        alone = one.pack(*(stack[expert] for stack in weights))
        assert list(alone) == list(packed)
        for name, tensor in alone.items():
            assert tensor.dtype == packed[name].dtype and torch.equal(tensor, packed[name][expert]), name


def run(
    backend: str,
    x: Tensor,
    weights: Weights,
    routing: Routing,
    call: Call,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> Tensor:
    """The backend's result on a device, by default where it runs, brought to the CPU."""
    device = device or DEVICES[backend]
    packed = [part.to(device) for part in get_routed_backend(backend).pack(*weights).values()]
    there = Routing(routing.indices.to(device), routing.weights.to(device), routing.weighting)
    scales = [None if s is None else s.to(device) for s in (call.input_scale, call.hidden_scale)]
    call = dataclasses.replace(call, input_scale=scales[0], hidden_scale=scales[1])
    out = torch.empty_like(x, dtype=dtype, device=device)
    shape = weights[0].shape[2], weights[0].shape[1]
    layer = call.activations, target_of(device), call.activation_scale, len(weights[0]), routing.indices.shape[1]
    get_routed_backend(backend).prepare(Problem(*shape, *layer), torch.device(device), len(x))
    get_routed_backend(backend).routed_experts(x.to(device), packed, there, call, out)
    return out.cpu()


def wanted(x: Tensor, weights: Weights, routing: Routing, call: Call) -> Tensor:
    return reference.routed_experts(
        x,
        *weights,
        routing.indices,
        routing.weights,
        swiglu_limit=call.swiglu_limit,
        activations=call.activations,
        activation_scale=call.activation_scale,
        input_scale=call.input_scale,
        hidden_scale=call.hidden_scale,
        weighting=routing.weighting,
    )


def token_by_token(x: Tensor, weights: Weights, routing: Routing, call: Call) -> Tensor:
    """The definition in fp64, a slot at a time; only what is rounded on purpose is rounded."""
    static = call.activation_scale == "static" and call.activations == "nvfp4"

    def enter(rows: Tensor, scales: Tensor, expert: int) -> Tensor:
        if call.activations == "bf16":
            return rows.bfloat16().double()
        if call.activations == "fp8":
            values, scale = quantize_fp8_rows(rows)
            return values.double() * scale.double()
        q = quantize_activation(rows, call.activation_scale, scales[expert] if static else None)
        return decode_blocks(q.codes, q.block_scales, torch.float32).double() * q.global_scale.double()

    def weight(w: Nvfp4Tensor) -> Tensor:
        values, scale = reference.weight(w, call.activations)
        return values.double() * scale.double().reshape(-1, 1)

    gate, up, down = weights
    h, rows = defaultdict(dict), {}
    for t in range(len(x)):
        for s, expert in enumerate(routing.indices[t].tolist()):
            if 0 <= expert < len(gate):
                entered = enter(x, call.input_scale, expert)[t]
                g = (weight(gate[expert]) @ entered).clamp(max=LIMIT)
                u = (weight(up[expert]) @ entered).clamp(-LIMIT, LIMIT)
                value = g * torch.sigmoid(g) * u
                before = routing.weighting == "before_down"
                h[expert][t, s] = value * (routing.weights[t, s].double() if before else 1)
    for expert, slots in h.items():
        entered = enter(torch.stack(list(slots.values())).float(), call.hidden_scale, expert)
        for (t, s), row in zip(slots, entered @ weight(down[expert]).T, strict=True):
            rows[t, s] = row if routing.weighting == "before_down" else row * routing.weights[t, s].double()
    y = torch.zeros(x.shape, dtype=torch.float64)
    for (t, _), row in rows.items():
        y[t] += row
    return y


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_reference_is_the_definition(mode: tuple[str, str], weighting: str) -> None:
    weights, x = make_experts(), torch.randn(12, H)
    routing, call = draw_routing(12, 4, weighting), call_of(mode)
    got, want = wanted(x, weights, routing, call), token_by_token(x, weights, routing, call)
    assert rel_l2(got, want) <= AGAINST_REFERENCE["routed_experts", mode[0]]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("backend", "mode"), CASES, ids=str)
def test_backend_matches_reference(backend: str, mode: tuple[str, str], weighting: str) -> None:
    weights, call = make_experts(), call_of(mode)
    for top_k, tokens in SIZES:
        x, routing = torch.randn(tokens, H), draw_routing(tokens, top_k, weighting)
        got = run(backend, x, weights, routing, call)
        assert rel_l2(got, wanted(x, weights, routing, call)) <= bound(backend, mode, tokens * top_k * I), top_k


@pytest.mark.parametrize("shape", [(144, 80), (16, 16), (320, 288)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_sizes(backend: str, shape: tuple[int, int]) -> None:
    weights, x, call = make_experts(3, *shape), torch.randn(17, shape[0]), call_of(("nvfp4", "dynamic"), 3)
    routing = draw_routing(17, 2, experts=3)
    got = run(backend, x, weights, routing, call)
    assert rel_l2(got, wanted(x, weights, routing, call)) <= bound(backend, ("nvfp4", "dynamic"), 17 * 2 * shape[1])


@pytest.mark.parametrize(("backend", "mode"), CASES, ids=str)
def test_each_expert_has_scales_of_its_own(backend: str, mode: tuple[str, str]) -> None:
    """Experts in another order, and indices to match: the same numbers, in each bit."""
    weights, call, x, routing = make_experts(), call_of(mode), torch.randn(20, H), draw_routing(20, 3)
    order = torch.randperm(E)
    moved = tuple(Nvfp4Stack.of([stack[int(e)] for e in order]) for stack in weights)
    moved_call = Call(LIMIT, *mode, call.input_scale[order].contiguous(), call.hidden_scale[order].contiguous())
    place = torch.cat((order.argsort(), torch.tensor([-1])))
    here = (routing.indices >= 0) & (routing.indices < E)
    moved_routing = Routing(place[torch.where(here, routing.indices, E)], routing.weights, routing.weighting)
    assert torch.equal(run(backend, x, moved, moved_routing, moved_call), run(backend, x, weights, routing, call))


@pytest.mark.parametrize(("backend", "mode"), CASES, ids=str)
def test_slots_are_added_in_ascending_order(backend: str, mode: tuple[str, str]) -> None:
    """One nonzero product per output, so that each row has known bits; the order of slots is all that is left."""
    eye = Nvfp4Stack.of([quantize(torch.eye(16) * scale) for scale in (1.0, 1.5, 2.0)])
    x = 64.0 * torch.eye(16)[:4]
    call = Call(0.0, *mode, *static_scales(3))
    indices = torch.tensor([[0, 1, 2, 1, 0]]).expand(4, 5).contiguous()
    routing = Routing(indices, torch.randn(4, 5) * 1000 ** torch.rand(4, 5), "after_down")
    got = run(backend, x, (eye, eye, eye), routing, call)
    rows = []
    for s in range(5):
        one = Routing(indices[:, s : s + 1].contiguous(), routing.weights[:, s : s + 1].contiguous(), "after_down")
        rows.append(run(backend, x, (eye, eye, eye), one, call))
    ascending = (((rows[0] + rows[1]) + rows[2]) + rows[3]) + rows[4]
    assert torch.equal(got, ascending)
    assert not torch.equal(ascending, (((rows[4] + rows[3]) + rows[2]) + rows[1]) + rows[0])


@pytest.mark.parametrize(("backend", "mode"), CASES, ids=str)
def test_a_sum_is_rounded_once(backend: str, mode: tuple[str, str]) -> None:
    weights, call, routing = make_experts(), call_of(mode), draw_routing(20, 3)
    for dtype in (torch.float16,) if INTERPRETED else (torch.bfloat16, torch.float16):  # it cuts bf16 off
        x = torch.randn(20, H).to(dtype)
        in_fp32 = run(backend, x, weights, routing, call, torch.float32)
        assert torch.equal(run(backend, x, weights, routing, call), in_fp32.to(dtype))
        assert torch.equal(run(backend, x.float(), weights, routing, call), in_fp32)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("mode", [m for m in MODES if m[0] == "nvfp4"], ids=str)
def test_cpu_to_the_bit(mode: tuple[str, str], weighting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each tier, by cpu_oracle.py."""
    weights, call, x = make_experts(), call_of(mode), torch.randn(33, H)
    routing = draw_routing(33, 5, weighting)
    want = cpu_oracle.routed_experts(x, *weights, routing, call)
    assert TIERS
    for tier in TIERS:
        monkeypatch.setenv(native.ISA_VARIABLE, tier)
        assert torch.equal(run("cpu", x, weights, routing, call), want), tier


# --- who is here --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "mode"), CASES, ids=str)
def test_experts_nobody_goes_to_do_not_matter(backend: str, mode: tuple[str, str]) -> None:
    (gate, up, down), x = make_experts(), torch.randn(5, H)
    routing = Routing(torch.full((5, 2), 3), torch.rand(5, 2), "before_down")
    want = run(backend, x, (gate, up, down), routing, call_of(mode))
    for stack in (gate, up, down):
        stack.global_scale[torch.arange(E) != 3] = torch.nan
    got = run(backend, x, (gate, up, down), routing, call_of(mode))
    assert torch.equal(got, want) and torch.isfinite(got).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("backend", "mode"), CASES, ids=str)
def test_what_is_not_here_adds_nothing(backend: str, mode: tuple[str, str], dtype: torch.dtype) -> None:
    weights, x = make_experts(), torch.randn(3, H)
    x[1] = torch.nan
    indices = torch.tensor([[0, 2**31 - 1], [-1, E], [-(2**31), 3]], dtype=dtype)
    routing = Routing(indices, torch.ones(3, 2), "before_down")
    if mode != ("nvfp4", "dynamic"):
        got = run(backend, x, weights, routing, call_of(mode))
        assert torch.equal(got[1], torch.zeros(H))
        alone = Routing(torch.tensor([[0], [3]]), torch.ones(2, 1), "before_down")
        want = wanted(x[[0, 2]], weights, alone, call_of(mode))
        assert rel_l2(got[[0, 2]], want) <= bound(backend, mode, 2 * I)
    nowhere = Routing(torch.full((3, 2), E), torch.ones(3, 2), "before_down")
    assert torch.equal(run(backend, x, weights, nowhere, call_of(mode)), torch.zeros(3, H))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_scales_are_the_batch_of_x_and_an_experts_own_h(backend: str) -> None:
    """A loud token that goes to one expert changes how x enters everywhere, and h of that expert's tokens alone."""
    weights, call = make_experts(), call_of(("nvfp4", "dynamic"))
    x = torch.randn(6, H).clamp(-2, 2)
    x[0, 0] = 4.0  # the largest of the batch in both runs
    indices = torch.tensor([[0], [0], [1], [1], [1], [0]])
    quiet = run(backend, x, weights, Routing(indices, torch.ones(6, 1), "before_down"), call)
    factors = torch.tensor([[500.0], [1], [1], [1], [1], [1]])
    loud = run(backend, x, weights, Routing(indices, factors, "before_down"), call)
    assert torch.equal(loud[2:5], quiet[2:5])
    assert not torch.allclose(loud[[1, 5]], quiet[[1, 5]], rtol=0.1)
    x[0, 0] = 400.0
    louder = run(backend, x, weights, Routing(indices, torch.ones(6, 1), "before_down"), call)
    assert not torch.allclose(louder[2:5], quiet[2:5], rtol=0.1)


def test_a_static_scale_of_weighted_h_needs_weighting_before_down() -> None:
    """Checkpoints calibrate it on h times its weight; h without it is six times as large, and saturates."""
    weights, x = make_experts(), torch.randn(200, H)
    indices, factors = draw_routing(200, 6).indices.clamp(0, E - 1), torch.full((200, 6), 1 / 6)
    exact = wanted(x, weights, Routing(indices, factors, "before_down"), Call(0.0, "bf16", "dynamic"))

    def amax_of_h(e: int) -> Tensor:
        rows = x[(indices == e).any(-1)]
        return ops.hidden_states(rows, weights[0][e], weights[1][e], 0.0).abs().amax()

    scales = x.abs().amax().expand(E) / 2688, torch.stack([amax_of_h(e) for e in range(E)]) / 6 / 2688
    call = Call(0.0, "nvfp4", "static", *scales)
    before, after = (rel_l2(wanted(x, weights, Routing(indices, factors, w), call), exact) for w in WEIGHTINGS)
    assert before < AGAINST_EXACT_MATH["nvfp4"] < after


@pytest.mark.gpu
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_torch_on_a_gpu(mode: tuple[str, str], weighting: str) -> None:
    """The reference on a CPU, the backend on a GPU, from a token on; shapes that divide by nothing larger than 16."""
    weights = make_experts(E, 144, 80)
    for tokens, top_k in ((1, 1), (7, 6), (129, 8)):
        x, routing, call = torch.randn(tokens, 144), draw_routing(tokens, top_k, weighting), call_of(mode)
        got = run("torch", x, weights, routing, call, device="cuda")
        want = wanted(x, weights, routing, call)
        assert rel_l2(got, want) <= against_reference(mode[0], "torch", tokens * top_k * 80)


# --- packing, doors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ROUTED_BACKENDS)
def test_pack_and_unpack_are_inverse_byte_for_byte(backend: str) -> None:
    # Tiles of scales may be padded, and on Hopper rows to whole chunks of 64: (2 * 192 / 144 + 128 / 80) / 3 = 1.42.
    for shape, most in (((144, 80), 1.46), ((256, 128), 1.04)):
        weights = make_experts(3, *shape)
        packed = get_routed_backend(backend).pack(*weights)
        assert sum(w.nbytes for w in packed.values()) <= 3 * 0.5625 * 3 * shape[0] * shape[1] * most
        for before, after in zip(weights, get_routed_backend(backend).unpack(packed, *shape), strict=True):
            assert torch.equal(before.codes, after.codes)
            assert torch.equal(before.block_scales.view(torch.uint8), after.block_scales.view(torch.uint8))
            assert torch.equal(before.global_scale, after.global_scale)


@pytest.mark.parametrize("name", ROUTED_BACKENDS)
def test_every_backend_is_tested_or_says_why_not(name: str) -> None:
    if name not in DEVICES:
        problem = dataclasses.replace(PROBLEM, target=target_of("cuda" if torch.cuda.is_available() else "cpu"))
        reason = get_routed_backend(name).refusal(problem)
        assert reason is not None
        pytest.skip(f"{name} {reason}")


def test_stacks_are_checked() -> None:
    one, other = quantize(torch.randn(16, 32)), quantize(torch.randn(32, 16))
    stack = Nvfp4Stack.of([one, one])
    assert stack.shape == (2, 16, 32) and torch.equal(stack.dequantize()[1], one.dequantize())
    for tensors in ([], [one, other]):
        with pytest.raises(FormatError, match="must have one shape"):
            Nvfp4Stack.of(tensors)
    for bad in ((one.codes, one.block_scales, one.global_scale), (stack.codes, stack.block_scales, torch.ones(3))):
        with pytest.raises(FormatError, match=r"\(E, N, K/2\)"):
            Nvfp4Stack(*bad)
    with pytest.raises(FormatError, match="float8_e4m3fn"):
        Nvfp4Stack(stack.codes, stack.block_scales.view(torch.uint8), stack.global_scale)


def test_a_backend_without_routed_experts_says_so() -> None:
    assert choose_routed_backend("auto", PROBLEM).name == "cpu"
    reasons = r"sm100-flashinfer: has no routed experts; .*cpu: can run this; torch: can run this"
    with pytest.raises(UnsupportedError, match=reasons):
        choose_routed_backend("sm100-flashinfer", PROBLEM)
    for name in ("sm100-flashinfer", "abacus"):
        with pytest.raises(UnsupportedError, match="must be one of"):
            get_routed_backend(name)
    with pytest.raises(UnsupportedError, match="must be one of"):
        choose_routed_backend("abacus", PROBLEM)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_opcheck(activations: str) -> None:
    weights = list(get_routed_backend("torch").pack(*make_experts(3, 32, 16)).values())
    x, routing = torch.randn(3, 32), draw_routing(3, 2, experts=3)
    scales = static_scales(3)
    arguments = (x, weights, routing.indices, routing.weights, *scales, 10.0, activations, "static", "before_down")
    torch.library.opcheck(ops.routed_experts, (*arguments, "torch"))
    torch.library.opcheck(ops.routed_experts_out, (*arguments, "torch", torch.zeros(3, 32)))
