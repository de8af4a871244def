# SPDX-License-Identifier: Apache-2.0
"""Which configuration of the Hopper GEMM runs: legality, the rule, ranges of tokens, and tables nobody may trust."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_experts.diagnostics.bench.work import SHAPES
from nvfp4_experts.errors import TableError, UnsupportedError
from nvfp4_experts.kernels.sm90 import choice, table
from nvfp4_experts.kernels.sm90.choice import choose, choose_by_rule, cluster_slots, decode_limit, estimate
from nvfp4_experts.kernels.sm90.config import GemmConfig, GemmProblem, config_is_legal, halves, legal_configs, refusal
from nvfp4_experts.kernels.sm90.table import DECODE_LIMIT, TOKEN_LIMITS, load_table, table_text, token_ranges
from nvfp4_experts.kernels.target import Target

HOPPER = Target("cuda", "a Hopper", (9, 0), 132)
PRO = GemmProblem(6144, 7168, 64)
SIZES = st.integers(1, 600).map(lambda n: 16 * n)
TOKENS = st.integers(1, 100_000)


@pytest.fixture
def no_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No table is checked in, until a test writes to this path; nothing read here is remembered."""
    path = tmp_path / "sm_90-132.json"
    monkeypatch.setattr(choice, "table_path", lambda target: path)
    for cached in (choice._choose, choice._table_of):
        cached.cache_clear()
    yield path
    for cached in (choice._choose, choice._table_of):
        cached.cache_clear()


# --- configurations -----------------------------------------------------------------------------------------------


def test_the_numbers_of_a_configuration() -> None:
    made = GemmConfig(2, 1, 128, 2)
    assert (made.warpgroups, made.parts, made.threads, made.registers, made.rows) == (2, 2, 384, 232, 128)
    assert made.stage_chunks == 2
    assert made.stage_bytes == 2 * (128 * 128 + 2 * 4 * 576) == 41984
    assert made.stages == (232448 - 8192) // 41984 == 5
    assert made.sum_bytes == 2 * 64 * 128 * 4  # of both parts, 64 tokens each
    assert made.shared_bytes == 5 * 41984 + 8192
    assert str(made) == "2/1/128/2" and GemmConfig(*made.to_list()) == made
    assert dataclasses.replace(made, split=1).sum_bytes == 0
    assert GemmConfig(1, 1, 32, 1).stages == 6  # more would fit


def test_the_numbers_of_column_groups() -> None:
    made = GemmConfig(1, 3, 128, 2)
    assert (made.warpgroups, made.parts, made.threads, made.registers, made.rows) == (3, 6, 512, 152, 64)
    assert made.stage_chunks == 6
    assert made.stage_bytes == 6 * (128 * 128 + 4 * 576)
    assert made.sum_bytes == 6 * 3 * 24 * 64 * 4  # of 6 parts, to each of 3: 16 groups of 8 tokens are 3 each at most
    more = GemmConfig(4, 1, 256, 2)
    assert more.shared_bytes == 2 * 128 * 256 * 4 + 8192 > more.stages * more.stage_bytes + 8192  # the sums need more


@pytest.mark.parametrize(("warpgroups", "producer"), [(1, 40), (2, 40), (3, 40), (4, 32)])
def test_registers_fit_those_of_an_sm(warpgroups: int, producer: int) -> None:
    """setmaxnreg gives to the warpgroups that multiply what the one that loads gives up of the launch's share."""
    made = GemmConfig(warpgroups, 1, 32, 1)
    share = 65536 // made.threads // 8 * 8
    assert warpgroups * made.registers + producer <= (warpgroups + 1) * min(share, 255)
    assert made.registers % 8 == 0
    assert GemmConfig(1, warpgroups, 32, 1).registers == made.registers


