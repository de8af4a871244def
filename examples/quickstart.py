# SPDX-License-Identifier: Apache-2.0
"""The Python API in one sitting: a weight, an expert, a calibration, a checkpoint.

Run it with `python examples/quickstart.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from nvfp4_experts import Nvfp4SharedExpert, load_shared_expert, quantize
from nvfp4_experts.checkpoints import convert, save_input_scales

torch.manual_seed(0)
hidden, intermediate = 512, 256

# One weight. K is the last dimension; a block is 16 values along it.
w = torch.randn(intermediate, hidden, dtype=torch.bfloat16) * 0.05
t = quantize(w)
error = (t.dequantize() - w.float()).norm() / w.float().norm()
print(f"{t}: {t.bits_per_value:.2f} bits per value, relative error {error:.3f}")

# One expert, from floating weights or Nvfp4Tensors. Weights are packed once, here.
gate, up = (torch.randn(intermediate, hidden) * 0.05 for _ in range(2))
down = torch.randn(hidden, intermediate) * 0.05
expert = Nvfp4SharedExpert.from_weights(gate, up, down, swiglu_limit=10.0, activations="bf16")
x = torch.randn(4, 7, hidden, dtype=torch.bfloat16)
y = expert(x)
print(f"{expert}\n  {expert.resident_bytes:,} bytes resident, {tuple(x.shape)} -> {tuple(y.shape)} {y.dtype}")

# Another activation format on the same weights: the tensors are shared, not copied.
for activations, scale in (("fp8", "dynamic"), ("nvfp4", "dynamic"), ("nvfp4", "per_token")):
    difference = (expert.with_activations(activations, scale)(x) - y).float().norm() / y.float().norm()
    print(f"  {activations} ({scale}) differs from bf16 activations by {difference:.3f}")

# Static scales: calibrate on typical hidden states, then ask for them.
expert.calibrate(x)
static = expert.with_activations("nvfp4", "static")
print(f"  static scales: input {static.input_scale:.5f}, hidden {static.hidden_scale:.5f}")

# A checkpoint: any dialect in, NVFP4 out (ModelOpt dialect unless you say otherwise), one layer back.
source = Path(__file__).resolve().parent.parent / "data" / "tiny-deepseek-v4"
with tempfile.TemporaryDirectory() as scratch:
    original = load_shared_expert(source, layer=0)
    original.calibrate(torch.randn(64, original.hidden_size))
    scales = {0: (original.input_scale, original.hidden_scale)}
    save_input_scales(Path(scratch) / "scales.safetensors", scales)
    convert(source, Path(scratch) / "nvfp4", input_scales=scales)
    loaded = load_shared_expert(Path(scratch) / "nvfp4", layer=0, max_tokens=64, activations="nvfp4")
    print(f"{loaded}\n  {loaded(torch.randn(3, loaded.hidden_size)).shape}")
