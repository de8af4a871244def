# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints in every dialect, written with the safetensors library, and the fp32 values each of them means.

A weight maker returns ({suffix: tensor}, fp32 values); the values are computed here from the format's definition, with
none of the package's code. `write` turns modules into a checkpoint directory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

TINY = Path(__file__).resolve().parents[2] / "data" / "tiny-deepseek-v4"
WORDS = {
    "official": {"gate": "w1", "up": "w3", "down": "w2"},
    "transformers": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}
PREFIX = {"official": "layers.{}.ffn", "transformers": "model.layers.{}.mlp"}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

Weight = tuple[dict[str, Tensor], Tensor]
Maker = Callable[[torch.Generator, int, int], Weight]


def _codes(g: torch.Generator, n: int, k: int) -> tuple[Tensor, Tensor]:
    nibbles = torch.randint(0, 16, (n, k), generator=g)
    return (nibbles[:, ::2] + 16 * nibbles[:, 1::2]).to(torch.uint8), E2M1[nibbles]


def plain(dtype: torch.dtype = torch.bfloat16) -> Maker:
    def make(g: torch.Generator, n: int, k: int) -> Weight:
        w = (torch.randn(n, k, generator=g) * 0.05).to(dtype)
        return {"weight": w}, w.float()

    return make


