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
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ...layers.routed_experts import Nvfp4RoutedExperts
from .config import METHOD
from .rule import check_fit, weights_of

_NAME = "experts"
_MAX_TOKENS = 8192
_made: WeakKeyDictionary[nn.Module, _Made] = WeakKeyDictionary()


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
    made = _made.get(self)
    experts = made.experts if made is not None and made.is_of(self) else None
    tokens, slots = len(hidden_states), top_k_index.shape[-1]
    if experts is None or slots > experts.top_k or tokens > experts.max_tokens:
        check_fit(_NAME, self)
        most_slots, most_tokens = (experts.top_k, experts.max_tokens) if experts is not None else (1, _MAX_TOKENS)
        experts = Nvfp4RoutedExperts.from_weights(
            *weights_of(_NAME, self),
            swiglu_limit=getattr(self, "limit", None),
            weighting="after_down",
            top_k=max(slots, most_slots),
            max_tokens=most_tokens if tokens <= most_tokens else 2 * tokens,
        )
        _made[self] = _Made(experts, self)
    return experts(hidden_states, top_k_index, top_k_weights)


class _Made:
    """Quantised experts, and the parameters they were made from, as they were then."""

    def __init__(self, experts: Nvfp4RoutedExperts, module: nn.Module) -> None:
        self.experts = experts
        self._from = [(ref(parameter), _state_of(parameter)) for parameter in module.parameters()]

    def is_of(self, module: nn.Module) -> bool:
        """Whether the module has the same parameters, in the same place, and nobody has written to them since."""
        now = list(module.parameters())
        return len(now) == len(self._from) and all(
            parameter is known() and _state_of(parameter) == state
            for parameter, (known, state) in zip(now, self._from, strict=True)
        )


def _state_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.device, tensor.dtype, None if tensor.is_inference() else tensor._version


ALL_EXPERTS_FUNCTIONS.register(METHOD, nvfp4_experts_forward)
