# SPDX-License-Identifier: Apache-2.0
"""Help that teaches, errors that explain, words that are the library's, and one real process per command."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from nvfp4_experts import __version__
from nvfp4_experts.checkpoints.dialects import OUTPUT_DIALECTS
from nvfp4_experts.checkpoints.plan import EXPERTS, SHARED
from nvfp4_experts.cli import bench, inspect, options, quantize, render, run, tune, verify
from nvfp4_experts.diagnostics.anomalies import CHECKPOINT_RULES, EXPERT_RULES, MODULE_RULES, SEVERITIES
from nvfp4_experts.diagnostics.exactness import DEFAULT_MIN_EQUAL
from nvfp4_experts.diagnostics.verify import DEFAULT_MAX_ERROR
from nvfp4_experts.errors import FormatError
from nvfp4_experts.formats.nvfp4 import RECIPES
from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES, ACTIVATIONS
from tests.cli.commands import ENVIRONMENT, error_of, invoke, output_of, subprocess_of

COMMANDS = {module.NAME: module for module in (quantize, inspect, run, verify, bench, tune)}


def test_version() -> None:
    assert invoke("--version").stdout == f"nvfp4-experts {__version__}\n"


def test_no_arguments_show_the_help() -> None:
    assert set(COMMANDS) <= set(invoke(code=2).output.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_a_sentence_and_an_example(name: str) -> None:
    text = " ".join(invoke(name, "--help").stdout.split())
    assert COMMANDS[name].HELP in text
    assert f"Example: nvfp4-experts {name} " in text


def test_help_loads_no_torch() -> None:
    source = "import sys, nvfp4_experts.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], env=ENVIRONMENT, check=False).returncode == 0


def test_the_words_are_the_librarys() -> None:
    assert get_args(options.Dialect) == OUTPUT_DIALECTS
    assert get_args(options.Experts) == EXPERTS
    assert get_args(options.Recipe) == RECIPES
    assert get_args(options.Shared) == SHARED
    assert get_args(options.Activations) == ("auto", *ACTIVATIONS)
    assert get_args(options.ActivationScale) == ACTIVATION_SCALES
    assert verify.DEFAULT_MAX_ERROR == DEFAULT_MAX_ERROR and verify.DEFAULT_MIN_EQUAL == DEFAULT_MIN_EQUAL
    assert set(render.SEVERITY_STYLE) == set(SEVERITIES)


def test_the_page_names_every_option_and_anomaly() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text()
    for name in COMMANDS:
        for option in re.findall(r"(--[a-z][a-z-]+)", invoke(name, "--help").stdout):
            assert f"`{option}" in page, f"docs/cli.md does not explain {option} of {name}"
    for rule in (*MODULE_RULES, *EXPERT_RULES, *CHECKPOINT_RULES):
        assert f"| `{rule.name}` | {rule.severity} |" in page, f"docs/cli.md does not list {rule.name}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "a"),
        ("quantize", "a", "b", "--dialect", "gguf"),
        ("inspect",),
        ("run", "a"),
        ("run", "a", "--layer", "first"),
        ("verify", "a"),
        ("frobnicate",),
    ],
)
def test_usage_errors_exit_2(arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments, code=2).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "nowhere"),
        ("quantize", "nowhere", "there"),
        ("run", "nowhere", "--layer", 0, "--random", 1),
        ("verify", "nowhere", "--against", "there"),
    ],
)
def test_errors_explain_themselves(arguments: tuple[object, ...]) -> None:
    error = error_of(*arguments)
    assert error["error"] == "NotACheckpointError"
    assert error["what"] == "nowhere" and error["way_out"]
    assert error["message"] == f"{error['what']}: {error['rule']}, got {error['got']}; {error['way_out']}"
    panel = invoke(*arguments, code=2)
    assert panel.stdout == ""
    for text in ("NotACheckpointError", "what", "rule", "got", "way out", "nowhere"):
        assert text in panel.stderr
    assert "Traceback" not in panel.output


def test_what_the_file_system_refuses_is_explained(tiny_checkpoint: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.safetensors"
    error = error_of("quantize", tiny_checkpoint, tmp_path / "out", "--input-scales", missing)
    assert error["what"] == str(missing) and "No such file" in error["got"]


def test_markup_in_an_error_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    render.failure(FormatError("[bold]x[/bold]", "must be", [1, 2], "[red]fix[/red]"), as_json=False)
    text = capsys.readouterr().err
    assert "[bold]x[/bold]" in text and "[red]fix[/red]" in text


def test_json_has_no_number_that_json_lacks() -> None:
    text = render.json_text({"a": float("inf"), "b": [float("nan"), 1.5], "c": {"d": -float("inf")}, "e": (1, None)})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": {"d": None}, "e": [1, None]}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (16_842_364, "16.8 MB"),
        (37_200_000_000, "37.2 GB"),
        (2 * 10**12, "2 TB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert render.size(count) == text


def test_progress_is_shown_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, as_json in ((True, False), (True, True), (False, False)):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, width=100)
        monkeypatch.setattr(render, "console", lambda stderr, console=console: console)
        with render.progress(as_json) as advance:
            advance(2_000_000, 8_000_000, "model-00001.safetensors")
        shown = "model-00001.safetensors" in screen.getvalue() and "2 MB of 8 MB" in screen.getvalue()
        assert shown is (terminal and not as_json)


def test_each_command_in_a_process_of_its_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    converted, y = tmp_path / "nvfp4", tmp_path / "y.safetensors"
    quantized = subprocess_of("quantize", tiny_checkpoint, converted, "--json")
    assert (quantized.returncode, quantized.stderr) == (0, "")
    assert json.loads(quantized.stdout)["converted"] == {"bf16": 12}

    inspected = subprocess_of("inspect", converted)
    assert inspected.returncode == 0 and "missing-input-scale ×12" in inspected.stdout

    ran = subprocess_of("run", converted, "--layer", 3, "--random", 5, "--output", y)
    assert ran.returncode == 0 and "(5, 256)" in ran.stdout and y.exists()

    verified = subprocess_of("verify", converted, "--against", tiny_checkpoint, "--max-error", 0.01)
    assert verified.returncode == 1 and "4 of 4 experts past 0.01" in verified.stdout

    refused = subprocess_of("quantize", tiny_checkpoint, converted)
    assert refused.returncode == 2 and "OutputExistsError" in refused.stderr and "Traceback" not in refused.stderr


def test_hub_ids_are_accepted(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        return str(tiny_checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert output_of("inspect", "someone/tiny")["tensors"] == 210
    assert output_of("run", "someone/tiny", "--layer", 0, "--random", 1)["tokens"] == 1
    assert output_of("verify", "someone/tiny", "--against", "someone/other")["passed"] is True
    assert set(asked) == {"someone/tiny", "someone/other"}
