# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: dialects as tables, reading by name, conversion to NVFP4, loading. Launches no kernel."""

from .convert import ConversionReport, convert
from .dialects import Projection
from .input_scales import load_input_scales, save_input_scales
from .load import load_kept_expert, load_moe, load_routed_experts, load_shared_expert
from .parts import load_part
from .projections import load_projection, projection_input_scale
from .reader import Checkpoint, ExpertEntry, open_checkpoint
from .router import load_router
from .safetensors_file import TensorInfo

__all__ = [
    "Checkpoint",
    "ConversionReport",
    "ExpertEntry",
    "Projection",
    "TensorInfo",
    "convert",
    "load_input_scales",
    "load_kept_expert",
    "load_moe",
    "load_part",
    "load_projection",
    "load_routed_experts",
    "load_router",
    "load_shared_expert",
    "open_checkpoint",
    "projection_input_scale",
    "save_input_scales",
]
