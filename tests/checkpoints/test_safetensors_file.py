# SPDX-License-Identifier: Apache-2.0
"""The file layer against the safetensors library, both ways, for every dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from nvfp4_experts.checkpoints.errors import IncompleteWriteError, TensorSizeError, UnknownDtypeError
from nvfp4_experts.checkpoints.safetensors_file import (
    DTYPES,
    SafetensorsWriter,
    TensorSpec,
    dtype_name,
    layout_header,
    read_header,
    read_tensor,
    tensor_bytes,
)
from nvfp4_experts.errors import InputError

HELD = {name: dtype for name, (_, dtype) in DTYPES.items() if dtype is not None}


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    bits = torch.empty((), dtype=dtype).element_size()
    count = torch.Size(shape).numel() * bits
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,)).to(torch.uint8)
    return raw.view(dtype).reshape(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@pytest.mark.parametrize("name", HELD)
def test_reads_every_dtype_as_the_library_wrote_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"x": sample(HELD[name], (5, 3)), "flat": sample(HELD[name], (7,)), "none": sample(HELD[name], (0, 2))}
    save_file(tensors, path, {"format": "pt"})
    infos, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    assert {info.dtype for info in infos.values()} == {name} == {dtype_name(HELD[name])}
    for key, t in tensors.items():
        assert same_bytes(read_tensor(path, infos[key]), t)
    assert same_bytes(read_tensor(path, infos["x"], (1, 4)), tensors["x"][1:4])
    assert read_tensor(path, infos["x"], (2, 2)).shape == (0, 3)


@pytest.mark.parametrize("name", HELD)
def test_the_library_reads_every_dtype_as_the_writer_wrote_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"odd": sample(torch.uint8, (3,)), "x": sample(HELD[name], (5, 4)), "s": sample(HELD[name], ())}
    specs = [TensorSpec(key, dtype_name(t.dtype), tuple(t.shape)) for key, t in tensors.items()]
    with SafetensorsWriter(path, specs, {"who": "ever"}) as writer:
        row = tensors["x"][0].nbytes
        writer.write("x", tensors["x"][3:], 3 * row)  # pieces in any order
        writer.write("s", tensors["s"])
        writer.write("x", tensors["x"][:3])
        writer.write("odd", bytes(tensors["odd"].tolist()))
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(same_bytes(found[key], t) for key, t in tensors.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"who": "ever"}
    assert all(info.start % (DTYPES[info.dtype][0] // 8) == 0 for info in read_header(path)[0].values())


def test_a_transposed_view_is_written_as_its_values(tmp_path: Path) -> None:
    t = torch.arange(12.0).reshape(3, 4).T
    with SafetensorsWriter(tmp_path / "a.safetensors", [TensorSpec("t", "F32", (4, 3))]) as writer:
        writer.write("t", t)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["t"], t)


def test_a_header_is_these_bytes() -> None:
    first, starts = layout_header([TensorSpec("b", "U8", (3,)), TensorSpec("w", "F32", (2,))], {})
    text = (
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}'
    )
    padded = text + b" " * (-len(text) % 8)
    assert first == len(padded).to_bytes(8, "little") + padded
    assert starts == {"w": len(first), "b": len(first) + 8}


def test_a_file_with_a_byte_missing_never_gets_its_name(tmp_path: Path) -> None:
    with (
        pytest.raises(IncompleteWriteError, match=r"e\.g\. b"),
        SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "U8", (4,)), TensorSpec("b", "U8", (4,))]) as writer,
    ):
        writer.write("a", b"1234")
        writer.write("b", b"123")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_is_not_written_past_its_end(tmp_path: Path) -> None:
    with (
        pytest.raises(IncompleteWriteError, match="4 bytes are left"),
        SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "U8", (4,))]) as writer,
    ):
        writer.write("a", b"12345")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "U8", (4,))]):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_sizes_of_narrow_dtypes() -> None:
    assert tensor_bytes("t", "F4", (3, 2)) == 3
    with pytest.raises(TensorSizeError, match="whole bytes"):
        tensor_bytes("t", "F4", (3,))
    with pytest.raises(UnknownDtypeError, match="F3"):
        tensor_bytes("t", "F3", (8,))


def test_rows_outside_a_tensor_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4, 2)}, tmp_path / "a.safetensors")
    info = read_header(tmp_path / "a.safetensors")[0]["x"]
    with pytest.raises(InputError, match=r"rows must lie in 0\.\.4.*3\.\.5 of a tensor \[4, 2\]"):
        read_tensor(tmp_path / "a.safetensors", info, (3, 5))
