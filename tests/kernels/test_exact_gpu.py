# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the exact sums have the bits they have on a CPU, and the layer on them follows the reference."""

from __future__ import annotations

import pytest
import torch

from nvfp4_experts.kernels import reference
from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES
from nvfp4_experts.kernels.exact import rule
from nvfp4_experts.layers.shared_expert import Nvfp4SharedExpert
from tests.kernels.test_exact import Operands, draw, pack_codes
from tests.kernels.test_shared_expert import make_expert, rel_l2
from tests.tolerances import against_reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 80), (33, 129, 1040), (7, 64, 7168)], ids=str)
def test_sums_have_the_bits_of_the_cpu(
    shape: tuple[int, int, int], tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torch may round fp32 operands to TF32: decoded values have 6 bits, which it holds."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    for seed in range(5):
        case: Operands = draw(seed, *shape)
        sides = (pack_codes(case.a_codes), case.a_scales, pack_codes(case.b_codes), case.b_scales)
        got = rule.torch_matmul(*(side.cuda() for side in sides)).cpu()
        assert torch.equal(got.view(torch.int32), rule.torch_matmul(*sides).view(torch.int32)), seed


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
def test_the_layer_follows_the_reference(mode: str) -> None:
    weights, x = make_expert(272, 144), torch.randn(33, 272)
    options = {"activations": "nvfp4", "activation_scale": mode, "swiglu_limit": 10.0}
    scales = {"input_scale": torch.tensor(5.0 / 2688), "hidden_scale": torch.tensor(8.0 / 2688)}
    want = reference.shared_expert(x, *weights, **options, **scales)
    layer = Nvfp4SharedExpert(*(w.to("cuda") for w in weights), **options, **scales, backend="exact")
    assert rel_l2(layer(x.cuda()).cpu(), want) <= against_reference("nvfp4", "exact", 33 * 144)
