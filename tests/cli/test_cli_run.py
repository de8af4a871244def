# SPDX-License-Identifier: Apache-2.0
"""`run`: the layer's own output, its statistics, and files that are never half written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4_experts import load_shared_expert
from tests.cli.commands import error_of, invoke, output_of


@pytest.fixture
def hidden(tmp_path: Path) -> Path:
    save_file({"x": torch.randn(3, 5, 256).bfloat16()}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ((), ("bf16", None)),
        (("--activations", "fp8"), ("fp8", None)),
        (("--activations", "nvfp4"), ("nvfp4", "static")),
        (("--activations", "nvfp4", "--activation-scale", "dynamic"), ("nvfp4", "dynamic")),
        (("--activations", "nvfp4", "--activation-scale", "per_token"), ("nvfp4", "per_token")),
    ],
)
def test_output_is_the_layers(
    modelopt: Path, hidden: Path, tmp_path: Path, options: tuple[str, ...], mode: tuple[str, str | None]
) -> None:
    out = tmp_path / "y.safetensors"
    report = output_of("run", modelopt, "--layer", 2, "--input", hidden, "--output", out, *options)
    assert (report["activations"], report["activation_scale"]) == mode
    x, y = load_file(hidden)["x"], load_file(out)["y"]
    layer = load_shared_expert(modelopt, 2, activations=mode[0], activation_scale=mode[1])
    assert y.shape == x.shape and y.dtype == x.dtype
    assert torch.equal(y, layer(x))
    assert report["output"]["rms"] == pytest.approx(float(y.float().square().mean().sqrt()), rel=1e-6)
    assert report["input"]["amax"] == float(x.float().abs().amax())
    assert report["resident_bytes"] == layer.resident_bytes
    assert report["tokens"] == 15 and report["saved"] == str(out)


def test_without_input_scales_nvfp4_is_dynamic(compressed: Path) -> None:
    report = output_of("run", compressed, "--layer", 0, "--random", 2, "--activations", "nvfp4")
    assert report["activation_scale"] == "dynamic"


def test_random_is_seeded_and_bf16(modelopt: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for seed, file in zip((1, 1, 2), files, strict=True):
        report = output_of("run", modelopt, "--layer", 0, "--random", 4, "--seed", seed, "--output", file)
        assert report["dtype"] == "bfloat16" and report["input"]["shape"] == [4, 256]
    y = [load_file(file)["y"] for file in files]
    assert torch.equal(y[0], y[1]) and not torch.equal(y[0], y[2])


def test_weights_quantised_on_loading_are_said_to_be(tiny_checkpoint: Path, modelopt: Path) -> None:
    assert output_of("run", modelopt, "--layer", 0, "--random", 1)["stored"] == ["nvfp4"]
    assert output_of("run", tiny_checkpoint, "--layer", 0, "--random", 1)["stored"] == ["bf16"]
    assert "quantised from bf16 on loading" in invoke("run", tiny_checkpoint, "--layer", 0, "--random", 1).stdout
    assert "on loading" not in invoke("run", modelopt, "--layer", 0, "--random", 1).stdout


def test_timing_counts_calls(modelopt: Path) -> None:
    report = output_of("run", modelopt, "--layer", 0, "--random", 1, "--repeat", 3, "--warmup", 0)
    assert report["calls"] == 3 and 0 < report["min_ms"] <= report["median_ms"]


def test_no_tokens_at_all(modelopt: Path) -> None:
    assert output_of("run", modelopt, "--layer", 0, "--random", 0)["output"]["shape"] == [0, 256]


def test_nan_in_the_input_is_counted(modelopt: Path, tmp_path: Path) -> None:
    x = torch.randn(4, 256)
    x[1, 7] = torch.nan
    save_file({"x": x}, tmp_path / "x.safetensors")
    report = output_of("run", modelopt, "--layer", 0, "--input", tmp_path / "x.safetensors")
    assert report["input"]["nan_count"] == 1 and report["output"]["nan_count"] == 256


def test_the_table_shows_what_ran(modelopt: Path) -> None:
    text = invoke("run", modelopt, "--layer", 1, "--random", 7, "--activations", "nvfp4").stdout
    assert "nvfp4 (static scale)" in text and "(7, 256)" in text and "backend cpu" in text and "7 tokens" in text


def test_one_of_several_tensors_is_named(modelopt: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.safetensors"
    save_file({"a": torch.zeros(1, 256), "b": torch.ones(2, 256)}, file)
    error = error_of("run", modelopt, "--layer", 0, "--input", file)
    assert "exactly one tensor" in error["rule"] and "--tensor" in error["way_out"]
    assert output_of("run", modelopt, "--layer", 0, "--input", file, "--tensor", "b")["tokens"] == 2
    assert "must hold a tensor 'c'" in error_of("run", modelopt, "--layer", 0, "--input", file, "--tensor", "c")["rule"]


@pytest.mark.parametrize("options", [(), ("--random", 1, "--input", "x.safetensors")])
def test_exactly_one_source_of_hidden_states(modelopt: Path, options: tuple[object, ...]) -> None:
    assert error_of("run", modelopt, "--layer", 0, *options)["what"] == "hidden states"


def test_an_existing_output_needs_force(modelopt: Path, tmp_path: Path) -> None:
    out = tmp_path / "y.safetensors"
    out.write_bytes(b"precious")
    arguments = ("run", modelopt, "--layer", 0, "--random", 1, "--output", out)
    assert error_of(*arguments)["way_out"].startswith("pass --force")
    assert out.read_bytes() == b"precious"
    invoke(*arguments, "--force")
    assert load_file(out)["y"].shape == (1, 256)
    assert [path.name for path in tmp_path.iterdir()] == ["y.safetensors"]


def test_an_output_without_a_folder_fails_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "nowhere" / "y.safetensors"
    error = error_of("run", "no-checkpoint-either", "--layer", 0, "--random", 1, "--output", out)
    assert error["what"] == str(out)


def test_what_is_no_hidden_state_is_refused(modelopt: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    arguments = ("run", modelopt, "--layer", 0, "--input", file)
    assert error_of(*arguments)["got"] == "no such file"
    file.write_bytes(b"not safetensors")
    assert error_of(*arguments)["rule"] == "must be a safetensors file"
    save_file({"x": torch.zeros(2, 256, dtype=torch.int32)}, file)
    assert "torch.int32" in error_of(*arguments)["got"]
    save_file({"x": torch.zeros(2, 128)}, file)
    assert error_of(*arguments)["what"] == "x"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--layer", 9), "MissingExpertError"),
        (("--layer", 0, "--backend", "abacus"), "UnsupportedError"),
        (("--layer", 0, "--activations", "nvfp4", "--activation-scale", "static"), "CalibrationError"),
    ],
)
def test_layers_that_cannot_run(compressed: Path, options: tuple[object, ...], error: str) -> None:
    assert error_of("run", compressed, "--random", 1, *options)["error"] == error


@pytest.mark.parametrize("device", ["nonsense", "meta", "", "cuda:99"])
@pytest.mark.parametrize("verb", [("run", "--layer", 0, "--random", 2), ("verify", "--tokens", 2)], ids=lambda v: v[0])
def test_a_device_that_does_not_work_is_an_input_error(modelopt: Path, device: str, verb: tuple[object, ...]) -> None:
    against = ("--against", modelopt) if verb[0] == "verify" else ()
    assert error_of(verb[0], modelopt, *verb[1:], *against, "--device", device)["error"] == "UnsupportedError"


def test_a_seed_beyond_64_bits_is_an_input_error(modelopt: Path) -> None:
    assert error_of("run", modelopt, "--layer", 0, "--random", 2, "--seed", 10**30)["what"] == "seed"


def test_an_output_that_cannot_be_written_is_an_input_error(modelopt: Path) -> None:
    assert "/proc" in error_of("run", modelopt, "--layer", 0, "--random", 2, "--output", "/proc/y.safetensors")["what"]


@pytest.mark.parametrize("tokens", [999_999_999_999, 10**17, 10**30])
def test_more_rows_than_memory_holds_is_an_input_error(modelopt: Path, tokens: int) -> None:
    error = error_of("run", modelopt, "--layer", 0, "--random", tokens)
    assert (error["error"], error["what"]) == ("InputError", "tokens") and f"{tokens * 1024} bytes" in error["got"]
