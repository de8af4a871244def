# SPDX-License-Identifier: Apache-2.0
"""Loading routers: names and settings of every kind of layer, and a broken copy for each error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_experts.checkpoints import errors, load_router
from nvfp4_experts.layers.routing import Router
from tests.checkpoints import factory

GATE = {"official": "layers.{}.ffn.gate", "transformers": "model.layers.{}.mlp.gate"}
Damage = Callable[[dict[str, Tensor], dict[str, Any]], object]


def made(naming: str = "official") -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, _, config = factory.blocks(factory.plain(), factory.plain(), naming=naming)
    return tensors, config


@pytest.mark.parametrize("naming", factory.WORDS)
def test_tensors_and_settings_are_the_checkpoints(tmp_path: Path, naming: str) -> None:
    tensors, config = made(naming)
    path = factory.write(tmp_path / "c", tensors, config | {"norm_topk_prob": False, "scoring_func": "sigmoid"})
    by_table, by_score = load_router(path, 0), load_router(path, 1)
    assert torch.equal(by_table.tid2eid, tensors[f"{GATE[naming].format(0)}.tid2eid"]) and by_table.bias is None
    bias = tensors[f"{GATE[naming].format(1)}.{factory.ROUTER_BIAS[naming]}"]
    assert torch.equal(by_score.bias, bias) and by_score.tid2eid is None
    for layer, router in enumerate((by_table, by_score)):
        assert torch.equal(router.weight, tensors[f"{GATE[naming].format(layer)}.weight"])
        assert (router.top_k, router.scoring, router.normalise, router.scaling_factor) == (2, "sigmoid", False, 1.5)
    want = Router(
        tensors[f"{GATE[naming].format(1)}.weight"],
        2,
        scoring="sigmoid",
        bias=bias,
        normalise=False,
        scaling_factor=1.5,
    )
    x = torch.randn(5, 160)
    assert all(torch.equal(a, b) for a, b in zip(by_score(x), want(x), strict=True))


def test_settings_may_lie_in_text_config_and_normalising_is_the_default(tmp_path: Path) -> None:
    tensors, config = made()
    del config["norm_topk_prob"]
    router = load_router(factory.write(tmp_path / "c", tensors, {"text_config": config}), 1)
    assert router.normalise and router.top_k == 2


def test_a_model_without_a_selection_bias(tmp_path: Path) -> None:
    tensors, config = made()
    del tensors["layers.1.ffn.gate.bias"]
    config = {**config, "model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax"}
    assert load_router(factory.write(tmp_path / "c", tensors, config), 1).bias is None


def put(name: str, value: Tensor | None) -> Damage:
    def damage(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return damage


def say(**settings: object) -> Damage:
    return lambda tensors, config: config.update(settings)


def forget(key: str) -> Damage:
    return lambda tensors, config: config.pop(key)


W, B, T = (f"layers.{layer}.ffn.gate.{name}" for layer, name in ((1, "weight"), (1, "bias"), (0, "tid2eid")))
BROKEN: list[tuple[int, type[Exception], str, Damage]] = [
    (1, errors.MissingTensorError, "gate.weight", put(W, None)),
    (1, errors.MissingTensorError, "bias", put(B, None)),
    (0, errors.MissingTensorError, "goes by token id", put(T, None)),
    (1, errors.MissingTensorError, "goes by token id", say(mlp_layer_types=["hash_moe", "hash_moe"])),
    (7, errors.MissingTensorError, r"\[0, 1\]", say()),
    (0, errors.AmbiguousCheckpointError, "token id or by score", put("layers.0.ffn.gate.bias", torch.zeros(4))),
    (1, errors.AmbiguousCheckpointError, "one bias", put("layers.1.ffn.gate.e_score_correction_bias", torch.zeros(4))),
    (1, errors.AmbiguousCheckpointError, "one weight", put("model.layers.1.mlp.gate.weight", torch.zeros(4, 160))),
    (1, errors.WrongDtypeError, "BF16", put(W, torch.zeros(4, 160, dtype=torch.float8_e4m3fn))),
    (0, errors.WrongDtypeError, "I64", put(T, torch.zeros(11, 2))),
    (1, errors.WrongShapeError, r"\(E, H\) = \(4, 160\)", put(W, torch.zeros(5, 160))),
    (1, errors.WrongShapeError, r"\(E, H\) = \(4, 160\)", put(W, torch.zeros(4, 128))),
    (1, errors.WrongShapeError, r"\(E, H\)", put(W, torch.zeros(640))),
    (1, errors.WrongShapeError, r"must be \(4,\)", put(B, torch.zeros(3))),
    (0, errors.WrongShapeError, r"\(vocabulary, 2\)", put(T, torch.zeros(11, 3, dtype=torch.int64))),
    (0, errors.InvalidRouterError, "0..3, got 0..4", put(T, torch.tensor([[0, 4]]))),
    (0, errors.InvalidRouterError, "0..3, got -1..0", put(T, torch.tensor([[0, -1]]))),
    (1, errors.MissingConfigError, "num_experts_per_tok", forget("num_experts_per_tok")),
    (1, errors.MissingConfigError, "scoring_func", forget("scoring_func")),
    (1, errors.MissingConfigError, "routed_scaling_factor", forget("routed_scaling_factor")),
    (1, errors.InvalidConfigError, "num_experts_per_tok", say(num_experts_per_tok=0)),
    (1, errors.InvalidConfigError, "num_experts_per_tok", say(num_experts_per_tok=True)),
    (1, errors.InvalidConfigError, "at most the 4 experts", say(num_experts_per_tok=5)),
    (1, errors.InvalidConfigError, "scoring_func", say(scoring_func="tanh")),
    (1, errors.InvalidConfigError, "scoring_func", say(scoring_func=["sigmoid"])),
    (1, errors.InvalidConfigError, "routed_scaling_factor", say(routed_scaling_factor="2.5")),
    (1, errors.InvalidConfigError, "routed_scaling_factor", say(routed_scaling_factor=-1)),
    (1, errors.InvalidConfigError, "norm_topk_prob", say(norm_topk_prob="yes")),
    (1, errors.UnsupportedRouterError, "8 groups", say(n_group=8, topk_group=4)),
]


@pytest.mark.parametrize(("layer", "error", "message", "damage"), BROKEN, ids=[f"{i}" for i in range(len(BROKEN))])
def test_each_fault_has_its_error(
    tmp_path: Path, layer: int, error: type[Exception], message: str, damage: Damage
) -> None:
    tensors, config = made()
    damage(tensors, config)
    with pytest.raises(error, match=message):
        load_router(factory.write(tmp_path / "c", tensors, config), layer)


def test_one_group_is_none(tmp_path: Path) -> None:
    tensors, config = made()
    for i, groups in enumerate(({"n_group": 1, "topk_group": 1}, {"n_group": 4, "topk_group": 4})):
        load_router(factory.write(tmp_path / f"{i}", tensors, config | groups), 1)
