# SPDX-License-Identifier: Apache-2.0
"""The shared expert that is not quantised: its numbers, what it refuses, what it keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from nvfp4_experts import KeptSharedExpert, Nvfp4SharedExpert
from nvfp4_experts.errors import InputError, LayoutError, UnsupportedError
from nvfp4_experts.formats.fp8_block import Fp8BlockTensor
from nvfp4_experts.kernels import ops
from nvfp4_experts.kernels.reference import swiglu
from tests.tolerances import AGAINST_REFERENCE

H, I, LIMIT = 160, 96, 0.5  # noqa: E741
KINDS = ["fp8 128 e8m0", "fp8 32 e8m0", "fp8 128 fp32", "fp8 48 fp32", "bfloat16", "float16", "float32"]


def weight(kind: str, rows: int, columns: int, g: torch.Generator) -> Tensor | Fp8BlockTensor:
    w = torch.randn(rows, columns, generator=g)
    if not kind.startswith("fp8"):
        return (0.2 * w).to(getattr(torch, kind))
    _, size, scale = kind.split()
    shape = (-(-rows // int(size)), -(-columns // int(size)))
    scales = torch.randint(118, 120, shape, generator=g).to(torch.uint8)
    if scale == "fp32":
        scales = (scales - 118 + torch.rand(shape, generator=g)) / 300
    return Fp8BlockTensor((50 * w).to(torch.float8_e4m3fn), scales, (int(size), int(size)))


def make(kind: str, **options: object) -> KeptSharedExpert:
    g = torch.Generator().manual_seed(0)
    shapes = ((I, H), (I, H), (H, I))
    return KeptSharedExpert(*(weight(kind, *shape, g) for shape in shapes), **{"swiglu_limit": LIMIT, **options})


def values(expert: KeptSharedExpert) -> list[Tensor]:
    weights = (expert.gate, expert.up, expert.down)
    return [(w.dequantize() if isinstance(w, Fp8BlockTensor) else w).double() for w in weights]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows or 32, which end inside blocks."""
    monkeypatch.setattr(ops, "_TILE", 16 * H)


@pytest.mark.parametrize("kind", KINDS)
def test_result_is_exact_but_for_the_rounding_of_x_and_h(kind: str) -> None:
    expert, x = make(kind), torch.randn(9, H)
    gate, up, down = values(expert)
    rounded = x.bfloat16().double()
    h = swiglu(rounded @ gate.T, rounded @ up.T, LIMIT)
    want = h.float().bfloat16().double() @ down.T
    assert (expert(x) - want).norm() <= AGAINST_REFERENCE["shared_expert", "bf16"] * want.norm()


def test_weights_of_nvfp4_values_give_what_the_nvfp4_expert_gives() -> None:
    g = torch.Generator().manual_seed(0)
    quantised = Nvfp4SharedExpert.from_weights(
        *(weight("float32", *s, g) for s in ((I, H), (I, H), (H, I))), activations="bf16", backend="torch"
    )
    kept = KeptSharedExpert(*(w.dequantize() for w in (quantised.gate, quantised.up, quantised.down)))
    x = torch.randn(5, H)
    assert (kept(x) - quantised(x)).norm() <= AGAINST_REFERENCE["shared_expert", "bf16"] * kept(x).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_one_byte_a_weight_stays(kind: str) -> None:
    expert = make(kind)
    size = {"float32": 4, "float16": 2, "bfloat16": 2}.get(kind, 1)
    scales = sum(t.nbytes for name, t in expert.named_buffers() if name.endswith("scales"))
    assert expert.resident_bytes == 3 * H * I * size + scales
    assert kind.split()[0].upper() in repr(expert).upper() and f"swiglu_limit={LIMIT}" in repr(expert)


def test_dtypes_shapes_strides_and_out() -> None:
    expert = make("fp8 32 e8m0")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 3, H).to(dtype)
        y = expert(x)
        assert y.dtype == dtype and torch.equal(y, expert(x.float()).to(dtype))
        assert torch.equal(expert(torch.stack((x, x), -1)[..., 0]), y)
        out = torch.empty_like(x)
        assert expert(x, out) is out and torch.equal(out, y)
        unrounded = torch.empty(x.shape)
        assert torch.equal(expert(x, unrounded), expert(x.float()))
    assert expert(torch.empty(0, H)).shape == (0, H)


def test_conversions_leave_bytes_alone() -> None:
    expert, x = make("fp8 128 fp32"), torch.randn(4, H)
    want = expert(x)
    for other in (copy.deepcopy(expert).half(), copy.deepcopy(expert).bfloat16(), copy.deepcopy(expert)):
        assert torch.equal(other(x), want)
    assert expert.to("meta").gate.values.device.type == "meta"


def test_state_dict_goes_there_and_back_and_no_further() -> None:
    expert, x = make("fp8 128 fp32"), torch.randn(4, H)
    other = KeptSharedExpert(*(Fp8BlockTensor(w.values, 2 * w.scales, w.block) for w in _weights(expert)))
    other.swiglu_limit = LIMIT
    assert not torch.equal(other(x), expert(x))
    other.load_state_dict(copy.deepcopy(expert.state_dict()))
    assert torch.equal(other(x), expert(x))
    before = expert(x)
    for wrong in ("fp8 128 e8m0", "fp8 32 fp32", "bfloat16"):
        with pytest.raises(RuntimeError, match=r"must be \(|Missing key"):
            expert.load_state_dict(make(wrong).state_dict())
    assert torch.equal(expert(x), before)


def _weights(expert: KeptSharedExpert) -> list[Fp8BlockTensor]:
    weights = [expert.gate, expert.up, expert.down]
    assert all(isinstance(w, Fp8BlockTensor) for w in weights)
    return weights  # type: ignore[return-value]


def test_weights_that_do_not_fit() -> None:
    g = torch.Generator().manual_seed(0)
    gate, up, down = (weight("fp8 32 e8m0", *shape, g) for shape in ((I, H), (I, H), (H, I)))
    for bad in (
        (gate, up, up),
        (gate, down, down),
        (gate, up, weight("fp8 32 fp32", H, I, g)),
        (gate, up, weight("fp8 128 e8m0", H, I, g)),
        (gate, up, weight("bfloat16", H, I, g)),
        (gate, up, down.to("meta")),
        tuple(weight("float64", *shape, g) for shape in ((I, H), (I, H), (H, I))),
    ):
        with pytest.raises(LayoutError):
            KeptSharedExpert(*bad)
    for options in ({"swiglu_limit": -1.0}, {"max_tokens": 0}):
        with pytest.raises(InputError):
            KeptSharedExpert(gate, up, down, **options)


def test_calls_that_do_not_fit() -> None:
    expert = make("fp8 32 e8m0", max_tokens=3)
    for x in (torch.randn(2, H + 1), torch.randn(4, H), torch.randn(2, H).double(), torch.randn(2, H, device="meta")):
        with pytest.raises(InputError):
            expert(x)
    with pytest.raises(InputError, match="out"):
        expert(torch.randn(2, H), torch.empty(3, H))
    with pytest.raises(InputError, match="out"):
        expert(torch.randn(2, H).bfloat16(), torch.empty(2, H).half())
    with pytest.raises(UnsupportedError, match="is for inference"):
        expert(torch.randn(2, H, requires_grad=True)).sum().backward()


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    expert = make("fp8 128 e8m0")
    compiled = torch.compile(expert, fullgraph=True, backend="aot_eager")
    for tokens in (3, 8):
        x = torch.randn(tokens, H)
        assert torch.equal(compiled(x), expert(x))
