# SPDX-License-Identifier: Apache-2.0
"""The expert layers of DeepSeek-V4-class mixture-of-experts models in NVFP4, for inference.

    quantize            a weight (..., K)             -> Nvfp4Tensor
    Nvfp4Tensor         codes, block scales, global scale; `.dequantize()`
    Nvfp4SharedExpert   gate, up and down in NVFP4 as one `nn.Module`: y = expert(x)
    Nvfp4RoutedExperts  E of them, weighted per token: y = experts(x, topk_indices, topk_weights)
    Nvfp4MoE            router, routed experts and shared expert: y = block(x)
    KeptSharedExpert    a shared expert in FP8 blocks or bf16, as its checkpoint has it
    load_shared_expert  one layer's shared expert out of a checkpoint on disk
    load_routed_experts its routed experts, or a share of them
    load_moe            its whole block

Each name is imported when it is first asked for, so that `import nvfp4_experts` costs nothing: no torch,
no Triton, no transformers, no CUDA.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .checkpoints import load_moe as load_moe
    from .checkpoints import load_routed_experts as load_routed_experts
    from .checkpoints import load_shared_expert as load_shared_expert
    from .formats.nvfp4 import Nvfp4Tensor as Nvfp4Tensor
    from .formats.nvfp4 import quantize as quantize
    from .layers.kept_expert import KeptSharedExpert as KeptSharedExpert
    from .layers.moe import Nvfp4MoE as Nvfp4MoE
    from .layers.routed_experts import Nvfp4RoutedExperts as Nvfp4RoutedExperts
    from .layers.shared_expert import Nvfp4SharedExpert as Nvfp4SharedExpert

_HOMES = {
    "KeptSharedExpert": ".layers.kept_expert",
    "Nvfp4MoE": ".layers.moe",
    "Nvfp4RoutedExperts": ".layers.routed_experts",
    "Nvfp4SharedExpert": ".layers.shared_expert",
    "Nvfp4Tensor": ".formats.nvfp4",
    "load_moe": ".checkpoints",
    "load_routed_experts": ".checkpoints",
    "load_shared_expert": ".checkpoints",
    "quantize": ".formats.nvfp4",
}

__all__ = [
    "KeptSharedExpert",
    "Nvfp4MoE",
    "Nvfp4RoutedExperts",
    "Nvfp4SharedExpert",
    "Nvfp4Tensor",
    "__version__",
    "load_moe",
    "load_routed_experts",
    "load_shared_expert",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__
