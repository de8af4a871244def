# SPDX-License-Identifier: Apache-2.0
"""Loading routed experts and whole blocks: every format computes what its values say, each expert its own."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvfp4_experts import KeptSharedExpert, Nvfp4MoE, Nvfp4RoutedExperts, Nvfp4SharedExpert
from nvfp4_experts.checkpoints import (
    convert,
    errors,
    load_kept_expert,
    load_moe,
    load_routed_experts,
    load_shared_expert,
    open_checkpoint,
    reader,
)
from nvfp4_experts.errors import CalibrationError, InputError, UnsupportedError
from nvfp4_experts.kernels.dispatch import get_routed_backend
from tests.checkpoints import factory
from tests.tolerances import NVFP4_OF_GAUSSIAN

E, K = 4, 2
EXACT = ("nvfp4", "mxfp4")


def write(path: Path, made: tuple[dict[str, Tensor], dict, dict], shards: int = 2) -> Path:
    return factory.write(path, made[0], made[2], shards=shards)


def routing(tokens: int, experts: int = E) -> tuple[Tensor, Tensor]:
    return torch.rand(tokens, experts).argsort(-1)[:, :K], torch.rand(tokens, K)


@pytest.mark.parametrize("naming", factory.WORDS)
@pytest.mark.parametrize("kind", factory.MAKERS)
def test_routed_experts_of_every_format_compute_what_their_values_say(tmp_path: Path, kind: str, naming: str) -> None:
    made = factory.blocks(factory.plain(), factory.MAKERS[kind], naming=naming)
    loaded = load_routed_experts(write(tmp_path / "c", made), 1, activations="bf16", max_tokens=64)
    assert (loaded.num_experts, loaded.swiglu_limit, loaded.max_tokens, loaded.top_k) == (E, 10.0, 64, K)
    values = [made[1][factory.expert_name(naming, 1, e)] for e in range(E)]
    stacks = {name: torch.stack([w[name] for w in values]) for name in ("gate", "up", "down")}
    if factory.FORMATS.get(kind) in EXACT:
        assert all(torch.equal(getattr(loaded, name).dequantize(), w) for name, w in stacks.items())
    else:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
        twin = Nvfp4RoutedExperts.from_weights(*(w.to(dtype) for w in stacks.values()), activations="bf16")
        x = torch.randn(5, 160)
        assert torch.equal(loaded(x, *(chosen := routing(5))), twin(x, *chosen))


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("kind", factory.MAKERS)
def test_loading_converts_as_convert_does(tmp_path: Path, kind: str, dialect: str) -> None:
    made = factory.blocks(factory.MAKERS[kind], factory.MAKERS[kind])
    source = write(tmp_path / "src", made)
    if kind == dialect:
        with pytest.raises(errors.NothingToConvertError):
            convert(source, tmp_path / "dst", dialect=dialect, experts="all")
        return
    convert(source, tmp_path / "dst", dialect=dialect, experts="all")
    x, ids = torch.randn(7, 160), torch.randint(11, (7,))
    for layer in (0, 1):
        blocks = [load_moe(tmp_path / name, layer, activations="bf16") for name in ("src", "dst")]
        assert torch.equal(*(block(x, ids) for block in blocks))


@pytest.mark.parametrize("experts", [range(2, 4), range(1), [3, 0]], ids=str)
def test_a_share_is_those_experts_and_reads_no_other(
    tmp_path: Path, experts: range | list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c", factory.hybrid())
    whole = load_routed_experts(path, 1)
    names: list[str] = []
    read = reader.read_tensor
    monkeypatch.setattr(
        reader, "read_tensor", lambda p, info, *rows: (names.append(info.name), read(p, info, *rows))[1]
    )
    share = load_routed_experts(path, 1, experts=experts)
    prefixes = tuple(factory.expert_name("official", 1, e) + "." for e in experts)
    assert names and all(name.startswith(prefixes) for name in names)
    state, all_state = share.state_dict(), whole.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor.float(), all_state[name].float()[list(experts)]), name


def test_each_expert_is_packed_before_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c", factory.blocks(factory.plain(), factory.fp8()))
    one = get_routed_backend(load_routed_experts(path, 1).backend).one
    steps: list[str] = []
    read, pack = reader.read_tensor, one.pack
    monkeypatch.setattr(
        reader, "read_tensor", lambda p, info, *rows: (steps.append(info.name.split(".")[4]), read(p, info, *rows))[1]
    )
    monkeypatch.setattr(one, "pack", lambda *weights: (steps.append("pack"), pack(*weights))[1])
    load_routed_experts(path, 1)
    assert [step for step, _ in itertools.groupby(steps)] == ["0", "pack", "1", "pack", "2", "pack", "3", "pack"]


def test_static_scales_are_each_experts_own(tmp_path: Path) -> None:
    path = write(tmp_path / "c", factory.hybrid())
    loaded = load_routed_experts(path, 0, activations="nvfp4")
    factors = 1 + torch.arange(E) / 4
    assert loaded.activation_scale == "static" and loaded.weighting == "before_down"
    assert torch.equal(loaded.input_scale, factors / 2688) and torch.equal(loaded.hidden_scale, 4 * factors / 2688)
    assert load_routed_experts(path, 0, activation_scale="per_token").activation_scale == "per_token"


def test_of_two_input_scales_the_larger_covers_both(tmp_path: Path) -> None:
    maker = {name: factory.modelopt(input_scale=s) for name, s in (("gate", 0.25), ("up", 0.5), ("down", 4.0))}
    loaded = load_routed_experts(write(tmp_path / "c", factory.blocks(factory.plain(), maker)), 0)
    assert loaded.input_scale.tolist() == [0.5] * E and loaded.hidden_scale.tolist() == [4.0] * E


def test_shares_of_a_layer_have_one_mode(tmp_path: Path) -> None:
    tensors, _, config = factory.hybrid()
    del tensors["layers.1.ffn.experts.3.w2.input_scale"]
    path = factory.write(tmp_path / "c", tensors, config)
    modes = [load_routed_experts(path, 1, experts=e).activation_scale for e in (range(2), range(2, 4), None)]
    assert modes == ["dynamic"] * 3
    known = load_routed_experts(path, 1, experts=range(2), activation_scale="static", activations="nvfp4")
    assert known(torch.randn(3, 160), *routing(3)).isfinite().all()
    unknown = load_routed_experts(path, 1, activation_scale="static", activations="nvfp4")
    with pytest.raises(CalibrationError, match=r"scales of every expert, got none of 1 of 4 experts: 3; "):
        unknown(torch.randn(3, 160), *routing(3))


def test_experts_without_scales_do_not_hide_those_of_the_others(tmp_path: Path) -> None:
    """One expert lacks all, one that of h, one that of gate; the rest is there, in whole layers and in shares."""
    tensors, _, config = factory.hybrid()
    for lacking in ("1.w1", "1.w2", "1.w3", "3.w2", "0.w1"):
        del tensors[f"layers.1.ffn.experts.{lacking}.input_scale"]
    path = factory.write(tmp_path / "c", tensors, config)
    factors, nan = 1 + torch.arange(E) / 4, torch.nan
    want = torch.tensor([[nan, nan, 1, 1], [4, nan, 4, nan]]) * factors / 2688

    def check(loaded: Nvfp4RoutedExperts, experts: list[int], uncalibrated: tuple[int, ...]) -> None:
        for scales, known in zip((loaded.input_scale, loaded.hidden_scale), want, strict=True):
            torch.testing.assert_close(scales, known[experts], rtol=0, atol=0, equal_nan=True)
        assert loaded.uncalibrated == uncalibrated and loaded.activation_scale == "dynamic"

    check(load_routed_experts(path, 1), [0, 1, 2, 3], (0, 1, 3))
    check(load_routed_experts(path, 1, experts=[2, 1]), [2, 1], (1,))
    routed = load_moe(path, 1, activations="nvfp4").routed
    check(routed, [0, 1, 2, 3], (0, 1, 3))
    assert routed(torch.randn(3, 160), *routing(3)).isfinite().all()
    assert routed.fill_uncalibrated() == (0, 1, 3)
    assert routed.with_activations("nvfp4", "static")(torch.randn(3, 160), *routing(3)).isfinite().all()
    none = load_routed_experts(path, 1, experts=[1])
    assert none.input_scale is None and none.hidden_scale is None and none.uncalibrated == (0,)


@pytest.mark.parametrize(
    ("model", "weighting"),
    [("deepseek_v4", "before_down"), (None, "before_down"), ("deepseek_v3", "after_down")],
)
def test_weighting_is_that_of_the_models_own_code(tmp_path: Path, model: str | None, weighting: str) -> None:
    tensors, _, config = factory.hybrid()
    path = factory.write(tmp_path / "c", tensors, {**config, "model_type": model})
    assert load_routed_experts(path, 0).weighting == weighting
    assert load_moe(path, 0).routed.weighting == weighting
    assert load_routed_experts(path, 0, weighting="after_down").weighting == "after_down"


@pytest.mark.parametrize(
    ("experts", "error"),
    [
        ([], InputError),
        ([1, 1], InputError),
        ([-1, 0], InputError),
        (range(2, 5), errors.MissingExpertError),
    ],
    ids=str,
)
def test_experts_that_cannot_be_had(tmp_path: Path, experts: list[int], error: type[Exception]) -> None:
    with pytest.raises(error):
        load_routed_experts(write(tmp_path / "c", factory.hybrid()), 0, experts=experts)


# --- whole blocks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["nvfp4", "keep"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_hybrid_block_is_its_parts(tmp_path: Path, layer: int, shared: str) -> None:
    path = write(tmp_path / "c", factory.hybrid())
    block = load_moe(path, layer, shared=shared, max_tokens=32)
    assert (block.router.tid2eid is not None) == (layer == 0) and block.router.top_k == block.routed.top_k == K
    assert type(block.shared) is {"nvfp4": Nvfp4SharedExpert, "keep": KeptSharedExpert}[shared]
    assert block.shared.max_tokens == block.routed.max_tokens == 32
    one = (load_shared_expert if shared == "nvfp4" else load_kept_expert)(path, layer)
    x, ids = torch.randn(6, 160), torch.randint(11, (6,))
    routed = load_routed_experts(path, layer)(x, *block.router(x, ids), out=torch.empty(6, 160))
    assert torch.equal(block(x, ids), routed + one(x))


@pytest.mark.parametrize("kind", factory.MAKERS)
def test_what_is_kept_has_the_values_it_is_stored_with(tmp_path: Path, kind: str) -> None:
    made = factory.blocks(factory.MAKERS[kind], factory.modelopt())
    path = write(tmp_path / "c", made)
    kept, values = load_moe(path, 1, shared="keep").shared, made[1][factory.expert_name("official", 1, None)]
    for name, want in values.items():
        weight = getattr(kept, name)
        assert torch.equal(weight.float() if isinstance(weight, Tensor) else weight.dequantize(), want)
    is_fp4 = factory.FORMATS.get(kind) in EXACT
    assert type(kept) is (Nvfp4SharedExpert if is_fp4 else KeptSharedExpert)
    if is_fp4:
        with pytest.raises(InputError, match="load_shared_expert"):
            load_kept_expert(path, 1)
    if kind.startswith("fp8"):
        weights = sum(w.numel() for w in values.values())
        assert kept.resident_bytes == sum(
            t.nbytes for name, t in made[0].items() if name.startswith("layers.1.ffn.shared_experts")
        )
        assert weights <= kept.resident_bytes < 1.05 * weights


def test_no_shared_expert_where_the_config_says_so(tmp_path: Path) -> None:
    tensors, _, config = factory.hybrid()
    tensors = {name: t for name, t in tensors.items() if "layers.1.ffn.shared" not in name}
    path = factory.write(tmp_path / "c", tensors, config)
    with pytest.raises(errors.MissingExpertError, match="shared expert of layer 1"):
        load_moe(path, 1)
    none = {name: t for name, t in tensors.items() if "shared_experts" not in name}
    assert load_moe(factory.write(tmp_path / "n", none, {**config, "n_shared_experts": 0}), 1).shared is None


def test_unknown_ways_for_the_shared_expert(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nvfp4.*keep"):
        load_moe(tmp_path, 0, shared="fp8")


def test_bad_devices_and_backends(tmp_path: Path) -> None:
    path = write(tmp_path / "c", factory.hybrid())
    with pytest.raises(UnsupportedError, match="device 'meta'"):
        load_routed_experts(path, 0, "meta")
    with pytest.raises(UnsupportedError, match="backend"):
        load_moe(path, 0, backend="abacus")


def test_the_trained_checkpoint_is_what_transformers_makes_of_it(tiny_checkpoint: Path) -> None:
    """Blocks of its own model in fp32: routes are equal, results apart by what NVFP4 costs three projections."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    for layer, theirs in enumerate(model.model.layers):
        block = load_moe(tiny_checkpoint, layer, shared="keep", activations="bf16")
        x, ids = torch.randn(2, 50, 256), torch.randint(256, (2, 50))
        with torch.no_grad():
            _, weights, indices = theirs.mlp.gate(x, *([ids] if layer == 0 else []))
            want = theirs.mlp(x, ids)
        own_indices, own_weights = (part.view(100, 2) for part in block.router(x, ids))
        spread = [torch.zeros(100, 8).scatter(-1, i, w) for i, w in ((indices, weights), (own_indices, own_weights))]
        torch.testing.assert_close(*spread)
        assert (block(x, ids) - want).norm() <= 3**0.5 * NVFP4_OF_GAUSSIAN * want.norm()


