# SPDX-License-Identifier: Apache-2.0
"""The examples run, and the demo's figures are the model's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tolerances import OVER_RANKS


def run(root: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("plan", ["ep", "tp", "dispatch"])
def test_a_model_over_two_processes(plan: str, root: Path) -> None:
    """torchrun, `from_pretrained` of each process's part, `generate`; with dispatch on texts of different lengths."""
    pytest.importorskip("transformers")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    lines = [line for line in run(root, *torchrun, "-m", "examples.parallel", "--plan", plan).splitlines() if line]
    form = r"rank (\d): (\S+) of the bytes, logits (\S+) apart, alike on all ranks: (\w+), (.*)"
    found = [match for line in lines if (match := re.fullmatch(form, line))]
    assert [match[1] for match in found] == ["0", "1"], lines
    shared = plan == "dispatch"  # whole on every rank: one expert of nine
    for match in found:
        assert float(match[2]) == pytest.approx(5 / 9 if shared else 0.5, abs=0.01)
        assert float(match[3]) <= (0 if shared else OVER_RANKS["logits"])
        assert match[4] == str(not shared)
    assert found[0][5].startswith("'class Node(object):\\n    def __init__(self, other):")
    assert (found[0][5] == found[1][5]) == (not shared)


def test_quickstart(root: Path) -> None:
    text = run(root, "examples/quickstart.py")
    assert "4.50 bits per value, relative error 0.09" in text
    assert "activation_scale='static', static scales known" in text


@pytest.mark.slow
def test_demo(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    picture, figures = tmp_path / "demo.png", tmp_path / "demo.json"
    text = run(root, "-m", "examples.demo", "--windows", "16", "--output", str(picture), "--json", str(figures))
    assert "nvfp4 per-token" in text and picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(figures.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    base = rows["original"]["nats_per_byte"]
    formats = ["bf16", "fp8", "nvfp4 static", "nvfp4 dynamic", "nvfp4 per-token"]
    assert 1.0 < base < 2.0
    for name in formats:
        assert abs(rows[name]["nats_per_byte"] - base) < 0.01
        assert max(rows[name]["against_original"]) < 0.16
    # The yardsticks see what they are for: each format costs its own error, exchanged halves are unrelated output,
    # and a 5 % scale error that the loss hardly sees stands out 20-fold against bf16 activations.
    assert max(rows["bf16"]["against_nvfp4"]) < 0.003 < min(rows["fp8"]["against_nvfp4"])
    assert max(rows["fp8"]["against_nvfp4"]) < min(rows["nvfp4 static"]["against_nvfp4"])
    assert rows["gate, up exchanged"]["nats_per_byte"] > base + 0.5
    assert min(rows["gate scale x 1.05"]["against_nvfp4"]) > 0.03
    assert [w["name"] for w in result["writings"]] == ["original", "bf16", "nvfp4 static"]
    for writing in result["writings"]:
        assert len(writing["texts"]) == 3 and writing["bytes_per_second"] > 0
        assert "def __init__(self, other):" in writing["texts"][1]  # every format writes Python
    assert result["disk_bytes"][0] / result["disk_bytes"][1] == pytest.approx(32 / 9, rel=0.01)
    beside = 2 * 4 * 9 * 3 * 256  # what the CPU kernel keeps: 2 bytes a row, in 4 layers of 9 times gate, up and down
    assert result["memory_bytes"][0] / (result["memory_bytes"][1] - beside) == pytest.approx(32 / 9, rel=0.01)
