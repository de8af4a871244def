# SPDX-License-Identifier: Apache-2.0
"""Tables of launch configurations that were measured, one JSON file per class of device.

    {"schema": 1, "device_class": "sm_90-132",
     "runs":   [{"date", "device", "driver" (or null), "torch", "command"}, ...],
     "shapes": [{"hidden", "intermediate", "decode_limit",
                 "choices": [{"limit", "gate_up": [r, c, t, split], "down": [...], "microseconds", "run"}, ...]}]}

A choice is for a range of tokens: `limit` is the range's upper end, one of TOKEN_LIMITS, or null for all above; a
range that is not there is the rule's (choice.py). `microseconds` is what the layer took when it was chosen and `run`
the index of the run that measured it: a file holds shapes and ranges of several runs. `decode_limit` is the largest
number of tokens for which decode.cu was faster with bf16 activations. Nothing in a file is taken on trust: keys, types,
order, and that gemm.cu can run each configuration.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ...errors import TableError
from .config import GemmConfig, GemmProblem, halves, refusal

SCHEMA = 1
TOKEN_LIMITS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
DECODE_LIMIT = 8  # tokens that decode.cu takes at most, and takes where no table says less
_TOKENS_ABOVE = 2 * TOKEN_LIMITS[-1]

_T = TypeVar("_T")


def range_limit(tokens: int) -> int | None:
    """The upper end of the range that a number of tokens lies in; None above the last limit."""
    index = bisect.bisect_left(TOKEN_LIMITS, tokens)
    return TOKEN_LIMITS[index] if index < len(TOKEN_LIMITS) else None


def tokens_of_range(limit: int | None) -> int:
    """The number of tokens that stands for a range: its upper end, or twice the last limit for all above."""
    return _TOKENS_ABOVE if limit is None else limit


def token_ranges(max_tokens: int) -> list[int]:
    """One number of tokens for each range that holds some up to max_tokens."""
    begins = (0, *TOKEN_LIMITS)
    limits = (*TOKEN_LIMITS, None)
    return [tokens_of_range(limit) for begin, limit in zip(begins, limits, strict=True) if begin < max_tokens]


@dataclass(frozen=True)
class Run:
    """Where and how something was measured."""

    date: str
    device: str
    driver: str | None
    torch: str
    command: str


@dataclass(frozen=True)
class Choice:
    """What runs in one range of tokens, up to limit_tokens (None: no end), and what it took when it was chosen."""

    limit_tokens: int | None
    gate_up: GemmConfig
    down: GemmConfig
    microseconds: float
    run: Run


@dataclass(frozen=True)
class Shape:
    """What is known of layers of one size; choices in the order of their ranges."""

    hidden: int
    intermediate: int
    decode_limit: int
    choices: tuple[Choice, ...] = ()

    def choice(self, limit: int | None) -> Choice | None:
        """The choice for a range; None if the table has none."""
        return next((choice for choice in self.choices if choice.limit_tokens == limit), None)

    def having(self, new: Choice) -> Shape:
        """This shape with another choice for one range."""
        kept = [choice for choice in self.choices if choice.limit_tokens != new.limit_tokens]
        choices = tuple(sorted([*kept, new], key=lambda choice: tokens_of_range(choice.limit_tokens)))
        return Shape(self.hidden, self.intermediate, self.decode_limit, choices)


@dataclass(frozen=True)
class Table:
    """All that is known of one class of device."""

    device_class: str
    shapes: tuple[Shape, ...] = ()

    def shape(self, hidden: int, intermediate: int) -> Shape | None:
        """What is known of layers of that size; None if nothing is."""
        return next((s for s in self.shapes if (s.hidden, s.intermediate) == (hidden, intermediate)), None)

    def having(self, new: Shape) -> Table:
        """This table with another entry for one size."""
        kept = [s for s in self.shapes if (s.hidden, s.intermediate) != (new.hidden, new.intermediate)]
        return Table(self.device_class, tuple(sorted([*kept, new], key=lambda s: (s.hidden, s.intermediate))))


def load_table(path: Path, device_class: str) -> Table:
    """Read a table and check all that is in it.

    Raises:
        TableError: the file cannot be read, is not such a table or is another device class's, or a configuration in it
            cannot run; the message names the file, the place in it, the rule and what it got.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _error(path, "", "must be a readable JSON file", error) from error
    return _Reader(path).table(document, device_class)


def table_text(table: Table) -> str:
    """A table as `load_table` reads it, one choice a line."""
    runs = list(dict.fromkeys(choice.run for shape in table.shapes for choice in shape.choices))
    shapes = []
    for shape in table.shapes:
        sizes = {name: getattr(shape, name) for name in ("hidden", "intermediate", "decode_limit")}
        rows = _lines([_choice_text(choice, runs) for choice in shape.choices], "    ")
        shapes.append(f'{json.dumps(sizes)[:-1]}, "choices": [{rows}]}}')
    head = json.dumps({"schema": SCHEMA, "device_class": table.device_class})[:-1]
    ran = _lines([json.dumps(asdict(run)) for run in runs])
    return f'{head},\n "runs": [{ran}],\n "shapes": [{_lines(shapes)}]}}\n'


