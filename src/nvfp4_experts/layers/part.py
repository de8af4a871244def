# SPDX-License-Identifier: Apache-2.0
"""What one rank holds of an expert layer under a plan (HELD, below), before the ranks are brought together.

Shards and shares: shards.py. `parallelize` makes a part of each whole layer it finds; `checkpoints.load_part` reads one
from disk, and nothing beside it.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from ..errors import InputError
from .checks import checked_choice
from .kept_expert import KeptSharedExpert
from .moe import Nvfp4MoE
from .routed_experts import Nvfp4RoutedExperts
from .shards import experts_of, shard_of, share_of
from .shared_expert import Nvfp4SharedExpert

# What a rank holds: of the routed experts, and of the shared one. A shared expert that is kept as it is stored has no
# shards: where others are sharded, the first rank has it, whole.
HELD = {"tp": ("shard", "shard"), "ep": ("share", "shard"), "dispatch": ("share", "whole")}
PLANS = tuple(HELD)


class LayerPart(nn.Module):
    """A rank's part of a layer: it holds weights, and cannot be called until `parallelize` has put it to work.

    Args:
        plan: one of HELD.
        rank, ranks: whose part it is.
        routed, shared: what the rank holds; None where it has nothing.
        router: of a whole block, or None.
        first_expert: what the first of `routed` is called in the indices.

    Raises:
        InputError: an unknown plan; or, under "dispatch", a shared expert beside routed ones without their router: only
            of a whole block are the two added.
    """

    def __init__(
        self,
        plan: str,
        rank: int,
        ranks: int,
        *,
        routed: Nvfp4RoutedExperts | None = None,
        shared: Nvfp4SharedExpert | KeptSharedExpert | None = None,
        router: nn.Module | None = None,
        first_expert: int = 0,
    ) -> None:
        super().__init__()
        checked_choice("plan", plan, PLANS)
        if plan == "dispatch" and router is None and shared is not None:
            raise InputError("shared", "must be whole and by itself, or in a block", "no router", "use it as it is")
        self.plan, self.rank, self.ranks, self.first_expert = plan, rank, ranks, first_expert
        self.routed, self.shared, self.router = routed, shared, router

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Raise InputError: alone a part gives no result."""
        got, way_out = f"the part of rank {self.rank}", f"call parallelize(model, plan={self.plan!r}) on every rank"
        raise InputError("an expert layer over ranks", "must be parallelized before it is called", got, way_out)

    def extra_repr(self) -> str:
        return f"plan={self.plan!r}, rank={self.rank} of {self.ranks}, first_expert={self.first_expert}"


def part_of(layer: Nvfp4SharedExpert | Nvfp4RoutedExperts | Nvfp4MoE, plan: str, rank: int, ranks: int) -> LayerPart:
    """A rank's part of a whole layer.

    Args:
        layer: with the same weights on every rank; not a lone shared expert under "dispatch", which stays whole.
        plan: one of HELD.
        rank, ranks: whose part.

    Raises:
        InputError: rank outside [0, ranks), or as `LayerPart`.

    Cost: unpacks the layer and packs the part, in memory of its own.
    """
    parts: dict[str, Any] = {"routed": layer} if isinstance(layer, Nvfp4RoutedExperts) else {"shared": layer}
    if isinstance(layer, Nvfp4MoE):
        parts = {"router": layer.router, "routed": layer.routed, "shared": layer.shared}
    shared, routed = parts.get("shared"), parts.get("routed")
    of_routed, of_shared = HELD[plan]
    if routed is not None and of_routed == "shard":
        parts["routed"] = shard_of(routed, rank, ranks)
    elif routed is not None:
        parts["routed"] = share_of(routed, rank, ranks)
        parts["first_expert"] = experts_of(rank, ranks, routed.num_experts).start
    if shared is not None and of_shared == "shard":
        is_kept = isinstance(shared, KeptSharedExpert)
        parts["shared"] = (shared if rank == 0 else None) if is_kept else shard_of(shared, rank, ranks)
    return LayerPart(plan, rank, ranks, **parts)