ILLEGAL = {
    "row_groups must be": (GemmConfig(5, 1, 32, 1), PRO),
    "column_groups must be": (GemmConfig(1, 0, 32, 1), PRO),
    "tokens must be": (GemmConfig(2, 1, 48, 1), PRO),
    "split must be": (GemmConfig(2, 1, 64, 3), PRO),
    "at most 4 warpgroups, not 6": (GemmConfig(3, 2, 32, 1), PRO),
    "4 groups of 8 tokens are too few for 8 parts": (GemmConfig(1, 2, 32, 4), PRO),
    "4 groups of 8 tokens are too few for 6 parts": (GemmConfig(1, 3, 32, 2), PRO),
    "2 stages of": (GemmConfig(1, 2, 256, 1), PRO),
    "bytes of sums": (GemmConfig(4, 1, 256, 2), PRO),
    "136 registers must fit in the 112": (GemmConfig(4, 1, 128, 1), PRO),
    "200 registers must fit in the 152": (GemmConfig(3, 1, 256, 1), PRO),
    "384 columns make 3 of the stages": (GemmConfig(2, 1, 64, 4), GemmProblem(256, 384, 64)),
    "256 columns make 1 of the stages": (GemmConfig(1, 2, 64, 2), GemmProblem(256, 256, 64)),
}


@pytest.mark.parametrize("reason", ILLEGAL)
def test_each_rule_refuses_with_its_reason(reason: str) -> None:
    made, problem = ILLEGAL[reason]
    assert reason in (refusal(made, problem) or "")
    assert not config_is_legal(made, problem)


@pytest.mark.parametrize(
    ("made", "columns"),
    [
        ((4, 1, 64, 4), 7168),  # 4 warpgroups; 104 of 112 registers
        ((3, 1, 128, 4), 7168),  # 136 of 152
        ((2, 1, 256, 4), 7168),  # 200 of 232
        ((2, 2, 32, 2), 7168),  # 4 parts of 4 groups of 8 tokens
        ((1, 4, 64, 2), 7168),  # 8 of 8
        ((1, 3, 128, 4), 7168),  # 2 stages that fill all there is
        ((2, 1, 64, 4), 400),  # 4 stages, the last one of one chunk
        ((1, 2, 64, 2), 272),  # 2 stages, the last one of one chunk for two warpgroups
        ((1, 4, 32, 1), 16),  # one chunk for four
    ],
)
def test_neighbours_of_the_rules_are_legal(made: tuple[int, ...], columns: int) -> None:
    assert refusal(GemmConfig(*made), GemmProblem(256, columns, 64)) is None


def test_what_is_legal_is_legal_in_every_number() -> None:
    found = list(legal_configs(PRO))
    assert found == sorted(set(found)) and {made.warpgroups for made in found} == {1, 2, 3, 4}
    for made in found:
        assert made.shared_bytes <= 232448 and made.stages >= 2 and made.tokens // 2 + 72 <= made.registers
        assert max(made.stages * made.stage_bytes, made.sum_bytes) + 8192 <= made.shared_bytes
        assert made.parts * 8 <= made.tokens


# --- the rule -----------------------------------------------------------------------------------------------------


@given(hidden=SIZES, intermediate=SIZES, tokens=TOKENS, multiprocessors=st.integers(1, 160))
def test_the_rule_is_legal_everywhere(hidden: int, intermediate: int, tokens: int, multiprocessors: int) -> None:
    for problem in halves(hidden, intermediate, tokens):
        made = choose_by_rule(problem, multiprocessors)
        assert config_is_legal(made, problem)
        least = min(estimate(other, problem, multiprocessors) for other in legal_configs(problem))
        assert 0 < estimate(made, problem, multiprocessors) <= least + 1e-3


def test_the_rule_over_odd_multiples_of_16() -> None:
    for hidden, intermediate in itertools.product((16, 48, 144, 1040, 7184), (16, 80, 272, 3056)):
        for tokens in (9, 16, 33, 129, 1000, 100_000):
            for problem in halves(hidden, intermediate, tokens):
                assert refusal(choose_by_rule(problem, 132), problem) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_few_tokens_split_k_and_many_do_not(shape: str) -> None:
    for few, many in zip(halves(*SHAPES[shape], 16), halves(*SHAPES[shape], 8192), strict=True):
        assert choose_by_rule(few, 132).parts > 1
        assert choose_by_rule(few, 132).tokens == 32
        assert choose_by_rule(many, 132).parts == 1
        assert choose_by_rule(many, 132).tokens >= 128