def fp8(block: tuple[int, int] = (128, 128), scale: str = "e8m0", suffix: str = "scale") -> Maker:
    def make(g: torch.Generator, n: int, k: int) -> Weight:
        values = torch.randn(n, k, generator=g).mul(50).to(torch.float8_e4m3fn)
        shape = (-(-n // block[0]), -(-k // block[1]))
        exponents = torch.randint(-12, -8, shape, generator=g)
        scales = torch.exp2(exponents.float())
        if scale == "e8m0":
            stored = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        else:
            stored = scales = scales * torch.rand(shape, generator=g).add(0.5)
        wide = scales.repeat_interleave(block[0], 0)[:n].repeat_interleave(block[1], 1)[:, :k]
        return {"weight": values, suffix: stored}, values.float() * wide

    return make


def mxfp4(low: int = -8, high: int = -4, dtype: torch.dtype = torch.int8) -> Maker:
    def make(g: torch.Generator, n: int, k: int) -> Weight:
        codes, values = _codes(g, n, k)
        exponents = torch.randint(low, high + 1, (n, k // 32), generator=g)
        stored = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        decoded = values * torch.exp2(exponents.float()).repeat_interleave(32, 1)
        return {"weight": codes.view(dtype), "scale": stored}, decoded

    return make


def _nvfp4(g: torch.Generator, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, values = _codes(g, n, k)
    block_scales = torch.rand(n, k // 16, generator=g).mul(440).add(8).to(torch.float8_e4m3fn)
    return codes, block_scales, values * block_scales.float().repeat_interleave(16, 1)


def modelopt(global_scale: float = 1e-4, input_scale: float | None = None) -> Maker:
    def make(g: torch.Generator, n: int, k: int) -> Weight:
        codes, block_scales, scaled = _nvfp4(g, n, k)
        s = torch.tensor(global_scale)
        tensors = {"weight": codes, "weight_scale": block_scales, "weight_scale_2": s}
        if input_scale is not None:
            tensors["input_scale"] = torch.tensor(input_scale)
        return tensors, scaled * s

    return make


def compressed_tensors(global_scale: float = 1e4, input_scale: float | None = None) -> Maker:
    """Both scales as that dialect stores them: 2688 / amax."""

    def make(g: torch.Generator, n: int, k: int) -> Weight:
        codes, block_scales, scaled = _nvfp4(g, n, k)
        s = torch.tensor([global_scale])
        tensors = {"weight_packed": codes, "weight_scale": block_scales, "weight_global_scale": s}
        if input_scale is not None:
            tensors["input_global_scale"] = torch.tensor([input_scale])
        return tensors, scaled * s.reciprocal()

    return make


MAKERS: dict[str, Maker] = {
    "bf16": plain(),
    "fp16": plain(torch.float16),
    "fp32": plain(torch.float32),
    "fp8-128-e8m0": fp8(),
    "fp8-32-e8m0": fp8((32, 32)),
    "fp8-128-fp32": fp8(scale="fp32"),
    "fp8-32-fp32": fp8((32, 32), "fp32"),
    "fp8-v3": fp8(scale="fp32", suffix="weight_scale_inv"),
    "mxfp4": mxfp4(),
    "modelopt": modelopt(),
    "compressed-tensors": compressed_tensors(),
}
FORMATS = {
    "bf16": "bf16", "fp16": "fp16", "fp32": "fp32", "mxfp4": "mxfp4",
    "modelopt": "nvfp4", "compressed-tensors": "nvfp4",
}  # fmt: skip


ROUTER_BIAS = {"official": "bias", "transformers": "e_score_correction_bias"}
NVIDIA_IGNORE = ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]


def expert_name(naming: str, layer: int, index: int | None) -> str:
    return PREFIX[naming].format(layer) + (".shared_experts" if index is None else f".experts.{index}")


def expert(
    maker: Maker | dict[str, Maker],
    prefix: str,
    naming: str = "official",
    hidden: int = 160,
    inner: int = 96,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors by full name, decoded values by projection) of one expert."""
    g = torch.Generator().manual_seed(seed)
    tensors, values = {}, {}
    for projection, word in WORDS[naming].items():
        shape = (hidden, inner) if projection == "down" else (inner, hidden)
        make = maker[projection] if isinstance(maker, dict) else maker
        found, values[projection] = make(g, *shape)
        tensors |= {f"{prefix}.{word}.{suffix}": t for suffix, t in found.items()}
    return tensors, values


def rest(layers: int = 2, hidden: int = 160, naming: str = "official") -> dict[str, Tensor]:
    """The tensors of a model that no conversion touches: odd sizes and dtypes among them."""
    g = torch.Generator().manual_seed(99)
    found = {
        "embed.weight": torch.randn(7, hidden, generator=g).bfloat16(),
        "head.weight": torch.randn(7, hidden).half(),
    }
    for layer in range(layers):
        prefix = PREFIX[naming].format(layer)
        found[f"{prefix}.gate.weight"] = torch.randn(3, hidden, generator=g).bfloat16()
        found[f"{prefix}.gate.bias"] = torch.randn(3, generator=g)
        found[f"{prefix}.gate.tid2eid"] = torch.randint(0, 3, (5, 2), generator=g)
        found[f"{prefix}.odd"] = torch.randint(0, 255, (3,), generator=g).to(torch.uint8)
    found["mtp.0.ffn.shared_experts.w1.weight"] = torch.randn(8, hidden, generator=g).bfloat16()
    found["empty"] = torch.zeros(0, 4)
    found["scalar"] = torch.tensor(3.5)
    return found


def write(
    path: Path, tensors: dict[str, Tensor], config: dict | None = None, shards: int = 1, metadata: dict | None = None
) -> Path:
    """A checkpoint directory: one file, or `shards` of them and an index (tensors dealt out in turn)."""
    path.mkdir(parents=True)
    default = {"hidden_size": 160, "num_hidden_layers": 2, "swiglu_limit": 10.0, "model_type": "deepseek_v4"}
    (path / "config.json").write_text(json.dumps(default if config is None else config))
    (path / "tokenizer.json").write_text('{"made": "up"}')
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    metadata = {"format": "pt"} if metadata is None else metadata
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata)
        return path
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, path / file, metadata)
        weight_map |= {name: file for name in names[i::shards]}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def model(
    shared: Maker | dict[str, Maker],
    routed: Maker | None = None,
    naming: str = "official",
    layers: int = 2,
    **sizes: int,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """(all tensors of a model, {expert prefix: {projection: values}}): a shared and two routed experts per layer."""
    tensors, values = rest(layers, sizes.get("hidden", 160), naming), {}
    for layer in range(layers):
        for seed, index in enumerate((None, 0, 1)):
            prefix = expert_name(naming, layer, index)
            maker = shared if index is None or routed is None else routed
            made, values[prefix] = expert(maker, prefix, naming, seed=10 * layer + seed, **sizes)
            tensors |= made
    return tensors, values


def router(
    layer: int, naming: str, experts: int, top_k: int, hidden: int, vocabulary: int, by_table: bool
) -> dict[str, Tensor]:
    """The tensors of one layer's router, in the dtypes of DeepSeek's checkpoints."""
    g = torch.Generator().manual_seed(1000 + layer)
    prefix = f"{PREFIX[naming].format(layer)}.gate"
    made = {f"{prefix}.weight": torch.randn(experts, hidden, generator=g).mul(0.1).bfloat16()}
    if by_table:
        made[f"{prefix}.tid2eid"] = torch.rand(vocabulary, experts, generator=g).argsort(-1)[:, :top_k].contiguous()
    else:
        made[f"{prefix}.{ROUTER_BIAS[naming]}"] = torch.randn(experts, generator=g).mul(0.1)
    return made


def blocks(
    shared: Maker | dict[str, Maker],
    routed: Maker | dict[str, Maker],
    *,
    naming: str = "official",
    layers: int = 2,
    experts: int = 4,
    top_k: int = 2,
    hash_layers: int = 1,
    hidden: int = 160,
    inner: int = 96,
    vocabulary: int = 11,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict]:
    """(tensors, {expert prefix: {projection: values}}, config) of a model whose blocks are whole: routers too."""
    tensors, values = {}, {}
    for layer in range(layers):
        tensors |= router(layer, naming, experts, top_k, hidden, vocabulary, layer < hash_layers)
        for index in (None, *range(experts)):
            prefix, seed = expert_name(naming, layer, index), 100 * layer + (-1 if index is None else index) + 1
            maker = shared if index is None else routed
            made, values[prefix] = expert(maker, prefix, naming, hidden, inner, seed)
            tensors |= made
    config = {
        "model_type": "deepseek_v4", "hidden_size": hidden, "moe_intermediate_size": inner, "num_hidden_layers": layers,
        "vocab_size": vocabulary, "swiglu_limit": 10.0, "n_routed_experts": experts, "n_shared_experts": 1,
        "num_experts_per_tok": top_k, "num_hash_layers": hash_layers, "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 1.5,
    }  # fmt: skip
    return tensors, values, config


def hybrid(
    calibrated: bool = True, scale: str = "e8m0", block: tuple[int, int] = (32, 32), **sizes: int
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict]:
    """NVIDIA's export of a DeepSeek V4: routed experts NVFP4, shared experts FP8, one MTP layer FP8 and MXFP4.

    gate and up of an expert share both scalars, which differ from expert to expert.
    """
    tensors, values, config = blocks(fp8(block, scale), modelopt(), **sizes)
    for prefix in (prefix for prefix in values if "shared" not in prefix):
        number = int(prefix.rpartition(".")[2])
        for word, share in (("w1", 1.0), ("w3", 1.0), ("w2", 4.0)):
            factor = 1 + number / 4
            tensors[f"{prefix}.{word}.weight_scale_2"] *= factor
            if calibrated:
                tensors[f"{prefix}.{word}.input_scale"] = torch.tensor(share * factor / 2688)
        values[prefix] = {name: factor * w for name, w in values[prefix].items()}
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    for index in (None, *range(config["n_routed_experts"])):
        prefix = expert_name("official", 0, index).replace("layers", "mtp")
        made, values[prefix] = expert(
            fp8(block, scale) if index is None else mxfp4(), prefix, "official", hidden, inner
        )
        tensors |= made
    quantization = {
        "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0" if scale == "e8m0" else "float",
        "weight_block_size": list(block), "activation_scheme": "dynamic", "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4", "ignore": NVIDIA_IGNORE,
    }  # fmt: skip
    return tensors, values, config | {"expert_dtype": "fp4", "quantization_config": quantization}
