# SPDX-License-Identifier: Apache-2.0
"""The experts implementation "nvfp4_experts": `model.set_experts_implementation("nvfp4_experts")`.

transformers calls it with a module that holds `gate_up_proj` and `down_proj`. The first call quantises them once; later
calls run what was made, until a parameter is replaced, moved, or written to. Routing weights multiply what down gives,
as in transformers' other implementations.

    memory   0.5625 bytes a weight beside the model's own (28 % of bf16); `swap_experts` lets the originals go
    no trace of writes through `parameter.data`: torch does not count them
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ...layers.routed_experts import Nvfp4RoutedExperts
from .config import METHOD
from .rule import check_fit, weights_of

_NAME = "experts"
_MAX_TOKENS = 8192
_made: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Nvfp4RoutedExperts]] = WeakKeyDictionary()


def nvfp4_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run a module's experts in NVFP4.

    Args:
        self: with `gate_up_proj` (E, 2I, H), gate first, and `down_proj` (E, H, I), floating.
        hidden_states: (T, H). top_k_index: (T, k) integers. top_k_weights: (T, k).

    Returns:
        (T, H) in the dtype of hidden_states.

    Raises:
        InputError: experts of another form: transposed, interleaved, with biases, with another gating function.

    Numerics: weights by recipe "modelopt"; activations "auto", whose scale is "dynamic" where it is nvfp4.

    Cost: the first call quantises every expert; so does one with more slots, or many more tokens, than any before.
    """
    state = _state_of(self)
    known, experts = _made.get(self, (None, None))
    tokens, top_k = len(hidden_states), top_k_index.shape[-1]
    if experts is None or known != state or top_k > experts.top_k or tokens > experts.max_tokens:
        check_fit(_NAME, self)
        experts = Nvfp4RoutedExperts.from_weights(
            *weights_of(_NAME, self),
            swiglu_limit=getattr(self, "limit", None),
            weighting="after_down",
            top_k=top_k,
            max_tokens=max(_MAX_TOKENS, 2 * tokens if tokens > _MAX_TOKENS else 0),
        )
        _made[self] = state, experts
    return experts(hidden_states, top_k_index, top_k_weights)


def _state_of(module: nn.Module) -> tuple[Any, ...]:
    """Changes when a parameter is replaced, moved to another place, or written to in place."""
    return tuple(
        (t.data_ptr(), t.device, t.dtype, None if t.is_inference() else t._version) for t in module.parameters()
    )


ALL_EXPERTS_FUNCTIONS.register(METHOD, nvfp4_experts_forward)
