# SPDX-License-Identifier: Apache-2.0
"""The promises of the routed experts' module: options, errors, memory, state, compile."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nvfp4_experts import Nvfp4RoutedExperts
from nvfp4_experts.errors import CalibrationError, InputError, LayoutError, Nvfp4Error, UnsupportedError
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor, quantize
from nvfp4_experts.formats.stack import Nvfp4Stack
from nvfp4_experts.kernels import reference
from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES, WEIGHTINGS, get_routed_backend

E, H, I, K = 5, 64, 48, 3  # noqa: E741
MODES = [("bf16", "dynamic"), ("fp8", "dynamic"), *(("nvfp4", scale) for scale in ACTIVATION_SCALES)]
SCALES = {"input_scale": torch.linspace(2, 6, E) / 2688, "hidden_scale": torch.linspace(3, 1, E) / 2688}


def weights(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g) * 0.1 for s in ((E, I, H), (E, I, H), (E, H, I)))  # type: ignore[return-value]


def make(**options: object) -> Nvfp4RoutedExperts:
    return Nvfp4RoutedExperts.from_weights(*weights(), **{"activations": "bf16", **options})


def make_in(mode: tuple[str, str], **options: object) -> Nvfp4RoutedExperts:
    return make(activations=mode[0], activation_scale=mode[1], **SCALES, **options)


def inputs(*lead: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(*lead, H), torch.rand(*lead, E).argsort(-1)[..., :K], torch.rand(*lead, K)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_result_is_the_references(mode: tuple[str, str], weighting: str) -> None:
    experts = make_in(mode, weighting=weighting)
    x, indices, w = inputs(9)
    for dtype in (torch.float32, torch.bfloat16):
        want = reference.routed_experts(
            x.to(dtype),
            experts.gate,
            experts.up,
            experts.down,
            indices,
            w.to(dtype),
            swiglu_limit=10.0,
            activations=mode[0],
            activation_scale=mode[1],
            weighting=weighting,
            **SCALES,
        )
        got = experts(x.to(dtype), indices, w.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions_and_strides(lead: tuple[int, ...]) -> None:
    experts = make()
    x, indices, w = inputs(*lead)
    got = experts(x, indices.int(), w)
    assert got.shape == x.shape
    assert torch.equal(got.view(-1, H), experts(x.view(-1, H), indices.view(-1, K), w.view(-1, K)))
    wide = torch.stack((x, x), -1)[..., 0]
    assert torch.equal(experts(wide, torch.stack((indices, indices), -1)[..., 0], w), got)


def test_out_takes_the_sum_rounded_or_not() -> None:
    experts = make()
    x, indices, w = inputs(7)
    half = x.bfloat16()
    for out in (torch.empty_like(half), torch.empty(7, H)):
        assert experts(half, indices, w, out=out) is out
    assert torch.equal(out.bfloat16(), experts(half, indices, w))
    for bad in (torch.empty(7, H, dtype=torch.float16), torch.empty(6, H), torch.empty(H, 7).T, half):
        with pytest.raises(InputError, match="out"):
            experts(half, indices, w, out=bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, i, w: (x[:, 1:], i, w), "x: must be"),
        (lambda x, i, w: (x.double(), i, w), "x: must be bf16"),
        (lambda x, i, w: (x.repeat(2, 1), i.repeat(2, 1), w.repeat(2, 1)), "max_tokens=9"),
        (lambda x, i, w: (x, i[:-1], w), "topk_indices: must be"),
        (lambda x, i, w: (x, i, w[:, None]), "topk_weights: must be"),
        (lambda x, i, w: (x, i[:, :2], w), "must have one shape"),
        (lambda x, i, w: (x, i[:, :0], w[:, :0]), "1 <= k <= top_k=4"),
        (lambda x, i, w: (x, i.repeat(1, 2), w.repeat(1, 2)), "1 <= k <= top_k=4"),
        (lambda x, i, w: (x, i.float(), w), "topk_indices: must be one of"),
        (lambda x, i, w: (x, i.short(), w), "topk_indices: must be one of"),
        (lambda x, i, w: (x, i, w.double()), "topk_weights: must be one of"),
        (lambda x, i, w: (x, i.to("meta"), w), "topk_indices: must be on cpu"),
    ],
)
def test_bad_calls_raise_before_any_work(change: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(max_tokens=9, top_k=4)(*change(*inputs(9)))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"weighting": "twice"}, InputError),
        ({"top_k": 0}, InputError),
        ({"activations": "int8"}, InputError),
        ({"activation_scale": "magic"}, InputError),
        ({"swiglu_limit": -1.0}, InputError),
        ({"max_tokens": 0}, InputError),
        ({"input_scale": torch.ones(E + 1)}, InputError),
        ({"hidden_scale": torch.zeros(E)}, InputError),
        ({"backend": "abacus"}, UnsupportedError),
        ({"backend": "exact", "activations": "nvfp4"}, UnsupportedError),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Nvfp4Error]) -> None:
    with pytest.raises(error):
        make(**options)


def test_bad_weights() -> None:
    gate, up, down = weights()
    for bad in ((gate, up, up), (gate[1:], up, down), (gate, up[:, 16:], down), (gate[0], up[0], down[0])):
        with pytest.raises(Nvfp4Error, match=r"\(E, I, H\)|experts first"):
            Nvfp4RoutedExperts.from_weights(*bad)


def test_from_lists_and_stacks_and_floating_weights() -> None:
    gate, up, down = weights()
    joint = Nvfp4RoutedExperts.from_weights(gate, 3 * up, down)
    amax = torch.maximum(gate.abs().amax((1, 2)), 3 * up.abs().amax((1, 2)))
    assert torch.equal(joint.gate.global_scale, amax / 2688) and torch.equal(joint.up.global_scale, amax / 2688)
    lists = [[quantize(w) for w in projection] for projection in (gate, up, down)]
    a = Nvfp4RoutedExperts.from_weights(*lists)
    b = Nvfp4RoutedExperts.from_weights(Nvfp4Stack.of(lists[0]), lists[1], down)
    assert torch.equal(a.down.global_scale, down.abs().amax((1, 2)) / 2688)
    assert all(torch.equal(v, w) for v, w in zip(a.buffers(), b.buffers(), strict=True))


def test_static_scales_are_per_expert_or_one_for_all() -> None:
    experts = make(activations="nvfp4", activation_scale="static")
    with pytest.raises(CalibrationError, match=r"one for each expert.*dynamic.*per_token"):
        experts(*inputs(2))
    one = make(activations="nvfp4", activation_scale="static", input_scale=0.002, hidden_scale=torch.tensor(0.001))
    same = {"input_scale": torch.full((E,), 0.002), "hidden_scale": torch.full((E,), 0.001)}
    assert torch.equal(one.input_scale, same["input_scale"]) and torch.equal(one.hidden_scale, same["hidden_scale"])
    x = inputs(4)
    assert torch.equal(one(*x), make(activations="nvfp4", activation_scale="static", **same)(*x))


@pytest.mark.parametrize("backends", [("cpu", "torch"), ("torch", "cpu")], ids=str)
def test_state_dict_moves_between_backends(backends: tuple[str, str]) -> None:
    source = make_in(("nvfp4", "static"), backend=backends[0])
    state = source.state_dict()
    names = [f"{p}.{part}" for p in ("gate", "up", "down") for part in ("codes", "block_scales", "global_scale")]
    assert list(state) == [*names, "input_scale", "hidden_scale"]
    assert state["up.codes"].shape == (E, I, H // 2) and state["down.global_scale"].shape == (E,)
    other = Nvfp4RoutedExperts.from_weights(
        *weights(1), activations="nvfp4", activation_scale="static", backend=backends[1]
    )
    other.load_state_dict(state)
    x = inputs(6)
    torch.testing.assert_close(other(*x), source(*x), rtol=1e-3, atol=1e-4)
    again = make(activations="nvfp4", activation_scale="static", backend=backends[0])
    again.load_state_dict(other.state_dict())
    assert torch.equal(again(*x), source(*x))


def test_state_dict_errors_leave_the_layer_as_it_was() -> None:
    experts, x = make(), inputs(3)
    want, state = experts(*x), make_in(("nvfp4", "static")).state_dict()
    for change, message in [
        ({"gate.global_scale": torch.ones(E + 1)}, r"\(E, N, K/2\)"),
        ({"input_scale": torch.ones(E - 1)}, "one for each of 5 experts"),
        (
            {name: t[:2] for name, t in state.items() if "scale" not in name or "." in name},
            r"gate: must be \(5, 48, 64\)",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            experts.load_state_dict({**state, **change})
    assert torch.equal(experts(*x), want)


def test_copies_conversions_and_other_activations_share_or_keep_the_bytes() -> None:
    experts, x = make_in(("nvfp4", "static")), inputs(4)
    want = experts(*x)
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts)), copy.deepcopy(experts).half()):
        assert torch.equal(other(*x), want)
    fp8 = experts.with_activations("fp8")
    assert [b.data_ptr() for b in fp8.buffers()] == [b.data_ptr() for b in experts.buffers()]
    assert (fp8.activations, experts.activations) == ("fp8", "nvfp4")
    assert experts.to("meta").gate.codes.device.type == "meta"


def test_repr_names_what_is_in_force() -> None:
    text = repr(make_in(("nvfp4", "per_token")))
    for part in (
        "num_experts=5",
        "activation_scale='per_token'",
        "weighting='before_down'",
        "backend='cpu'",
        "top_k=8",
    ):
        assert part in text


@pytest.mark.parametrize("mode", [m for m in MODES if m != ("nvfp4", "dynamic")], ids=str)
def test_nan_stays_in_its_row(mode: tuple[str, str]) -> None:
    experts, (x, indices, w) = make_in(mode), inputs(5)
    clean = experts(x, indices, w)
    x[2, 7] = torch.nan
    got = experts(x, indices, w)
    others = [0, 1, 3, 4]
    assert got[2].isnan().all() and torch.equal(got[others], clean[others])


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    experts = make_in(("nvfp4", "static"))
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for tokens in (3, 8):
        x = inputs(tokens)
        assert torch.equal(compiled(*x), experts(*x))
        assert torch.equal(compiled(*x, out=torch.empty_like(x[0])), experts(*x))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_backward_pass_is_refused(backend: str) -> None:
    x, indices, w = inputs(3)
    for wanting in ((x.clone().requires_grad_(), indices, w), (x, indices, w.clone().requires_grad_())):
        with pytest.raises(UnsupportedError, match="routed experts: is for inference"):
            make(backend=backend)(*wanting).sum().backward()


class Source:
    """Experts, one by one, and how many of them were taken when each was packed."""

    def __init__(self, number: int = E) -> None:
        self.taken, self.number = 0, number

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for expert in zip(*weights(), strict=True):
            if self.taken == self.number:
                return
            self.taken += 1
            yield expert


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_from_experts_is_from_weights_and_takes_one_at_a_time(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, seen = Source(), []
    one = get_routed_backend(backend).one
    pack = one.pack
    monkeypatch.setattr(one, "pack", lambda *w: (seen.append(source.taken), pack(*w))[1])
    made = Nvfp4RoutedExperts.from_experts(source, E, backend=backend, activations="bf16")
    assert seen == list(range(1, E + 1))
    want = make(backend=backend)
    assert all(torch.equal(v, w) for v, w in zip(made.buffers(), want.buffers(), strict=True))
    assert repr(made) == repr(want) and made.state_dict().keys() == want.state_dict().keys()


def test_an_expert_is_forgotten_before_the_next_is_made() -> None:
    alive: list[weakref.ref[Nvfp4Tensor]] = []

    def experts() -> Iterator[tuple[Nvfp4Tensor, ...]]:
        for expert in zip(*weights(), strict=True):
            assert not any(ref() for ref in alive)
            made = tuple(quantize(w) for w in expert)
            alive[:] = [weakref.ref(w) for w in made]
            yield made
            del made

    Nvfp4RoutedExperts.from_experts(experts(), E)


@pytest.mark.parametrize(("count", "got"), [(E + 1, f"got {E}"), (E - 1, "got more"), (0, "num_experts"), (1.5, "num")])
def test_a_wrong_number_of_experts(count: int, got: str) -> None:
    with pytest.raises(InputError, match=got):
        Nvfp4RoutedExperts.from_experts(Source(), count)


def test_no_experts_and_experts_of_two_shapes() -> None:
    with pytest.raises(InputError, match="num_experts=1, got 0"):
        Nvfp4RoutedExperts.from_experts([], 1)
    gate, up, down = (w[0] for w in weights())
    with pytest.raises(LayoutError, match="expert 1: must have the shapes of the first"):
        Nvfp4RoutedExperts.from_experts([(gate, up, down), (gate[:16], up[:16], down[:, :16])], 2)


def test_what_is_wrong_with_the_options_shows_before_the_second_expert() -> None:
    for options in ({"weighting": "twice"}, {"input_scale": torch.ones(E + 1)}, {"backend": "abacus"}):
        source = Source()
        with pytest.raises(Nvfp4Error):
            Nvfp4RoutedExperts.from_experts(source, E, **options)
        assert source.taken == 1
