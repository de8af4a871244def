# SPDX-License-Identifier: Apache-2.0
"""ggml as a peer: the bytes it is given, the libraries that are refused, the graph; and a real one where there is one.

NVFP4_EXPERTS_GGML=DIR pytest tests/diagnostics/test_bench_ggml.py      runs `test_a_real_library`
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_experts.diagnostics.bench import ggml_library, ggml_peer
from nvfp4_experts.diagnostics.bench.ggml_library import Ggml, every_code_and_scale, mismatch, to_blocks
from nvfp4_experts.diagnostics.bench.measure import bench
from nvfp4_experts.diagnostics.bench.task import SharedExpertTask
from nvfp4_experts.diagnostics.bench.work import find_work
from nvfp4_experts.diagnostics.metrics import rel_l2
from nvfp4_experts.errors import FormatError, LayoutError
from nvfp4_experts.formats.codes import unpack_codes
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor, quantize
from nvfp4_experts.kernels.target import Target

CPU = Target("cpu", "")
SMALL: dict[str, Any] = {"tokens": (1,), "device": "cpu", "seconds": 0.05, "rotate": 300_000, "matmul_size": 64}
REAL, NO_REAL = ggml_library.find()


def decode(blocks: bytes) -> list[float]:
    """The values of ggml's NVFP4 blocks, by the byte; written from its header, with nothing of this package."""
    values = []
    for start in range(0, len(blocks), 36):
        for s in range(4):
            exponent, mantissa = blocks[start + s] >> 3, blocks[start + s] & 7
            scale = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
            body = blocks[start + 4 + 8 * s : start + 12 + 8 * s]
            for code in [byte & 15 for byte in body] + [byte >> 4 for byte in body]:
                magnitude = (0, 0.5, 1, 1.5, 2, 3, 4, 6)[code & 7]
                values.append((-magnitude if code & 8 else magnitude) * scale)
    return values


# --- the blocks ---------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_block() -> None:
    codes = torch.arange(0x10, 0x100, 0x22, dtype=torch.uint8).repeat(4)  # 0, 1, ... 15 four times, low nibble first
    scales = torch.tensor([0x01, 0x38, 0x7E, 0x00], dtype=torch.uint8).view(torch.float8_e4m3fn)
    block = to_blocks(Nvfp4Tensor(codes[None], scales[None], torch.tensor(3.0)))
    assert block.shape == (1, 1, 36)
    assert bytes(block.flatten().tolist()).hex() == "01387e00" + 4 * "8091a2b3c4d5e6f7"


def test_blocks_hold_the_same_values() -> None:
    w = quantize(torch.randn(3, 256, generator=torch.Generator().manual_seed(0)))
    decoded = torch.tensor(decode(to_blocks(w).numpy().tobytes())).view(3, 256)
    assert torch.equal(decoded * w.global_scale, w.dequantize())


def test_every_code_meets_every_scale() -> None:
    w = every_code_and_scale()
    pairs = torch.stack((w.block_scales.view(torch.uint8).repeat_interleave(16, dim=1), unpack_codes(w.codes)), dim=-1)
    assert {tuple(pair) for pair in pairs[0].tolist()} == {(scale, code) for scale in range(127) for code in range(16)}


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xB8], ids=["NaN", "-0", "-1"])
def test_scales_that_ggml_does_not_read_are_refused(byte: int) -> None:
    w = every_code_and_scale()
    w.block_scales.view(torch.uint8)[0, 5] = byte
    with pytest.raises(FormatError, match="0 to 448"):
        to_blocks(w)


def test_columns_come_in_blocks_of_64() -> None:
    with pytest.raises(LayoutError, match="multiple of 64"):
        to_blocks(quantize(torch.ones(2, 96)))


# --- the library --------------------------------------------------------------------------------------------------


