"""Schedules: the authors' counts, the text forms, the cuts, and every refusal."""

import json
from pathlib import Path

import pytest
from tokexport.export.reducers.options import parse_r
from tokexport.export.schedule import Step

from tokexport import Schedule, UsageError

PARSED = json.loads((Path(__file__).parents[1] / "golden" / "units.json").read_text())["parse_r"]
DEIT = {"depth": 12, "n_tokens": 197, "n_prefix": 1}


@pytest.mark.parametrize("case", PARSED, ids=lambda c: f"{c['num_layers']}-{c['kind']}-{str(c['r'])[:12]}")
def test_r_runs_over_the_blocks_as_in_the_authors_code(case):
    r = tuple(case["r"]) if case["kind"] == "tuple" else case["r"]
    if len(case["out"]) > case["num_layers"]:  # theirs passes a list that is too long through
        with pytest.raises(UsageError, match="give at most one a block"):
            parse_r(r, case["num_layers"])
    else:
        assert parse_r(r, case["num_layers"]) == case["out"]


@pytest.mark.parametrize(
    "text, same",
    [
        ("13", 13),
        ("0", 0),
        ("8:-1", (8, -1.0)),
        ("8:0.5", (8, 0.5)),
        ("8,8,4", [8, 8, 4]),
        (" 13 ", 13),
        ("5, 0, 3", [5, 0, 3]),
    ],
)
def test_a_text_means_what_its_python_form_means(text, same):
    assert parse_r(text, 6) == parse_r(same, 6)


def test_two_inflections_are_told_apart():
    assert parse_r("8:-1", 6) == [16, 12, 9, 6, 3, 0] != parse_r("8:1", 6)


def test_a_model_of_one_block_takes_every_form():
    assert [parse_r(r, 1) for r in (8, (8, -1.0), [3])] == [[8], [16], [3]]


def test_r_25_on_197_tokens_is_cut_to_half_and_says_where():
    schedule = Schedule.parse("tome", r=25, **DEIT)
    assert [n for n, _ in schedule.tokens_per_block()] == [197, 172, 147, 122, 97, 72, 47, 24, 13, 7, 4, 3]
    assert schedule.n_final == 2
    (note,) = schedule.notes
    for said in ("6 (25 to 23)", "7 (25 to 11)", "8 (25 to 6)", "9 (25 to 3)", "10 (25 to 1)", "11 (25 to 1)"):
        assert said in note
    assert schedule.options["r"] == [25] * 12, "the options hold what was asked for"


def test_nothing_is_cut_without_a_note():
    schedule = Schedule.parse("tome", r=13, **DEIT)
    assert schedule.notes == () and schedule.n_final == 197 - 12 * 13


@pytest.mark.parametrize(
    "n_tokens, n_prefix, kept",
    [
        (9, 0, 5),
        (9, 1, 5),
        (9, 2, 6),
        (10, 5, 8),
        (10, 1, 6),
        (3, 1, 2),
        (2, 1, 2),
        (1, 1, 1),
        (1, 0, 1),
    ],
)
def test_at_most_half_of_the_tokens_after_the_prefix_merge(n_tokens, n_prefix, kept):
    assert Schedule.parse("tome", r=n_tokens, depth=1, n_tokens=n_tokens, n_prefix=n_prefix).n_final == kept


def test_a_block_with_r_0_has_no_step():
    schedule = Schedule.parse("tome", r=[5, 0, 3], **DEIT)
    assert [(s.block, s.n_in, s.n_out) for s in schedule.steps] == [(0, 197, 192), (2, 192, 189)]
    assert schedule.tokens_per_block()[:4] == [(197, 192), (192, 192), (192, 189), (189, 189)]


def test_without_a_method_nothing_is_reduced():
    schedule = Schedule.parse(method="none", **DEIT)
    assert schedule.steps == () and schedule.n_final == 197
    with pytest.raises(UsageError, match="^r goes with method tome, tofu, dtem, not with none"):
        Schedule.parse("none", r=0, **DEIT)


