# SPDX-License-Identifier: Apache-2.0
"""Experts that are made one after the other, so that no two of them need lie in memory beside the packed ones.

    gate, up, down = ExpertStream(iterator, E, device, recipe).projections
    gate[0], up[0], down[0], gate[1], up[1], ...          each made when it is asked for, the one before it forgotten

A `RoutedBackend` packs expert by expert, in order, each once; so a projection of a stream will do where it takes a
stack: it has a stack's length, shape and device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import InputError, LayoutError
from ..formats.nvfp4 import Nvfp4Tensor, joint_amax, quantize

Weight = Tensor | Nvfp4Tensor
Expert = tuple[Nvfp4Tensor, Nvfp4Tensor, Nvfp4Tensor]


def quantize_expert(gate: Weight, up: Weight, down: Weight, recipe: str) -> Expert:
    """One expert in NVFP4: what is not is quantised; gate and up, if both are, under their joint amax.

    Raises: what `quantize` raises.
    """
    joint = None
    if isinstance(gate, Tensor) and isinstance(up, Tensor):
        joint = joint_amax(gate, up)

    def as_nvfp4(w: Weight, amax: float | None = None) -> Nvfp4Tensor:
        return w if isinstance(w, Nvfp4Tensor) else quantize(w.detach(), recipe, amax)

    return as_nvfp4(gate, joint), as_nvfp4(up, joint), as_nvfp4(down)


class ExpertStream:
    """E experts out of an iterator, as NVFP4 on one device.

    Args:
        experts: (gate, up, down) of each, (I, H), (I, H), (H, I): floating or NVFP4, on any device. Nothing is taken
            before it is needed.
        num_experts: E.
        device: where they go before they are quantised; None is where the first one's gate lies.
        recipe: how floating weights are quantised.

    Raises:
        InputError: (here, or when it is found out) there are fewer than E.
        LayoutError: (then) an expert whose shapes are not the first one's.
    """

    def __init__(
        self,
        experts: Iterable[tuple[Weight, Weight, Weight]],
        num_experts: int,
        device: torch.device | str | None,
        recipe: str,
    ) -> None:
        self._rest, self._recipe = iter(experts), recipe
        self.num_experts = num_experts
        self.device = None if device is None else torch.device(device)
        self._number, self._current = 0, self._take(0)
        self.device = self._current[0].device
        self._shapes = [tuple(w.shape) for w in self._current]

    @property
    def projections(self) -> tuple[_Projection, _Projection, _Projection]:
        """gate, up and down, as stacks that hold one expert at a time."""
        gate, up, down = (_Projection(self, index, (self.num_experts, *s)) for index, s in enumerate(self._shapes))
        return gate, up, down

    def expert(self, number: int) -> Expert:
        """Expert `number`: the one at hand, or the next."""
        if number != self._number:
            assert number == self._number + 1, "a stream is read in order"
            self._current = ()  # type: ignore[assignment]  # forgotten before the next one is made
            self._number, self._current = number, self._take(number)
            if (found := [tuple(w.shape) for w in self._current]) != self._shapes:
                rule = f"must have the shapes of the first one, {self._shapes}"
                raise LayoutError(f"expert {number}", rule, found, "give the experts of one layer")
        return self._current

    def finish(self) -> None:
        """Raise InputError if there are more than E."""
        self._current = ()  # type: ignore[assignment]
        if next(self._rest, None) is not None:
            raise InputError("experts", f"must be num_experts={self.num_experts}", "more", "give their true number")

    def _take(self, number: int) -> Expert:
        expert = next(self._rest, None)
        if expert is None:
            rule = f"must be num_experts={self.num_experts}"
            raise InputError("experts", rule, number, "give their true number, at least 1")
        gate, up, down = (w if self.device is None else w.to(self.device) for w in expert)
        return quantize_expert(gate, up, down, self._recipe)


class _Projection:
    """One projection of a stream, as `StackLike` says."""

    def __init__(self, stream: ExpertStream, index: int, shape: tuple[int, ...]) -> None:
        self._stream, self._index, self.shape = stream, index, torch.Size(shape)

    @property
    def device(self) -> torch.device:
        """Device of the experts."""
        assert self._stream.device is not None
        return self._stream.device

    def __len__(self) -> int:
        return self._stream.num_experts

    def __getitem__(self, expert: int) -> Nvfp4Tensor:
        return self._stream.expert(expert)[self._index]
