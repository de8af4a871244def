# SPDX-License-Identifier: Apache-2.0
"""The module's promises: options, errors, memory, devices, state, threads, compile."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from nvfp4_experts.errors import CalibrationError, FormatError, InputError, LayoutError, Nvfp4Error, UnsupportedError
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor, quantize
from nvfp4_experts.kernels import reference
from nvfp4_experts.layers.shared_expert import Nvfp4SharedExpert
from tests.tolerances import NVFP4_OF_GAUSSIAN

H, I = 96, 64  # noqa: E741
MODES = [
    ("bf16", "dynamic"),
    ("fp8", "dynamic"),
    ("nvfp4", "static"),
    ("nvfp4", "dynamic"),
    ("nvfp4", "per_token"),
]


# size, stride and offset of x and of out in one storage
View = tuple[tuple[int, int], tuple[int, int], int]
PLAIN: View = ((2, H), (H, 1), 0)
OVERLAPPING: list[tuple[View, View]] = [
    (PLAIN, PLAIN),
    (PLAIN, ((2, H), (H, 1), 2 * H - 1)),
    (((2, H), (H, 1), 2 * H - 1), PLAIN),
    (((2, H), (3 * H, 1), 0), ((2, H), (H, 1), 3 * H)),
]
DISJOINT: list[tuple[View, View]] = [
    (PLAIN, ((2, H), (H, 1), 2 * H)),
    (((2, H), (H, 1), 2 * H), PLAIN),
    (((2, H), (2 * H, 1), 0), ((2, H), (H, 1), 3 * H)),
]


def weights(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g) * 0.1 for s in ((I, H), (I, H), (H, I)))  # type: ignore[return-value]


def make(**options: object) -> Nvfp4SharedExpert:
    return Nvfp4SharedExpert.from_weights(*weights(), **{"activations": "bf16", **options})


def make_in(mode: tuple[str, str], **options: object) -> Nvfp4SharedExpert:
    scales = {"input_scale": 4 / 2688, "hidden_scale": 4 / 2688}
    return make(activations=mode[0], activation_scale=mode[1], **scales, **options)


class TestForward:
    @pytest.mark.parametrize("mode", MODES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_result_is_the_references(self, mode: tuple[str, str], dtype: torch.dtype) -> None:
        expert = make_in(mode)
        x = torch.randn(9, H).to(dtype)
        want = reference.shared_expert(
            x,
            expert.gate,
            expert.up,
            expert.down,
            swiglu_limit=10.0,
            activations=mode[0],
            activation_scale=mode[1],
            input_scale=torch.tensor(4 / 2688),
            hidden_scale=torch.tensor(4 / 2688),
        )
        got = expert(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=2**-9)

    @pytest.mark.parametrize("shape", [(H,), (1, H), (2, 3, H), (2, 1, 5, H)])
    def test_leading_dimensions(self, shape: tuple[int, ...]) -> None:
        expert, x = make(), torch.randn(shape)
        assert expert(x).shape == shape
        torch.testing.assert_close(expert(x).view(-1, H), expert(x.view(-1, H)))

    @pytest.mark.parametrize("shape", [(0, H), (2, 0, H)])
    def test_zero_tokens(self, shape: tuple[int, ...]) -> None:
        for mode in MODES:
            assert make_in(mode)(torch.randn(shape)).shape == shape

    def test_non_contiguous_input(self) -> None:
        expert, x = make(), torch.randn(H, 6).T
        assert not x.is_contiguous()
        torch.testing.assert_close(expert(x), expert(x.contiguous()), rtol=0, atol=0)
        wide = torch.randn(6, 2 * H)
        torch.testing.assert_close(expert(wide[:, ::2]), expert(wide[:, ::2].contiguous()), rtol=0, atol=0)

    def test_results_are_the_callers_own(self) -> None:
        expert = make()
        first = expert(torch.randn(4, H))
        kept = first.clone()
        expert(torch.randn(4, H))
        assert torch.equal(first, kept)

    def test_out_is_written_and_returned(self) -> None:
        expert, x = make(), torch.randn(2, 3, H)
        out = torch.full_like(x, torch.nan)
        assert expert(x, out=out) is out
        assert torch.equal(out, expert(x))

    @pytest.mark.parametrize("backend", ["cpu", "torch", "exact"])
    def test_out_in_fp32_is_the_sum_before_it_is_rounded(self, backend: str) -> None:
        expert = make(activations="nvfp4", activation_scale="per_token", backend=backend)
        for dtype in (torch.bfloat16, torch.float16):
            x, out = torch.randn(6, H).to(dtype), torch.empty(6, H)
            assert expert(x, out=out) is out
            assert torch.equal(out, expert(x.float())) and torch.equal(out.to(dtype), expert(x))

    @pytest.mark.parametrize(("x", "out"), OVERLAPPING, ids=str)
    def test_out_that_overlaps_x_is_refused(self, x: View, out: View) -> None:
        expert, memory = make(), torch.randn(8 * H)
        before = memory.clone()
        with pytest.raises(InputError, match="out: must not overlap x"):
            expert(memory.as_strided(*x), out=memory.as_strided(*out))
        assert torch.equal(memory, before)

    @pytest.mark.parametrize(("x", "out"), DISJOINT, ids=str)
    def test_out_may_share_the_storage_of_x(self, x: View, out: View) -> None:
        expert, memory = make(), torch.randn(8 * H)
        want = expert(memory.as_strided(*x).clone())
        assert torch.equal(expert(memory.as_strided(*x), out=memory.as_strided(*out)), want)

    def test_input_is_not_changed(self) -> None:
        x = torch.randn(5, H)
        before = x.clone()
        for mode in MODES:
            make_in(mode)(x)
        assert torch.equal(x, before)

    def test_limit_none_and_zero_are_off(self) -> None:
        x = 100 * torch.randn(4, H)
        off = make(swiglu_limit=None)(x)
        assert torch.equal(off, make(swiglu_limit=0)(x))
        assert not torch.allclose(off, make(swiglu_limit=10.0)(x), rtol=0.1)

    def test_shared_global_scale_of_floating_gate_and_up(self) -> None:
        gate, up, down = weights()
        expert = Nvfp4SharedExpert.from_weights(gate, 3 * up, down)
        joint = torch.maximum(gate.abs().amax(), 3 * up.abs().amax()) / 2688
        assert expert.gate.global_scale == expert.up.global_scale == joint

    def test_different_global_scales_are_kept_exactly(self) -> None:
        gate, up, down = (quantize(w * f) for w, f in zip(weights(), (1, 7, 1), strict=True))
        expert = Nvfp4SharedExpert.from_weights(gate, up, down)
        assert torch.equal(expert.gate.global_scale, gate.global_scale)
        assert torch.equal(expert.up.global_scale, up.global_scale)


class TestNan:
    @pytest.mark.parametrize("mode", [m for m in MODES if m != ("nvfp4", "dynamic")], ids=str)
    @pytest.mark.parametrize("where", [0, H - 1])
    def test_nan_stays_in_its_row(self, mode: tuple[str, str], where: int) -> None:
        x = torch.randn(5, H)
        clean = make_in(mode)(x)
        x[2, where] = torch.nan
        got = make_in(mode)(x)
        assert got[2].isnan().all()
        others = [0, 1, 3, 4]
        torch.testing.assert_close(got[others], clean[others], rtol=0, atol=0)

    def test_nan_spreads_with_dynamic_scales(self) -> None:
        x = torch.randn(5, H)
        x[2, 3] = torch.nan
        assert make_in(("nvfp4", "dynamic"))(x).isnan().all()

    def test_per_token_rows_do_not_depend_on_each_other(self) -> None:
        """One request's outlier leaves the rest of the batch alone, which a dynamic scale cannot promise."""
        x = torch.randn(4, H)
        loud = x.clone()
        loud[0] *= 1000
        per_token, dynamic = make_in(("nvfp4", "per_token")), make_in(("nvfp4", "dynamic"))
        torch.testing.assert_close(per_token(loud)[1:], per_token(x)[1:], rtol=0, atol=0)
        assert not torch.allclose(dynamic(loud)[1:], dynamic(x)[1:], rtol=0.1)


