# SPDX-License-Identifier: Apache-2.0
"""transformers models with this package's experts. Importing it registers the method "nvfp4_experts".

import nvfp4_experts.integrations.transformers
model = AutoModelForCausalLM.from_pretrained("nvfp4-dir")        NVFP4 checkpoints: quantizer.py, config.py

model.set_experts_implementation("nvfp4_experts")                models in memory: implementation.py
handle = swap_experts(model)                                     swap.py
scales = calibrate_model(model, batches)
"""

from .config import Nvfp4ExpertsConfig
from .implementation import nvfp4_experts_forward
from .quantizer import Nvfp4ExpertsHfQuantizer
from .rule import find_experts, find_shared_experts
from .swap import SwapHandle, calibrate_model, experts_of, set_activations, swap_experts, swap_shared_experts

__all__ = [
    "Nvfp4ExpertsConfig",
    "Nvfp4ExpertsHfQuantizer",
    "SwapHandle",
    "calibrate_model",
    "experts_of",
    "find_experts",
    "find_shared_experts",
    "nvfp4_experts_forward",
    "set_activations",
    "swap_experts",
    "swap_shared_experts",
]
