# SPDX-License-Identifier: Apache-2.0
"""`python -m nvfp4_experts.cli`: the same as the `nvfp4-experts` command."""

from . import main

main()
