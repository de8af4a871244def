# SPDX-License-Identifier: Apache-2.0
"""`set_experts_implementation("nvfp4_experts")` on a model in floating point."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvfp4_experts import Nvfp4RoutedExperts
from nvfp4_experts.errors import InputError
from nvfp4_experts.integrations.transformers import nvfp4_experts_forward, swap_experts
from tests.tolerances import AGAINST_EXACT_MATH

IDS = torch.tensor([[256, *b"class Node(object):\n    def __init__(self, other):\n"]])


@pytest.fixture
def model(load: Callable[..., Any], tiny_checkpoint: Path) -> Any:
    return load(tiny_checkpoint)


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often weights were quantised, layer by layer."""
    calls: list[int] = []
    from_weights = Nvfp4RoutedExperts.from_weights
    monkeypatch.setattr(
        Nvfp4RoutedExperts, "from_weights", lambda *w, **o: (calls.append(len(w[0])), from_weights(*w, **o))[1]
    )
    yield calls


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


def test_it_is_the_layer_with_weights_after_down(model: Any, load: Callable[..., Any], tiny_checkpoint: Path) -> None:
    original = logits(model)
    model.set_experts_implementation("nvfp4_experts")
    got = logits(model)
    assert not torch.equal(got, original)
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(logits(model), original)
    swapped = load(tiny_checkpoint)
    swap_experts(swapped, experts="routed", weighting="after_down")
    assert torch.equal(logits(swapped), got)
    named = load(tiny_checkpoint, experts_implementation="nvfp4_experts")
    assert torch.equal(logits(named), got)


def test_weights_are_quantised_once_and_anew_when_they_change(model: Any, quantised: list[int]) -> None:
    model.set_experts_implementation("nvfp4_experts")
    keys = model.state_dict().keys()
    first = logits(model)
    assert torch.equal(logits(model), first) and len(quantised) == 4
    assert model.state_dict().keys() == keys
    experts = model.model.layers[2].mlp.experts
    with torch.no_grad():
        experts.down_proj.mul_(2)  # written in place
    changed = logits(model)
    assert len(quantised) == 5 and not torch.equal(changed, first)
    experts.down_proj = nn.Parameter(experts.down_proj.detach() / 2)  # replaced
    assert torch.equal(logits(model), first) and len(quantised) == 6
    model.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), first) and len(quantised) == 10
    assert torch.equal(logits(copy.deepcopy(model)), first) and len(quantised) == 14


class Experts(nn.Module):
    """Fused experts as transformers has them, of another family: no clamp."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 64, 32) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(3, 32, 32) * 0.1)

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def test_against_plain_math_on_the_quantised_weights() -> None:
    experts, x = Experts(), torch.randn(7, 32)
    indices, weights = torch.stack([torch.randperm(3)[:2] for _ in range(7)]), torch.rand(7, 2)
    with torch.no_grad():
        made = Nvfp4RoutedExperts.from_weights(*experts.gate_up_proj.chunk(2, dim=1), experts.down_proj)
        got = nvfp4_experts_forward(experts, x, indices, weights)
        want = torch.zeros(7, 32)
        for token in range(7):
            for slot in range(2):
                gate, up, down = (w[indices[token, slot]].dequantize() for w in made._projections())
                h = nn.functional.silu(gate @ x[token]) * (up @ x[token])
                want[token] += weights[token, slot] * (down @ h)
    assert (got - want).norm() < AGAINST_EXACT_MATH["bf16"] * want.norm()


def test_more_slots_or_tokens_than_before(quantised: list[int]) -> None:
    experts = Experts()

    def run(tokens: int, slots: int) -> Tensor:
        indices = torch.zeros(tokens, slots, dtype=torch.long)
        return nvfp4_experts_forward(experts, torch.ones(tokens, 32), indices, torch.full((tokens, slots), 1 / slots))

    one = run(1, 1)
    assert torch.allclose(one, run(1, 2), rtol=1e-6) and len(quantised) == 2
    assert torch.equal(run(9000, 1), one.expand(9000, 32)) and len(quantised) == 3
    assert torch.equal(run(1, 2), run(2, 2)[:1]) and len(quantised) == 3


def transposed(experts: Any) -> None:
    experts.is_transposed = True


def interleaved(experts: Any) -> None:
    experts.is_concatenated = False


def biased(experts: Any) -> None:
    experts.down_proj_bias = nn.Parameter(torch.zeros(3, 32))


def gelu(experts: Any) -> None:
    experts._apply_gate = lambda both: nn.functional.gelu(both[..., :32]) * both[..., 32:]


def clamped(experts: Any) -> None:
    experts.limit = 5.0  # which its gating function does not know


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (transposed, "transposed or interleaved"),
        (interleaved, "transposed or interleaved"),
        (biased, "down_proj_bias"),
        (gelu, "another gating function"),
        (clamped, "another gating function"),
    ],
)
def test_experts_of_another_form_are_refused(change: Callable[[Any], None], reason: str) -> None:
    experts = Experts()
    change(experts)
    with pytest.raises(InputError, match=reason):
        nvfp4_experts_forward(experts, torch.ones(1, 32), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