@pytest.mark.parametrize("made", [(2, 1, 32, 4), (1, 2, 64, 1), (3, 1, 128, 1), (2, 1, 256, 1)])
def test_the_estimate_grows_with_the_work(made: tuple[int, ...]) -> None:
    def at(tokens: int, rows: int = 6144) -> float:
        return estimate(GemmConfig(*made), GemmProblem(rows, 7168, tokens), 132)

    times = [at(tokens) for tokens in (1, 256, 1024, 4096, 65536)]
    assert times == sorted(times) and times[-1] > 8 * times[2]
    assert at(1024, 12288) > at(1024)
    assert at(16) > 6144 * 7168 * 0.5625 / 4.4e6  # never faster than reading the weights


def test_many_tokens_are_never_faster_than_the_tensor_cores() -> None:
    problem = GemmProblem(6144, 7168, 8192)
    least = 2 * 6144 * 7168 * 8192 / (4096 * 1755 * 132)
    assert all(estimate(made, problem, 132) > least for made in legal_configs(problem))
    assert estimate(choose_by_rule(problem, 132), problem, 132) < 1.2 * least


def test_equal_estimates_take_the_fewest_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = GemmProblem(6144, 7168, 63)
    monkeypatch.setattr(choice, "estimate", lambda *_: 1.0)
    choose_by_rule.cache_clear()
    assert choose_by_rule(problem, 132) == GemmConfig(1, 1, 32, 1)
    choose_by_rule.cache_clear()


def test_clusters_that_fit_a_hopper() -> None:
    assert [cluster_slots(cluster, 132) for cluster in (1, 2, 4)] == [132, 66, 29]
    assert all(cluster_slots(c, n) * c <= max(n, c) for c in (1, 2, 4) for n in range(1, 200))


# --- ranges and tables --------------------------------------------------------------------------------------------


@given(hidden=SIZES, intermediate=SIZES, tokens=TOKENS)
def test_a_choice_is_a_function_of_the_range(hidden: int, intermediate: int, tokens: int) -> None:
    limit = table.range_limit(tokens)
    assert limit is None or tokens <= limit
    assert [lower for lower in TOKEN_LIMITS if tokens <= lower][:1] == ([] if limit is None else [limit])
    made = choose(hidden, intermediate, tokens, HOPPER)
    assert made == choose(hidden, intermediate, table.tokens_of_range(limit), HOPPER)
    for part, problem in zip(made, halves(hidden, intermediate, tokens), strict=True):
        assert config_is_legal(part, problem)


def test_ranges_have_their_ends() -> None:
    assert [table.range_limit(tokens) for tokens in (1, 16, 17, 32, 33, 4096, 4097)] == [16, 16, 32, 32, 64, 4096, None]
    assert table.tokens_of_range(None) > TOKEN_LIMITS[-1]


def test_each_range_up_to_max_tokens_is_named_once() -> None:
    assert token_ranges(1) == token_ranges(16) == [16]
    assert token_ranges(17) == token_ranges(32) == [16, 32]
    assert token_ranges(4096) == list(TOKEN_LIMITS)
    assert token_ranges(4097) == [*TOKEN_LIMITS, table.tokens_of_range(None)] == token_ranges(100_000)


@given(max_tokens=TOKENS, tokens=TOKENS)
def test_ranges_hold_all_numbers_up_to_max_tokens(max_tokens: int, tokens: int) -> None:
    limits = [table.range_limit(count) for count in token_ranges(max_tokens)]
    assert len(set(limits)) == len(limits) and limits[-1] == table.range_limit(max_tokens)
    assert tokens > max_tokens or table.range_limit(tokens) in limits


