# SPDX-License-Identifier: Apache-2.0
"""Hidden states to try a layer on: read from a safetensors file, or drawn from a seeded Gaussian; token ids likewise.

    synthetic: x ~ N(0, 1), (tokens, H), the scale a layer sees behind an RMS norm of unit weight; ids uniform

Gaussian rows have no outlier channels, so activation errors on them are what the format costs at best; give
recorded hidden states where the true figure matters.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def synthetic_hidden_states(tokens: int, hidden: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw (tokens, hidden) values of N(0, 1) on the CPU; the same seed gives the same values everywhere.

    Raises:
        InputError: a negative count of tokens, a seed of more than 64 bits, or more than memory holds.
    """
    if tokens < 0:
        raise InputError("tokens", "must be 0 or more", tokens, "give the number of rows to draw")
    if not -(2**63) <= seed < 2**63:
        raise InputError("seed", "must fit 64 bits", seed, "use a smaller one")
    generator = torch.Generator().manual_seed(seed)
    try:
        return torch.randn(tokens, hidden, generator=generator).to(dtype)
    except (RuntimeError, TypeError) as bad:  # an allocation that fails, or a count beyond 64 bits
        got = f"{tokens} rows of {hidden} fp32, {tokens * hidden * 4} bytes"
        raise InputError("tokens", "must fit in memory", got, "ask for fewer") from bad


def load_hidden_states(path: str | Path, tensor: str | None = None) -> Tensor:
    """Read hidden states (..., H), bf16, fp16 or fp32, from a safetensors file.

    Args:
        path: the file.
        tensor: name of the tensor; None where the file holds exactly one.

    Raises:
        InputError: no such file, not a safetensors file, no or more than one candidate, or a dtype that is no
            hidden state.
    """
    x = _load(path, tensor)
    if x.dtype not in _DTYPES or x.ndim == 0:
        got = f"{x.dtype} of shape {tuple(x.shape)}"
        raise InputError(str(path), "must hold bf16, fp16 or fp32 of shape (..., H)", got, "cast before saving")
    return x


def synthetic_token_ids(tokens: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Draw (tokens,) ids, uniform over a vocabulary, on the CPU; the same seed gives the same ids everywhere."""
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))


def load_token_ids(path: str | Path, tensor: str, x: Tensor, vocabulary: int) -> Tensor:
    """Read token ids, integers of the leading dimensions of x, from a safetensors file.

    Raises:
        InputError: no such tensor, another shape or dtype, or an id outside the vocabulary.
    """
    ids = _load(path, tensor)
    if ids.shape != x.shape[:-1] or ids.dtype not in (torch.int32, torch.int64):
        got = f"{ids.dtype} of shape {tuple(ids.shape)}"
        raise InputError(f"{path}: {tensor}", f"must be integers {tuple(x.shape[:-1])}", got, "one id for each row")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        got = f"{int(ids.min())}..{int(ids.max())}"
        raise InputError(f"{path}: {tensor}", f"must be ids in 0..{vocabulary - 1}", got, "use the model's own tokens")
    return ids


def _load(path: str | Path, tensor: str | None) -> Tensor:
    """The tensor of that name, or the only one, of a safetensors file."""
    if not Path(path).is_file():
        raise InputError(str(path), "must be a safetensors file", "no such file", "check the path")
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if tensor is None and len(names) != 1:
                raise InputError(
                    str(path), "must hold exactly one tensor", f"{len(names)}: {names[:5]}", "name one with --tensor"
                )
            if tensor is not None and tensor not in names:
                raise InputError(str(path), f"must hold a tensor {tensor!r}", names[:5], "name one of those")
            found: Tensor = file.get_tensor(tensor or names[0])
            return found
    except SafetensorError as error:
        raise InputError(str(path), "must be a safetensors file", str(error), "write it with safetensors") from error
