# SPDX-License-Identifier: Apache-2.0
"""Mistakes inside other people's models, in the form of table.py."""

from __future__ import annotations

from .mutant import Mutant

INTEGRATIONS = (
    Mutant(
        "scalars of a checkpoint made anew when it is saved",
        "integrations/transformers/saving.py",
        "scalars = dict(stored.scalars)",
        "scalars: dict[str, Tensor] = {}",
        "tests/integrations/test_from_pretrained.py::test_load_evaluate_generate_save[modelopt]",
    ),
    Mutant(
        "unexpected tensors ignored in layers that have none of ours",
        "integrations/transformers/source.py",
        'f"(?:{of_layers})"',
        'r"\\d+"',
        "tests/integrations/test_from_pretrained.py::test_what_neither_side_takes_is_still_unexpected",
    ),
    Mutant(
        "experts of parameters that have been written to since",
        "integrations/transformers/implementation.py",
        "parameter is known() and _state_of(parameter) == state",
        "parameter is known()",
        "tests/integrations/test_implementation.py::test_weights_are_quantised_once_and_anew_when_they_change",
    ),
)