RUN = {"date": "2026-12-01", "device": "a Hopper", "driver": None, "torch": "2.13", "command": "nvfp4-experts tune"}
ROW = {"limit": 64, "gate_up": [2, 1, 64, 4], "down": [1, 2, 64, 2], "microseconds": 21.5, "run": 0}
SHAPE = {"hidden": 7168, "intermediate": 3072, "decode_limit": 5, "choices": [ROW, {**ROW, "limit": None}]}
SMALL = {**SHAPE, "hidden": 64, "intermediate": 64, "choices": []}
DOCUMENT = {"schema": 1, "device_class": "sm_90-132", "runs": [RUN], "shapes": [SMALL, SHAPE]}


def test_the_table_comes_before_the_rule(no_table: Path) -> None:
    no_table.write_text(json.dumps(DOCUMENT))
    assert choose(7168, 3072, 40, HOPPER) == (GemmConfig(2, 1, 64, 4), GemmConfig(1, 2, 64, 2))
    assert choose(7168, 3072, 64, HOPPER) == choose(7168, 3072, 33, HOPPER) == choose(7168, 3072, 5000, HOPPER)
    assert decode_limit(7168, 3072, HOPPER) == 5
    assert choose(7168, 3072, 65, HOPPER) == tuple(choose_by_rule(p, 132) for p in halves(7168, 3072, 128))
    assert choose(4096, 3072, 64, HOPPER) == tuple(choose_by_rule(p, 132) for p in halves(4096, 3072, 64))
    assert choose(4096, 3072, 64, HOPPER) != choose(7168, 3072, 64, HOPPER)
    assert decode_limit(4096, 3072, HOPPER) == DECODE_LIMIT


def test_without_a_table_the_rule_chooses(no_table: Path) -> None:
    assert choose(4096, 2048, 20, HOPPER) == tuple(choose_by_rule(p, 132) for p in halves(4096, 2048, 32))
    assert decode_limit(4096, 2048, HOPPER) == DECODE_LIMIT


def test_a_broken_table_is_heard_of(no_table: Path) -> None:
    no_table.write_text("{")
    with pytest.raises(TableError, match=r"sm_90-132\.json"):
        choose(4096, 2048, 20, HOPPER)


@pytest.mark.parametrize("path", sorted((Path(choice.__file__).parent / "tuned").glob("*.json")), ids=lambda p: p.stem)
def test_tables_that_are_checked_in_are_sound(path: Path) -> None:
    read = load_table(path, path.stem)
    assert read.shapes
    target = Target("cuda", "a Hopper", (9, 0), int(path.stem.rpartition("-")[2]))
    assert choice.table_path(target) == path
    for shape in read.shapes:
        assert shape.choices and decode_limit(shape.hidden, shape.intermediate, target) == shape.decode_limit
        for made in shape.choices:
            tokens = table.tokens_of_range(made.limit_tokens)
            pair = choose(shape.hidden, shape.intermediate, tokens, target)
            assert pair == (made.gate_up, made.down)
            for config_of, problem in zip(pair, halves(shape.hidden, shape.intermediate, tokens), strict=True):
                assert refusal(config_of, problem) is None


def test_a_device_without_a_class_is_refused() -> None:
    assert choice.device_class(HOPPER) == "sm_90-132"
    with pytest.raises(UnsupportedError, match="CUDA"):
        choice.device_class(Target("cpu", "cpu"))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(DOCUMENT))
    read = load_table(path, "sm_90-132")
    path.write_text(table_text(read))
    assert load_table(path, "sm_90-132") == read
    assert json.loads(path.read_text()) == DOCUMENT
    assert max(len(line) for line in path.read_text().splitlines()) < 200
    path.write_text(table_text(table.Table("sm_90-132")))
    assert load_table(path, "sm_90-132") == table.Table("sm_90-132")


