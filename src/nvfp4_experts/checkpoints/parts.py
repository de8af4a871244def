# SPDX-License-Identifier: Apache-2.0
"""One rank's part of a layer's experts out of a checkpoint, and nothing beside it; `parallelize` puts it to work.

plan        routed experts                             the shared one
"tp"        every expert is read, its channels kept    read, its channels kept
"ep"        the rank's experts are read                the same
"dispatch"  the same                                   read, kept whole
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..errors import InputError
from ..kernels.target import usable_device
from ..layers.checks import checked_choice
from ..layers.collectives import checked_group
from ..layers.part import PLANS, LayerPart
from ..layers.shards import channels_of, experts_of
from .load import is_fp4, load_kept_expert, load_routed_experts, load_shared_expert, owned_experts, shared_entry
from .plan import check_shared
from .reader import Checkpoint, open_checkpoint
from .router import load_router

KINDS = ("block", "routed", "shared")


def load_part(
    path: str | os.PathLike[str] | Checkpoint,
    layer: int,
    plan: str,
    group: ProcessGroup | DeviceMesh | None = None,
    device: str | torch.device = "cpu",
    max_tokens: int = 8192,
    *,
    kind: str = "block",
    shared: str = "nvfp4",
    activations: str = "auto",
    activation_scale: str | None = None,
    backend: str = "auto",
    recipe: str = "modelopt",
    weighting: str | None = None,
    top_k: int | None = None,
) -> LayerPart:
    """This rank's part of one layer of a checkpoint.

    Args:
        path, layer, device, max_tokens, activations, activation_scale, backend, recipe: as for `load_shared_expert`.
        plan: one of `layers.part.PLANS`.
        group: a process group, a mesh of one dimension, or None for the default group.
        kind: "block" (router, routed experts and shared one), or "routed" or "shared" experts alone.
        shared: as for `load_moe`. One that is kept as it is stored has no shards: under "tp" and "ep" the first rank
            has it, whole.
        weighting, top_k: as for `load_routed_experts`; of a whole block top_k is the router's.

    Returns:
        A LayerPart on `device`, for `parallelize` with the same group and plan. A rank may have nothing.

    Raises:
        InputError: a plan, kind or `shared` that is none; no process group; or a lone shared expert under "dispatch",
            which every rank has whole.
        And what `load_router`, `load_routed_experts` and `load_shared_expert` raise.

    Numerics: the part is a slice of what the whole layer would be: scales are found on whole weights.

    Cost: that of `load_routed_experts`: one expert at a time beside what is packed. Other ranks' experts are not read.
    """
    checked_choice("plan", plan, PLANS)
    checked_choice("kind", kind, KINDS)
    check_shared(shared)
    if plan == "dispatch" and kind == "shared":
        raise InputError("kind", 'must be "block" or "routed" under "dispatch"', repr(kind), "use load_shared_expert")
    _, rank, ranks = checked_group(group)
    device = usable_device(device)
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    parts: dict[str, Any] = {}
    if kind == "block":
        parts["router"] = load_router(checkpoint, layer, device)
        top_k = parts["router"].top_k
    where = layer, device, max_tokens
    options: dict[str, Any] = {"activations": activations, "activation_scale": activation_scale}
    options |= {"backend": backend, "recipe": recipe}
    if kind != "shared":
        entries = owned_experts(checkpoint, layer, None)
        mine, channels = range(len(entries)), None
        if plan == "tp":
            channels = channels_of(rank, ranks, entries[0].projections["gate"].shape[0])
        else:
            mine = experts_of(rank, ranks, len(entries))
        of_routed = options | {"experts": mine, "channels": channels, "weighting": weighting, "top_k": top_k}
        is_there = len(mine if channels is None else channels) > 0
        parts["routed"] = load_routed_experts(checkpoint, *where, **of_routed) if is_there else None
        parts["first_expert"] = mine.start
    if kind != "routed" and (entry := shared_entry(checkpoint, layer)) is not None:
        if shared == "keep" and not is_fp4(entry):
            has_it = rank == 0 or plan == "dispatch"
            parts["shared"] = load_kept_expert(checkpoint, *where) if has_it else None
        else:
            size = entry.projections["gate"].shape[0]
            channels = None if plan == "dispatch" else channels_of(rank, ranks, size)
            is_there = channels is None or len(channels) > 0
            parts["shared"] = load_shared_expert(checkpoint, *where, channels=channels, **options) if is_there else None
    return LayerPart(plan, rank, ranks, **parts)
