# SPDX-License-Identifier: Apache-2.0
"""The packages whose bytes the recipes promise: f(w (N, K), amax ()) -> (packed codes, scale bytes, decode scale).

Each makes the global scale from the amax it is given as it would make it from that of w.

Imported inside the functions: each is needed only by the tests of its recipe, which skip where it is missing.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.formats.scalar_oracle import kernel_recipe


def modelopt(w: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    module = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    scale_2 = module.NVFP4QTensor.get_weights_scaling_factor_2(amax.view(1))
    # Its cast writes into its input, hence the clone.
    packed, scales, scale_2 = module.NVFP4QTensor.quantize(w.clone(), 16, weights_scaling_factor_2=scale_2)
    return packed._quantized_data, scales.view(torch.uint8), scale_2


def torchao(w: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    w = w.float() if w.dtype == torch.float16 else w
    scale = module.per_tensor_amax_to_scale(amax)
    scales, packed = module.nvfp4_quantize(w, per_tensor_scale=scale)
    return packed, scales.view(torch.uint8), scale


def compressed_tensors(w: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True,
        scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    blocks = w.float().unflatten(-1, (-1, 16))
    g = generate_gparam(-amax.float(), amax.float())
    scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=g)
    codes = quantize(w, scales, None, args, global_scale=g, dtype=torch.float32)
    return pack_fp4_to_uint8(codes), scales.to(torch.float8_e4m3fn).view(torch.uint8), 1 / g.reshape(())


def kernel(w: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    import numpy as np

    x = w.float().numpy()
    g = np.float32(2688) / amax.float().numpy()
    s = np.float32(1) / g
    packed, scales = kernel_recipe(x, g, s)
    return torch.from_numpy(packed), torch.from_numpy(scales), torch.tensor(s)


ORACLES = {"modelopt": modelopt, "torchao": torchao, "compressed-tensors": compressed_tensors, "kernel": kernel}
