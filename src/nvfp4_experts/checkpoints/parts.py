# SPDX-License-Identifier: Apache-2.0
"""One rank's part of a layer's experts out of a checkpoint, and nothing beside it; `parallelize` puts it to work.

    a share of the routed experts    they are read, and no others
    a shard of experts               every one is read, one at a time, and its channels are kept

Which of them a plan asks for: HELD of layers/part.py.
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
from ..layers.part import HELD, PLANS, LayerPart
from ..layers.shards import channels_of, experts_of
from .load import is_fp4, load_kept_expert, load_routed_experts, load_shared_expert, opened, owned_experts, shared_entry
from .plan import check_shared
from .reader import Checkpoint, ExpertEntry
from .router import load_router

KINDS = ("block", "routed", "shared")
_NONE = range(0)  # equal to every run without channels


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
        plan: one of `layers.part.HELD`.
        group: a process group, a mesh of one dimension, or None for the default group.
        kind: "block" (router, routed experts and shared one), or "routed" or "shared" experts alone.
        shared: as for `load_moe`.
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
    checkpoint = opened(path)
    parts: dict[str, Any] = {}
    if kind == "block":
        parts["router"] = load_router(checkpoint, layer, device)
        top_k = parts["router"].top_k
    where = layer, device, max_tokens
    options: dict[str, Any] = {"activations": activations, "activation_scale": activation_scale}
    options |= {"backend": backend, "recipe": recipe}
    of_routed, of_shared = HELD[plan]
    if kind != "shared":
        entries = owned_experts(checkpoint, layer, None)
        mine = experts_of(rank, ranks, len(entries)) if of_routed == "share" else range(len(entries))
        channels = channels_of(rank, ranks, _size(entries[0])) if of_routed == "shard" else None
        more = options | {"experts": mine, "channels": channels, "weighting": weighting, "top_k": top_k}
        parts["routed"] = load_routed_experts(checkpoint, *where, **more) if mine and channels != _NONE else None
        parts["first_expert"] = mine.start
    if kind != "routed" and (entry := shared_entry(checkpoint, layer)) is not None:
        is_whole = of_shared == "whole"
        if shared == "keep" and not is_fp4(entry):
            parts["shared"] = load_kept_expert(checkpoint, *where) if is_whole or rank == 0 else None
        else:
            channels = None if is_whole else channels_of(rank, ranks, _size(entry))
            more = options | {"channels": channels}
            parts["shared"] = load_shared_expert(checkpoint, *where, **more) if channels != _NONE else None
    return LayerPart(plan, rank, ranks, **parts)


def _size(entry: ExpertEntry) -> int:
    return entry.projections["gate"].shape[0]