def test_new_choices_replace_old_ones_and_keep_the_order(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(DOCUMENT))
    read = load_table(path, "sm_90-132")
    run = table.Run("2027-01-01", "a Hopper", None, "3", "again")
    shape = read.shapes[1]
    for limit in (64, 16):
        made = table.Choice(limit, GemmConfig(3, 1, 32, 4), GemmConfig(1, 3, 64, 2), 9.0, run)
        shape = shape.having(made)
        assert shape.choice(limit) == made
    assert [made.limit_tokens for made in shape.choices] == [16, 64, None]
    path.write_text(table_text(read.having(shape)))
    again = load_table(path, "sm_90-132")
    assert again.shape(64, 64) == read.shape(64, 64) and again.shape(7168, 3072) == shape


def having(place: tuple[Any, ...], value: Any) -> Any:
    """DOCUMENT with something else at one place."""
    changed = json.loads(json.dumps(DOCUMENT))
    at = changed
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return changed


CHOICE = ("shapes", 1, "choices", 0)
BROKEN: dict[str, tuple[Any, str]] = {
    "not an object": ([], "must be an object with schema"),
    "a key too many": ({**DOCUMENT, "note": ""}, "must be an object with schema"),
    "another schema": (having(("schema",), 2), "schema: must be 1, got 2"),
    "another device": (having(("device_class",), "sm_90-114"), "device_class: must be 'sm_90-132'"),
    "runs that are none": (having(("runs",), {}), r"runs: must be a list"),
    "a run without a date": (having(("runs", 0, "date"), None), r"runs\[0\]\.date: must be text"),
    "a size that is not whole": (having(("shapes", 1, "hidden"), 7168.0), r"shapes\[1\]\.hidden: must be a positive"),
    "a size of no blocks": (having(("shapes", 1, "intermediate"), 40), r"intermediate: must be a positive multiple"),
    "a size twice": (having(("shapes", 0), SHAPE), "shapes: must each be there once"),
    "a decode limit too far": (having(("shapes", 1, "decode_limit"), 9), "decode_limit: must be from 0 to 8, got 9"),
    "true for one": (having(("shapes", 1, "decode_limit"), True), "decode_limit: must be from 0 to 8, got True"),
    "a missing key": (having(CHOICE, {"limit": 64}), r"choices\[0\]: must be an object with limit"),
    "no such range": (having((*CHOICE, "limit"), 65), r"limit: must be null or one of"),
    "a range twice": (having(("shapes", 1, "choices"), [ROW, ROW]), "choices: must have each limit once"),
    "ranges that fall": (having(("shapes", 1, "choices"), [ROW, {**ROW, "limit": 16}]), "must have rising limits"),
    "no time": (having((*CHOICE, "microseconds"), 0), "microseconds: must be finite and above 0"),
    "a time without end": (having((*CHOICE, "microseconds"), float("inf")), "microseconds: must be finite"),
    "no such run": (having((*CHOICE, "run"), 1), "run: must be the index of a run, got 1"),
    "three numbers": (
        having((*CHOICE, "down"), [1, 2, 64]),
        r"choices\[0\]\.down: must be \[row_groups, column_groups",
    ),
    "an illegal configuration": (
        having((*CHOICE, "gate_up"), [4, 1, 128, 1]),
        r"gate_up: must be legal: 136 registers",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_each_fault_of_a_table_is_named(fault: str, tmp_path: Path) -> None:
    document, message = BROKEN[fault]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(document))
    with pytest.raises(TableError, match=message) as caught:
        load_table(path, "sm_90-132")
    assert str(path) in caught.value.what and "tune" in caught.value.way_out


@pytest.mark.parametrize(
    "write", [lambda path: path.write_bytes(b"\xff"), lambda path: None, lambda path: path.mkdir()]
)
def test_a_file_that_cannot_be_read_is_named(write: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write(path)
    with pytest.raises(TableError, match=r"table\.json: must be a readable JSON file"):
        load_table(path, "sm_90-132")
