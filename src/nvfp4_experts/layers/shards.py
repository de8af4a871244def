# SPDX-License-Identifier: Apache-2.0
"""What one of several ranks holds of an expert layer: a part of every expert, or some whole experts.

    shard r of R    channels [first, last) of I, multiples of 16: those rows of gate and up, those columns of down
    share r of R    experts [first, last) of E

Both are as even as whole blocks (or experts) allow, the larger ones first, and may be empty. Codes and block scales are
the bytes of the whole tensor and the global scale is the whole tensor's: a shard is a slice, nothing is quantised anew.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from ..errors import InputError, LayoutError
from ..formats.codes import BLOCK_SIZE
from ..formats.nvfp4 import Nvfp4Tensor
from ..formats.stack import Nvfp4Stack
from .kept_expert import KeptSharedExpert
from .routed_experts import Nvfp4RoutedExperts
from .shared_expert import Nvfp4SharedExpert

_WITH_MODES = (Nvfp4SharedExpert, Nvfp4RoutedExperts)
_Weight = TypeVar("_Weight", Nvfp4Tensor, Nvfp4Stack)
_Layer = TypeVar("_Layer", Nvfp4SharedExpert, Nvfp4RoutedExperts)


def even_part(count: int, rank: int, ranks: int) -> range:
    """Which of `count` things a rank has: runs as even as can be, the longer ones first.

    Raises:
        InputError: rank outside [0, ranks).
    """
    if not 0 <= rank < ranks:
        raise InputError("rank", f"must be in [0, {ranks})", rank, "count ranks from 0")
    size, longer = divmod(count, ranks)
    first = rank * size + min(rank, longer)
    return range(first, first + size + (rank < longer))


def experts_of(rank: int, ranks: int, num_experts: int) -> range:
    """The experts of a rank's share; a loader need read no others. Raises as `even_part`."""
    return even_part(num_experts, rank, ranks)


def channels_of(rank: int, ranks: int, intermediate_size: int) -> range:
    """The channels of a rank's shard, whole blocks of 16; a loader need read no others. Raises as `even_part`."""
    blocks = even_part(intermediate_size // BLOCK_SIZE, rank, ranks)
    return range(BLOCK_SIZE * blocks.start, BLOCK_SIZE * blocks.stop)


def cut_channels(gate: _Weight, up: _Weight, down: _Weight, channels: range) -> tuple[_Weight, _Weight, _Weight]:
    """Rows of gate and up, columns of down, in memory of their own.

    Args:
        gate, up: (I, H) or (E, I, H) NVFP4.
        down: (H, I) or (E, H, I).
        channels: a non-empty run of [0, I) whose ends are multiples of 16, the blocks in which down is scaled.

    Raises:
        LayoutError: another run.
    """
    size, first, last = gate.shape[-2], channels.start, channels.stop
    if first % BLOCK_SIZE or last % BLOCK_SIZE or channels.step != 1 or not 0 <= first < last <= size:
        rule = f"must be a run of [0, {size}) that begins and ends at multiples of {BLOCK_SIZE}"
        raise LayoutError("channels", rule, channels, "use channels_of()")
    rows, columns = slice(first, last), slice(None)
    return _cut(gate, rows, columns), _cut(up, rows, columns), _cut(down, columns, rows)


def _cut(w: _Weight, rows: slice, columns: slice) -> _Weight:
    """A sub-matrix, copied, so that the whole can be freed."""

    def of(values_a_column: int) -> tuple[Any, ...]:
        bounds = (
            None if columns.start is None else slice(columns.start // values_a_column, columns.stop // values_a_column)
        )
        return ..., rows, bounds or columns

    return type(w)(w.codes[of(2)].clone(), w.block_scales[of(BLOCK_SIZE)].clone(), w.global_scale)


def shard_of(layer: _Layer, rank: int, ranks: int) -> _Layer | None:
    """A rank's shard of a shared expert, or of each of some routed experts, with the options of the whole.

    Returns:
        A layer of channels_of(rank, ranks, I), or None where there are fewer blocks of 16 than ranks.

    Numerics: what gate and up give is that of the whole, in the rank's channels. What is measured on h ("dynamic" and
        "per_token" scales, fp8's scale of a row) is measured on these channels alone. Static scales are the whole's.
    Cost: unpacks the whole, packs the shard.

    Raises:
        InputError: rank outside [0, ranks).
    """
    channels = channels_of(rank, ranks, layer.intermediate_size)
    if not channels:
        return None
    weights = cut_channels(*layer._projections(), channels)
    return type(layer)(*weights, **_options(layer), input_scale=layer._input_scale, hidden_scale=layer._hidden_scale)


def share_of(experts: Nvfp4RoutedExperts, rank: int, ranks: int) -> Nvfp4RoutedExperts | None:
    """A rank's share of routed experts, with the options of the whole.

    Returns:
        A layer of experts_of(rank, ranks, E), whose indices count from the first of them; or None where there are fewer
        experts than ranks.

    Cost: unpacks the whole, packs the share.

    Raises:
        InputError: rank outside [0, ranks).
    """
    mine = experts_of(rank, ranks, experts.num_experts)
    if not mine:
        return None
    run = slice(mine.start, mine.stop)
    gate, up, down = (
        Nvfp4Stack(w.codes[run].clone(), w.block_scales[run].clone(), w.global_scale[run].clone())
        for w in experts._projections()
    )
    input_scale, hidden_scale = (None if s is None else s[run] for s in (experts.input_scale, experts.hidden_scale))
    return Nvfp4RoutedExperts(gate, up, down, **_options(experts), input_scale=input_scale, hidden_scale=hidden_scale)


def _options(layer: Nvfp4SharedExpert | Nvfp4RoutedExperts) -> dict[str, Any]:
    names = ["swiglu_limit", "activations", "activation_scale", "max_tokens"]
    if isinstance(layer, Nvfp4RoutedExperts):
        names += ["weighting", "top_k"]
    return {name: getattr(layer, name) for name in names} | {"backend": layer._backend_choice}


def facts_of(layer: Nvfp4SharedExpert | KeptSharedExpert | Nvfp4RoutedExperts | None) -> dict[str, Any] | None:
    """What the parts of a layer must have alike on all ranks; None of no layer."""
    if layer is None:
        return None
    if isinstance(layer, KeptSharedExpert):
        modes = {"activations": "bf16", "activation_scale": "dynamic"}
        return modes | {name: getattr(layer, name) for name in ("hidden_size", "swiglu_limit", "max_tokens")}
    return {"hidden_size": layer.hidden_size} | {n: v for n, v in _options(layer).items() if n != "backend"}


def modes_of(*layers: nn.Module | None) -> list[tuple[str, str]]:
    """(activations, activation_scale) of each of the parts that have a choice."""
    return [(layer.activations, layer.activation_scale) for layer in layers if isinstance(layer, _WITH_MODES)]


def check_modes(agreed: list[tuple[str, str]], *layers: nn.Module | None) -> None:
    """Raise InputError if a part has changed its activations since the ranks agreed on them."""
    if (now := modes_of(*layers)) != agreed:
        way_out = "choose activations before parallelize(), on every rank"
        raise InputError("activations", f"must be those that the ranks agreed on, {agreed}", now, way_out)