class TestErrors:
    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.zeros(3, H + 1), "must be"),
            (torch.zeros(()), "must be"),
            (torch.zeros(3, H, dtype=torch.int32), "bf16, fp16 or fp32"),
            (torch.zeros(3, H, dtype=torch.float64), "bf16, fp16 or fp32"),
            (torch.zeros(3, H, device="meta"), "must be on cpu"),
            (torch.zeros(11, H), "max_tokens=10"),
        ],
    )
    def test_bad_input_raises_before_any_work(self, x: Tensor, message: str) -> None:
        with pytest.raises(InputError, match=message):
            make(max_tokens=10)(x)

    def test_max_tokens_counts_all_leading_dimensions(self) -> None:
        expert = make(max_tokens=10)
        assert expert(torch.zeros(2, 5, H)).shape == (2, 5, H)
        with pytest.raises(InputError, match="max_tokens"):
            expert(torch.zeros(3, 4, H))

    @pytest.mark.parametrize(
        "out",
        [
            torch.zeros(2, H),
            torch.zeros(3, H, dtype=torch.bfloat16),
            torch.zeros(H, 3).T,
            torch.zeros(3, H, device="meta"),
        ],
    )
    def test_bad_out(self, out: Tensor) -> None:
        with pytest.raises(InputError, match="out"):
            make()(torch.zeros(3, H), out=out)

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"activations": "int8"}, InputError),
            ({"activation_scale": "magic"}, InputError),
            ({"swiglu_limit": -1.0}, InputError),
            ({"swiglu_limit": float("nan")}, InputError),
            ({"max_tokens": 0}, InputError),
            ({"input_scale": 0.0}, InputError),
            ({"hidden_scale": float("inf")}, InputError),
            ({"backend": "abacus"}, UnsupportedError),
        ],
    )
    def test_bad_options(self, options: dict[str, object], error: type[Nvfp4Error]) -> None:
        with pytest.raises(error):
            make(**options)

    def test_weights_that_do_not_fit(self) -> None:
        gate, up, _ = weights()
        with pytest.raises(LayoutError, match="gate \\(I, H\\)"):
            Nvfp4SharedExpert.from_weights(gate, up, up)
        odd = torch.randn(24, 16)
        with pytest.raises(Nvfp4Error, match="multiple"):
            Nvfp4SharedExpert.from_weights(odd, odd, torch.randn(16, 24))

    def test_static_without_scales_names_the_three_ways_out(self) -> None:
        expert = make(activations="nvfp4", activation_scale="static")
        with pytest.raises(CalibrationError, match=r"calibrate\(\).*checkpoint with input scales.*dynamic.*per_token"):
            expert(torch.randn(2, H))


