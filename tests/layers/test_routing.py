# SPDX-License-Identifier: Apache-2.0
"""Routing: DeepSeek-V4's rules as transformers has them, as loops, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_experts.errors import InputError, LayoutError
from nvfp4_experts.layers.routing import SCORINGS, Router

E, H, K, VOCABULARY = 12, 32, 4, 20
REFUSED_IDS = (torch.float32, torch.bool, torch.uint8, torch.int8, torch.int16)

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")


def config_of(**options: Any) -> Any:
    return transformers.DeepseekV4Config(
        hidden_size=H,
        moe_intermediate_size=32,
        n_routed_experts=E,
        num_local_experts=E,
        num_experts_per_tok=K,
        vocab_size=VOCABULARY,
        num_hidden_layers=2,
        mlp_layer_types=["hash_moe", "moe"],
        routed_scaling_factor=1.5,
        **options,
    )


def by_expert(indices: Tensor, weights: Tensor) -> Tensor:
    """(T, E) weights, whatever the order of the slots."""
    return torch.zeros(len(indices), E).scatter(-1, indices, weights)


def test_scores_of_transformers() -> None:
    theirs = modeling.DeepseekV4TopKRouter(config_of())
    torch.nn.init.normal_(theirs.weight)
    theirs.e_score_correction_bias.normal_()
    ours = Router(theirs.weight, K, bias=theirs.e_score_correction_bias, scaling_factor=1.5)
    x = torch.randn(200, H)
    indices, weights = ours(x)
    _, want_weights, want_indices = theirs(x)
    assert torch.equal(indices.sort(-1).values, want_indices.sort(-1).values)
    torch.testing.assert_close(
        by_expert(indices, weights), by_expert(want_indices, want_weights.detach()), rtol=1e-6, atol=0
    )
    unbiased = Router(theirs.weight, K, scaling_factor=1.5)(x)[0]
    assert not torch.equal(indices.sort(-1).values, unbiased.sort(-1).values)


def test_table_of_transformers() -> None:
    theirs = modeling.DeepseekV4HashRouter(config_of())
    torch.nn.init.normal_(theirs.weight)
    theirs.tid2eid.copy_(torch.rand(VOCABULARY, E).argsort(-1)[:, :K])
    ours = Router(theirs.weight, K, tid2eid=theirs.tid2eid, scaling_factor=1.5)
    x, ids = torch.randn(3, 5, H), torch.randint(VOCABULARY, (3, 5))
    indices, weights = ours(x, ids)
    _, want_weights, want_indices = theirs(x, ids)
    assert torch.equal(indices.view(-1, K), want_indices) and torch.equal(weights.view(-1, K), want_weights)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_against_loops(scoring: str, normalise: bool) -> None:
    weight, bias, x = torch.randn(E, H).bfloat16(), torch.randn(E), torch.randn(30, H).bfloat16()
    router = Router(weight, K, scoring=scoring, bias=bias, normalise=normalise, scaling_factor=2.5)
    indices, weights = router(x)
    for t in range(len(x)):
        logits = [float(x[t].double() @ weight[e].double()) for e in range(E)]
        scores = {
            "sqrtsoftplus": [math.sqrt(math.log1p(math.exp(v))) for v in logits],
            "sigmoid": [1 / (1 + math.exp(-v)) for v in logits],
            "softmax": [math.exp(v) / sum(map(math.exp, logits)) for v in logits],
        }[scoring]
        chosen = sorted(range(E), key=lambda e, s=scores: s[e] + float(bias[e]), reverse=True)[:K]
        assert indices[t].tolist() == chosen
        total = sum(scores[e] for e in chosen) if normalise else 1
        assert weights[t].tolist() == pytest.approx([2.5 * scores[e] / total for e in chosen], rel=1e-5)


def test_conversions_leave_the_bias_alone() -> None:
    router, x = Router(torch.randn(E, H), K, bias=torch.randn(E)), torch.randn(5, H)
    want = router(x)
    assert all(torch.equal(a, b) for a, b in zip(router.half()(x), want, strict=True))
    assert "biased" in repr(router)


def test_what_is_refused() -> None:
    weight, table = torch.randn(E, H), torch.zeros(VOCABULARY, K, dtype=torch.int64)
    for arguments, error in [
        ({"weight": weight[0]}, LayoutError),
        ({"top_k": 0}, InputError),
        ({"top_k": E + 1}, InputError),
        ({"bias": torch.ones(E - 1)}, LayoutError),
        ({"tid2eid": table[:, 1:]}, LayoutError),
        ({"tid2eid": table.bool()}, LayoutError),
        ({"tid2eid": table + E}, InputError),
        ({"tid2eid": table - 1}, InputError),
        ({"tid2eid": table, "bias": torch.ones(E)}, InputError),
        ({"scoring": "guess"}, InputError),
    ]:
        with pytest.raises(error):
            Router(**{"weight": weight, "top_k": K, **arguments})
    with pytest.raises(InputError, match="x: must be"):
        Router(weight, K)(torch.randn(2, H + 1))
    good = torch.zeros(2, dtype=torch.int64)
    for ids in (None, torch.zeros(3, dtype=torch.int64), *map(good.to, REFUSED_IDS), good.to("meta")):
        with pytest.raises(InputError, match="token_ids"):
            Router(weight, K, tid2eid=table)(torch.randn(2, H), ids)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_outside_the_table_do_not_wrap_around(dtype: torch.dtype) -> None:
    table = torch.rand(VOCABULARY, E).argsort(-1)[:, :K]
    router, x = Router(torch.randn(E, H), K, tid2eid=table), torch.randn(2, H)
    ids = torch.tensor([0, VOCABULARY - 1], dtype=dtype)
    assert torch.equal(router(x, ids)[0], table[[0, -1]])
    assert torch.equal(router(x[1], ids[1])[0], table[-1])
    for bad in (-1, -VOCABULARY, VOCABULARY):
        with pytest.raises(IndexError):
            router(x, ids.index_fill(0, torch.tensor(1), bad))


def test_compiled_code_refuses_negative_ids_too() -> None:
    torch._dynamo.reset()
    router, x = Router(torch.randn(E, H), K, tid2eid=torch.zeros(VOCABULARY, K, dtype=torch.int64)), torch.randn(2, H)
    compiled = torch.compile(router, fullgraph=True)
    assert torch.equal(compiled(x, torch.tensor([0, 1]))[0], router(x, torch.tensor([0, 1]))[0])
    with pytest.raises((IndexError, RuntimeError), match="index"):
        compiled(x, torch.tensor([0, -1]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_tables_of_any_integers(dtype: torch.dtype) -> None:
    table, x = torch.rand(VOCABULARY, E).argsort(-1)[:, :K].to(dtype), torch.randn(3, H)
    weight = torch.randn(E, H)
    assert torch.equal(Router(weight, K, tid2eid=table)(x, torch.tensor([0, 7, 3]))[0], table[[0, 7, 3]].long())
    moved = Router(weight.to("meta"), K, tid2eid=table.to("meta"))
    assert moved(x.to("meta"), torch.zeros(3, dtype=torch.int64, device="meta"))[0].shape == (3, K)
    assert Router(weight, K, tid2eid=table[:0]).tid2eid.shape == (0, K)
