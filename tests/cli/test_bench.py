# SPDX-License-Identifier: Apache-2.0
"""`bench`: the table, the files, the exit code, and refusals before any work."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from nvfp4_experts.cli import bench
from nvfp4_experts.diagnostics.bench import candidates, exact, measure
from nvfp4_experts.kernels import reference
from tests.cli.commands import invoke

SMALL = ("bench", "--shape", "256x256", "--tokens", "1,4", "--device", "cpu", "--seconds", 0.05)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotate over less than the caches hold: times mean nothing here, and are not looked at."""
    monkeypatch.setattr(measure, "rotation_bytes", lambda device: 500_000)
    real = measure.measure_ceilings
    monkeypatch.setattr(measure, "measure_ceilings", lambda device, rotate, size: real(device, rotate, 64))


def test_help_has_a_sentence_an_example_and_a_page() -> None:
    text = invoke("bench", "--help").stdout
    assert bench.HELP in " ".join(text.split()) and "Example: nvfp4-experts bench " in " ".join(text.split())
    section = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text().partition("\n## bench")[2]
    options = set(re.findall(r"(--[a-z][a-z-]+)", text)) - {"--help"}
    assert {"--shape", "--tokens", "--json", "--experts", "--no-shared"} <= options
    for option in options:
        assert f"`{option}`" in section, f"docs/cli.md does not explain {option} of bench"


def test_the_table_and_the_files(tmp_path: Path) -> None:
    files = {kind: tmp_path / f"bench.{kind}" for kind in ("json", "csv", "png")}
    result = invoke(*SMALL, "--json", files["json"], "--csv", files["csv"], "--picture", files["png"])
    for text in ("nvfp4-experts bf16", "nvfp4-experts nvfp4 dynamic", "torch bf16", "ceilings", "backend cpu", "×)"):
        assert text in result.stdout
    report = json.loads(files["json"].read_text())
    assert report["passed"] is True and report["hidden_size"] == 256 and report["command"].startswith("nvfp4-experts")
    assert {row["tokens"] for row in report["rows"]} == {1, 4}
    with open(files["csv"], newline="", encoding="utf-8") as file:
        assert [row["candidate"] for row in csv.DictReader(file)] == [row["candidate"] for row in report["rows"]]
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.csv", "bench.json", "bench.png"]