@pytest.mark.parametrize(
    "r, said",
    [
        (-1, "negative"),
        ("-3", "negative"),
        ([8, -1], "negative"),
        ((-2, 1.0), "negative"),
        ("-2:-1", "negative"),
        ("", "not a token count"),
        ("many", "not a token count"),
        ("8,,4", "not a token count"),
        ("8:", "not a token count"),
        ("8:1:2", "not a token count"),
        ("1.5", "not a token count"),
        ("8,4.5", "not a token count"),
        ("1e1", "not a token count"),
        ("8:1.5", "outside"),
        ((8, -1.01), "outside"),
        ("8:nan", "outside"),
        ("8:inf", "outside"),
        ([8.0], "whole numbers"),
        ([True], "whole numbers"),
        ([1] * 13, "at most one a block"),
        (198, "the model has 197"),
        ("198,0", "block 0"),
        ([0, 500], "block 1"),
    ],
)
def test_what_is_no_r_is_refused_in_words(r, said):
    with pytest.raises(UsageError, match=said):
        Schedule.parse("tome", r=r, **DEIT)


@pytest.mark.parametrize("r", [13.5, True, None, (8, 0.0, 1), (8, "x"), float("nan")], ids=repr)
def test_a_python_value_that_is_no_r_is_refused_too(r):
    with pytest.raises(UsageError):
        Schedule.parse("tome", r=r, **DEIT)


def test_an_unknown_method_is_refused():
    with pytest.raises(UsageError, match="unknown method 'merge'.*none, tome"):
        Schedule.parse("merge", r=8, **DEIT)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.parse("tome", r=25, **DEIT),
        Schedule.parse("tome", r="8:-1", prop_attn=False, **DEIT),
        Schedule.parse(method="none", **DEIT),
    ],
    ids=["cut", "inflection", "none"],
)
def test_a_schedule_survives_json(schedule):
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


def test_json_that_was_changed_gives_another_schedule():
    data = Schedule.parse("tome", r=8, **DEIT).to_json()
    data["options"]["prop_attn"] = False
    assert Schedule.from_json(data) != Schedule.parse("tome", r=8, **DEIT)


@pytest.mark.parametrize(
    "change", [{"steps": None}, {"extra": 1}, {"steps": [{"block": 0}]}, {"notes": None}, {"steps": "x"}], ids=repr
)
def test_json_that_is_no_schedule_is_refused(change):
    with pytest.raises(UsageError, match="not a schedule"):
        Schedule.from_json({**Schedule.parse("tome", r=8, **DEIT).to_json(), **change})


@pytest.mark.parametrize("field", ["method", "n_tokens", "depth", "steps", "notes"])
def test_json_without_a_field_is_refused(field):
    data = Schedule.parse("tome", r=8, **DEIT).to_json()
    del data[field]
    with pytest.raises(UsageError, match=field):
        Schedule.from_json(data)


@pytest.mark.parametrize(
    "values, said",
    [
        (("inside", 9, 8, 8), "wanted post_attn or pre_block"),
        (("post_attn", 9, 0, 0), "cannot go"),
        (("post_attn", 9, 10, 10), "cannot go"),
        (("post_attn", 9, 8, 7), "cannot go"),
        (("post_attn", 9, 8, 10), "cannot go"),
    ],
)
def test_a_step_that_cannot_be_is_refused(values, said):
    with pytest.raises(UsageError, match=said):
        Step(0, *values)


@pytest.mark.parametrize(
    "steps, said",
    [
        ([(2, 9, 8)], "model with 2 blocks"),
        ([(-1, 9, 8)], "block -1"),
        ([(0, 8, 7)], "expects 8 tokens and gets 9"),
        ([(0, 9, 8), (1, 9, 8)], "expects 9 tokens and gets 8"),
        ([(1, 9, 8), (0, 8, 7)], "out of order"),
        ([(0, 9, 8), (0, 8, 7)], "block 0 has two steps; wanted one a block"),
    ],
)
def test_steps_that_do_not_follow_each_other_are_refused(steps, said):
    with pytest.raises(UsageError, match=said):
        Schedule("tome", 9, 1, 2, steps=tuple(Step(b, "post_attn", n, k, k) for b, n, k in steps))
