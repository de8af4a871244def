# SPDX-License-Identifier: Apache-2.0
"""The embedded model in the dialects that people have: written here with the safetensors library, for tests to load."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvfp4_experts import quantize
from nvfp4_experts.formats.nvfp4 import joint_amax

_OFFICIAL = (
    ("model.embed_tokens.weight", "embed.weight"),
    ("model.hc_head.hc_", "hc_head_"),
    ("attn.norm.", "attn.kv_norm."),
    ("model.", ""),
)
_FP8 = re.compile(r"\.(?:wq_a|wq_b|wkv|wo_a|wo_b|shared_experts\.w[123])\.weight$")
_ROUTED = re.compile(r"(.*\.experts\.\d+)\.w1\.weight")
# As NVIDIA's exports of DeepSeek V4 say it: FP8 to whoever does not read on.
HYBRID_CONFIG = {
    "quant_method": "fp8",
    "quant_algo": "MIXED_PRECISION",
    "moe_quant_algo": "NVFP4",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
    "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
    "producer": {"name": "modelopt", "version": "0.41.0"},
}


def fp8_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and e8m0 scales of 128x128 blocks, as DeepSeek's own checkpoints."""
    rows, columns = (-(-size // 128) for size in w.shape)
    padded = torch.zeros(rows * 128, columns * 128)
    padded[: w.shape[0], : w.shape[1]] = w.float()
    amax = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).abs().amax((1, 3))
    exponents = torch.ceil(torch.log2(amax.clamp(min=2**-100) / 448))
    wide = torch.exp2(exponents).repeat_interleave(128, 0).repeat_interleave(128, 1)
    values = (padded / wide)[: w.shape[0], : w.shape[1]].to(torch.float8_e4m3fn)
    return values, (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def routed_nvfp4(tensors: dict[str, Tensor], input_scale: float, hidden_scale: float) -> None:
    """Replace routed experts by ModelOpt's tensors, w1 and w3 under one global scale."""
    for prefix in [match[1] for name in list(tensors) if (match := _ROUTED.fullmatch(name))]:
        joint = joint_amax(tensors[f"{prefix}.w1.weight"], tensors[f"{prefix}.w3.weight"])
        for word, amax, scale in (("w1", joint, input_scale), ("w3", joint, input_scale), ("w2", None, hidden_scale)):
            made = quantize(tensors.pop(f"{prefix}.{word}.weight"), "modelopt", amax)
            tensors[f"{prefix}.{word}.weight"] = made.codes
            tensors[f"{prefix}.{word}.weight_scale"] = made.block_scales
            tensors[f"{prefix}.{word}.weight_scale_2"] = made.global_scale
            tensors[f"{prefix}.{word}.input_scale"] = torch.tensor(scale)


def routed_mxfp4(tensors: dict[str, Tensor]) -> None:
    """Replace routed experts by random ones in MXFP4, as in DeepSeek's own checkpoints."""
    g = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if ".experts." in name]:
        rows, columns = tensors[name].shape
        tensors[name] = torch.randint(0, 256, (rows, columns // 2), generator=g).to(torch.uint8).view(torch.int8)
        exponents = torch.randint(118, 123, (rows, columns // 32), generator=g).to(torch.uint8)
        tensors[name.removesuffix("weight") + "scale"] = exponents.view(torch.float8_e8m0fnu)


def write_hybrid(tiny: Path, path: Path, routed: str = "nvfp4") -> Path:
    """NVIDIA's hybrid: official names, routed experts NVFP4, attention and shared experts FP8, the rest as it was.

    An MTP layer, which transformers has no module for, is there too, its routed experts in MXFP4. With routed="mxfp4"
    it is DeepSeek's own.
    """
    tensors = {}
    for name, tensor in load_file(tiny / "model.safetensors").items():
        for old, new in _OFFICIAL:
            name = name.replace(old, new)
        tensors[name] = tensor
    mtp = {f"mtp.0.{n.removeprefix('layers.3.')}": t.clone() for n, t in tensors.items() if n.startswith("layers.3.")}
    routed_mxfp4(mtp)
    if routed == "nvfp4":
        routed_nvfp4(tensors, 0.004, 0.03)
    else:
        routed_mxfp4(tensors)
    tensors |= mtp
    for name in [name for name in tensors if _FP8.search(name)]:
        tensors[name], tensors[name.removesuffix("weight") + "scale"] = fp8_blocks(tensors[name])
    path.mkdir(parents=True)
    half = sorted(tensors)[: len(tensors) // 2]
    shards = {
        "model-00001-of-00002.safetensors": {name: tensors[name].contiguous() for name in half},
        "model-00002-of-00002.safetensors": {n: t.contiguous() for n, t in tensors.items() if n not in half},
    }
    for shard, members in shards.items():
        save_file(members, path / shard, {"format": "pt"})
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((tiny / "config.json").read_text())
    declared = {k: v for k, v in HYBRID_CONFIG.items() if routed == "nvfp4" or "algo" not in k}
    config |= {"expert_dtype": "fp4", "num_nextn_predict_layers": 1, "quantization_config": declared}
    (path / "config.json").write_text(json.dumps(config))
    return path
