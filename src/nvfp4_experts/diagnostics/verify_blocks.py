# SPDX-License-Identifier: Apache-2.0
"""How far whole blocks (router, routed experts, shared expert) are from those they were made from, layer by layer.

    routes    the share of tokens that both routers send to the same experts
    outputs   y = block(x) in each activation format, against two truths in exact fp32 math, as in verify.py:
              the original's router and weights, and the checkpoint's own, as they are stored

A block passes when every token goes where the original's does, and the rel-L2 of its bf16-activation output against the
original is at most `max_error`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..checkpoints.load import load_moe
from ..checkpoints.projections import load_projection
from ..checkpoints.reader import Checkpoint, ExpertEntry, open_checkpoint
from ..checkpoints.router import load_router
from ..errors import CheckpointError, InputError
from ..kernels.target import usable_device
from ..layers.moe import Nvfp4MoE
from ..layers.shared_expert import Nvfp4SharedExpert
from .hidden_states import synthetic_hidden_states, synthetic_token_ids
from .metrics import ErrorFigures, compare
from .verify import DEFAULT_MAX_ERROR, FORMATS, OutputError, exact_expert
from .weights import values

ProgressCallback = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BlockVerification:
    """Everything found out about one block. exact: what the stored weights alone cost, in exact math."""

    layer: int
    same_routes: float
    exact: ErrorFigures
    outputs: list[OutputError]

    @property
    def bound_figure(self) -> ErrorFigures:
        """What `max_error` bounds: the bf16-activation output against the original."""
        return next(output.against_original for output in self.outputs if output.activations == "bf16")

    def within(self, max_error: float) -> bool:
        """Whether the block passes; NaN does not."""
        return self.same_routes == 1 and self.bound_figure.within(max_error)

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "bound_figure": self.bound_figure.rel_l2}


@dataclass(frozen=True)
class BlocksReport:
    """The verdict and everything behind it."""

    checkpoint: str
    original: str
    shared: str
    hidden_states: str
    tokens: int
    max_error: float
    blocks: list[BlockVerification] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(block.within(self.max_error) for block in self.blocks)

    def to_dict(self) -> dict[str, object]:
        return {
            "checkpoint": self.checkpoint, "original": self.original, "shared": self.shared,
            "hidden_states": self.hidden_states, "tokens": self.tokens, "max_error": self.max_error,
            "passed": self.passed, "blocks": [block.to_dict() for block in self.blocks],
        }  # fmt: skip


def verify_blocks(
    checkpoint: str,
    original: str,
    *,
    shared: str = "nvfp4",
    layers: list[int] | None = None,
    hidden_states: Tensor | None = None,
    tokens: int = 64,
    seed: int = 0,
    max_error: float = DEFAULT_MAX_ERROR,
    device: str = "cpu",
    backend: str = "auto",
    progress: ProgressCallback | None = None,
) -> BlocksReport:
    """Compare the blocks of a checkpoint with its original's; see the module docstring for what is compared.

    Args:
        checkpoint, original: directories or hub ids, in any dialect the reader knows.
        shared: how the checkpoint's shared experts run, see `load_moe`.
        layers: which layers; None is all that have routed experts.
        hidden_states: (..., H) for every layer; None draws (tokens, H) of N(0, 1) from `seed`. Token ids, where a
            layer routes by them, are drawn from `seed`.
        max_error, device, backend: as for `verify_checkpoint`.
        progress: called with (layers done, layers in all, name).

    Raises:
        CheckpointError: either cannot be read, or the original lacks an expert.
        InputError: no layer to compare, or hidden states that do not fit.
        UnsupportedError: a device or backend that does not work here.

    Cost: one layer's routed experts packed, and one expert in fp32 at a time; both checkpoints' experts that the rows
        go to are read, and decoded, once.
    """
    usable_device(device)
    ours, theirs = open_checkpoint(checkpoint), open_checkpoint(original)
    known = sorted({entry.layer for entry in ours.experts if entry.kind == "routed"})
    if absent := sorted(set(layers or ()) - set(known)) or not known:
        raise InputError("layers", f"must have routed experts, as {known} do", absent, "choose from these")
    count = tokens if hidden_states is None else hidden_states.numel() // max(hidden_states.shape[-1], 1)
    described = f"N(0, 1), seed {seed}" if hidden_states is None else "given"
    found = []
    chosen = known if layers is None else layers
    for done, layer in enumerate(chosen):
        if progress:
            progress(done, len(chosen), f"layer {layer}")
        options = {"shared": shared, "activations": "bf16", "backend": backend}
        block = load_moe(ours, layer, device, max(count, 1), **options)
        hidden = block.routed.hidden_size
        x = synthetic_hidden_states(tokens, hidden, seed) if hidden_states is None else hidden_states
        if x.shape[-1] != hidden:
            rule = f"must be (..., {hidden}) for layer {layer}"
            raise InputError("hidden states", rule, tuple(x.shape), "check the layer")
        found.append(_verify_block(ours, theirs, layer, block, x.reshape(-1, hidden).float().to(device), seed))
    return BlocksReport(str(ours.path), str(theirs.path), shared, described, count, max_error, found)


def _verify_block(
    ours: Checkpoint, theirs: Checkpoint, layer: int, block: Nvfp4MoE, x: Tensor, seed: int
) -> BlockVerification:
    router = load_router(theirs, layer, x.device)
    ids = None
    if router.tid2eid is not None:
        ids = synthetic_token_ids(len(x), len(router.tid2eid), seed).to(x.device)
    true_routes, own_routes = router(x, ids), block.router(x, ids)
    y_true, y_own = (
        exact_block(checkpoint, layer, x, *routes) for checkpoint, routes in ((theirs, true_routes), (ours, own_routes))
    )
    same = (true_routes[0].sort().values == own_routes[0].sort().values).all(-1).double().mean()
    outputs = []
    for activations, scale in FORMATS:
        if scale == "static" and block.routed.uncalibrated:
            continue
        y = _in_format(block, activations, scale)(x, ids)
        outputs.append(OutputError(activations, scale, compare(y, y_true), compare(y, y_own)))
    return BlockVerification(layer, float(same), compare(y_own, y_true), outputs)


def exact_block(checkpoint: Checkpoint, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Routed experts, weighted, and the shared one, in fp32 on the device of x, with nothing rounded.

    Raises:
        CheckpointError: an expert that a row goes to is not there.

    Cost: reads the experts that rows go to, one at a time.
    """
    entries: dict[int | None, ExpertEntry] = {entry.index: entry for entry in checkpoint.routed_experts(layer)}
    limit = checkpoint.swiglu_limit or 0.0
    y = torch.zeros_like(x)
    for index in indices.unique().tolist():
        if index not in entries:
            rule = f"must hold expert {index} of layer {layer}"
            raise CheckpointError(str(checkpoint.path), rule, "none", "fetch the shard that holds it")
        token, slot = (indices == index).nonzero(as_tuple=True)
        row = exact_expert(x[token], _decoded(checkpoint, entries[index].check()), limit)
        y.index_add_(0, token, row * weights[token, slot, None])
    if layer in checkpoint.layers:
        y += exact_expert(x, _decoded(checkpoint, checkpoint.shared_expert(layer)), limit)
    return y


def _decoded(checkpoint: Checkpoint, entry: ExpertEntry) -> dict[str, Tensor]:
    return {name: values(load_projection(checkpoint, p)) for name, p in entry.projections.items()}


def _in_format(block: Nvfp4MoE, activations: str, scale: str | None) -> Nvfp4MoE:
    """The block in another activation format. A shared expert without static scales is dynamic where others are static;
    one that is kept stays as it is."""
    shared = block.shared
    if isinstance(shared, Nvfp4SharedExpert):
        own = "dynamic" if scale == "static" and None in (shared.input_scale, shared.hidden_scale) else scale
        shared = shared.with_activations(activations, own)
    return Nvfp4MoE(block.router, block.routed.with_activations(activations, scale), shared)
