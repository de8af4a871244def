# SPDX-License-Identifier: Apache-2.0
"""The quantisation method "nvfp4_experts" as transformers' configuration class, and which checkpoints it answers for.

    {"quant_method": "nvfp4_experts", ...options}     the override, as a dictionary or as this class
    {"quant_method": "modelopt", ...}                 a name that transformers has no reader for: ours
    {"quant_method": ..., "producer": {"name": "nvfp4-experts"}}    what this package wrote, whatever its dialect

Other people's compressed-tensors and FP8 configurations stay with transformers' own readers until they are overridden.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from transformers.quantizers import auto, register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...checkpoints.quant_config import PRODUCER
from ...errors import InputError
from ...formats.recipes import RECIPES
from ...kernels.dispatch import ACTIVATION_SCALES, ACTIVATIONS, ALL_BACKENDS, WEIGHTINGS
from ...layers.checks import checked_choice, checked_count
from ...layers.part import PLANS

METHOD = "nvfp4_experts"
EXPERTS = ("stored", "shared", "routed", "all")


@register_quantization_config(METHOD)
class Nvfp4ExpertsConfig(QuantizationConfigMixin):
    """How the experts of a checkpoint are loaded and run.

    Args:
        experts: which experts become NVFP4 layers. "stored": those that the checkpoint stores in four bits (NVFP4, or
            MXFP4, which is cast exactly). "routed", "shared", "all": these too, quantised while loading.
        activations: what enters each GEMM: "nvfp4", "fp8", "bf16" or "auto".
        activation_scale: "static", "dynamic" or "per_token"; None is static where the checkpoint has input scales for
            a layer's experts, else dynamic.
        weighting: of routed experts: "before_down" or "after_down"; None is as `load_routed_experts`: before for
            DeepSeek-V4, whose code weighs h and whose exports have static scales of weighted h, after for others.
        max_tokens: the most tokens of one forward, batch times length; more raises.
        backend: name of a backend, or "auto".
        recipe: how experts that are not in four bits are quantised; see `quantize`.
        plan: None loads experts whole. "tp", "ep" or "dispatch" loads this process's part of them, by the default
            process group: call `layers.parallel.parallelize(model, plan=plan)` once the model is on its device.

    Raises:
        InputError: an option that is none of these, or a value outside its range.
    """

    def __init__(
        self,
        experts: str = "stored",
        activations: str = "auto",
        activation_scale: str | None = None,
        weighting: str | None = None,
        max_tokens: int = 8192,
        backend: str = "auto",
        recipe: str = "modelopt",
        plan: str | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            way_out = f"options are {', '.join(self._options())}"
            raise InputError(METHOD, "must have known options", sorted(unknown), way_out)
        self.quant_method = METHOD
        self.experts = checked_choice("experts", experts, EXPERTS)
        self.activations = checked_choice("activations", activations, ("auto", *ACTIVATIONS))
        for name, value, choices in (
            ("activation_scale", activation_scale, ACTIVATION_SCALES),
            ("weighting", weighting, WEIGHTINGS),
            ("plan", plan, PLANS),
        ):
            setattr(self, name, None if value is None else checked_choice(name, value, choices))
        self.max_tokens = checked_count("max_tokens", max_tokens, "give the largest batch you will send")
        self.backend = checked_choice("backend", backend, ("auto", *ALL_BACKENDS))
        self.recipe = checked_choice("recipe", recipe, RECIPES)
        self._declared: dict[str, Any] | None = None

    @classmethod
    def _options(cls) -> list[str]:
        return list(inspect.signature(cls).parameters)[:-1]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the override's dictionary, or from what a checkpoint this class answers for declares."""
        options = {k: v for k, v in config_dict.items() if k != "quant_method"}
        config = cls(**options) if config_dict.get("quant_method") == METHOD else cls()
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dictionary, which is what transformers takes the configuration of a checkpoint for."""
        return getattr(self, key, default)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What `from_pretrained(..., quantization_config=...)` may change of a checkpoint's own configuration."""
        return {name: getattr(self, name) for name in self._options()}

    def of_layers(self) -> dict[str, Any]:
        """The options that routed and shared experts have in common."""
        names = ("activations", "activation_scale", "max_tokens", "backend", "recipe")
        return {name: getattr(self, name) for name in names}

    def declare(self, declared: dict[str, Any]) -> None:
        """Say in config.json what the checkpoint's own says, which every engine reads, and not how it was loaded."""
        self._declared = {"quant_method": "modelopt", **declared} if declared else None

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes as `quantization_config`."""
        if self._declared is not None:
            return copy.deepcopy(self._declared)
        return {"quant_method": self.quant_method, **self.get_loading_attributes()}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


def is_ours(declared: dict[str, Any]) -> bool:
    """Whether this package wrote a checkpoint, by the `quantization_config` of its config.json."""
    producer = declared.get("producer")
    return isinstance(producer, dict) and producer.get("name") == PRODUCER


def _answer_for(method: str) -> None:
    """Read the checkpoints of a method that this package wrote, and those of a method that nobody reads.

    transformers finds the class of a checkpoint's configuration by its `quant_method` alone. That of a method it knows
    is replaced by a subclass which is the same but for checkpoints of this package.
    """
    theirs = auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if theirs is None:
        register_quantization_config(method)(Nvfp4ExpertsConfig)
        return

    class Reader(theirs):  # type: ignore[misc, valid-type]
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            reader = Nvfp4ExpertsConfig if is_ours(config_dict) else theirs
            return reader.from_dict(config_dict, *args, **kwargs)

    Reader.__name__, Reader.__qualname__, Reader.__doc__ = theirs.__name__, theirs.__qualname__, theirs.__doc__
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = Reader


for _method in ("modelopt", "compressed-tensors", "fp8"):
    _answer_for(_method)
# The types whose values in from_pretrained(..., quantization_config=...) win over the checkpoint's own configuration.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, Nvfp4ExpertsConfig)