def _choice_text(choice: Choice, runs: Sequence[Run]) -> str:
    return json.dumps(
        {
            "limit": choice.limit_tokens,
            "gate_up": choice.gate_up.to_list(),
            "down": choice.down.to_list(),
            "microseconds": round(choice.microseconds, 2),
            "run": runs.index(choice.run),
        }
    )


def _lines(texts: Sequence[str], indent: str = "  ") -> str:
    return ",".join(f"\n{indent}{text}" for text in texts)


def _error(path: Path, place: str, rule: str, got: object) -> TableError:
    way_out = "write it with `nvfp4-experts tune`, or remove it: the rule then chooses"
    return TableError(f"{path}{' ' if place else ''}{place}", rule, got, way_out)


@dataclass(frozen=True)
class _Reader:
    """Takes a document apart; `place` is where in it, for the messages."""

    path: Path

    def require(self, fine: bool, place: str, rule: str, got: object) -> None:
        if not fine:
            raise _error(self.path, place, rule, repr(got))

    def values(self, value: Any, place: str, keys: Sequence[str]) -> list[Any]:
        """The values of exactly these keys."""
        rule = f"must be an object with {', '.join(keys)}"
        self.require(isinstance(value, dict) and set(value) == set(keys), place, rule, value)
        return [value[key] for key in keys]

    def items(self, value: Any, place: str) -> list[Any]:
        self.require(isinstance(value, list), place, "must be a list", value)
        return list(value)

    def integer(self, value: Any, place: str, rule: str, fine: range) -> int:
        self.require(type(value) is int and value in fine, place, rule, value)
        return int(value)

    def unique(self, values: Sequence[_T], place: str, rule: str) -> tuple[_T, ...]:
        self.require(len(set(values)) == len(values), place, rule, values)
        return tuple(values)

    def table(self, document: Any, device_class: str) -> Table:
        keys = ("schema", "device_class", "runs", "shapes")
        schema, found_class, runs, shapes = self.values(document, "", keys)
        self.require(schema == SCHEMA, "schema", f"must be {SCHEMA}", schema)
        self.require(found_class == device_class, "device_class", f"must be {device_class!r}", found_class)
        read_runs = [self.run(run, f"runs[{i}]") for i, run in enumerate(self.items(runs, "runs"))]
        read = [self.shape(s, f"shapes[{i}]", read_runs) for i, s in enumerate(self.items(shapes, "shapes"))]
        self.unique([(s.hidden, s.intermediate) for s in read], "shapes", "must each be there once")
        return Table(device_class, tuple(read))

    def run(self, value: Any, place: str) -> Run:
        names = [field.name for field in fields(Run)]
        texts = self.values(value, place, names)
        for name, text in zip(names, texts, strict=True):
            fine = isinstance(text, str) or (name == "driver" and text is None)
            self.require(fine, f"{place}.{name}", "must be text", text)
        return Run(*texts)

    def shape(self, value: Any, place: str, runs: Sequence[Run]) -> Shape:
        *numbers, choices = self.values(value, place, ("hidden", "intermediate", "decode_limit", "choices"))
        sizes = range(16, 1 << 24, 16)
        hidden = self.integer(numbers[0], f"{place}.hidden", "must be a positive multiple of 16", sizes)
        intermediate = self.integer(numbers[1], f"{place}.intermediate", "must be a positive multiple of 16", sizes)
        rule = f"must be from 0 to {DECODE_LIMIT}"
        decode = self.integer(numbers[2], f"{place}.decode_limit", rule, range(DECODE_LIMIT + 1))
        read = []
        for i, choice in enumerate(self.items(choices, f"{place}.choices")):
            read.append(self.choice(choice, f"{place}.choices[{i}]", (hidden, intermediate), runs))
        limits = [tokens_of_range(choice.limit_tokens) for choice in read]
        self.unique(limits, f"{place}.choices", "must have each limit once")
        self.require(limits == sorted(limits), f"{place}.choices", "must have rising limits", limits)
        return Shape(hidden, intermediate, decode, tuple(read))

    def choice(self, value: Any, place: str, size: tuple[int, int], runs: Sequence[Run]) -> Choice:
        keys = ("limit", "gate_up", "down", "microseconds", "run")
        limit, gate_up, down, microseconds, run = self.values(value, place, keys)
        known = limit is None or (type(limit) is int and limit in TOKEN_LIMITS)
        self.require(known, f"{place}.limit", f"must be null or one of {TOKEN_LIMITS}", limit)
        fine = type(microseconds) in (int, float) and math.isfinite(microseconds) and microseconds > 0
        self.require(fine, f"{place}.microseconds", "must be finite and above 0", microseconds)
        index = self.integer(run, f"{place}.run", "must be the index of a run", range(len(runs)))
        problems = halves(*size, tokens_of_range(limit))
        first = self.config(gate_up, f"{place}.gate_up", problems[0])
        second = self.config(down, f"{place}.down", problems[1])
        return Choice(limit, first, second, float(microseconds), runs[index])

    def config(self, value: Any, place: str, problem: GemmProblem) -> GemmConfig:
        fine = isinstance(value, list) and len(value) == 4 and all(type(part) is int for part in value)
        self.require(fine, place, "must be [row_groups, column_groups, tokens, split]", value)
        config = GemmConfig(*value)
        reason = refusal(config, problem)
        self.require(reason is None, place, f"must be legal: {reason}", value)
        return config
