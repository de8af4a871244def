# SPDX-License-Identifier: Apache-2.0
"""The command line, `nvfp4-experts`: quantize, inspect, run, verify, bench and tune.

A command parses its arguments, calls one library function and renders the report that comes back. Nothing here
computes, and no module imports torch before a command needs it, so `--help` answers at once.

Exit codes: 0 fine · 1 the check failed (`verify` past its bound, `inspect` with errors, `bench` and `tune`
with wrong outputs) · 2 usage or input.
"""

from .app import app, main

__all__ = ["app", "main"]
