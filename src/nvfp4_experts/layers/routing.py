# SPDX-License-Identifier: Apache-2.0
"""Which experts a token goes to, and with what weight; all in fp32.

    scores[t]  = score(x[t] @ W.T)                           sqrt(softplus(.)), sigmoid or softmax over E
    indices[t] = the k largest of scores[t] + bias, largest first; or tid2eid[token id], which looks at no score
    weights[t] = scores[t, indices[t]]                       the bias chooses and does not weigh
                 / (their sum + 1e-20)                       if normalised
                 * scaling_factor

Source: DeepSeek-V4's inference code; transformers' deepseek_v4 (which has the 1e-20).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError, LayoutError
from ..kernels.ops import without_autocast
from .checks import check_hidden_states, checked_choice, checked_count
from .packed import move_buffers

_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrtsoftplus": lambda logits: functional.softplus(logits).sqrt(),
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
}
SCORINGS = tuple(_SCORES)
_SUM_FLOOR = 1e-20
_TABLE_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_ID_DTYPES = (torch.int32, torch.int64)


def scores_of(logits: Tensor, scoring: str) -> Tensor:
    """(T, E) logits to scores, fp32; scoring is one of SCORINGS."""
    return _SCORES[checked_choice("scoring", scoring, SCORINGS)](logits.float())


def largest_scores(scores: Tensor, bias: Tensor | None, top_k: int) -> Tensor:
    """(T, k) int64: the experts of the k largest scores + bias, largest first (of equals, the one torch.topk takes)."""
    return torch.topk(scores if bias is None else scores + bias, top_k, dim=-1).indices


def weights_of(scores: Tensor, indices: Tensor, normalise: bool, scaling_factor: float) -> Tensor:
    """(T, k) fp32 routing weights of the chosen experts."""
    weights = scores.gather(-1, indices)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + _SUM_FLOOR)
    return weights * scaling_factor


class Router(nn.Module):
    """Hidden states (and, if it has a table, token ids) to experts and weights, as the module docstring says.

    Args:
        weight: (E, H) floating, kept in its dtype and used in fp32.
        top_k: k, at most E.
        scoring: one of SCORINGS.
        bias: (E,) added to scores for the choice alone; or None.
        tid2eid: (vocabulary, k) integers in [0, E), the experts of each token id; or None. With a table there is no
            bias. Building the router reads it on the host.
        normalise: whether a token's weights are divided by their sum.
        scaling_factor: what multiplies them (`routed_scaling_factor`).

    Raises:
        LayoutError: shapes that do not fit together.
        InputError: an option outside its range, or a table that names an expert outside [0, E).

    Numerics: NaN in x gives NaN weights and some k experts. `.half()` and `.to(dtype)` leave all tensors alone, and
        torch.autocast changes nothing: the matmul is fp32.
    """

    weight: Tensor
    bias: Tensor | None
    tid2eid: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        top_k: int,
        *,
        scoring: str = "sqrtsoftplus",
        bias: Tensor | None = None,
        tid2eid: Tensor | None = None,
        normalise: bool = True,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
            got = f"{tuple(weight.shape)} {weight.dtype}"
            raise LayoutError("weight", "must be (E, H), floating", got, "give the router's weight, experts first")
        self.num_experts, self.hidden_size = weight.shape
        self.top_k = checked_count("top_k", top_k, "give the number of experts a token goes to")
        if top_k > self.num_experts:
            raise InputError("top_k", f"must be at most E={self.num_experts}", top_k, "choose fewer")
        if bias is not None and tuple(bias.shape) != (self.num_experts,):
            raise LayoutError("bias", f"must be ({self.num_experts},)", tuple(bias.shape), "give one for each expert")
        if tid2eid is not None and (tid2eid.shape[1:] != (top_k,) or tid2eid.dtype not in _TABLE_DTYPES):
            got = f"{tuple(tid2eid.shape)} {tid2eid.dtype}"
            raise LayoutError("tid2eid", f"must be (vocabulary, {top_k}), integers", got, "give one row per token id")
        if bias is not None and tid2eid is not None:
            raise InputError("bias", "must be None with tid2eid", "both", "a table chooses without scores")
        if tid2eid is not None and tid2eid.numel() and not tid2eid.is_meta:  # meta has no values to look at
            first, last = int(tid2eid.min()), int(tid2eid.max())
            if first < 0 or last >= self.num_experts:
                rule = f"must name experts 0..{self.num_experts - 1}"
                raise InputError("tid2eid", rule, f"{first}..{last}", "give the table of this weight's model")
        self.scoring = checked_choice("scoring", scoring, SCORINGS)
        self.normalise, self.scaling_factor = normalise, float(scaling_factor)
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.register_buffer("tid2eid", None if tid2eid is None else tid2eid.long())

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose.

        Args:
            x: (..., H) bf16, fp16 or fp32 on the device of the weight.
            token_ids: (...) int32 or int64 in [0, vocabulary) on the device of x, needed by a router with a table and
                by no other.

        Returns:
            indices (..., k) int64 and weights (..., k) fp32.

        Raises:
            InputError: x or token_ids does not fit. An id outside the table, also one below 0, is torch's own error:
                IndexError on a CPU, a device-side assertion on a GPU.
        """
        check_hidden_states(x, self.hidden_size, None, self.weight.device)
        with without_autocast(x.device):
            logits = functional.linear(x.float(), self.weight.float())
        scores = scores_of(logits, self.scoring)
        if self.tid2eid is None:
            indices = largest_scores(scores, self.bias, self.top_k)
        else:
            if token_ids is None or token_ids.shape != x.shape[:-1] or token_ids.dtype not in _ID_DTYPES:
                got = "none" if token_ids is None else f"{tuple(token_ids.shape)} {token_ids.dtype}"
                rule = f"must be int32 or int64 {tuple(x.shape[:-1])}, since this layer routes by token id"
                raise InputError("token_ids", rule, got, "pass the input ids of the batch")
            if token_ids.device != x.device:
                raise InputError("token_ids", f"must be on {x.device}", token_ids.device, "move them with .to()")
            # Not by subscript, which counts negative ids from the end and takes uint8 for a mask.
            indices = functional.embedding(token_ids, self.tid2eid)
        return indices, weights_of(scores, indices, self.normalise, self.scaling_factor)

    def extra_repr(self) -> str:
        how = "by token id" if self.tid2eid is not None else "biased" if self.bias is not None else "by score"
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, {how}, scoring={self.scoring!r}, "
            f"normalise={self.normalise}, scaling_factor={self.scaling_factor}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        move_buffers(self, fn)
        return self
