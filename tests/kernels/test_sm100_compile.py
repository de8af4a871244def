# SPDX-License-Identifier: Apache-2.0
"""What Triton and the assembler make of the Blackwell kernels, without the hardware: representative layers.

`tests/compile_check.py` (`make compile-check`) does the same for every cut, chip, mode and shape.
"""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

from nvfp4_experts.kernels.sm100.backend import OLDEST_TRITON_OF_SM_121
from nvfp4_experts.kernels.sm100.compile import Compiled, compile_layer
from nvfp4_experts.kernels.sm100.config import CHIPS, TOKEN_LIMITS, GemmConfig, config_is_legal, refusal
from tests.compile_check import problems_of, triton_version

V4_PRO, V4_FLASH, RAGGED = (7168, 3072), (4096, 2048), (144, 80)
# mode, (H, I), tokens, experts, top_k: every mode; few, more and many tokens; sizes that fill no tile; routed experts.
LAYERS = {
    "one token": ("static", V4_PRO, 1, 1, 0),
    "decode": ("dynamic", V4_PRO, 20, 1, 0),
    "more": ("per_token", V4_FLASH, 64, 1, 0),
    "prefill": ("per_token", V4_PRO, 4096, 1, 0),
    "routed, one token": ("dynamic", V4_PRO, 1, 384, 6),
    "routed, prefill": ("per_token", V4_FLASH, 8192, 256, 6),
    "routed, ragged": ("static", RAGGED, 90, 5, 2),
    "routed, 32 rows": ("dynamic", RAGGED, 40, 5, 2),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("capability", CHIPS, ids=lambda c: CHIPS[c].name)
def test_compiles_to_the_fp4_instruction_without_spills(capability: tuple[int, int], layer: tuple) -> None:
    if capability == (12, 1) and triton_version() < OLDEST_TRITON_OF_SM_121:
        pytest.skip(f"Triton {triton_version()} does not know sm_121; {OLDEST_TRITON_OF_SM_121} does")
    mode, sizes, tokens, experts, top_k = layer
    compiled = compile_layer(capability, mode, *sizes, tokens, experts, top_k)
    assert [kernel.kernel for kernel in compiled if kernel.config] == ["gemm", "gemm"]
    first = "group_slots" if top_k else "amax_partials" if mode == "dynamic" else "enter"
    assert compiled[0].kernel == first and (compiled[-1].kernel == "add_slots") == (top_k > 0)
    assert [problem for kernel in compiled for problem in problems_of(kernel, CHIPS[capability])] == []


def one_gemm(capability: tuple[int, int], config: GemmConfig) -> Compiled:
    chip = dataclasses.replace(CHIPS[capability], table=(config,) * (len(TOKEN_LIMITS) + 1))
    return next(k for k in compile_layer(capability, "per_token", *V4_FLASH, 8192, chip=chip) if k.config)


def test_a_cut_that_spills_is_illegal() -> None:
    """128 tokens x 128 rows of sums do not fit the registers of 4 warps."""
    config = GemmConfig(128, 128, 128, 4, 3, False)
    kernel = one_gemm((12, 0), config)
    assert kernel.config == config and kernel.spilled_bytes > 0
    reason = refusal(config, CHIPS[12, 0], kernel.shared_bytes, kernel.spilled_bytes)
    assert reason == f"it spills {kernel.spilled_bytes} bytes of registers"


def test_a_cut_that_needs_more_shared_memory_than_there_is_is_illegal() -> None:
    config = GemmConfig(64, 128, 256, 8, 6, True)
    kernel = one_gemm((12, 0), config)
    assert kernel.shared_bytes > CHIPS[12, 0].shared_bytes
    assert "shared memory must fit in the 101376" in (refusal(config, CHIPS[12, 0], kernel.shared_bytes, 0) or "")
    assert config_is_legal(config, CHIPS[10, 0], kernel.shared_bytes, 0)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GemmConfig(8, 128, 256, 4, 4, True), "tokens must be 16"),
        (GemmConfig(16, 64, 256, 4, 4, True), "rows whole tiles"),
        (GemmConfig(16, 128, 32, 4, 4, True), "columns whole tiles"),
        (GemmConfig(128, 128, 256, 8, 4, True), "fewer than 128"),
        (GemmConfig(64, 128, 256, 8, 4, False), "fewer than 128"),
    ],
    ids=str,
)
def test_cuts_that_the_kernel_cannot_make(config: GemmConfig, reason: str) -> None:
    assert reason in (refusal(config, CHIPS[10, 0], 0, 0) or "")
