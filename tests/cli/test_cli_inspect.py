# SPDX-License-Identifier: Apache-2.0
"""`inspect`: both dialects of the converted checkpoint, broken copies of it, and the exit codes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvfp4_experts.diagnostics import capabilities
from nvfp4_experts.kernels import native
from nvfp4_experts.kernels.exact import rule
from nvfp4_experts.kernels.sm90 import backend as sm90
from nvfp4_experts.kernels.target import Target
from tests.cli.commands import error_of, invoke, output_of

W1 = "model.layers.1.ffn.shared_experts.w1"


def broken(source: Path, target: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def test_what_is_in_a_modelopt_checkpoint(modelopt: Path) -> None:
    report = output_of("inspect", modelopt)
    assert (report["dialect"], report["swiglu_limit"], report["shards"]) == ("modelopt", 10.0, 1)
    assert report["anomalies"] == [] and report["counts"] == {"error": 0, "warning": 0, "note": 0}
    groups = [(g["layer"], g["kind"], g["experts"], g["format"], g["input_scales"]) for g in report["groups"]]
    rows = [("shared", 1, "nvfp4", 3), ("routed", 8, "bf16", 0)]
    assert groups == [(layer, *row) for layer in range(4) for row in rows]
    module = next(m for m in report["modules"] if m["prefix"] == W1)
    assert module["scale_max"] == 448.0 and module["shape"] == [256, 256]
    assert module["bits_per_weight"] == pytest.approx(4.5 + 64 / 65536)


def test_what_is_in_a_compressed_tensors_checkpoint(compressed: Path) -> None:
    report = output_of("inspect", compressed)
    assert report["dialect"] == "compressed-tensors" and len(report["modules"]) == 108
    assert {anomaly["name"] for anomaly in report["anomalies"]} == {"missing-input-scale"}
    assert report["counts"] == {"error": 0, "warning": 0, "note": 108}
    assert all(0 < module["global_scale"] < 1e-3 for module in report["modules"])


def test_384_experts_would_be_one_line(compressed: Path) -> None:
    lines = invoke("inspect", compressed).stdout.splitlines()
    assert sum("8 routed" in line for line in lines) == 4
    assert any("missing-input-scale ×108" in line for line in lines)
    assert any("105 more" in line for line in lines)


def test_layers_can_be_chosen(compressed: Path) -> None:
    report = output_of("inspect", compressed, "--layer", 1, "--layer", 3)
    assert {module["layer"] for module in report["modules"]} == {1, 3}


def test_errors_exit_1(modelopt: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{W1}.weight_scale"].view(torch.uint8)[0, 0] = 0x7F

    path = broken(modelopt, tmp_path / "nan", spoil)
    report = output_of("inspect", path, code=1)
    (anomaly,) = report["anomalies"]
    assert (anomaly["name"], anomaly["severity"], anomaly["where"]) == ("nan-scale", "error", W1)
    text = invoke("inspect", path, code=1).stdout
    assert "error nan-scale ×1" in text and f"{W1}: 1 of 4096 block scales are NaN" in text


def test_warnings_exit_1_only_when_strict(modelopt: Path, tmp_path: Path) -> None:
    path = broken(modelopt, tmp_path / "differ", lambda tensors: tensors[f"{W1}.weight_scale_2"].mul_(2))
    report = output_of("inspect", path)
    assert [anomaly["name"] for anomaly in report["anomalies"]] == ["gate-up-global-scales-differ"]
    assert output_of("inspect", path, "--strict", code=1) == report


def test_notes_never_fail(compressed: Path) -> None:
    invoke("inspect", compressed, "--strict")


def test_a_missing_scale_is_reported_and_the_rest_shown(modelopt: Path, tmp_path: Path) -> None:
    path = broken(modelopt, tmp_path / "missing", lambda tensors: tensors.pop(f"{W1}.weight_scale_2"))
    report = output_of("inspect", path, code=1)
    (anomaly,) = report["anomalies"]
    assert (anomaly["name"], anomaly["where"]) == ("missing-tensor", f"{W1}.weight_scale_2")
    assert len(report["modules"]) == 107


def test_a_truncated_file_is_an_anomaly(modelopt: Path, tmp_path: Path) -> None:
    shutil.copytree(modelopt, tmp_path / "short")
    shard = tmp_path / "short" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    report = output_of("inspect", tmp_path / "short", code=1)
    assert [anomaly["name"] for anomaly in report["anomalies"]] == ["truncated-file"]
    assert "truncated-file" in invoke("inspect", tmp_path / "short", code=1).stdout


def test_what_this_machine_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    report = output_of("inspect", "--machine")
    runs = {(b["name"], b["where"]): b["reason"] for b in report["backends"]}
    assert runs["torch", "cpu"] is None and "Hopper" in runs["sm90", "cpu"]
    assert report["threads"] >= 1 and report["cpu"]
    notes = {(b["name"], b["where"]): b["note"] for b in report["backends"]}
    assert notes["torch", "cpu"] is None
    assert notes["exact", "cpu"] == f"nvfp4 activations alone; when asked for by name; {rule.form(torch.device('cpu'))}"
    loaded, reason = native.load()
    if loaded is None:
        assert report["library"] is None and report["library_reason"] == reason == runs["cpu", "cpu"]
        return
    assert runs["cpu", "cpu"] is None and report["tier"] == native.tier().name
    for tier, known in zip(report["tiers"], loaded.tiers, strict=True):
        assert tier["name"] == known.name
        assert tier["reason"] == (None if known.present else f"this processor does not have all of: {known.needs}")
    text = invoke("inspect", "--machine").stdout
    assert all(word in text for word in ("CPU kernel", "Tiers", "portable", "needs a Hopper GPU"))


def test_forms_of_a_backend_are_not_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Hopper "auto" takes the one for fp8 too."""
    monkeypatch.setattr(sm90, "_compiler_problem", lambda: None)
    monkeypatch.setattr(capabilities, "target_of", lambda _: Target("cuda", "a Hopper", (9, 0), 132))
    notes = {name: capabilities._backend(name, torch.device("cpu")).note for name in ("sm90", "sm90-fp8")}
    assert notes == {"sm90": "nvfp4, bf16 activations alone", "sm90-fp8": "fp8 activations alone"}


def test_a_machine_that_is_told_to_run_another_tier_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.load()[0] is None:
        pytest.skip("the native library is not here")
    monkeypatch.setenv(native.ISA_VARIABLE, "sse9")
    report = output_of("inspect", "--machine")
    assert report["tier"] is None and "must name a tier of this machine" in report["tier_reason"]


def test_a_checkpoint_or_the_machine(modelopt: Path) -> None:
    assert error_of("inspect")["got"] == "neither"
    assert error_of("inspect", modelopt, "--machine")["got"] == "both"