class StandIn:
    """The functions of ggml that are called, in plain torch and without q8_0, inside the memory of their context."""

    def __init__(self, decoder: Callable[[bytes], list[float]] = decode, **answers: Any) -> None:
        self.decoder, self.answers = decoder, {"name": b"nvfp4", "values": 64, "bytes": 36, **answers}
        self.contexts: list[list[int]] = []  # next free byte, end
        self.tensors: list[tuple[int, Tensor]] = []
        self.steps: list[Callable[[], object]] = []
        self.clamps: list[tuple[float, float]] = []
        self.threads = 0

    def ggml_type_name(self, kind: int) -> bytes:
        return self.answers["name"] if kind == 40 else b"?"

    def ggml_blck_size(self, kind: int) -> int:
        return self.answers["values"]

    def ggml_type_size(self, kind: int) -> int:
        return self.answers["bytes"]

    def dequantize_row_nvfp4(self, blocks: int, values: int, count: int) -> None:
        decoded = torch.tensor(self.decoder(ctypes.string_at(blocks, count // 64 * 36)))
        ctypes.memmove(values, decoded.data_ptr(), 4 * count)

    def ggml_tensor_overhead(self) -> int:
        return 400

    def ggml_graph_overhead(self) -> int:
        return 0

    def ggml_init(self, params: Any) -> int:
        assert params.mem_buffer % 16 == 0 and not params.no_alloc
        self.contexts.append([params.mem_buffer, params.mem_buffer + params.mem_size])
        return len(self.contexts) - 1

    def ggml_free(self, context: int) -> None:
        self.contexts[context] = [0, 0]

    def _place(self, context: int, nbytes: int) -> int:
        start = self.contexts[context][0] + self.ggml_tensor_overhead()
        self.contexts[context][0] = start + -(-nbytes // 64) * 64
        assert self.contexts[context][0] <= self.contexts[context][1], "the context is too small"
        return start

    def _add(self, address: int, values: Tensor, step: Callable[[], object] | None = None) -> int:
        self.tensors.append((address, values))
        if step is not None:
            self.steps.append(step)
        return len(self.tensors) - 1

    def ggml_new_tensor_2d(self, context: int, kind: int, columns: int, rows: int) -> int:
        nbytes = rows * (columns * 4 if kind == 0 else columns // 64 * 36)
        address = self._place(context, nbytes)
        data = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
        return self._add(address, data.view(torch.float32).view(rows, columns) if kind == 0 else data.view(rows, -1))

    def ggml_get_data(self, tensor: int) -> int:
        return self.tensors[tensor][0]

    def ggml_mul_mat(self, context: int, weight: int, x: int) -> int:
        (_, blocks), (_, activations) = self.tensors[weight], self.tensors[x]
        y = self.ggml_new_tensor_2d(context, 0, blocks.shape[0], activations.shape[0])
        w = torch.tensor(decode(blocks.numpy().tobytes())).view(blocks.shape[0], -1)
        self.steps.append(lambda: torch.matmul(activations, w.T, out=self.tensors[y][1]))
        return y

    def ggml_view_2d(self, context: int, a: int, columns: int, rows: int, row: int, offset: int) -> int:
        self._place(context, 0)
        address, values = self.tensors[a]
        assert row == 4 * values.shape[1] and rows == values.shape[0]
        return self._add(address + offset, values[:, offset // 4 : offset // 4 + columns])

    def ggml_scale_inplace(self, context: int, a: int, factor: float) -> int:
        self._place(context, 0)
        address, values = self.tensors[a]
        return self._add(address, values, lambda: values.mul_(factor))

    def ggml_clamp(self, context: int, a: int, low: float, high: float) -> int:
        self._place(context, 0)
        self.clamps.append((low, high))
        address, values = self.tensors[a]
        return self._add(address, values, lambda: values.clamp_(low, high))

    def ggml_swiglu_split(self, context: int, gate: int, up: int) -> int:
        (_, g), (_, u) = self.tensors[gate], self.tensors[up]
        h = self.ggml_new_tensor_2d(context, 0, g.shape[1], g.shape[0])
        self.steps.append(lambda: torch.mul(g * g.sigmoid(), u, out=self.tensors[h][1]))
        return h

    def ggml_new_graph(self, context: int) -> int:
        return 0

    def ggml_build_forward_expand(self, graph: int, y: int) -> None:
        self.graph, self.steps = self.steps, []

    def ggml_backend_graph_compute(self, backend: int, graph: int) -> int:
        for step in self.graph:
            step()
        return 0


def adjacent(blocks: bytes) -> list[float]:
    """As if a byte held neighbours."""
    v = torch.tensor(decode(blocks)).view(-1, 2, 8)
    return v.transpose(1, 2).flatten().tolist()


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (StandIn(), None),
        (StandIn(name=b"q1_0"), "its type 40 is b'q1_0'"),
        (StandIn(name=None), "its type 40 is None"),
        (StandIn(values=32), "32 values in 36 bytes"),
        (StandIn(bytes=40), "64 values in 40 bytes"),
        (StandIn(adjacent), "decode to other values"),
        (StandIn(lambda blocks: [2 * value for value in decode(blocks)]), "decode to other values"),
        (StandIn(lambda blocks: [min(value, 6 * 240) for value in decode(blocks)]), "decode to other values"),
    ],
)  # fmt: skip
def test_only_the_format_we_know_is_used(library: Any, reason: str | None) -> None:
    found = mismatch(library)
    assert found is None if reason is None else reason in (found or "")


def test_it_is_found_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = ggml_peer.GgmlCpu()
    monkeypatch.setenv(ggml_library.VARIABLE, str(tmp_path / "nowhere"))
    assert f"not loadable in {tmp_path / 'nowhere'}" in (candidate.refusal(CPU) or "")
    library = tmp_path / ("libggml" + ggml_library._SUFFIX)
    library.write_text("no library")
    monkeypatch.setenv(ggml_library.VARIABLE, str(tmp_path))
    assert f"not loadable in {tmp_path}" in (candidate.refusal(CPU) or "")
    assert "--device cpu" in (candidate.refusal(Target("cuda", "", (9, 0))) or "")


def test_an_old_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library without these functions: one of torch's, under ggml's name."""
    suffix = ggml_library._SUFFIX
    (tmp_path / f"libggml{suffix}").symlink_to(Path(torch.__file__).parent / "lib" / f"libc10{suffix}")
    monkeypatch.setenv(ggml_library.VARIABLE, str(tmp_path))
    reason = ggml_peer.GgmlCpu().refusal(CPU)
    assert reason is not None and "too old to know NVFP4" in reason and "dequantize_row_nvfp4" in reason


def test_the_systems_loader_is_asked_where_the_variable_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(name: str) -> None:
        asked.append(name)
        raise OSError("none")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    found, reason = ggml_library._load.__wrapped__("")  # what the cache keeps may come from a real one
    assert found is None and ggml_library.VARIABLE in reason
    assert asked == ["libggml" + ggml_library._SUFFIX]


# --- the graph ----------------------------------------------------------------------------------------------------


def test_the_graph_is_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the stand-in, which rounds nothing: bf16's own error, at every number of tokens, in any order."""
    library: Any = StandIn()
    monkeypatch.setattr(ggml_peer, "find", lambda: (Ggml(library, 0, "0"), ""))
    monkeypatch.setattr(Ggml, "set_threads", lambda self, threads: setattr(library, "threads", threads))
    work = find_work("128x64")
    truths = SharedExpertTask(work, torch.device("cpu"), 0)
    first, second = (ggml_peer.GgmlCpu().prepare(truths.weights, 5) for _ in range(2))
    assert library.threads == torch.get_num_threads()
    assert first.nbytes == 0.5625 * work.weight_count <= first.tensors[0].nbytes
    assert not {t.data_ptr() for t in first.tensors} & {t.data_ptr() for t in second.tensors}
    for tokens in (5, 1, 5):
        y = first.run(truths.input(tokens))
        assert y.dtype == torch.bfloat16 and y.shape == (tokens, 128)
        assert rel_l2(y, truths.output(tokens, "bf16", "dynamic")) < 2**-8
    assert set(library.clamps) == {(-math.inf, 10), (-10, 10)}, "gate has no lower limit, which silu all but hides"
    kept = y.clone()
    first.run(truths.input(5) * 2)
    assert torch.equal(y, kept), "an output is overwritten by the next call"


def test_a_shape_that_does_not_fit_its_blocks_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = StandIn()
    monkeypatch.setattr(ggml_peer, "find", lambda: (Ggml(library, 0, "0"), ""))
    monkeypatch.setattr(Ggml, "set_threads", lambda self, threads: None)
    (row,) = bench(find_work("64x96"), [ggml_peer.GgmlCpu()], **SMALL).rows
    assert row.status == "unavailable" and "multiple of 64" in (row.reason or "")


def test_a_graph_that_fails_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = StandIn()
    monkeypatch.setattr(library, "ggml_backend_graph_compute", lambda backend, graph: -1)
    work = find_work("64x64")
    expert = ggml_peer.GgmlExpert(Ggml(library, 0, "0"), work.weights(torch.device("cpu")), 1)
    with pytest.raises(RuntimeError, match="returned -1"):
        expert(torch.zeros(1, 64, dtype=torch.bfloat16))


def test_the_bound_is_what_q8_0_costs() -> None:
    """q8_0 by hand on x, and on the h of it: within a third of the bound on Gaussian data, where amax is 2.4 rms."""
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    scale = x.abs().amax(1, keepdim=True) / 127
    once = rel_l2((x / scale).round() * scale, x)
    assert once < ggml_peer.GgmlCpu().bound / math.sqrt(3) < 3 * once


# --- a real one ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(REAL is None, reason=NO_REAL)
def test_a_real_library() -> None:
    report = bench(find_work("256x128"), [ggml_peer.GgmlCpu()], **{**SMALL, "tokens": (1, 7)})
    for row in report.rows:
        assert row.status == "timed", row.reason
        assert 1e-3 < (row.rel_l2 or 0) <= row.bound, "q8_0 errs by more than 0.001 and less than the bound"
