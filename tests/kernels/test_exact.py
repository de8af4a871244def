# SPDX-License-Identifier: Apache-2.0
"""The rule of Blackwell's FP4 tensor core: both forms against a scalar port, and figures worked by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nvfp4_experts.errors import LayoutError, UnsupportedError
from nvfp4_experts.formats.activations import quantize_activation
from nvfp4_experts.formats.codes import pack_codes
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor
from nvfp4_experts.kernels import native, reference
from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES, WEIGHTINGS, Call, Problem, Routing, get_backend
from nvfp4_experts.kernels.exact import rule
from nvfp4_experts.kernels.target import Target
from nvfp4_experts.layers.shared_expert import Nvfp4SharedExpert
from tests.kernels import test_routed_experts as routed
from tests.kernels.exact_oracle import bits_of, exact_sum
from tests.kernels.test_shared_expert import make_expert, run

LOADED, REASON = native.load()
FORMS = ["torch", *(tier.name for tier in (LOADED.tiers if LOADED else ()) if tier.present)]
needs_library = pytest.mark.skipif(LOADED is None, reason=f"the native library is not here: {REASON}")
ZERO, ONE, LARGEST, SMALLEST, NAN = 0x00, 0x38, 0x7E, 0x01, 0x7F  # scale bytes: 0, 1, 448, 2^-9


@dataclass(frozen=True)
class Operands:
    """Codes 0..15 (rows, K) and scale bytes (rows, K/16) of both sides."""

    a_codes: Tensor
    a_scales: Tensor
    b_codes: Tensor
    b_scales: Tensor

    def sums(self, form: str) -> Tensor:
        """Bits of the sums, (T, N) int64, by the torch form or by a tier of the native one."""
        sides = (pack_codes(self.a_codes), self.a_scales, pack_codes(self.b_codes), self.b_scales)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(native.ISA_VARIABLE, "" if form == "torch" else form)
            sums = (rule.torch_matmul if form == "torch" else rule.native_matmul)(*sides)
        return sums.view(torch.int32).long() & 0xFFFF_FFFF

    def wanted(self) -> Tensor:
        """The same by the scalar port."""
        a_rows, b_rows = (
            list(zip(codes.tolist(), scales.tolist(), strict=True))
            for codes, scales in ((self.a_codes, self.a_scales), (self.b_codes, self.b_scales))
        )
        return torch.tensor([[exact_sum(*a, *b) for b in b_rows] for a in a_rows])


def draw(seed: int, tokens: int, rows: int, columns: int) -> Operands:
    """Random codes under scales of one kind: any byte, ordinary, subnormal and zero, large, or both ends mixed."""
    g = torch.Generator().manual_seed(seed)
    kinds = [
        range(256),
        range(0x30, 0x40),
        range(0x0A),
        range(0x76, 0x7F),
        [ZERO, SMALLEST, 0x78, LARGEST, LARGEST + 128],
    ]
    kind = torch.tensor(list(kinds[seed % len(kinds)]), dtype=torch.uint8)

    def codes(n: int) -> Tensor:
        drawn = torch.randint(16, (n, columns), generator=g, dtype=torch.uint8)
        return drawn & 7 if seed % 3 == 0 else drawn  # of one sign, now and then

    def scales(n: int) -> Tensor:
        return kind[torch.randint(len(kind), (n, columns // 16), generator=g)]

    return Operands(codes(tokens), scales(tokens), codes(rows), scales(rows))


@pytest.mark.parametrize("columns", [16, 48, 64, 80, 320])
def test_drawn_sums_equal_the_scalar_port(columns: int) -> None:
    for seed in range(15):
        case = draw(seed, 3, 5, columns)
        wanted = case.wanted()
        for form in FORMS:
            assert torch.equal(case.sums(form), wanted), (form, seed)


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_long_sums_equal_the_scalar_port(seed: int) -> None:
    """K of V4-Pro: any bytes, large scales with codes of one sign (a sum of 2^34), and both ends mixed."""
    case = draw(seed, 1, 2, 7168)
    wanted = case.wanted()
    for form in FORMS:
        assert torch.equal(case.sums(form), wanted), form


@needs_library
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 17, 48), (7, 33, 272), (129, 15, 80), (130, 48, 64)], ids=str)
def test_the_forms_agree_to_the_bit(shape: tuple[int, int, int]) -> None:
    for seed in range(5):
        case = draw(seed, *shape)
        wanted = case.sums("torch")
        for form in FORMS:
            assert torch.equal(case.sums(form), wanted), (form, seed)


def test_how_the_work_is_cut_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(1, 70, 45, 80)
    wanted = case.sums("torch")
    monkeypatch.setattr(rule, "TILE_SUMS", 400)
    monkeypatch.setattr(rule, "TILE_VALUES", 80 * 33)
    monkeypatch.setattr(rule, "CHUNK", 33)
    for threads in (1, 3):
        monkeypatch.setattr(rule, "cpu_threads", lambda threads=threads: threads)
        for form in FORMS:
            assert torch.equal(case.sums(form), wanted), (form, threads)


# --- figures worked by hand ---------------------------------------------------------------------------------------

HALF, TWO, SIX, MINUS = 1, 4, 7, 8


Group = tuple[int, int, list[tuple[int, int]]]


def one_sum(*groups: Group) -> Operands:
    """Groups as (scale of a, scale of b, pairs of codes); what is left of a group is zero."""
    sides = []
    for side in range(2):
        codes = [[pair[side] for pair in pairs] + [0] * (16 - len(pairs)) for _, _, pairs in groups]
        sides.append(torch.tensor([codes], dtype=torch.uint8).flatten(1))
        sides.append(torch.tensor([[group[side] for group in groups]], dtype=torch.uint8))
    return Operands(*sides)


NOTHING = (ZERO, ZERO, [])
CANCELS = (LARGEST, LARGEST, [(SIX, SIX), (SIX, SIX + MINUS)])  # zero, of power 2^16: the grid is 2^-19
LEAST = (SMALLEST, SMALLEST, [(HALF, HALF)])  # 2^-20
LARGE = (LARGEST, LARGEST, [(SIX, SIX)])  # 36 * 448^2 = 7225344, of power 2^22: the last place is 0.5, the grid 2^-13
THREE = [(HALF, HALF)] * 3
STEP_ENDS = [NOTHING] * 3


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        pytest.param([LEAST], 2.0**-20, id="the smallest sum there is"),
        pytest.param([LEAST, CANCELS], 0.0, id="codes that cancel push out what is below 35 bits"),
        pytest.param([(SMALLEST, SMALLEST, [(HALF, HALF)] * 2), CANCELS], 2.0**-19, id="and leave the 35th"),
        pytest.param([(SMALLEST, SMALLEST, THREE), CANCELS], 2.0**-19, id="toward zero, not to nearest"),
        pytest.param([(SMALLEST, SMALLEST, [(HALF, HALF + MINUS)] * 3), CANCELS], -(2.0**-19), id="negative: not down"),
        pytest.param([(SMALLEST, SMALLEST, [(HALF, HALF + MINUS)]), CANCELS], 0.0, id="no -0"),
        pytest.param([LEAST, LEAST, CANCELS], 0.0, id="each group is cut, not their sum"),
        pytest.param([LEAST, *STEP_ENDS, CANCELS], 0.0, id="the sum so far is cut too"),
        pytest.param([LEAST, *STEP_ENDS, NOTHING], 2.0**-20, id="but by a step of nothing"),
        pytest.param([LARGE, *STEP_ENDS, (0x20, 0x20, [(HALF, HALF + MINUS)] * 2)], 7225344.0 - 0.5, id="fp32 is cut"),
        pytest.param([LARGE, *STEP_ENDS, (0x08, 0x08, [(HALF, HALF + MINUS)])], 7225344.0, id="2^-14 is cut first"),
        pytest.param([LARGE, *STEP_ENDS, (0x08, 0x08, [(HALF, HALF + MINUS)] * 2)], 7225344.0 - 0.5, id="2^-13 is not"),
        pytest.param([LARGE, *STEP_ENDS, (0x30, ONE, [(HALF, SIX)] * 2)], 7225344.0 + 3.0, id="what fits is added"),
        pytest.param([LARGE, *STEP_ENDS, (ONE, ONE, [(HALF, HALF), (HALF, 2)])], 7225344.5, id="3/4: fp32 toward zero"),
        pytest.param([(LARGEST + 128, LARGEST, [(SIX, SIX)])], 7225344.0, id="the sign of a scale is not looked at"),
    ],
)  # fmt: skip
def test_figures_worked_by_hand(groups: list[Group], wanted: float) -> None:
    case = one_sum(*groups)
    assert int(case.wanted()) == bits_of(wanted)
    for form in FORMS:
        assert int(case.sums(form)) == bits_of(wanted), form


@pytest.mark.parametrize("nan", [NAN, NAN + 128])
@pytest.mark.parametrize("form", FORMS)
def test_a_nan_scale_makes_its_sums_one_nan(form: str, nan: int) -> None:
    """Zero codes and a zero scale on the other side do not save a sum; other rows and tokens are as they were."""
    case = draw(1, 3, 4, 144)
    case.a_scales[1, 4] = nan
    case.b_scales[2, 8], case.b_codes[2], case.a_scales[0, 8] = nan, 0, ZERO
    got = case.sums(form)
    assert torch.equal(got, case.wanted())
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[1], expected[:, 2] = True, True
    assert torch.equal(got == 0x7FFF_FFFF, expected)


# --- the layer ----------------------------------------------------------------------------------------------------


def by_the_port(x: Tensor, w: Nvfp4Tensor, mode: str, scale: Tensor) -> Tensor:
    q = quantize_activation(x, mode, scale if mode == "static" else None)
    unpacked = [torch.stack((c & 15, c >> 4), -1).flatten(1) for c in (q.codes, w.codes)]
    scales = [s.view(torch.uint8) for s in (q.block_scales, w.block_scales)]
    bits = Operands(unpacked[0], scales[0], unpacked[1], scales[1]).wanted()
    return bits.to(torch.int32).view(torch.float32) * (q.global_scale * w.global_scale)


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
def test_a_layer_is_the_reference_on_exact_sums(mode: str) -> None:
    weights, x = make_expert(80, 48), torch.randn(3, 80)
    scales = torch.tensor(5.0 / 2688), torch.tensor(8.0 / 2688)
    h = reference.swiglu(by_the_port(x, weights[0], mode, scales[0]), by_the_port(x, weights[1], mode, scales[0]), 1.0)
    wanted = by_the_port(h, weights[2], mode, scales[1])
    assert torch.equal(run("exact", x, weights, Call(1.0, "nvfp4", mode, *scales)), wanted)
    half = run("exact", x.bfloat16(), weights, Call(1.0, "nvfp4", mode, *scales))
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
def test_routed_experts_are_the_reference_on_exact_sums(mode: str, weighting: str) -> None:
    (gate, up, down), x = routed.make_experts(3, 80, 48), torch.randn(4, 80)
    call = Call(1.0, "nvfp4", mode, *routed.static_scales(3))
    indices = torch.tensor([[2, 0], [1, 2], [2, 2], [3, 0]])  # 3 is not here
    routing = Routing(indices, torch.randn(4, 2), weighting)
    rows = torch.zeros(4, 2, 80)
    for e in range(3):
        token, slot = (indices == e).nonzero(as_tuple=True)
        factor = routing.weights[token, slot, None]
        before, after = (factor, 1.0) if weighting == "before_down" else (1.0, factor)
        g, u = (by_the_port(x, w[e], mode, call.input_scale[e])[token] for w in (gate, up))
        rows[token, slot] = (
            by_the_port(reference.swiglu(g, u, 1.0) * before, down[e], mode, call.hidden_scale[e]) * after
        )
    assert torch.equal(routed.run("exact", x, (gate, up, down), routing, call), rows[:, 0] + rows[:, 1])


def test_what_it_does_not_compute_is_refused() -> None:
    backend = get_backend("exact")
    assert "nvfp4" in (backend.refusal(Problem(64, 32, "bf16", Target("cpu", "cpu"))) or "")
    assert "fp64" in (backend.refusal(Problem(64, 32, "nvfp4", Target("mps", "mps"))) or "")
    with pytest.raises(UnsupportedError, match='exact: computes activations="nvfp4" alone'):
        Nvfp4SharedExpert.from_weights(
            torch.ones(16, 16), torch.ones(16, 16), torch.ones(16, 16), backend="exact", activations="fp8"
        )


def test_shapes_that_do_not_go_together_are_named() -> None:
    codes, scales = torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(2, 1).to(torch.float8_e4m3fn)
    for bad in ((codes, scales[:1]), (codes[:, :7], scales), (codes[0], scales)):
        with pytest.raises(LayoutError, match=r"a: must be codes \(rows, K/2\)"):
            rule.exact_matmul(*bad, codes, scales)
    with pytest.raises(LayoutError, match=r"must have one K.*16 and 32"):
        rule.exact_matmul(codes, scales, codes.repeat(1, 2), scales.repeat(1, 2))
    assert rule.exact_matmul(codes[:0], scales[:0], codes, scales).shape == (0, 2)


def test_without_the_library_torch_computes_the_same_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(1, 3, 20, 80)
    sides = (pack_codes(case.a_codes), case.a_scales.view(torch.float8_e4m3fn))
    sides += (pack_codes(case.b_codes), case.b_scales.view(torch.float8_e4m3fn))
    with_it, said = rule.exact_matmul(*sides), rule.form(torch.device("cpu"))
    monkeypatch.setattr(native, "load", lambda: (None, "was installed without"))
    assert rule.form(torch.device("cpu")) == "in torch, slowly: the native library was installed without"
    assert torch.equal(rule.exact_matmul(*sides).view(torch.int32), with_it.view(torch.int32))
    assert LOADED is None or said == f"native, {native.tier().name}"