# --- broken hybrids ------------------------------------------------------------------------------------------

EXPERT = "layers.1.ffn.experts.2"


def _without(name: str):
    return lambda tensors, config: tensors.pop(name)


def _set(name: str, value: Tensor):
    return lambda tensors, config: tensors.__setitem__(name, value)


def _mxfp4(tensors: dict[str, Tensor], config: dict) -> None:
    for name in [name for name in tensors if name.startswith(EXPERT)]:
        del tensors[name]
    tensors |= factory.expert(factory.mxfp4(), EXPERT)[0]


BROKEN = {
    "a global scale is missing": (_without(f"{EXPERT}.w1.weight_scale_2"), errors.MissingTensorError),
    "a projection is missing": (
        lambda t, c: [t.pop(n) for n in list(t) if n.startswith(f"{EXPERT}.w2.")],
        errors.MissingTensorError,
    ),
    "an expert is missing": (
        lambda t, c: [t.pop(n) for n in list(t) if n.startswith(f"{EXPERT}.")],
        errors.MissingExpertError,
    ),
    "an expert is MXFP4, against moe_quant_algo": (_mxfp4, errors.ConfigMismatchError),
    "a global scale is a reciprocal": (
        _set(f"{EXPERT}.w3.weight_scale_2", torch.tensor(1e4)),
        errors.SuspiciousScaleError,
    ),
    "an input scale is zero": (_set(f"{EXPERT}.w3.input_scale", torch.tensor(0.0)), errors.InvalidScaleError),
    "block scales are swizzled": (
        _set(f"{EXPERT}.w1.weight_scale", torch.ones(128, 12).to(torch.float8_e4m3fn)),
        errors.WrongShapeError,
    ),
    "more experts than the config has": (lambda t, c: c.update(n_routed_experts=3), errors.ConfigMismatchError),
    "the shared expert lacks a scale": (_without("layers.1.ffn.shared_experts.w1.scale"), errors.MissingTensorError),
    "the shared expert has another block": (
        lambda t, c: c["quantization_config"].update(weight_block_size=[128, 128]),
        errors.ConfigMismatchError,
    ),
}


