# SPDX-License-Identifier: Apache-2.0
"""`verify`: a report on stdout, in a file and as a picture; exit 1 past the bound or on broken bits."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4_experts.kernels import tiled
from tests.cli.commands import error_of, invoke, output_of


def test_an_honest_conversion_passes(modelopt: Path, tiny_checkpoint: Path) -> None:
    report = output_of("verify", modelopt, "--against", tiny_checkpoint, "--recipe", "modelopt")
    assert report["passed"] is True and report["offenders"] == [] and report["max_error"] == 0.25
    assert len(report["experts"]) == 4
    for expert in report["experts"]:
        assert all(0.09 < weight["error"]["rel_l2"] < 0.1 for weight in expert["weights"])
        assert all(check["kept"] for check in expert["bits"])
        names = [(output["activations"], output["activation_scale"]) for output in expert["outputs"]]
        assert ("nvfp4", "static") in names and ("bf16", None) in names


def test_past_the_bound_exits_1_and_lists_the_offenders(modelopt: Path, tiny_checkpoint: Path) -> None:
    arguments = ("verify", modelopt, "--against", tiny_checkpoint)
    figures = [expert["bound_figure"] for expert in output_of(*arguments)["experts"]]
    bound = (min(figures) + max(figures)) / 2
    report = output_of(*arguments, "--max-error", bound, code=1)
    assert report["offenders"] == [f"layer {i} shared" for i, figure in enumerate(figures) if figure > bound]
    text = invoke(*arguments, "--max-error", bound, code=1).stdout
    verdict = text[text.index("failed") :]
    assert f"failed: {len(report['offenders'])} of 4 experts" in verdict and verdict.count("other bits") == 1


def test_another_recipe_breaks_the_promise(modelopt: Path, tiny_checkpoint: Path) -> None:
    arguments = ("verify", modelopt, "--against", tiny_checkpoint, "--recipe", "compressed-tensors", "--layer", 1)
    report = output_of(*arguments, code=1)
    broken = [check for check in report["experts"][0]["bits"] if not check["kept"]]
    assert broken and broken[0]["mismatch"]["part"] in ("codes", "block_scales")
    text = invoke(*arguments, code=1).stdout
    assert "not requantised by compressed-tensors" in text and "must be" in text
    verdict = " ".join(text[text.index("failed") :].split())
    assert "or with other bits than promised: layer 1 shared" in verdict and verdict.count("other bits") == 2


def test_tables_show_formats_and_figures(modelopt: Path, tiny_checkpoint: Path) -> None:
    text = invoke("verify", modelopt, "--against", tiny_checkpoint).stdout
    for expected in ("bf16 → nvfp4", "nvfp4 per_token", "layer 3 shared", "SQNR dB", "passed", "N(0, 1), seed 0"):
        assert expected in text


def test_routed_experts_can_be_sampled(compressed: Path, tiny_checkpoint: Path) -> None:
    arguments = ("--experts", "routed", "--sample", 2, "--layer", 0)
    report = output_of("verify", compressed, "--against", tiny_checkpoint, *arguments)
    assert [expert["index"] for expert in report["experts"]] == [0, 4]


def test_dialects_pass_into_each_other(modelopt: Path, tmp_path: Path) -> None:
    invoke("quantize", modelopt, tmp_path / "ct", "--dialect", "compressed-tensors")
    report = output_of("verify", tmp_path / "ct", "--against", modelopt)
    assert {check["promise"] for expert in report["experts"] for check in expert["bits"]} == {"passed through"}
    sqnr = [weight["error"]["sqnr_db"] for expert in report["experts"] for weight in expert["weights"]]
    assert sqnr.count(None) + sum(value > 130 for value in sqnr if value is not None) == 12  # None: infinite


def test_given_hidden_states(modelopt: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"x": 2 * torch.randn(7, 256)}, file)
    report = output_of("verify", modelopt, "--against", tiny_checkpoint, "--input", file, "--layer", 0)
    assert (report["tokens"], report["hidden_states"]) == (7, str(file))
    assert load_file(file)["x"].shape == (7, 256)


def test_report_and_picture_are_written(modelopt: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    report, picture = tmp_path / "verify.json", tmp_path / "verify.png"
    arguments = ("verify", modelopt, "--against", tiny_checkpoint, "--report", report, "--picture", picture)
    printed = output_of(*arguments)
    assert json.loads(report.read_text()) == printed
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["verify.json", "verify.png"]
    assert error_of(*arguments)["what"] == str(report)
    invoke(*arguments, "--force")


def test_a_failed_verification_still_leaves_its_report(modelopt: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "verify.json"
    invoke("verify", modelopt, "--against", tiny_checkpoint, "--max-error", 0, "--report", report, code=1)
    assert json.loads(report.read_text())["passed"] is False


def test_no_matplotlib_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    error = error_of("verify", "nowhere", "--against", "nowhere", "--picture", tmp_path / "v.png")
    assert error["error"] == "UnsupportedError" and "[plot]" in error["way_out"]


def test_layers_that_are_not_there(modelopt: Path, tiny_checkpoint: Path) -> None:
    error = error_of("verify", modelopt, "--against", tiny_checkpoint, "--layer", 9)
    assert error["error"] == "InputError" and "[9]" in error["what"]


def test_report_and_picture_must_be_two_files(tmp_path: Path) -> None:
    file = tmp_path / "verify.svg"
    error = error_of("verify", "nowhere", "--against", "nowhere", "--report", file, "--picture", file)
    assert (error["error"], error["what"]) == ("InputError", "--report and --picture")


# --- verify --exact -----------------------------------------------------------------------------------------------


def test_a_backend_against_the_exact_sums(modelopt: Path, tmp_path: Path) -> None:
    file = tmp_path / "exact.json"
    arguments = ("verify", modelopt, "--exact", "--layer", 2, "--tokens", 8)
    report = output_of(*arguments, "--report", file)
    assert json.loads(file.read_text()) == report and report["passed"] is True
    modes = report["experts"][0]["modes"]
    assert [mode["activation_scale"] for mode in modes] == ["static", "dynamic", "per_token"]
    for mode in modes:
        assert [output["dtype"] for output in mode["outputs"]] == ["bfloat16", "float32"]
        assert all(sum(output["histogram"].values()) == output["values"] == 8 * 256 for output in mode["outputs"])
    text = invoke(*arguments).stdout
    for expected in ("backend exact", "bit-equal", "3–4", "bfloat16", "passed", "layer 2 shared", "per_token"):
        assert expected in text


def test_too_few_equal_bits_exit_1_and_name_the_first(modelopt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = tiled._matmul
    monkeypatch.setattr(tiled, "_matmul", lambda a, b: multiply(a, b) * (1 + 2.0**-9))
    arguments = ("verify", modelopt, "--exact", "--layer", 0, "--tokens", 4, "--backend", "torch")
    report = output_of(*arguments, code=1)
    assert report["offenders"] == ["layer 0 shared"]
    text = " ".join(invoke(*arguments, code=1).stdout.split())
    assert "first bfloat16 mismatch at token 0, channel" in text and "failed" in text and "ulp); that token" in text
    invoke(*arguments, "--min-equal", 0)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ((), "neither"),
        (("--exact", "--against", "there"), "both"),
        (("--exact", "--recipe", "modelopt"), "--recipe"),
        (("--exact", "--picture", "a.png"), "--picture"),
    ],
)
def test_one_question_at_a_time(options: tuple[str, ...], what: str) -> None:
    assert error_of("verify", "nowhere", *options)["got"] == what
