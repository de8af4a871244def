# SPDX-License-Identifier: Apache-2.0
"""The attack corpus: broken and hostile checkpoints, each refused under its own name before a tensor is trusted."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4_experts.checkpoints import convert, errors, load_projection, load_shared_expert, open_checkpoint
from nvfp4_experts.checkpoints.safetensors_file import MAX_HEADER_BYTES, read_header
from nvfp4_experts.errors import CheckpointError
from tests.checkpoints import factory, test_router

# --- files -----------------------------------------------------------------------------------------------------------

Header = dict[str, object]


def entry(dtype: str = "U8", shape: object = (4,), offsets: object = (0, 4)) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw(header: Header | str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    text = text.encode() if isinstance(text, str) else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


ONE = {"a": entry()}
FILES: dict[str, tuple[type[CheckpointError], bytes]] = {
    "empty file": (errors.TruncatedFileError, b""),
    "seven bytes": (errors.TruncatedFileError, b"\0" * 7),
    "header cut": (errors.TruncatedFileError, raw(ONE)[:-5]),
    "data cut": (errors.TruncatedFileError, raw(ONE, b"123")),
    "offsets beyond the file": (
        errors.TruncatedFileError,
        raw({"a": entry(shape=[1 << 40], offsets=[0, 1 << 40])}, b"1234"),
    ),
    "huge header length": (errors.HeaderTooLargeError, raw(ONE, length=1 << 62)),
    "header length of all ones": (errors.HeaderTooLargeError, b"\xff" * 64),
    "header length just too large": (errors.HeaderTooLargeError, raw(ONE, length=MAX_HEADER_BYTES + 1)),
    "no header": (errors.InvalidHeaderError, raw("")),
    "not JSON": (errors.InvalidHeaderError, raw("{'a': 1}")),
    "not UTF-8": (errors.InvalidHeaderError, raw(b'{"\xff\xfe": 1}')),
    "a list": (errors.InvalidHeaderError, raw("[]")),
    "nested without end": (errors.InvalidHeaderError, raw("[" * 100_000)),
    "an entry that is a number": (errors.InvalidHeaderError, raw({"a": 1})),
    "an entry with another key": (errors.InvalidHeaderError, raw({"a": {**entry(), "offset": 3}}, b"1234")),
    "an entry without shape": (errors.InvalidHeaderError, raw({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, b"1234")),
    "a name that is no text": (errors.InvalidHeaderError, raw({"\ud800": entry()}, b"1234")),
    "negative shape": (errors.InvalidHeaderError, raw({"a": entry(shape=[-2, -2])}, b"1234")),
    "fractional shape": (errors.InvalidHeaderError, raw({"a": entry(shape=[4.0])}, b"1234")),
    "boolean shape": (errors.InvalidHeaderError, raw({"a": entry(shape=[True], offsets=[0, 1])}, b"1")),
    "negative offsets": (errors.InvalidHeaderError, raw({"a": entry(offsets=[-4, 0])}, b"1234")),
    "three offsets": (errors.InvalidHeaderError, raw({"a": entry(offsets=[0, 4, 4])}, b"1234")),
    "metadata of numbers": (errors.InvalidHeaderError, raw({"__metadata__": {"n": 1}})),
    "a name twice": (
        errors.DuplicateTensorError,
        raw(f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}', b"1234"),
    ),
    "unknown dtype": (errors.UnknownDtypeError, raw({"a": entry(dtype="F5")}, b"1234")),
    "size is not shape times dtype": (errors.TensorSizeError, raw({"a": entry(shape=[5])}, b"1234")),
    "offsets reversed": (errors.TensorSizeError, raw({"a": entry(offsets=[4, 0])}, b"1234")),
    "shape that overflows 64 bits": (errors.TensorSizeError, raw({"a": entry(shape=[1 << 32, 1 << 32])}, b"1234")),
    "half a byte": (errors.TensorSizeError, raw({"a": entry("F4", [3], [0, 2])}, b"12")),
    "overlap": (errors.OverlappingTensorsError, raw({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456")),
    "two names for the same bytes": (errors.OverlappingTensorsError, raw({"a": entry(), "b": entry()}, b"1234")),
    "hole": (errors.UnusedBytesError, raw({"a": entry(), "b": entry(offsets=[5, 9])}, b"123456789")),
    "hole at the start": (errors.UnusedBytesError, raw({"a": entry(offsets=[1, 5])}, b"12345")),
    "bytes at the end": (errors.UnusedBytesError, raw(ONE, b"12345")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_refused(tmp_path: Path, name: str) -> None:
    error, content = FILES[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(error) as caught:
        open_checkpoint(tmp_path)
    assert type(caught.value) is error
    assert "model.safetensors" in str(caught.value)


def test_the_smallest_valid_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw(ONE, b"1234"))
    assert open_checkpoint(tmp_path).read("a").tolist() == list(b"1234")


def test_every_cut_of_a_real_file_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    save_file({"a": torch.arange(5.0), "b": torch.arange(3)}, whole, {"format": "pt"})
    content = whole.read_bytes()
    read_header(whole)
    for size in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            read_header(tmp_path / "cut")


def test_every_flipped_header_bit_is_refused_or_reads_within_the_file(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    save_file({"a": torch.arange(5.0), "b": torch.arange(3)}, whole)
    content = bytearray(whole.read_bytes())
    for bit in range(8 * (len(content) - 44)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "cut").write_bytes(damaged)
        try:
            infos, _ = read_header(tmp_path / "cut")
        except CheckpointError:
            continue
        assert all(0 <= i.start <= i.stop <= len(content) for i in infos.values())


def test_a_file_that_shrinks_after_opening_is_refused(tmp_path: Path) -> None:
    factory.write(tmp_path / "c", factory.rest())
    checkpoint = open_checkpoint(tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 50)
    last = max(checkpoint.tensors.values(), key=lambda info: info.stop)
    with pytest.raises(errors.TruncatedFileError):
        checkpoint.read(last.name)


# --- directories -----------------------------------------------------------------------------------------------------

INDEX, FIRST = "model.safetensors.index.json", "model-00001-of-00003.safetensors"


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def point_to(name: str) -> Callable[[Path], None]:
    return lambda path: edit_json(path / INDEX, lambda index: index["weight_map"].update(scalar=name))


def link_out(path: Path) -> None:
    outside = path.parent / "outside.safetensors"
    (path / FIRST).rename(outside)
    (path / FIRST).symlink_to(outside)


def drop_from_shard(path: Path) -> None:
    save_file(dict(list(load_file(path / FIRST).items())[1:]), path / FIRST)


def twice(path: Path) -> None:
    other = path / FIRST.replace("1-of", "2-of")
    name, t = next(iter(load_file(path / FIRST).items()))
    save_file({**load_file(other), name: t}, other)


def write_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(text) and None


def set_config(**values: object) -> Callable[[Path], None]:
    return lambda path: edit_json(path / "config.json", lambda config: config.update(values))


DIRECTORIES: dict[str, tuple[type[CheckpointError], Callable[[Path], object]]] = {
    "index leads up": (errors.UnsafePathError, point_to("../outside.safetensors")),
    "index is absolute": (errors.UnsafePathError, point_to("/etc/passwd")),
    "index leads into a folder": (errors.UnsafePathError, point_to("folder/model.safetensors")),
    "index leads up the other way": (errors.UnsafePathError, point_to("..\\outside.safetensors")),
    "index names the folder": (errors.UnsafePathError, point_to("..")),
    "index names nothing": (errors.UnsafePathError, point_to("")),
    "index with a NUL": (errors.UnsafePathError, point_to("a\0b")),
    "index with a name too long": (errors.UnsafePathError, point_to("x" * 5000)),
    "index with a lone surrogate": (errors.UnsafePathError, point_to("\ud800.safetensors")),
    "index is a folder": (errors.NotACheckpointError, lambda path: ((path / INDEX).unlink(), (path / INDEX).mkdir())),
    "config is a folder": (
        errors.InvalidConfigError,
        lambda path: ((path / "config.json").unlink(), (path / "config.json").mkdir()),
    ),
    "shard is a link out": (errors.UnsafePathError, link_out),
    "config is a link out": (
        errors.UnsafePathError,
        lambda path: ((path / "config.json").unlink(), (path / "config.json").symlink_to("/etc/hosts")),
    ),
    "index is no JSON": (errors.InvalidIndexError, write_text(INDEX, "{")),
    "index without a map": (errors.InvalidIndexError, write_text(INDEX, "{}")),
    "index with an empty map": (errors.InvalidIndexError, write_text(INDEX, '{"weight_map": {}}')),
    "index maps to numbers": (errors.InvalidIndexError, write_text(INDEX, '{"weight_map": {"a": 1}}')),
    "index names a tensor twice": (
        errors.DuplicateTensorError, write_text(INDEX, '{"weight_map": {"a": "b", "a": "c"}}'),
    ),
    "shard is gone": (errors.MissingShardError, lambda path: (path / FIRST).unlink()),
    "shard lacks a tensor of the index": (errors.IndexMismatchError, drop_from_shard),
    "index lacks a tensor": (
        errors.IndexMismatchError,
        lambda path: edit_json(path / INDEX, lambda index: index["weight_map"].pop("scalar")),
    ),
    "a tensor in two shards": (errors.DuplicateTensorError, twice),
    "index and single file": (
        errors.AmbiguousCheckpointError, lambda path: (path / "model.safetensors").write_bytes(raw(ONE, b"1234")),
    ),
    "no index": (errors.NotACheckpointError, lambda path: (path / INDEX).unlink()),
    "config is no JSON": (errors.InvalidConfigError, write_text("config.json", "swiglu_limit = 10")),
    "config is a list": (errors.InvalidConfigError, write_text("config.json", "[]")),
    "ModelOpt config is no JSON": (errors.InvalidConfigError, write_text("hf_quant_config.json", "")),
}  # fmt: skip


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_broken_directory_is_refused(tmp_path: Path, name: str) -> None:
    error, attack = DIRECTORIES[name]
    path = factory.write(tmp_path / "c", factory.rest(), shards=3)
    open_checkpoint(path)
    attack(path)
    with pytest.raises(error) as caught:
        open_checkpoint(path)
    assert type(caught.value) is error


def test_a_huge_config_is_not_read(tmp_path: Path) -> None:
    path = factory.write(tmp_path / "c", factory.rest())
    os.truncate(path / "config.json", MAX_HEADER_BYTES + 1)  # sparse
    with pytest.raises(errors.HeaderTooLargeError):
        open_checkpoint(path)


def test_a_text_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(errors.NotACheckpointError, match=r"must be a directory or a \.safetensors file"):
        open_checkpoint(tmp_path / "notes.txt")


@pytest.mark.parametrize("limit", [-1, "ten", True, [10], 10**400, 1e39])
def test_a_limit_that_is_no_limit(tmp_path: Path, limit: object) -> None:
    path = factory.write(tmp_path / "c", factory.rest(), {"swiglu_limit": limit})
    with pytest.raises(errors.InvalidConfigError, match="swiglu_limit"):
        _ = open_checkpoint(path).swiglu_limit


@pytest.mark.parametrize("shape", [(0, 160), (96, 0), (0, 0)], ids=str)
def test_a_weight_without_values_is_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    tensors = {f"layers.0.ffn.shared_experts.{w}.weight": torch.empty(shape) for w in ("w1", "w3")}
    tensors["layers.0.ffn.shared_experts.w2.weight"] = torch.empty(shape[::-1])
    path = factory.write(tmp_path / "c", tensors)
    for use in (lambda: load_shared_expert(path, 0), lambda: convert(path, tmp_path / "dst")):
        with pytest.raises(errors.WrongShapeError, match="with values in it"):
            use()


def test_a_layer_number_of_thousands_of_digits_is_no_layer(tmp_path: Path) -> None:
    name = f"layers.{'9' * 5000}.ffn.shared_experts.w1.weight"
    assert open_checkpoint(factory.write(tmp_path / "c", {name: torch.ones(16, 16)}, {})).experts == []


def test_a_layer_without_any_config_is_not_guessed(tmp_path: Path) -> None:
    path = factory.write(tmp_path / "c", factory.model(factory.plain())[0])
    (path / "config.json").unlink()
    with pytest.raises(errors.MissingConfigError, match="SwiGLU"):
        load_shared_expert(path, 0)


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.MissingTensorError, match="no such name"):
        open_checkpoint(factory.write(tmp_path / "c", factory.rest())).read("nothing")


# --- modules ---------------------------------------------------------------------------------------------------------

GATE = "layers.0.ffn.shared_experts.w1"
Tensors = dict[str, torch.Tensor]


def without(suffix: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"{GATE}.{suffix}")


def changed(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    name = f"{GATE}.{suffix}"
    return lambda tensors: tensors.update({name: change(tensors[name])})


def added(suffix: str, t: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{GATE}.{suffix}": t})


def without_gate(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(GATE)]:
        tensors.pop(name)


def exchanged(first: str, second: str) -> Callable[[Tensors], None]:
    """Two projections of the shared expert under each other's names."""

    def exchange(tensors: Tensors) -> None:
        prefix = GATE.rpartition(".")[0]
        pair = {first: second, second: first}
        taken = {
            name: tensors.pop(name)
            for name in list(tensors)
            if name.startswith((f"{prefix}.{first}", f"{prefix}.{second}"))
        }
        for name, t in taken.items():
            word = name[len(prefix) + 1 :].partition(".")[0]
            tensors[name.replace(f"{prefix}.{word}.", f"{prefix}.{pair[word]}.")] = t

    return exchange


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    rows, columns = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    return torch.zeros(rows, columns, dtype=torch.uint8).view(scales.dtype)