def test_the_one_file_of_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "CASES", {"64x48": (2,)})
    file = tmp_path / "report.json"
    text = invoke(*SMALL, "--backend", "auto,sm90", "--activations", "nvfp4", "--report", file).stdout
    assert "nvfp4 outputs against backend exact" in text and "the same bits" in text and "needs a Hopper" in text
    report = json.loads(file.read_text())
    assert set(report) == {"format", "machine", "capabilities", "exact", "exactness", "bench"}
    assert {"system", "nvfp4-experts", "torch", "python", "driver"} <= set(report["machine"])
    assert report["exact"]["against_cpu"]["share"] == 1.0
    assert [(c["backend"], c["found"] is None) for c in report["exactness"]] == 3 * [("auto", False), ("sm90", True)]
    assert report["exactness"][0]["found"]["outputs"][0]["values"] == 2 * 64
    assert report["capabilities"]["backends"] and report["bench"]["rows"] and report["bench"]["passed"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert "--force" in invoke(*SMALL, "--report", file, code=2).stderr


def test_which_candidates_take_part(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ("--activations", "nvfp4", "--activation-scale", "per_token", "--backend", "auto, torch")
    text = invoke(*SMALL, *options, "--json", file).stdout
    assert text.count("[torch]") == 2  # in both tables: a name is no markup
    names = list(dict.fromkeys(row["candidate"] for row in json.loads(file.read_text())["rows"]))
    assert names == [
        "nvfp4-experts nvfp4 per_token", "nvfp4-experts nvfp4 per_token [torch]",
        "torch bf16", "torch fp8", "humming-kernels", "ggml",
    ]  # fmt: skip


@pytest.mark.parametrize("options", [("--moe",), ("--top-k", "2"), ("--shared",), ("--no-shared",)])
def test_any_option_of_a_mixture_asks_for_one(options: tuple[str, ...]) -> None:
    text = invoke("bench", "--shape", "64x48", "--device", "cpu", *options, code=2).stderr
    assert "--experts 256" in text, "64x48 is no name, so the number of experts must be given"


@pytest.mark.parametrize(("options", "shared"), [((), True), (("--no-shared",), False)])
def test_a_mixture_of_experts(tmp_path: Path, options: tuple[str, ...], shared: bool) -> None:
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    small = ("bench", "--shape", "64x48", "--experts", 4, "--top-k", 2, "--device", "cpu", "--seconds", 0.05)
    text = invoke(*small, "--tokens", "1,5", *options, "--json", file, "--picture", picture).stdout
    assert f"4 routed experts, top-2{', and a shared one' if shared else ''}, 64x48: H 64, I 48" in text
    assert "experts hit" in text and "F.linear for each hit expert" in text and "FAILED" not in text
    report = json.loads(file.read_text())
    assert (report["experts"], report["top_k"], report["shared"]) == (4, 2, shared)
    assert {row["hits"] for row in report["rows"] if row["tokens"] == 1} == {2}
    names = list(dict.fromkeys(row["candidate"] for row in report["rows"]))
    assert names == [
        "nvfp4-experts bf16", "nvfp4-experts fp8", "nvfp4-experts nvfp4 dynamic", "torch bf16", "humming-kernels",
    ]  # fmt: skip
    assert {row["status"] for row in report["rows"] if row["ours"]} == {"timed"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_one_file_of_a_mixture_has_the_same_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "CASES", {"64x48": (2,)})
    file = tmp_path / "report.json"
    mixture = ("--experts", 4, "--top-k", 2, "--activations", "nvfp4")
    invoke("bench", "--shape", "64x48", "--tokens", 2, "--device", "cpu", "--seconds", 0.05, *mixture, "--report", file)
    report = json.loads(file.read_text())
    assert [case["backend"] for case in report["exactness"]] == ["auto"] * 3
    assert report["bench"]["experts"] == 4 and report["bench"]["rows"][0]["hits"] > 0


def test_quick_is_two_numbers_of_tokens_unless_others_are_given(tmp_path: Path) -> None:
    for i, (options, expected) in enumerate((((), {1, 64}), (("--tokens", "2"), {2}))):
        file = tmp_path / f"{i}.json"
        short = ("bench", "--shape", "64x64", "--device", "cpu", "--activations", "bf16", "--quick")
        invoke(*short, *options, "--json", file)
        assert {row["tokens"] for row in json.loads(file.read_text())["rows"]} == expected


def test_wrong_outputs_of_ours_exit_1_and_have_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = reference.shared_expert

    def wrong(x, gate, up, down, *, activations, **options):  # type: ignore[no-untyped-def]
        """The truth for fp8 is moved away from what the layer gives."""
        return real(x, gate, up, down, activations=activations, **options) * (1.1 if activations == "fp8" else 1.0)

    monkeypatch.setattr(reference, "shared_expert", wrong)
    file = tmp_path / "bench.json"
    result = invoke(*SMALL, "--json", file, code=1)
    assert "FAILED" in result.stdout
    times = result.stdout.partition("Median µs")[2]
    assert "nvfp4-experts bf16" in times and "fp8" not in times
    rows = json.loads(file.read_text())["rows"]
    assert {row["median_us"] for row in rows if row["candidate"] == "nvfp4-experts fp8"} == {None}


def test_a_wrong_peer_is_shown_and_exits_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "swiglu", lambda gate_up: gate_up.chunk(2, dim=-1)[1])
    result = invoke(*SMALL, "--activations", "bf16")
    assert "FAILED" in result.stdout and "torch bf16" not in result.stdout.partition("Median µs")[2]


@pytest.mark.parametrize(
    "options",
    [
        ("--tokens", "1,many"),
        ("--tokens", ","),
        ("--tokens", "0"),
        ("--shape", "V5"),
        ("--activations", "int3"),
        ("--device", "abacus"),
        ("--seconds", "0"),
        ("--experts", "4", "--top-k", "5"),
        ("--experts", "0"),
    ],
)
def test_usage_errors_exit_2_and_explain(options: tuple[str, ...]) -> None:
    result = invoke(*SMALL, *options, code=2)
    assert result.stdout == "" and "way out" in result.stderr and "Traceback" not in result.output


def test_existing_files_need_force(tmp_path: Path) -> None:
    file = tmp_path / "bench.csv"
    file.write_text("precious")
    assert "--force" in invoke(*SMALL, "--csv", file, code=2).stderr
    assert file.read_text() == "precious"
    invoke(*SMALL, "--activations", "bf16", "--csv", file, "--force")
    assert file.read_text().startswith("candidate,")
