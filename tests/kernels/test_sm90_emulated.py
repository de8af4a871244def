# SPDX-License-Identifier: Apache-2.0
"""The decode kernels of Hopper on a CPU (tests/emulator): results, hand-over between blocks, what a call leaves behind.

The order in which warps go on is drawn anew in each launch, and results do not depend on it.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor
from nvfp4_experts.kernels.dispatch import WEIGHTINGS, Beside, Call, Routing
from nvfp4_experts.kernels.reference import shared_expert
from nvfp4_experts.kernels.sm90 import backend, mailbox, routed, routed_decode
from nvfp4_experts.kernels.sm90.mailbox import Mailboxes, mailbox_bytes
from nvfp4_experts.kernels.target import Target
from tests.emulator.translate import build
from tests.kernels.test_routed_experts import LIMIT, draw_routing, make_experts, static_scales, wanted
from tests.tolerances import against_reference

BLOCKS, E, K = 4, 9, 6
SHAPE = 272, 80  # rows of whole chunks and the rest of one; 10 tiles of L1 for 4 blocks
MODES = [("bf16", "dynamic"), *(("nvfp4", scale) for scale in ("static", "dynamic", "per_token"))]
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("c++"), reason="needs c++ and Linux's ucontext"
)


class Emulator:
    """In the place of what loads and launches kernels, and gives them mailboxes."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder, self._libraries, self.launches = folder, {}, 0
        self._mailboxes: dict[tuple[object, ...], Mailboxes] = {}
        hopper = Target("cuda", "a small Hopper", (9, 0), BLOCKS)
        cuda_core = SimpleNamespace(LaunchConfig=SimpleNamespace, launch=self.launch)
        patch.setitem(sys.modules, "cuda.core", cuda_core)
        patch.setattr(mailbox, "allocate", lambda _, size: aligned_bytes(size))
        patch.setattr(mailbox, "fill", lambda memory, byte: memory.fill_(byte))
        patch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(backend, "current_stream", lambda _: None)
        for module in (backend, routed_decode):
            patch.setattr(module, "target_of", lambda _: hopper)
            patch.setattr(module, "load_kernel", self.load)
            patch.setattr(module, "mailboxes", self.mailboxes)
        patch.setattr(routed_decode, "launch_structure", self.launch_structure)
        routed_decode._tiles.cache_clear()

    def load(self, name: str, file: str, macros: tuple[tuple[str, int], ...], *_: object) -> ctypes.CDLL:
        if (file, macros) not in self._libraries:
            folder = self._folder / str(len(self._libraries))
            folder.mkdir()
            self._libraries[file, macros] = build(file, macros, folder)
        return self._libraries[file, macros]

    def mailboxes(self, device: torch.device, box: int, layout: tuple[object, ...] = ()) -> Mailboxes:
        return self._mailboxes.setdefault((box, layout), Mailboxes(device, mailbox_bytes(box)))

    def launch(self, _: None, config: SimpleNamespace, kernel: ctypes.CDLL, *arguments: Any) -> None:
        kinds = {np.int32: "i", np.float32: "f", int: "Q"}
        packed = struct.pack("@" + "".join(kinds[type(a)] for a in arguments), *arguments)
        self.launch_structure(kernel, config.grid, config.block, config.shmem_size, packed, CPU)

    def launch_structure(
        self,
        kernel: ctypes.CDLL,
        blocks: int,
        threads: int,
        shared_bytes: int,
        arguments: bytes,
        device: torch.device,
        **_: object,
    ) -> None:
        self.launches += 1
        given = ctypes.create_string_buffer(arguments, len(arguments))
        assert kernel.launch(given, blocks, threads, shared_bytes, ctypes.c_ulonglong(self.launches)), "it is stuck"


def aligned_bytes(size: int) -> Tensor:
    memory = torch.empty(size + 128, dtype=torch.uint8)
    begin = -memory.data_ptr() % 128
    return memory[begin : begin + size]


@pytest.fixture
def emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    yield Emulator(tmp_path, monkeypatch)
    routed_decode._tiles.cache_clear()


def one_of(stacks: tuple[Any, ...], expert: int) -> list[Nvfp4Tensor]:
    return [stack[expert] for stack in stacks]


def alone(x: Tensor, tensors: list[Nvfp4Tensor], call: Call) -> Tensor:
    """What a shared expert makes of x."""
    return shared_expert(
        x,
        *tensors,
        swiglu_limit=call.swiglu_limit,
        activations=call.activations,
        activation_scale=call.activation_scale,
        input_scale=call.input_scale,
        hidden_scale=call.hidden_scale,
    )


def check(got: Tensor, expected: Tensor, mode: tuple[str, str], op: str) -> None:
    bound = against_reference(mode[0], "sm90", len(got) * K * SHAPE[1], rounded=False, op=op)
    assert (got.double() - expected.double()).norm() <= bound * expected.double().norm()


def bound_call(mode: tuple[str, str], expert: int | None = None) -> Call:
    scales = static_scales(E) if expert is None else (s[expert] for s in static_scales(E))
    return Call(LIMIT, *mode, *scales)


@pytest.mark.parametrize(("mode", "weighting"), list(zip(MODES, WEIGHTINGS * 2, strict=True)), ids=str)
def test_routed_experts(mode: tuple[str, str], weighting: str, emulator: Emulator) -> None:
    """Calls that follow each other, of more and of fewer tokens, with a shared expert and without; also for nobody."""
    stacks = make_experts(E, *SHAPE)
    weights, call = list(routed.ROUTED.pack(*stacks).values()), bound_call(mode)
    beside = Beside(
        backend.BACKEND, list(backend.BACKEND.pack(*one_of(stacks, 2)).values()), bound_call(mode, expert=2)
    )
    calls: list[tuple[Callable[[Tensor], None], Tensor]] = []
    for tokens, has_shared in ((8, False), (1, True), (3, False), (8, True), (1, False)):
        x, routing = torch.randn(tokens, SHAPE[0]), draw_routing(tokens, min(K, 1 + tokens), weighting, E)
        nobody = Routing(torch.full_like(routing.indices, -1), routing.weights, weighting)
        of_shared = alone(x, one_of(stacks, 2), beside.call) if has_shared else torch.zeros_like(x)
        for chosen, of_routed in ((routing, wanted(x, stacks, routing, call)), (nobody, torch.zeros_like(x))):

            def run(out: Tensor, x: Tensor = x, chosen: Routing = chosen, has_shared: bool = has_shared) -> None:
                routed_decode.routed_experts(x, weights, chosen, call, out, beside if has_shared else None)

            calls.append((run, of_routed + of_shared))
    seen = []
    for run, expected in calls:
        out = torch.full_like(expected, torch.nan)
        run(out)
        check(out, expected, mode, "routed_experts")
        seen.append(out)
    for which in torch.randperm(len(calls))[:4].tolist():
        out = torch.full_like(seen[which], torch.nan)
        calls[which][0](out)
        assert torch.equal(out, seen[which])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_shared_expert(mode: tuple[str, str], emulator: Emulator) -> None:
    tensors = one_of(make_experts(E, *SHAPE), 4)
    weights, call = list(backend.BACKEND.pack(*tensors).values()), bound_call(mode, expert=4)
    for tokens in (8, 1, 2, 8):
        x = torch.randn(tokens, SHAPE[0])
        outs = [torch.full_like(x, torch.nan) for _ in range(2)]
        for out in outs:
            backend.decode(x, weights, call, SHAPE[1], out)
        check(outs[0], alone(x, tensors, call), mode, "shared_expert")
        assert torch.equal(*outs)
    assert emulator.launches == 8