class TestCalibration:
    def test_running_maximum_over_calls(self) -> None:
        expert = make()
        x = torch.randn(7, H)
        assert torch.equal(expert.calibrate(x), expert(x))
        assert expert.input_scale == float(x.abs().max() / 2688)
        expert.calibrate(0.1 * x)
        assert expert.input_scale == float(x.abs().max() / 2688)
        expert.calibrate(2 * x)
        assert expert.input_scale == float(2 * x.abs().max() / 2688)

    def test_hidden_scale_covers_what_enters_down(self) -> None:
        expert, x = make(), torch.randn(7, H)
        expert.calibrate(x)
        gate, up = (x.bfloat16().float() @ w.dequantize().T for w in (expert.gate, expert.up))
        h = torch.nn.functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10)
        assert expert.hidden_scale == pytest.approx(float(h.abs().max() / 2688), rel=1e-4)

    def test_static_layer_calibrates_and_then_runs(self) -> None:
        expert, x = make(activations="nvfp4", activation_scale="static"), torch.randn(7, H)
        expert.calibrate(x)
        dynamic = expert.with_activations("nvfp4", "dynamic")(x)
        # Same scale for x, nearly the same for h: only block scales that round differently tell them apart.
        assert (expert(x) - dynamic).norm() < NVFP4_OF_GAUSSIAN * dynamic.norm()
        assert expert.activation_scale == "static"

    def test_percentile_ignores_outliers(self) -> None:
        x = torch.ones(100, H)
        x[0, 0] = 1000.0
        expert = make()
        expert.calibrate(x, percentile=99.0)
        assert expert.input_scale == pytest.approx(1 / 2688)

    @pytest.mark.parametrize(
        "bad",
        [torch.zeros(0, H), torch.zeros(3, H), torch.full((3, H), torch.nan), torch.full((1, H), torch.inf)],
    )
    def test_refuses_what_teaches_nothing(self, bad: Tensor) -> None:
        expert = make()
        with pytest.raises(CalibrationError):
            expert.calibrate(bad)
        assert expert.input_scale is None and expert.hidden_scale is None
        expert.calibrate(torch.ones(1, H))
        before = expert.input_scale, expert.hidden_scale
        with pytest.raises(CalibrationError):
            expert.calibrate(bad)
        assert (expert.input_scale, expert.hidden_scale) == before

    def test_percentile_out_of_range(self) -> None:
        for percentile in (0, -1, 101):
            with pytest.raises(InputError, match="percentile"):
                make().calibrate(torch.ones(1, H), percentile)


