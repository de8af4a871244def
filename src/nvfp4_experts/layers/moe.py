# SPDX-License-Identifier: Apache-2.0
"""The whole mixture-of-experts block: router, routed experts, shared expert.

indices, weights = router(x, token_ids)
y                = (sum over slots of routed experts) + shared(x)        fp32, rounded once to the dtype of x
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import InputError, LayoutError
from .checks import check_out
from .kept_expert import KeptSharedExpert
from .packed import NoBackward
from .routed_experts import Nvfp4RoutedExperts
from .routing import Router
from .shared_expert import Nvfp4SharedExpert


class Nvfp4MoE(nn.Module):
    """Router, routed experts and an optional shared expert in one call.

    Args:
        router: a `layers.routing.Router`, or any module that gives (indices (..., k), weights (..., k)) for
            (x, token_ids).
        routed: the routed experts; each has its own activation format and so may the shared one.
        shared: the shared expert, in NVFP4 or kept as it is stored, or None. It is added unweighted.

    Raises:
        LayoutError: parts for different hidden sizes or numbers of experts.
        InputError: the router chooses more experts than `routed` takes.

    Numerics: the routed sum and the shared expert's result are fp32, added in this order and rounded once.
        torch.autocast changes nothing, but in a router that is not a `Router`.

    Cost: that of its parts; where they have one size and format, on a GPU in one launch while tokens are few, on a CPU
        in one native call. Inference only.
    """

    def __init__(
        self,
        router: nn.Module,
        routed: Nvfp4RoutedExperts,
        shared: Nvfp4SharedExpert | KeptSharedExpert | None = None,
    ) -> None:
        super().__init__()
        sizes = {"routed": routed.hidden_size}
        if shared is not None:
            sizes["shared"] = shared.hidden_size
        if isinstance(router, Router):
            sizes["router"] = router.hidden_size
            if router.num_experts != routed.num_experts:
                got = f"{router.num_experts} and {routed.num_experts}"
                way_out = "for a share of the experts, call router and routed yourself, with indices counted from it"
                raise LayoutError("router and routed", "must have one number of experts", got, way_out)
            if router.top_k > routed.top_k:
                rule = f"must choose at most the top_k={routed.top_k} of the routed experts"
                raise InputError("router", rule, router.top_k, "build them with a larger top_k")
        if len(set(sizes.values())) > 1:
            raise LayoutError("parts", "must have one hidden size", sizes, "build them from one layer's weights")
        self.router, self.routed, self.shared = router, routed, shared
        self._prepare()

    def forward(self, x: Tensor, token_ids: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Run the block.

        Args:
            x: (..., H) bf16, fp16 or fp32 on the device of the weights.
            token_ids: (...) int32 or int64 on the device of x, for a router that goes by token id.
            out: as for `Nvfp4RoutedExperts`.

        Returns:
            (..., H) in the dtype of x, or `out`.

        Raises:
            InputError, CalibrationError: as its parts.
        """
        if out is not None:
            check_out(x, out)
        y = self._run(x, token_ids, out)
        wants_grad = out is None and x.requires_grad and torch.is_grad_enabled()
        return NoBackward.apply(y, "mixture of experts", x) if wants_grad else y

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights its experts keep on their device."""
        return self.routed.resident_bytes + (0 if self.shared is None else self.shared.resident_bytes)

    @torch.no_grad()
    def _run(self, x: Tensor, token_ids: Tensor | None, out: Tensor | None) -> Tensor:
        indices, weights = self.router(x, token_ids)
        if self.shared is None:
            return self.routed(x, indices, weights, out)
        if isinstance(self.routed, Nvfp4RoutedExperts) and isinstance(self.shared, Nvfp4SharedExpert):
            return self.routed.with_shared(x, indices, weights, self.shared, out)
        total = self.routed(x, indices, weights, torch.empty(x.shape, device=x.device))
        total += self.shared(x, torch.empty_like(total))
        return total.to(x.dtype) if out is None else out.copy_(total)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Nvfp4MoE:
        super()._apply(fn, recurse)
        self._prepare()
        return self

    def _prepare(self) -> None:
        if isinstance(self.routed, Nvfp4RoutedExperts) and isinstance(self.shared, Nvfp4SharedExpert):
            self.routed.prepare_with(self.shared)
