# SPDX-License-Identifier: Apache-2.0
"""Loads a layer's router: path and layer number in, a `layers.routing.Router` out.

    tensor     names                                                                        shape
    weight     <block>.gate.weight                                                          (E, H)
    bias       <block>.gate.bias, .e_score_correction_bias         layers that choose by score   (E,)
    tid2eid    <block>.gate.tid2eid                                layers that go by token id    (vocabulary, k)

    setting    config.json
    k          num_experts_per_tok
    scoring    scoring_func
    factor     routed_scaling_factor
    normalise  norm_topk_prob, default true: DeepSeek-V4's code has no other way

Which layers go by token id is told by their tensors; `num_hash_layers` and `mlp_layer_types` are checked against them.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from ..kernels.target import usable_device
from ..layers.routing import SCORINGS, Router
from .errors import (
    AmbiguousCheckpointError,
    InvalidConfigError,
    InvalidRouterError,
    MissingConfigError,
    MissingTensorError,
    UnsupportedRouterError,
    WrongDtypeError,
    WrongShapeError,
)
from .reader import CONFIG_FILE, Checkpoint, open_checkpoint
from .safetensors_file import TensorInfo


def load_router(path: str | os.PathLike[str] | Checkpoint, layer: int, device: str | torch.device = "cpu") -> Router:
    """The router of one layer of a checkpoint.

    Args:
        path: directory, .safetensors file or hub id; or a checkpoint already open.
        layer: layer number, as in the tensor names.
        device: where its tensors go.

    Returns:
        A Router on `device`; its weight stays in the dtype it is stored in.

    Raises:
        MissingTensorError: no router, no selection bias where the model has one, no table where the config names one.
        WrongDtypeError, WrongShapeError, InvalidRouterError: tensors that are no router's.
        AmbiguousCheckpointError: a tensor under two names, or both a table and a bias.
        MissingConfigError, InvalidConfigError: a setting that is absent or out of range.
        UnsupportedRouterError: experts chosen within groups (`n_group` above 1).

    Numerics: see `layers.routing`.

    Cost: reads the router's tensors and nothing else.
    """
    device = usable_device(device)
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    found = _find_tensors(checkpoint, layer)
    top_k = experts_per_token(checkpoint)
    _check_groups(checkpoint)
    _check_choice(checkpoint, layer, found)
    _check_shapes(checkpoint, found, top_k)
    tensors = {name: checkpoint.read(info.name) for name, info in found.items()}
    if "tid2eid" in tensors:
        _check_table(found["tid2eid"].name, tensors["tid2eid"], len(tensors["weight"]))
    router = Router(
        tensors.pop("weight"),
        top_k,
        scoring=_required(checkpoint, "scoring_func", f"must be one of {SCORINGS}", lambda v: v in SCORINGS),
        normalise=_normalises(checkpoint),
        scaling_factor=_required(checkpoint, "routed_scaling_factor", "must be finite and positive", _is_positive),
        **tensors,
    )
    return router.to(device)


def experts_per_token(checkpoint: Checkpoint) -> int:
    """k, `num_experts_per_tok` of config.json.

    Raises:
        MissingConfigError, InvalidConfigError: it is absent, or no count.
    """
    count = _required(
        checkpoint, "num_experts_per_tok", "must be a whole number of at least 1", lambda v: type(v) is int and v > 0
    )
    return int(count)


# --- settings ------------------------------------------------------------------------------------------------


def _required(checkpoint: Checkpoint, key: str, rule: str, fits: Any) -> Any:
    value = checkpoint.setting(key)
    if value is None:
        got = f"no {key}" if checkpoint.config else f"no {CONFIG_FILE}"
        where, way_out = str(checkpoint.directory), "fetch the model's own config.json"
        raise MissingConfigError(where, f"{CONFIG_FILE} must tell {key}", got, way_out)
    if not fits(value):
        raise InvalidConfigError(key, rule, value, f"correct {CONFIG_FILE}")
    return value


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _normalises(checkpoint: Checkpoint) -> bool:
    value = checkpoint.setting("norm_topk_prob")
    if value not in (None, True, False):
        raise InvalidConfigError("norm_topk_prob", "must be true or false", value, f"correct {CONFIG_FILE}")
    return value is not False


def _check_groups(checkpoint: Checkpoint) -> None:
    groups = checkpoint.setting("n_group")
    if groups not in (None, 0, 1) and groups != checkpoint.setting("topk_group"):
        rule, way_out = (
            "experts must be chosen from all of them",
            "build a Router of your own and an Nvfp4MoE around it",
        )
        raise UnsupportedRouterError("n_group", rule, f"{groups} groups", way_out)


def _check_choice(checkpoint: Checkpoint, layer: int, found: dict[str, TensorInfo]) -> None:
    """A layer has a table or a bias, as its model and its config have it."""
    where = f"router of layer {layer}"
    if "tid2eid" in found and "bias" in found:
        got = f"{found['tid2eid'].name} and {found['bias'].name}"
        raise AmbiguousCheckpointError(where, "must choose by token id or by score", got, "remove the tensor of one")
    kinds, hashed = checkpoint.setting("mlp_layer_types"), checkpoint.setting("num_hash_layers")
    by_table = isinstance(hashed, int) and layer < hashed
    by_table |= isinstance(kinds, list) and layer < len(kinds) and kinds[layer] == "hash_moe"
    if by_table and "tid2eid" not in found:
        rule = f"{CONFIG_FILE} says that layer {layer} goes by token id, so tid2eid must be there"
        raise MissingTensorError(where, rule, sorted(found), "fetch the shard that holds it")
    biased = checkpoint.setting("topk_method") == "noaux_tc" or checkpoint.setting("model_type") == "deepseek_v4"
    if biased and not found.keys() & {"tid2eid", "bias"}:
        rule = "must have the bias by which this model chooses (gate.bias or e_score_correction_bias)"
        raise MissingTensorError(where, rule, sorted(found), "fetch the shard that holds it")


# --- tensors -------------------------------------------------------------------------------------------------


def _find_tensors(checkpoint: Checkpoint, layer: int) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for role, info in checkpoint.routers.get(layer, []):
        if role.name in found:
            got = f"{found[role.name].name} and {info.name}"
            raise AmbiguousCheckpointError(f"router of layer {layer}", f"must have one {role.name}", got, "remove one")
        if info.dtype not in role.dtypes:
            rule = f"the {role.name} of a router must be {' or '.join(role.dtypes)}"
            raise WrongDtypeError(info.name, rule, info.dtype, "export the checkpoint again")
        found[role.name] = info
    if "weight" not in found:
        layers = sorted(checkpoint.routers)
        rule = f"must have a gate.weight, as layers {layers} have" if layers else "must have a gate.weight"
        raise MissingTensorError(f"router of layer {layer}", rule, sorted(found), "fetch the shard that holds it")
    return found


def _check_shapes(checkpoint: Checkpoint, found: dict[str, TensorInfo], top_k: int) -> None:
    experts, hidden = (checkpoint.setting(key) for key in ("n_routed_experts", "hidden_size"))
    shape = found["weight"].shape
    fits = len(shape) == 2 and 0 not in shape and experts in (None, shape[0]) and hidden in (None, shape[1])
    wanted: dict[str, tuple[bool, str]] = {"weight": (fits, f"must be (E, H) = ({experts or 'E'}, {hidden or 'H'})")}
    if "bias" in found:
        wanted["bias"] = found["bias"].shape == shape[:1], f"must be {shape[:1]} beside a weight {shape}"
    if "tid2eid" in found:
        table = found["tid2eid"].shape
        wanted["tid2eid"] = len(table) == 2 and table[1:] == (top_k,), f"must be (vocabulary, {top_k})"
    for name, (fits, rule) in wanted.items():
        if not fits:
            got = found[name].shape
            raise WrongShapeError(found[name].name, rule, got, "the shard or config.json is another model's")
    if top_k > shape[0]:
        rule = f"must be at most the {shape[0]} experts of {found['weight'].name}"
        raise InvalidConfigError("num_experts_per_tok", rule, top_k, f"correct {CONFIG_FILE}")


def _check_table(name: str, table: Tensor, experts: int) -> None:
    if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < experts:
        got = f"{int(table.min())}..{int(table.max())}"
        raise InvalidRouterError(name, f"must name experts 0..{experts - 1}", got, "fetch the shard again")