class TestState:
    @pytest.mark.parametrize("mode", MODES, ids=str)
    def test_state_dict_round_trip(self, mode: tuple[str, str]) -> None:
        source, x = make_in(mode), torch.randn(4, H)
        other = Nvfp4SharedExpert.from_weights(*weights(1), activations=mode[0], activation_scale=mode[1])
        other.load_state_dict(source.state_dict())
        assert torch.equal(other(x), source(x))

    def test_state_dict_is_canonical(self) -> None:
        state = make_in(("nvfp4", "static")).state_dict()
        names = [f"{p}.{part}" for p in ("gate", "up", "down") for part in ("codes", "block_scales", "global_scale")]
        assert list(state) == [*names, "input_scale", "hidden_scale"]
        assert state["gate.block_scales"].dtype == torch.float8_e4m3fn
        assert state["up.codes"].shape == (I, H // 2)

    def test_state_dict_errors(self) -> None:
        state = make().state_dict()
        missing = {k: v for k, v in state.items() if k != "up.codes"}
        with pytest.raises(RuntimeError, match=r"up\.codes"):
            make().load_state_dict(missing)
        with pytest.raises(RuntimeError, match="surprise"):
            make().load_state_dict({**state, "surprise": torch.zeros(1)})
        with pytest.raises(RuntimeError, match="codes \\(16, 32\\)"):
            make().load_state_dict({**state, "down.codes": state["down.codes"][:16]})

    def test_nested_state_dict(self) -> None:
        model = torch.nn.ModuleDict({"mlp": make()})
        again = torch.nn.ModuleDict({"mlp": Nvfp4SharedExpert.from_weights(*weights(1), activations="bf16")})
        again.load_state_dict(model.state_dict())
        x = torch.randn(2, H)
        assert torch.equal(model["mlp"](x), again["mlp"](x))

    def test_copies(self) -> None:
        expert, x = make_in(("nvfp4", "static")), torch.randn(4, H)
        want = expert(x)
        for other in (copy.deepcopy(expert), pickle.loads(pickle.dumps(expert)), copy.copy(expert)):
            assert torch.equal(other(x), want)
        clone = copy.deepcopy(expert)
        clone.calibrate(100 * x)
        assert torch.equal(expert(x), want)

    def test_dtype_conversions_leave_the_bytes_alone(self) -> None:
        expert, x = make_in(("nvfp4", "static")), torch.randn(4, H)
        want = expert(x)
        for convert in (
            lambda m: m.half(),
            lambda m: m.to(torch.bfloat16),
            lambda m: m.double(),
            lambda m: m.float(),
        ):
            assert torch.equal(convert(expert)(x), want)

    def test_moving_devices(self) -> None:
        expert = make()
        moved = expert.to("meta")
        assert moved is expert and expert.gate.codes.device.type == "meta"

    def test_with_activations_shares_memory_and_keeps_the_original(self) -> None:
        expert = make_in(("nvfp4", "static"))
        other = expert.with_activations("fp8")
        assert (other.activations, expert.activations) == ("fp8", "nvfp4")
        assert [b.data_ptr() for b in other.buffers()] == [b.data_ptr() for b in expert.buffers()]

    def test_repr_names_the_mode_in_force(self) -> None:
        text = repr(make_in(("nvfp4", "per_token")))
        assert "activations='nvfp4'" in text and "activation_scale='per_token'" in text and "backend='cpu'" in text
        assert "tensor(" not in text

    def test_auto_resolves_once_and_shows(self) -> None:
        assert Nvfp4SharedExpert.from_weights(*weights()).activations == "bf16"

    def test_mixed_weights(self) -> None:
        gate, up, down = weights()
        expert = Nvfp4SharedExpert.from_weights(quantize(gate), up, down)
        assert isinstance(expert.gate, Nvfp4Tensor) and expert(torch.randn(2, H)).shape == (2, H)

    def test_resident_bytes(self) -> None:
        packed = 3 * H * I * 9 // 16 + 3 * 4  # weights and global scales
        assert make(backend="torch").resident_bytes == packed
        assert make(backend="cpu").resident_bytes == packed + 2 * (2 * I + H)  # and the largest magnitude of each row


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_threads_agree_with_one(mode: tuple[str, str]) -> None:
    expert = make_in(mode)
    inputs = [torch.randn(t, H) for t in (1, 5, 9, 17)] * 4
    want = [expert(x) for x in inputs]
    # A new thread multiplies with OpenMP's default number of threads, which may cut the sum over k another way.
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        for got, expected in zip(pool.map(expert, inputs), want, strict=True):
            assert torch.equal(got, expected)


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_compiles_whole(mode: tuple[str, str]) -> None:
    expert = make_in(mode)
    compiled = torch.compile(expert, fullgraph=True, backend="aot_eager")
    for tokens in (3, 8):
        x = torch.randn(tokens, H)
        assert torch.equal(compiled(x), expert(x))
        out = torch.empty_like(x)
        assert torch.equal(compiled(x, out=out), expert(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_inductor() -> None:
    expert, x = make(), torch.randn(4, H)

    def block(x: Tensor) -> Tensor:
        return x + expert(x * 2)

    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))


class TestBadArguments:
    @pytest.mark.parametrize("count", [0, -1, 8.5, "8", None])
    def test_max_tokens(self, count: object) -> None:
        with pytest.raises(InputError, match="max_tokens"):
            make(max_tokens=count)

    @pytest.mark.parametrize("limit", [-1, float("nan"), float("inf"), "ten", [], 10**400], ids=lambda x: str(x)[:5])
    def test_swiglu_limit(self, limit: object) -> None:
        with pytest.raises(InputError, match="swiglu_limit"):
            make(swiglu_limit=limit)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w[:0], "must be gate"),
            (lambda w: w[..., :0], "K must be"),
            (lambda w: w > 0, "must be bfloat16"),
            (lambda w: w.to("meta"), "must hold values"),
            (lambda w: w * float("nan"), "must be finite"),
        ],
    )
    @pytest.mark.parametrize("which", [(0, 1, 2), (1,)], ids=["all", "up"])
    def test_weights(self, change: object, message: str, which: tuple[int, ...]) -> None:
        made = [change(w) if i in which else w for i, w in enumerate(weights())]
        with pytest.raises((FormatError, LayoutError), match=message):
            Nvfp4SharedExpert.from_weights(*made)


def test_hooks_are_not_shared_with_another_activation_format() -> None:
    expert, seen = make(), []
    expert.with_activations("fp8").register_forward_hook(lambda *_: seen.append(1))
    expert(torch.randn(2, H))
    assert seen == []


@pytest.mark.filterwarnings("ignore:nvfp4_experts..shared_expert. an autograd kernel was not registered")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_backward_pass_is_refused_and_not_left_out(compiled: bool) -> None:
    expert = make()
    x = torch.randn(3, expert.hidden_size, requires_grad=True)
    call = torch.compile(expert, backend="aot_eager") if compiled else expert
    y = call(x)
    assert y.requires_grad and torch.equal(y.detach(), expert(x.detach()))
    with pytest.raises(UnsupportedError, match="is for inference"):
        y.sum().backward()
    with torch.no_grad():
        assert not call(x).requires_grad