@pytest.mark.parametrize("shared", ["nvfp4", "keep"])
@pytest.mark.parametrize("fault", BROKEN)
def test_broken_hybrids_have_named_errors(tmp_path: Path, fault: str, shared: str) -> None:
    damage, error = BROKEN[fault]
    tensors, _, config = factory.hybrid()
    damage(tensors, config)
    path = factory.write(tmp_path / "c", tensors, config)
    with pytest.raises(error):
        if "more experts" in fault:
            load_routed_experts(path, 1)
        else:
            load_moe(path, 1, shared=shared)


def test_what_is_wrong_with_one_expert_does_not_keep_others_from_loading(tmp_path: Path) -> None:
    tensors, _, config = factory.hybrid()
    del tensors[f"{EXPERT}.w1.weight_scale_2"]
    path = factory.write(tmp_path / "c", tensors, config)
    assert load_routed_experts(path, 1, experts=[0, 1, 3]).num_experts == 3


def test_expert_dtype_alone_claims_nothing(tmp_path: Path) -> None:
    """DeepSeek's own checkpoints say expert_dtype fp4 and are MXFP4; NVIDIA's still say it."""
    tensors, _, config = factory.blocks(factory.fp8(), factory.mxfp4())
    path = factory.write(tmp_path / "c", tensors, {**config, "expert_dtype": "fp4"})
    assert isinstance(load_moe(path, 1), Nvfp4MoE)


def test_mtp_experts_are_known_and_left_alone(tmp_path: Path) -> None:
    opened = open_checkpoint(write(tmp_path / "c", factory.hybrid()))
    assert {entry.layer for entry in opened.experts} == {0, 1}
    found = {entry.prefix: {p.format for p in entry.projections.values()} for entry in opened.mtp_experts}
    assert found == {
        "mtp.0.ffn.shared_experts": {"fp8_block"},
        **{f"mtp.0.ffn.experts.{e}": {"mxfp4"} for e in range(E)},
    }
