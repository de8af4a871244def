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
        ({"backend": "exact", "activations": "bf16"}, UnsupportedError),
        ({"backend": "sm100-torch", "activations": "nvfp4"}, UnsupportedError),
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


# --- calibration --------------------------------------------------------------------------------------------------


def rows_of(expert: int, indices: Tensor) -> tuple[Tensor, Tensor]:
    return (indices == expert).nonzero(as_tuple=True)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_calibration_covers_what_each_expert_saw(weighting: str, backend: str) -> None:
    """Twice, so that the scales are the maximum over calls; index E is not here, and expert 4 sees nothing."""
    experts = make(weighting=weighting, backend=backend)
    calls = [(x, i.clamp(max=3), w) for x, i, w in (inputs(9), inputs(2, 4))]
    calls[0][1][0] = E
    want = [torch.full((E,), torch.nan) for _ in range(2)]
    for x, indices, w in calls:
        got = experts.calibrate(x, indices, w)
        assert torch.equal(got, experts(x, indices, w)) and got.shape == x.shape
        for e in range(4):
            *token, slot = (indices == e).nonzero(as_tuple=True)
            rows = x[tuple(token)]
            h = reference.swiglu(rows @ experts.gate[e].dequantize().T, rows @ experts.up[e].dequantize().T, 10.0)
            entering = h * w[(*token, slot)][:, None] if weighting == "before_down" else h
            for scales, values in zip(want, (rows, entering), strict=True):
                if len(rows):
                    scales[e] = torch.fmax(scales[e], values.abs().amax() / 2688)
    assert not torch.equal(want[0][0], want[0][1])
    assert torch.equal(experts.input_scale[:4], want[0][:4]) and experts.input_scale[4].isnan()
    torch.testing.assert_close(experts.hidden_scale, want[1], rtol=2**-6, atol=0.0, equal_nan=True)  # bf16 enters
    assert experts.uncalibrated == (4,)


def test_a_percentile_is_of_each_experts_own_values() -> None:
    experts, (x, _, w) = make(), inputs(40)
    indices = torch.arange(40 * K).view(40, K) % 2
    x[0], x[1] = 100.0, 50.0
    indices[0], indices[1] = 0, 1
    w[:2] = 1.0
    experts.calibrate(x, indices, w, percentile=50)
    for e in range(2):
        token, _ = rows_of(e, indices)
        values = x[token].abs().flatten()
        want = values.kthvalue(-(-len(values) // 2)).values
        assert experts.input_scale[e] == want / 2688 < 2 / 2688
    with pytest.raises(InputError, match="percentile"):
        experts.calibrate(x, indices, w, percentile=0)


def test_static_scales_of_every_expert_are_needed_or_named() -> None:
    experts = make(activations="nvfp4", activation_scale="static")
    assert experts.uncalibrated == tuple(range(E))
    with pytest.raises(CalibrationError, match=r"must be known of some expert.*call calibrate"):
        experts.fill_uncalibrated()
    x, indices, w = inputs(20)
    experts.calibrate(x, torch.where(indices > 2, 0, indices), w)
    assert experts.uncalibrated == (3, 4) and "static scales known of all but 2 experts" in repr(experts)
    with pytest.raises(
        CalibrationError, match=r"of every expert, got none of 2 of 5 experts: 3, 4; .*fill_uncalibrated"
    ):
        experts(x, torch.zeros_like(indices), w)
    fp8 = experts.with_activations("fp8")
    assert torch.isfinite(fp8(x, indices, w)).all()
    before = experts.input_scale, experts.hidden_scale
    assert experts.fill_uncalibrated() == (3, 4)
    for old, new in zip(before, (experts.input_scale, experts.hidden_scale), strict=True):
        assert torch.equal(new[:3], old[:3]) and (new[3:] == old[:3].amax()).all()
    assert torch.isfinite(experts(x, indices, w)).all()
    assert experts.fill_uncalibrated() == ()
    many = Nvfp4RoutedExperts.from_weights(*(torch.ones(20, 16, 16) for _ in range(3)), activations="nvfp4")
    many.calibrate(torch.ones(1, 16), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    with pytest.raises(CalibrationError, match=r"none of 19 of 20 experts: 1, 2, 3, 4, 5, 6, 7, 8, \.\.\.; "):
        many.with_activations("nvfp4", "static")(
            torch.ones(1, 16), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
        )


def test_unknown_scales_travel_in_a_state_dict() -> None:
    source, (x, indices, w) = make(), inputs(20)
    source.calibrate(x, indices.clamp(max=3), w)
    for other in (make(), make_in(("nvfp4", "static"))):
        other.load_state_dict(source.state_dict())
        assert other.uncalibrated == source.uncalibrated == (4,)
        torch.testing.assert_close(other.hidden_scale, source.hidden_scale, rtol=0, atol=0, equal_nan=True)
    other.load_state_dict(make_in(("nvfp4", "static")).state_dict())
    assert other.uncalibrated == ()
    assert make(input_scale=source.input_scale, hidden_scale=1.0).uncalibrated == (4,)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_calibration_that_fails_leaves_the_scales(value: float) -> None:
    experts, (x, indices, w) = make(), inputs(9)
    experts.calibrate(x, indices, w)
    before = [s.clone() for s in (experts.input_scale, experts.hidden_scale)]
    louder = 2 * x
    louder[8, 3] = value
    with pytest.raises(CalibrationError, match=rf"hidden states of expert {indices[8].min()}: must be finite"):
        experts.calibrate(louder, indices, w)
    with pytest.raises(CalibrationError, match="at least one token"):
        experts.calibrate(x[:0], indices[:0], w[:0])
    assert all(torch.equal(a, b) for a, b in zip(before, (experts.input_scale, experts.hidden_scale), strict=True))


def test_zeros_say_nothing_about_a_scale() -> None:
    """A padded token, and a weight of 0: not an error, and not a scale."""
    experts, (x, _, _) = make(), inputs(3)
    x[1] = 0.0
    experts.calibrate(x, torch.tensor([[0], [1], [2]]), torch.tensor([[1.0], [1.0], [0.0]]))
    assert experts.uncalibrated == (1, 2, 3, 4)
    assert experts.input_scale.isnan().tolist() == [False, True, False, True, True]
    assert torch.equal(experts.calibrate(x, torch.full((3, 1), E), torch.ones(3, 1)), torch.zeros(3, H))
    assert experts.uncalibrated == (1, 2, 3, 4)


def test_calibrated_scales_are_used_and_do_not_saturate() -> None:
    """On the text of the calibration, static scales are as good as dynamic ones."""
    experts, (x, indices, w) = make(activations="nvfp4", activation_scale="static"), inputs(64)
    exact = experts.calibrate(x, indices, w)

    def error(layer: Nvfp4RoutedExperts) -> float:
        return float((layer(x, indices, w) - exact).norm() / exact.norm())

    assert error(experts) < 1.1 * error(experts.with_activations("nvfp4", "dynamic"))
    saturating = make(
        activations="nvfp4",
        activation_scale="static",
        input_scale=experts.input_scale / 32,
        hidden_scale=experts.hidden_scale / 32,
    )
    assert error(saturating) > 2 * error(experts)
