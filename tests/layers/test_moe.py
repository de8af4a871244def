# SPDX-License-Identifier: Apache-2.0
"""The whole block: against transformers' on the same decoded weights, and what it promises itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nvfp4_experts import Nvfp4MoE, Nvfp4RoutedExperts, Nvfp4SharedExpert
from nvfp4_experts.errors import InputError, LayoutError, UnsupportedError
from nvfp4_experts.layers.routing import Router
from tests.layers.test_routing import VOCABULARY, E, H, K, config_of, modeling
from tests.tolerances import AGAINST_EXACT_MATH

I = 32  # noqa: E741


def make(by_table: bool = False, shared: bool = True, weighting: str = "before_down") -> Nvfp4MoE:
    """A block in bf16 activations; its clamp is felt."""
    g = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"activations": "bf16", "swiglu_limit": 0.5}

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * 0.2

    chosen: dict[str, torch.Tensor] = {"bias": draw(E)}
    if by_table:
        chosen = {"tid2eid": torch.rand(VOCABULARY, E, generator=g).argsort(-1)[:, :K]}
    router = Router(draw(E, H), K, scaling_factor=1.5, **chosen)
    routed = Nvfp4RoutedExperts.from_weights(
        draw(E, I, H), draw(E, I, H), draw(E, H, I), weighting=weighting, **options
    )
    one = Nvfp4SharedExpert.from_weights(draw(I, H), draw(I, H), draw(H, I), **options) if shared else None
    return Nvfp4MoE(router, routed, one)


def in_transformers(block: Nvfp4MoE) -> nn.Module:
    """Their block with our decoded weights."""
    by_table = block.router.tid2eid is not None
    theirs = modeling.DeepseekV4SparseMoeBlock(config_of(swiglu_limit=0.5), 0 if by_table else 1)
    routed, shared = block.routed, block.shared
    with torch.no_grad():
        theirs.gate.weight.copy_(block.router.weight)
        if by_table:
            theirs.gate.tid2eid.copy_(block.router.tid2eid)
        else:
            theirs.gate.e_score_correction_bias.copy_(block.router.bias)
        theirs.experts.gate_up_proj.copy_(torch.cat((routed.gate.dequantize(), routed.up.dequantize()), 1))
        theirs.experts.down_proj.copy_(routed.down.dequantize())
        for name in ("gate", "up", "down"):
            getattr(theirs.shared_experts, f"{name}_proj").weight.copy_(getattr(shared, name).dequantize())
    return theirs


@pytest.mark.parametrize("weighting", ["before_down", "after_down"])
@pytest.mark.parametrize("by_table", [False, True], ids=["scores", "table"])
def test_block_of_transformers(by_table: bool, weighting: str) -> None:
    block = make(by_table, weighting=weighting)
    x, ids = torch.randn(3, 20, H).bfloat16().float(), torch.randint(VOCABULARY, (3, 20))
    with torch.no_grad():
        want = in_transformers(block)(x, ids)
    got = block(x, ids if by_table else None)
    # x is bf16 already and the weights are the same, so only the rounding of h is apart: less than the bound, which has
    # that of x too. Weighting before or after down is the same number in exact math.
    assert (got - want).norm() <= AGAINST_EXACT_MATH["bf16"] * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_routed_and_shared_are_added_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    block, x = make(), torch.randn(40, H).to(dtype)
    indices, weights = block.router(x)
    want = block.routed(x, indices, weights, out=torch.empty(40, H)) + block.shared(x.float())
    assert torch.equal(block(x), want.to(dtype))
    assert torch.equal(block(x.float()), want)
    out = torch.empty(40, H)
    assert block(x, out=out) is out and torch.equal(out, want)
    with pytest.raises(InputError, match="out"):
        block(x, out=torch.empty(39, H))


def test_without_a_shared_expert_and_without_tokens() -> None:
    block, x = make(shared=False), torch.randn(5, H)
    assert torch.equal(block(x), block.routed(x, *block.router(x)))
    assert make()(torch.randn(0, H)).shape == (0, H)


def test_state_dict_and_repr() -> None:
    block, x = make(), torch.randn(5, H)
    again = make()
    nn.init.zeros_(again.router.weight)
    again.load_state_dict(block.state_dict())
    assert torch.equal(again(x), block(x))
    assert "(router): Router(" in repr(block)


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    block, x = make(), torch.randn(5, H)
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_a_backward_pass_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="is for inference"):
        make()(torch.randn(3, H, requires_grad=True)).sum().backward()


def test_parts_that_do_not_fit() -> None:
    block = make()
    with pytest.raises(LayoutError, match="one number of experts"):
        Nvfp4MoE(Router(torch.randn(E + 1, H), K), block.routed, block.shared)
    with pytest.raises(LayoutError, match="one hidden size"):
        Nvfp4MoE(Router(torch.randn(E, H + 16), K), block.routed, block.shared)
    with pytest.raises(InputError, match="top_k=8"):
        Nvfp4MoE(Router(torch.randn(E, H), 9), block.routed, block.shared)
    narrow = Nvfp4SharedExpert.from_weights(*(torch.randn(16, 16) for _ in range(3)))
    with pytest.raises(LayoutError, match="one hidden size"):
        Nvfp4MoE(block.router, block.routed, narrow)
