# SPDX-License-Identifier: Apache-2.0
"""Writes what other engines read: config.json's `quantization_config`, and hf_quant_config.json for ModelOpt.

In go the tensors of the output; out come dictionaries that name each NVFP4 module, or each other one:

    modelopt             quant_algo NVFP4 (every module has an input scale), W4A16_NVFP4 (none has) or MIXED_PRECISION
                         with `quantized_layers`; `ignore` (config.json) = `exclude_modules` (hf_quant_config.json)
    compressed-tensors   one config group with input_activations and one without, targets as "re:" patterns; `ignore`
    the rest is FP8      quant_method stays "fp8" with its keys; MIXED_PRECISION, `quantized_layers`, and
                         `moe_quant_algo` if routed experts are NVFP4, are added, as NVIDIA's exports of DeepSeek V4 do

Modules are listed as patterns in which layer and expert numbers are wild, unless that would take in a module of the
other kind; then those are listed one by one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .._version import __version__
from ..formats.codes import BLOCK_SIZE
from .dialects import LAYOUTS, NVFP4_LAYOUTS, parse_name
from .errors import MixedOutputError
from .safetensors_file import TensorSpec

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")
_DEEPSEEK_SCALES = {role.suffix for lay in LAYOUTS if lay.dialect == "deepseek" for role in lay.roles.values()} - {
    "weight"
}
_NVFP4_ONLY = {role.suffix for lay in NVFP4_LAYOUTS.values() for role in lay.roles.values()} - {"weight"}
_FLOATING = {"F32", "F16", "BF16", "F64"}
_KEPT = ("kv_cache_scheme", "kv_cache_quant_algo")
PRODUCER = "nvfp4-experts"


@dataclass(frozen=True)
class Modules:
    """The modules of a checkpoint by how they are stored.

    with_input, weight_only: NVFP4 with and without a static input scale. deepseek: FP8 or MXFP4. plain: the rest.
    """

    with_input: list[str]
    weight_only: list[str]
    deepseek: list[str]
    plain: list[str]

    @property
    def nvfp4(self) -> list[str]:
        return self.with_input + self.weight_only


def sort_modules(tensors: Mapping[str, TensorSpec], dialect: str) -> Modules:
    """Sort every module that has a weight matrix.

    Raises:
        MixedOutputError: a module is quantised in a way that a config of this dialect cannot say.
    """
    grouped: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for spec in tensors.values():
        prefix, _, suffix = spec.name.rpartition(".")
        grouped[prefix][suffix] = spec
    roles = NVFP4_LAYOUTS[dialect].roles
    required = {role.suffix for role in roles.values() if role.required}
    sorted_modules = Modules([], [], [], [])
    for prefix, found in grouped.items():
        weight = found.get("weight")
        if required <= found.keys():
            has_input = roles["input_scale"].suffix in found
            (sorted_modules.with_input if has_input else sorted_modules.weight_only).append(prefix)
        elif found.keys() & _NVFP4_ONLY:
            rule = f"every quantised module must be NVFP4 of the {dialect} dialect, or FP8 or MXFP4 of DeepSeek's"
            way_out = f"convert with experts='all', or keep the source's dialect instead of {dialect}"
            raise MixedOutputError(prefix, rule, sorted(found), way_out)
        elif weight is not None and len(weight.shape) > 1:
            scaled = weight.dtype not in _FLOATING and found.keys() & _DEEPSEEK_SCALES
            (sorted_modules.deepseek if scaled else sorted_modules.plain).append(prefix)
    return sorted_modules


def patterns(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """Globs that match every module of `wanted` and none of `others`; numbers become `*` where that allows it."""
    shapes = {_NUMBER.sub("0", other) for other in others}  # a number never decides whether a glob matches
    found: dict[str, None] = {}
    safe: dict[str, bool] = {}
    for module in wanted:
        glob = _NUMBER.sub("*", module)
        if glob not in safe:
            safe[glob] = not any(fnmatchcase(shape, glob) for shape in shapes)
        found[glob if safe[glob] else module] = None
    return list(found)


def build_configs(
    config: dict[str, Any], declared: dict[str, Any], tensors: Mapping[str, TensorSpec], dialect: str, recipe: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """config.json and (ModelOpt only) hf_quant_config.json of an output.

    Args:
        config: the source's config.json. declared: what it says of quantisation (`Checkpoint.quantization`).
        tensors: every tensor of the output. recipe: noted, so that the bytes can be made again.
    """
    modules = sort_modules(tensors, dialect)
    producer = {"name": PRODUCER, "version": __version__, "recipe": recipe}
    ignore = patterns(modules.deepseek + modules.plain, modules.nvfp4)
    described = _modelopt(modules, ignore) if dialect == "modelopt" else _compressed_tensors(modules, ignore)
    described |= {key: declared[key] for key in _KEPT if declared.get(key) is not None} | {"producer": producer}
    hf_quant_config = _hf_quant_config(described) if dialect == "modelopt" else None
    if modules.deepseek:
        described = _beside_fp8(declared, described, modules)
    return {**config, "quantization_config": described}, hf_quant_config


# --- ModelOpt ------------------------------------------------------------------------------------------------


def _modelopt(modules: Modules, ignore: list[str]) -> dict[str, Any]:
    mixed = bool(modules.deepseek) or bool(modules.with_input and modules.weight_only)
    groups = {"NVFP4": modules.with_input, "W4A16_NVFP4": modules.weight_only}
    used = {algo: members for algo, members in groups.items() if members}
    described: dict[str, Any] = {"quant_method": "modelopt", "group_size": BLOCK_SIZE, "ignore": ignore}
    described["config_groups"] = {
        f"group_{i}": _modelopt_group(algo) | {"targets": sorted(_listed(members)) if mixed else ["Linear"]}
        for i, (algo, members) in enumerate(used.items())
    }
    if mixed:
        layers = {name: algo for algo, members in used.items() for name in _listed(members)}
        described["quant_algo"] = "MIXED_PRECISION"
        described["quantized_layers"] = {
            name: {"quant_algo": algo, "group_size": BLOCK_SIZE} for name, algo in layers.items()
        }
    else:
        described["quant_algo"] = next(iter(used))
    return described


def _modelopt_group(algo: str) -> dict[str, Any]:
    four_bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE}
    return {"weights": four_bits} | ({"input_activations": four_bits} if algo == "NVFP4" else {})


def _listed(modules: list[str]) -> list[str]:
    """Modules one by one, but the routed experts of a layer as one: `layers.3.ffn.experts`."""
    listed: dict[str, None] = {}
    for module in modules:
        parts = parse_name(f"{module}.weight")
        routed = parts is not None and parts.index is not None
        listed[parts.prefix.rpartition(".")[0] if parts is not None and routed else module] = None
    return list(listed)


def _hf_quant_config(described: dict[str, Any]) -> dict[str, Any]:
    quantization = {
        "quant_algo": described["quant_algo"],
        "kv_cache_quant_algo": described.get("kv_cache_quant_algo"),
        "group_size": BLOCK_SIZE,
        "exclude_modules": described["ignore"],
    }
    if "quantized_layers" in described:
        quantization["quantized_layers"] = described["quantized_layers"]
    return {"producer": described["producer"], "quantization": quantization}


# --- compressed-tensors --------------------------------------------------------------------------------------


def _compressed_tensors(modules: Modules, ignore: list[str]) -> dict[str, Any]:
    def arguments(dynamic: bool | str) -> dict[str, Any]:
        return {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "symmetric": True, "dynamic": dynamic,
            "group_size": BLOCK_SIZE, "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn",
        }  # fmt: skip

    rest = modules.deepseek + modules.plain
    members = ((modules.with_input, modules.weight_only), (modules.weight_only, modules.with_input))
    groups = [
        {
            "targets": [_regular(glob) for glob in patterns(wanted, others + rest)],
            "weights": arguments(False),
            "input_activations": arguments("local") if wanted is modules.with_input else None,
            "output_activations": None,
            "format": "nvfp4-pack-quantized",
        }
        for wanted, others in members
        if wanted
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": [_regular(glob) for glob in ignore],
    }


def _regular(glob: str) -> str:
    """A glob as compressed-tensors writes it: a plain name, or "re:" and a regular expression of the whole name."""
    return "re:" + re.escape(glob).replace(r"\*", "[0-9]+") + "$" if "*" in glob else glob


# --- beside FP8 ----------------------------------------------------------------------------------------------


def _beside_fp8(declared: dict[str, Any], described: dict[str, Any], modules: Modules) -> dict[str, Any]:
    fp8 = declared if declared.get("quant_method") == "fp8" else {"quant_method": "fp8"}
    kept = {key: value for key, value in described.items() if key not in ("quant_method", "quantization_status")}
    routed = any(
        "experts" in glob and (p := parse_name(f"{glob}.weight")) and p.index is not None for glob in modules.nvfp4
    )
    moe = {"moe_quant_algo": "NVFP4"} if routed else {}
    return {**fp8, **kept, "quant_algo": "MIXED_PRECISION", **moe}
