# SPDX-License-Identifier: Apache-2.0
"""The quantisation method "nvfp4_experts" inside `from_pretrained` and `save_pretrained`.

before loading   modules that will hold NVFP4 experts give way to empty ones
loading          transformers loads all other tensors, and is told which ones are not its own (`source.py`)
after loading    this package loads the experts, layer by layer, onto the device of their block, or this rank's part of
                 them; FP8 weights that transformers has loaded as numbers are multiplied by their scales
saving           `saving.py`
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantizer

from ...checkpoints import load_part, load_projection
from ...errors import UnsupportedError
from ...formats.fp8_block import Fp8BlockTensor
from ...layers.collectives import checked_group
from ...layers.part import LayerPart
from .config import METHOD, Nvfp4ExpertsConfig
from .rule import ROUTED, kind_of, layer_number, top_k_of
from .saving import Saver
from .source import Source, open_files
from .swap import Experts, load_experts

OLDEST = "5.23"  # transformers whose hooks these are; pyproject.toml asks for it too


class _Awaited(nn.Module):
    """Stands where NVFP4 experts will be; it has no tensors, so nothing of it can be missing."""


@register_quantizer(METHOD)
class Nvfp4ExpertsHfQuantizer(HfQuantizer):
    """transformers' hooks for this package's experts; see the module docstring.

    Cost: while loading, one expert beside those that are packed; while saving, all of them once more, on the host.
    """

    quantization_config: Nvfp4ExpertsConfig
    _source: Source
    _saver: Saver | None  # None of a model in parts

    def __init__(self, quantization_config: Nvfp4ExpertsConfig, **kwargs: Any) -> None:
        super().__init__(
            copy.deepcopy(quantization_config), **kwargs
        )  # one for each model: it takes on what this one is
        self.pre_quantized = True  # also if the checkpoint is not: transformers has no weight to quantise

    @property
    def is_trainable(self) -> bool:
        """No: NVFP4 experts have no backward."""
        return False

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The model's dtype; a dtype of one byte, which transformers may take from a weight, is bf16."""
        return torch.bfloat16 if dtype.itemsize == 1 else dtype

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        """Refuse what would leave experts without a device, and versions that load by other rules."""
        if Version(transformers.__version__) < Version(OLDEST):
            rule = f"needs transformers {OLDEST} or newer to load NVFP4 experts"
            raise UnsupportedError("from_pretrained", rule, transformers.__version__, "pip install -U transformers")
        if self.quantization_config.plan is not None:
            checked_group(None)
        if isinstance(device_map, dict) and "disk" in device_map.values():
            way_out = "give every layer a device"
            raise UnsupportedError("device_map", "must not offload to disk", "disk", way_out)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        if getattr(model.config, "distributed_config", None) is not None:  # its plans would shard what is not there yet
            way_out = "load without tp_plan and distributed_config; Nvfp4ExpertsConfig(plan=...) loads a rank's part"
            raise UnsupportedError("NVFP4 experts", "are not sharded by transformers", "a distributed model", way_out)
        self._source = Source(open_files(checkpoint_files), model, self.quantization_config.experts)
        for name in self._source.experts:
            model.set_submodule(name, _Awaited())

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """transformers' conversions without those of our experts; see `Source.trace`."""
        conversions = self._source.trace(weight_conversions, model)
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *self._source.ignored,
        }
        return conversions

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        source, config = self._source, self.quantization_config
        for key, projection in source.fp8.items():
            blocks = load_projection(source.checkpoint, projection)
            assert isinstance(blocks, Fp8BlockTensor)
            model.get_parameter_or_buffer(key).copy_(blocks.dequantize())
        for name in source.experts:
            model.set_submodule(name, self._load(model, name).eval())
        self._saver = Saver(source, model, config.recipe) if config.plan is None else None
        del self._source
        config.declare(source.checkpoint.quantization)
        return model

    def _load(self, model: Any, name: str) -> Experts | LayerPart:
        """The experts of a module; this rank's part, where there is a plan for them."""
        checkpoint, config, kind = self._source.checkpoint, self.quantization_config, kind_of(name)
        assert kind is not None, "Source chooses by it"
        device, options = _device_of_block(model, name), config.of_layers()
        if kind == ROUTED:
            options |= {"weighting": config.weighting, "top_k": top_k_of(model)}
        if config.plan is None or (config.plan == "dispatch" and kind != ROUTED):
            return load_experts(checkpoint, name, device, **options)
        return load_part(checkpoint, layer_number(name), config.plan, None, device, kind=kind, **options)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors as the checkpoint had them; the config says what they are."""
        if self._saver is None:
            rule, got = "writes whole experts", f"parts of them, plan={self.quantization_config.plan!r}"
            raise UnsupportedError("save_pretrained", rule, got, "save a model that was loaded whole")
        tensors = self._saver.tensors(model)
        self.quantization_config.declare(self._saver.declared(tensors, model))
        return tensors, {}


def _device_of_block(model: nn.Module, name: str) -> torch.device:
    """Where the router is that sends tokens to these experts."""
    parameter = next(model.get_submodule(name.rpartition(".")[0]).parameters())
    if parameter.device.type == "meta":
        way_out = "give every layer a device in device_map"
        raise UnsupportedError(name, "must be on a device", "offloaded weights beside it", way_out)
    return parameter.device
