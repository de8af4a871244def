# SPDX-License-Identifier: Apache-2.0
"""A shared expert that is not quantised: its weights stay in FP8 blocks, or floating, as the checkpoint has them.

    gate, up = x @ W1.T, x @ W3.T
    h        = silu(min(gate, L)) * clamp(up, -L, L)       fp32; L = swiglu_limit, 0 or None is off
    y        = h @ W2.T

For checkpoints whose routed experts alone are NVFP4. Plain torch, a tile of weights decoded at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import InputError, LayoutError
from ..formats.fp8_block import Fp8BlockTensor
from ..kernels import ops
from .checks import DTYPES, check_hidden_states, check_out, checked_count, checked_limit
from .packed import PROJECTIONS, NoBackward, move_buffers

KeptWeight: TypeAlias = Tensor | Fp8BlockTensor


class KeptSharedExpert(nn.Module):
    """A gate/up/down expert with FP8-block or floating weights and bf16 activations.

    Args:
        gate, up: (I, H), Fp8BlockTensor (blocks of any size, scales fp32 or e8m0) or bf16, fp16 or fp32.
        down: (H, I), the same format and block.
        swiglu_limit: L of the clamp, >= 0; 0 or None is off. Default 10.0.
        max_tokens: the largest T of a call; more raises.

    Raises:
        LayoutError: shapes, formats or devices that do not fit together.
        InputError: an option outside its range.

    Numerics: as `Nvfp4SharedExpert` with activations="bf16": x and h are rounded to bf16, weights are exact (their
        products and sums, the clamp and SwiGLU fp32), the result is rounded once to the dtype of x. An FP8 value times
        an fp32 scale is rounded once, to fp32. torch.autocast changes nothing.

    Cost: 1 byte per weight and a scale per block resident, or the floating weights; per call the weights are decoded
        once, a tile of 2^20 values at a time, which takes far longer than a call of NVFP4 weights (docs/measured.md).
        fp32 scales and fp16 or fp32 weights multiply in fp32. Inference only.
    """

    def __init__(
        self,
        gate: KeptWeight,
        up: KeptWeight,
        down: KeptWeight,
        *,
        swiglu_limit: float | None = 10.0,
        max_tokens: int = 8192,
    ) -> None:
        super().__init__()
        weights = dict(zip(PROJECTIONS, (gate, up, down), strict=True))
        shapes = {name: tuple(w.shape) for name, w in weights.items()}
        if len(shapes["gate"]) != 2 or not shapes["gate"] == shapes["up"] == shapes["down"][::-1]:
            raise LayoutError("weights", "must be gate (I, H), up (I, H), down (H, I)", shapes, "transpose them")
        if len(formats := {_format(w) for w in weights.values()}) > 1:
            raise LayoutError("weights", "must have one format and block, and one device", formats, "convert them")
        if not isinstance(gate, Fp8BlockTensor) and gate.dtype not in DTYPES:
            raise LayoutError("weights", "must be FP8 blocks, bf16, fp16 or fp32", gate.dtype, "cast them")
        self.intermediate_size, self.hidden_size = shapes["gate"]
        self.swiglu_limit = checked_limit(swiglu_limit)
        self.max_tokens = checked_count("max_tokens", max_tokens, "give the largest batch you will send")
        self.block = list(gate.block) if isinstance(gate, Fp8BlockTensor) else []
        for name, w in weights.items():
            if isinstance(w, Fp8BlockTensor):
                self.register_buffer(f"{name}_values", w.values.detach())
                self.register_buffer(f"{name}_scales", w.scales.detach())
            else:
                self.register_buffer(f"{name}_values", w.detach())

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Run the expert.

        Args:
            x: (..., H) bf16, fp16 or fp32 on the device of the weights, any strides, at most max_tokens rows.
            out: where to write: contiguous, shape and device of x, dtype of x or fp32 (the sum, not rounded), outside
                the memory from x's first element to its last; None allocates.

        Returns:
            (..., H) in the dtype of x, the caller's own, or `out`.

        Raises:
            InputError: x or out does not fit; nothing has been computed.
        """
        check_hidden_states(x, self.hidden_size, self.max_tokens, self._weights()[0].device)
        # As fp32, x is the same values, and the sum comes out unrounded, as an fp32 `out` takes it.
        rows = x if out is None or out.dtype == x.dtype else x.float()
        if out is not None:
            check_out(rows, out)
        flat = rows.reshape(-1, self.hidden_size).contiguous()
        y = ops.kept_expert(flat, self._weights(), self.block, self.swiglu_limit).view(x.shape)
        if out is not None:
            return out.copy_(y)
        return NoBackward.apply(y, "shared expert", x) if x.requires_grad and torch.is_grad_enabled() else y

    @property
    def gate(self) -> KeptWeight:
        """The gate projection, (I, H)."""
        return ops.kept_weights(self._weights(), self.block)[0]

    @property
    def up(self) -> KeptWeight:
        """The up projection, (I, H)."""
        return ops.kept_weights(self._weights(), self.block)[1]

    @property
    def down(self) -> KeptWeight:
        """The down projection, (H, I)."""
        return ops.kept_weights(self._weights(), self.block)[2]

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights this module keeps on its device."""
        return sum(w.nbytes for w in self._weights())

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"weights={_format(self.gate)[0]!r}, activations='bf16', swiglu_limit={self.swiglu_limit or None}, "
            f"max_tokens={self.max_tokens}"
        )

    # -- inside --------------------------------------------------------------------------------------------------

    def _weights(self) -> list[Tensor]:
        return list(self.buffers(recurse=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        move_buffers(self, fn)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """As torch does, but all or nothing, and bytes are not converted: e8m0 scales are no fp32 scales."""
        for name, tensor in self.named_buffers(recurse=False):
            given = state_dict.get(prefix + name)
            if given is not None and (given.dtype, given.shape) != (tensor.dtype, tensor.shape):
                rule, got = (f"must be {tuple(t.shape)} {t.dtype}" for t in (tensor, given))
                way_out = "build the expert from weights of that format"
                lists[-1].append(str(InputError(prefix + name, rule, got.removeprefix("must be "), way_out)))
        if not lists[-1]:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)


def _format(w: KeptWeight) -> tuple[str, torch.device]:
    """What the three projections must have in common."""
    if isinstance(w, Fp8BlockTensor):
        scale = "e8m0" if w.scales.dtype == torch.uint8 else "fp32"
        return f"FP8 {w.block[0]}x{w.block[1]}, {scale} scales", w.values.device
    return str(w.dtype).removeprefix("torch."), w.device