def to_e5m2(t: torch.Tensor) -> torch.Tensor:
    return t.float().to(torch.float8_e5m2)


MODULES: dict[str, tuple[type[CheckpointError], str, Callable[[Tensors], object]]] = {
    "ModelOpt block scales gone": (errors.MissingTensorError, "modelopt", without("weight_scale")),
    "ModelOpt global scale gone": (errors.MissingTensorError, "modelopt", without("weight_scale_2")),
    "ModelOpt codes gone": (errors.MissingTensorError, "modelopt", without("weight")),
    "compressed-tensors block scales gone": (errors.MissingTensorError, "compressed-tensors", without("weight_scale")),
    "compressed-tensors global scale gone": (
        errors.MissingTensorError, "compressed-tensors", without("weight_global_scale"),
    ),
    "FP8 scale gone": (errors.MissingTensorError, "fp8-128-e8m0", without("scale")),
    "MXFP4 scale gone": (errors.MissingTensorError, "mxfp4", without("scale")),
    "projection gone": (errors.MissingTensorError, "bf16", without_gate),
    "scale of an unquantised weight": (errors.ExtraTensorError, "bf16", added("weight_scale", torch.ones(96, 10))),
    "smoothing vector": (errors.ExtraTensorError, "modelopt", added("pre_quant_scale", torch.ones(160))),
    "bias": (errors.ExtraTensorError, "fp8-v3", added("bias", torch.ones(96))),
    "weight of integers": (errors.UnknownFormatError, "bf16", changed("weight", lambda t: t.to(torch.int32))),
    "weight of e5m2": (errors.UnknownFormatError, "fp8-32-e8m0", changed("weight", to_e5m2)),
    "block scales of bf16": (errors.WrongDtypeError, "modelopt", changed("weight_scale", lambda t: t.bfloat16())),
    "block scales of e5m2": (errors.WrongDtypeError, "compressed-tensors", changed("weight_scale", to_e5m2)),
    "global scale of bf16": (errors.WrongDtypeError, "modelopt", changed("weight_scale_2", lambda t: t.bfloat16())),
    "FP8 scale of fp64": (errors.WrongDtypeError, "fp8-128-fp32", changed("scale", lambda t: t.double())),
    "block scales one row short": (errors.WrongShapeError, "modelopt", changed("weight_scale", lambda t: t[1:])),
    "block scales transposed": (errors.WrongShapeError, "modelopt", changed("weight_scale", lambda t: t.T)),
    "block scales swizzled": (errors.WrongShapeError, "modelopt", changed("weight_scale", swizzled)),
    "block scales of 32": (errors.WrongShapeError, "compressed-tensors", changed("weight_scale", lambda t: t[:, ::2])),
    "global scale per row": (errors.WrongShapeError, "modelopt", changed("weight_scale_2", lambda t: t.repeat(96))),
    "MXFP4 scales of 16": (errors.WrongShapeError, "mxfp4", changed("scale", lambda t: t.repeat(1, 2))),
    "FP8 scales of no known block": (errors.WrongShapeError, "fp8-32-e8m0", changed("scale", lambda t: t[:-1])),
    "weight of three dimensions": (errors.WrongShapeError, "bf16", changed("weight", lambda t: t.unsqueeze(0))),
    "gate of another shape than up": (errors.WrongShapeError, "bf16", changed("weight", lambda t: t[:-16])),
    "gate and down exchanged": (errors.WrongShapeError, "bf16", exchanged("w1", "w2")),
    "quantised twice": (
        errors.AmbiguousCheckpointError, "modelopt",
        lambda tensors: tensors.update({
            f"{GATE}.weight_packed": tensors[f"{GATE}.weight"].clone(), f"{GATE}.weight_global_scale": torch.ones(1),
        }),
    ),
    "two FP8 scales": (
        errors.AmbiguousCheckpointError, "fp8-128-fp32",
        lambda tensors: tensors.update({f"{GATE}.weight_scale_inv": tensors[f"{GATE}.scale"].clone()}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_a_broken_module_is_refused_and_the_rest_still_reads(tmp_path: Path, name: str) -> None:
    error, kind, attack = MODULES[name]
    tensors, _ = factory.model(factory.MAKERS[kind])
    attack(tensors)
    path = factory.write(tmp_path / "c", tensors)
    checkpoint = open_checkpoint(path)
    assert [type(problem) for problem in checkpoint.problems] == [error]
    with pytest.raises(error) as caught:
        checkpoint.shared_expert(0)
    assert GATE.rpartition(".")[0] in str(caught.value)
    with pytest.raises(error):
        load_shared_expert(path, 0)
    assert checkpoint.shared_expert(1).check().problems == ()


def test_a_layer_with_two_shared_experts_is_not_decided_by_order(tmp_path: Path) -> None:
    tensors, _ = factory.model(factory.plain())
    tensors |= factory.expert(factory.plain(), "model.layers.0.mlp.shared_experts", "transformers")[0]
    path = factory.write(tmp_path / "c", tensors)
    with pytest.raises(errors.AmbiguousCheckpointError, match=r"model\.layers\.0\.mlp\.shared_experts"):
        load_shared_expert(path, 0)


CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "another hidden size": ("bf16", {"hidden_size": 96}),
    "another FP8 block": (
        "fp8-32-e8m0",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
    ),
    "another dialect": ("modelopt", {"quantization_config": {"quant_method": "compressed-tensors"}}),
    "the other dialect": ("compressed-tensors", {"quantization_config": {"quant_method": "modelopt"}}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path: Path, name: str) -> None:
    kind, config = CONFIGS[name]
    checkpoint = open_checkpoint(factory.write(tmp_path / "c", factory.model(factory.MAKERS[kind])[0], config))
    with pytest.raises(errors.ConfigMismatchError):
        checkpoint.shared_expert(0)


def test_a_declared_block_decides_where_shapes_allow_two(tmp_path: Path) -> None:
    """160 x 96 under 64 x 64 has scales of 3 x 2; the config is believed, and it decodes."""
    tensors, values = factory.model(factory.fp8((64, 64)))
    config = {"quantization_config": {"weight_block_size": [64, 64]}}
    checkpoint = open_checkpoint(factory.write(tmp_path / "c", tensors, config))
    down = checkpoint.shared_expert(0).projections["down"]
    assert down.block == (64, 64)
    assert torch.equal(load_projection(checkpoint, down).dequantize(), values["layers.0.ffn.shared_experts"]["down"])


@pytest.mark.parametrize("block", ["128", [128], [0, 128], [128, 128, 128]])
def test_a_block_size_that_is_none(tmp_path: Path, block: object) -> None:
    config = {"quantization_config": {"weight_block_size": block}}
    with pytest.raises(errors.InvalidConfigError, match="weight_block_size"):
        _ = open_checkpoint(factory.write(tmp_path / "c", factory.rest(), config)).experts


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "suffix"), [("modelopt", "weight_scale_2"), ("compressed-tensors", "weight_global_scale")]
)
@pytest.mark.parametrize("value", [0.0, -1e-4, float("nan"), float("inf")])
def test_a_global_scale_that_is_none(tmp_path: Path, kind: str, suffix: str, value: float) -> None:
    tensors, _ = factory.model(factory.MAKERS[kind])
    tensors[f"{GATE}.{suffix}"].fill_(value)
    with pytest.raises(errors.InvalidScaleError, match=f"{GATE}.{suffix}"):
        load_shared_expert(factory.write(tmp_path / "c", tensors), 0)


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("amax", [1e-3, 0.05, 1.0, 30.0, 200.0])
def test_a_reciprocal_global_scale_is_refused_and_the_right_one_is_not(tmp_path: Path, kind: str, amax: float) -> None:
    right, wrong = (amax / 2688, 2688 / amax) if kind == "modelopt" else (2688 / amax, amax / 2688)
    maker = factory.modelopt if kind == "modelopt" else factory.compressed_tensors
    load_shared_expert(factory.write(tmp_path / "right", factory.model(maker(right))[0]), 0)
    path = factory.write(tmp_path / "wrong", factory.model(maker(wrong))[0])
    with pytest.raises(errors.SuspiciousScaleError, match="looks like a global scale stored as its reciprocal"):
        load_shared_expert(path, 0)


def test_gate_and_up_exchanged_fit_every_shape_but_not_the_layers_output(tmp_path: Path) -> None:
    """No header can tell gate from up: what catches the exchange is the output, far beyond any rounding."""
    tensors, _ = factory.model(factory.plain(torch.float32))
    right = load_shared_expert(factory.write(tmp_path / "right", tensors), 0, activations="bf16")
    exchanged("w1", "w3")(tensors)
    checkpoint = open_checkpoint(factory.write(tmp_path / "wrong", tensors))
    assert checkpoint.problems == []
    wrong = load_shared_expert(checkpoint.path, 0, activations="bf16")
    x = torch.randn(32, 160)
    y, z = right(x), wrong(x)
    assert (y - z).norm() / y.norm() > 0.5


# --- the corpus itself -----------------------------------------------------------------------------------------------


def test_every_named_error_has_its_test() -> None:
    named = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    tables = {case[0].__name__ for table in (FILES, DIRECTORIES, MODULES) for case in table.values()}
    tables |= {error.__name__ for _, error, *_ in test_router.BROKEN}
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    raised = set(re.findall(r"pytest\.raises\((?:errors\.)?(\w+)", tests))
    assert named - tables - raised == set()
