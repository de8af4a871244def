# SPDX-License-Identifier: Apache-2.0
"""`tune` without a GPU: what it refuses, what it finds by a made-up clock, and the table it writes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvfp4_experts.cli import tune
from nvfp4_experts.diagnostics.bench.work import Work, find_work
from nvfp4_experts.diagnostics.tune import search
from nvfp4_experts.errors import InputError, UnsupportedError
from nvfp4_experts.kernels.sm90 import choice
from nvfp4_experts.kernels.sm90.choice import choose
from nvfp4_experts.kernels.sm90.config import GemmConfig, halves
from nvfp4_experts.kernels.sm90.table import TOKEN_LIMITS, Run, Table, load_table
from nvfp4_experts.kernels.target import Target
from tests.cli.commands import invoke

HOPPER = Target("cuda", "a Hopper", (9, 0), 132)
WORK = find_work("4096x2048")
RUN = Run("2026-12-01", "a Hopper", None, "2.13", "nvfp4-experts tune")


@dataclass
class Clock:
    """A timer that knows beforehand, and a chain that was right, or wrong by some factor."""

    seconds: float
    factor: float = 1.0

    def sample(self) -> float:
        return self.seconds

    def outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.ones(4), torch.ones(4)
        yield torch.full((4,), self.factor), torch.ones(4)


class FakeLayer:
    """A GPU on which `fast` takes less time than all others; `wrong` gives wrong results, `racy` only in graphs."""

    fast: tuple[tuple[bool, GemmConfig], ...] = ()  # (gate_up, which)
    wrong: tuple[GemmConfig, ...] = ()
    racy: tuple[GemmConfig, ...] = ()
    decode_seconds = 8e-6

    def __init__(self, work: Work, device: object = None) -> None:
        self.work = work
        self.compiled: set[tuple[bool, GemmConfig]] = set()

    def compile(self, gate_up: bool, configs: Iterable[GemmConfig]) -> None:
        self.compiled.update((gate_up, config) for config in configs)

    def truth(self, gate_up: bool, tokens: int) -> Tensor:
        return torch.linspace(-1, 1, 64)

    def result(self, gate_up: bool, tokens: int, config: GemmConfig) -> Tensor:
        assert (gate_up, config) in self.compiled  # several at a time: one by one, compiling takes longer than all else
        return self.truth(gate_up, tokens) * (1.002 if config in self.wrong else 1.0)

    def _seconds(self, gate_up: bool, tokens: int, config: GemmConfig) -> float:
        return 1e-6 * tokens ** (0.5 if (gate_up, config) in self.fast else 1)

    def half_timer(self, gate_up: bool, tokens: int, config: GemmConfig) -> Clock:
        assert config not in self.wrong
        return Clock(self._seconds(gate_up, tokens, config))

    def pair_timer(self, tokens: int, gate_up: GemmConfig, down: GemmConfig) -> Clock:
        seconds = self._seconds(True, tokens, gate_up) + self._seconds(False, tokens, down)
        return Clock(seconds, 1.5 if {gate_up, down} & set(self.racy) else 1.0)

    def decode_timer(self, tokens: int) -> Clock:
        return Clock(self.decode_seconds)


@pytest.fixture(autouse=True)
def table_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The package's table is a file of the test's own, not there at first."""
    path = tmp_path / "tuned" / "sm_90-132.json"
    monkeypatch.setattr(choice, "table_path", lambda target: path)
    for cached in (choice._choose, choice._table_of):
        cached.cache_clear()
    yield path
    for cached in (choice._choose, choice._table_of):
        cached.cache_clear()


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds a Hopper, and FakeLayer on it."""
    monkeypatch.setattr(search, "hopper", lambda device: (torch.device("cpu"), HOPPER))
    monkeypatch.setattr("nvfp4_experts.diagnostics.tune.halves.Layer", FakeLayer)


def others(tokens: int, count: int) -> tuple[list[GemmConfig], list[GemmConfig]]:
    """Candidates of each half that do not run now."""
    now = choose(4096, 2048, tokens, HOPPER)
    problems = halves(4096, 2048, tokens)
    return tuple(list(search.candidates(p, 132, n)[1 : 1 + count]) for p, n in zip(problems, now, strict=True))  # type: ignore[return-value]


def tuned(layer: type[FakeLayer], *tokens: int) -> tuple[Table, tuple[search.Row, ...]]:
    return search.tune([WORK], layer, HOPPER, Table("sm_90-132"), RUN, tokens=tokens, seconds=0.01)  # type: ignore[arg-type]


def test_help_has_a_sentence_an_example_and_a_page() -> None:
    text = invoke("tune", "--help").stdout
    assert tune.HELP in " ".join(text.split()) and "Example: nvfp4-experts tune " in " ".join(text.split())
    section = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text().partition("\n## tune")[2]
    options = set(re.findall(r"(--[a-z][a-z-]+)", text)) - {"--help"}
    assert options == {"--shape", "--tokens", "--output", "--device", "--seconds"}
    for option in options:
        assert f"`{option}`" in section, f"docs/cli.md does not explain {option} of tune"


@pytest.mark.parametrize("options", [(), ("--device", "cpu"), ("--device", "abacus")])
def test_without_a_hopper_nothing_is_written(options: tuple[str, ...], tmp_path: Path) -> None:
    if not options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = sorted(tmp_path.rglob("*"))
    result = invoke("tune", *options, "--output", tmp_path / "table.json", code=2)
    error = " ".join(result.stderr.split())
    assert "UnsupportedError" in error and "tune on the GPU that the table is for" in error and result.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "options",
    [
        ("--tokens", "many"),
        ("--tokens", "0"),
        ("--shape", "V5"),
        ("--seconds", "0"),
        ("--output", "nowhere/table.json"),
    ],
)
def test_usage_errors_exit_2_and_explain(options: tuple[str, ...], fake_gpu: None, table_in_use: Path) -> None:
    result = invoke("tune", *options, code=2)
    assert "InputError" in result.stderr and "way out" in result.stderr and "Traceback" not in result.output
    assert not table_in_use.exists()


def test_the_table_is_written_whole_and_valid(fake_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed: list[tuple[str, str]] = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (renamed.append((str(a), str(b))), real(a, b)))
    path = tmp_path / "table.json"
    result = invoke("tune", "--shape", "V4-Flash,5120x2304", "--seconds", 0.01, "--output", path)
    assert [to for _, to in renamed] == [str(path)] and Path(renamed[0][0]).parent == tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["table.json"]
    table = load_table(path, "sm_90-132")
    assert [(s.hidden, s.intermediate, s.decode_limit) for s in table.shapes] == [(4096, 2048, 8), (5120, 2304, 8)]
    for shape in table.shapes:
        assert [made.limit_tokens for made in shape.choices] == [*TOKEN_LIMITS, None]
    assert "V4-Flash" in result.stdout and "to 4096" in result.stdout and str(path) in result.stdout.replace("\n", "")
    run = table.shapes[0].choices[0].run
    assert run.command.startswith("nvfp4-experts") and run.torch == torch.__version__ and run.date.startswith("20")


def test_what_is_not_tuned_stays_and_the_default_is_the_packages_table(fake_gpu: None, table_in_use: Path) -> None:
    invoke("tune", "--shape", "V4-Flash", "--tokens", "100", "--seconds", 0.01)
    first = load_table(table_in_use, "sm_90-132")
    assert [made.limit_tokens for made in first.shapes[0].choices] == [128]
    invoke("tune", "--shape", "V4-Flash,V4-Pro", "--tokens", "9,16", "--seconds", 0.01)
    second = load_table(table_in_use, "sm_90-132")
    shape = second.shape(4096, 2048)
    assert shape is not None and [made.limit_tokens for made in shape.choices] == [16, 128]
    assert shape.choice(128) == first.shapes[0].choice(128) and second.shape(7168, 3072) is not None
    assert len(json.loads(table_in_use.read_text())["runs"]) == 2 or shape.choices[0].run == shape.choices[1].run


def test_a_file_that_is_no_table_is_left_alone(fake_gpu: None, tmp_path: Path) -> None:
    path = tmp_path / "precious.json"
    path.write_text('{"mine": 1}')
    assert "TableError" in invoke("tune", "--shape", "V4-Flash", "--output", path, code=2).stderr
    assert path.read_text() == '{"mine": 1}'


def test_the_fastest_pair_wins() -> None:
    (gate_up, *_), (*_, down) = others(128, 5)

    class Layer(FakeLayer):
        fast = ((True, gate_up), (False, down))

    table, (row,) = tuned(Layer, 100)
    assert row.limit == 128 and row.new == (gate_up, down) and row.wrong == ()
    assert row.old_us == pytest.approx(256) and row.new_us == pytest.approx(2 * 128**0.5)
    made = table.shapes[0].choice(128)
    assert made is not None and (made.gate_up, made.down, made.run) == (gate_up, down, RUN)


def test_what_runs_now_stays_unless_another_is_faster() -> None:
    assert tuned(FakeLayer, 64, 9000)[1] == tuple(
        search.Row(WORK.shape, limit, now, now, pytest.approx(2 * tokens), pytest.approx(2 * tokens), ())
        for limit, tokens in ((64, 64), (None, 8192))
        for now in [choose(4096, 2048, tokens, HOPPER)]
    )


def test_wrong_candidates_cannot_win_and_are_told(
    fake_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bad, good, race, *_), _ = others(128, 5)

    class Layer(FakeLayer):
        fast = tuple((True, config) for config in (bad, good, race))
        wrong = (bad,)
        racy = (race,)

    _, (row,) = tuned(Layer, 128)
    assert row.new[0] == good
    assert any(f"gate_up {bad}" in reason for reason in row.wrong)
    assert any(f"{race} then" in reason and "replayed" in reason for reason in row.wrong)
    monkeypatch.setattr("nvfp4_experts.diagnostics.tune.halves.Layer", Layer)
    path = tmp_path / "table.json"
    result = invoke("tune", "--shape", "V4-Flash", "--tokens", "128", "--seconds", 0.01, "--output", path, code=1)
    assert "WRONG" in result.stdout
    assert load_table(path, "sm_90-132").shapes[0].choices[0].gate_up == good


def test_when_all_are_wrong_nothing_is_chosen() -> None:
    class Layer(FakeLayer):
        def result(self, gate_up: bool, tokens: int, config: GemmConfig) -> Tensor:
            return torch.full((64,), torch.nan)

    with pytest.raises(UnsupportedError, match="one configuration must be right"):
        tuned(Layer, 128)


@pytest.mark.parametrize(("seconds", "limit"), [(1e-6, 8), (1e-3, 0)])
def test_decode_that_is_always_or_never_faster(seconds: float, limit: int) -> None:
    class Layer(FakeLayer):
        decode_seconds = seconds

    assert tuned(Layer, 10)[0].shapes[0].decode_limit == limit


def test_decode_stops_where_the_pair_is_faster() -> None:
    class Layer(FakeLayer):
        def decode_timer(self, tokens: int) -> Clock:
            return Clock(1e-6 * tokens * tokens / 2.5)  # the pair: 2 µs a token

    assert tuned(Layer, 16)[0].shapes[0].decode_limit == 5


def test_candidates_are_the_current_one_and_the_near_best() -> None:
    problem = halves(4096, 2048, 16)[0]
    odd = GemmConfig(1, 1, 256, 1)
    found = search.candidates(problem, 132, odd)
    assert found[0] == odd and len(found) == 1 + search.MOST
    best = choice.choose_by_rule(problem, 132)
    times = [choice.estimate(config, problem, 132) for config in found[1:]]
    assert times == sorted(times) and times[-1] <= search.NEAR * choice.estimate(best, problem, 132) and best in found


def test_tokens_and_seconds_are_checked() -> None:
    for options in ({"tokens": (0,)}, {"tokens": ()}, {"seconds": float("nan")}):
        with pytest.raises(InputError):
            search.tune([WORK], FakeLayer, HOPPER, Table("sm_90-132"), RUN, **options)  # type: ignore[arg-type]
