# SPDX-License-Identifier: Apache-2.0
"""The command line as functions: in this process, or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from nvfp4_experts.cli import app

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src"),
    "OMP_NUM_THREADS": "1",
}


def invoke(*arguments: object, code: int = 0) -> Result:
    """Run a command in this process, as wide as in a pipe; its exit code must be `code`."""
    result = CliRunner(env={"COLUMNS": None}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def output_of(*arguments: object, code: int = 0) -> Any:
    """The JSON object a command prints on stdout with --json."""
    return json.loads(invoke(*arguments, "--json", code=code).stdout)


def error_of(*arguments: object) -> dict[str, str]:
    """The JSON object a failing command prints on stderr with --json."""
    result = invoke(*arguments, "--json", code=2)
    assert result.stdout == ""
    return json.loads(result.stderr)


def subprocess_of(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, in a process of its own."""
    command = [sys.executable, "-m", "nvfp4_experts.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
