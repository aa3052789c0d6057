"""Counts: the authors' numbers, what each method does with a token that does not stay, and every refusal."""

import json
from pathlib import Path

import pytest
from tokexport.export.reducers import diffrate, dynamicvit, evit
from tokexport.export.reducers.options import parse_at, parse_rates
from tokexport.export.step import ModelSize

from tokexport import Schedule, UsageError

UNITS = json.loads((Path(__file__).parents[1] / "golden" / "units.json").read_text())
GOLDEN_AT = [1, 3, 4]  # of the golden cases: 65 tokens, 1 prefix token, 6 blocks
PRUNE, MERGE = [65, 60, 50, 42, 34, 20], [65, 55, 46, 38, 30, 12]


def evit_counts(rates, at, n_tokens, n_prefix=1, *, fuse=True, squeeze=False):
    """Steps and notes of EViT, or of eTPS with squeeze."""
    asked = {"keep_rate": rates, "at": at, "score": "class", "fuse": fuse}
    how = {"fold": True, "extra": False} if squeeze else {"fold": fuse, "extra": fuse}
    counts = evit.stage_counts(asked, ModelSize(n_tokens, n_prefix, 12), **how)
    return counts.steps, counts.notes


def tps_counts(rates, at, n_tokens, n_prefix=1, *, squeeze=False):
    """Steps and notes of DynamicViT, or of dTPS with squeeze."""
    counts = dynamicvit.stage_counts({"keep_rate": rates, "at": at}, ModelSize(n_tokens, n_prefix, 12), squeeze=squeeze)
    return counts.steps, counts.notes


def diffrate_counts(prune, merge, n_tokens, n_prefix, depth=None):
    return diffrate.block_counts(prune, merge, size=ModelSize(n_tokens, n_prefix, depth or len(prune)))


def after_blocks(steps, n_tokens=65, n_prefix=1, depth=6):
    """Tokens after each block; the schedule checks that the steps follow each other."""
    schedule = Schedule("evit", n_tokens, n_prefix, depth, steps=tuple(steps), n_layers=3)
    return [m for _, m in schedule.tokens_per_block()]


def numbers(steps):
    return [(s.block, s.n_in, s.n_kept, s.n_out, s.n_folded) for s in steps]


@pytest.mark.parametrize("case", UNITS["evit_left_tokens"], ids=lambda c: f"{c['keep_rate']}-{c['n']}")
@pytest.mark.parametrize("n_prefix", [1, 2])
def test_evit_keeps_as_many_as_the_authors_code(case, n_prefix):
    steps, notes = evit_counts([case["keep_rate"]], [0], case["n"] + n_prefix, n_prefix, fuse=False)
    assert [s.n_kept - n_prefix for s in steps] == [case["left"]] and notes == []


@pytest.mark.parametrize("case", UNITS["tps_keep"], ids=lambda c: f"{c['keep_ratio']}-{c['init_n']}")
def test_tps_keeps_as_many_as_the_authors_code(case):
    n, stages = case["init_n"], len(case["keep"])
    steps, notes = tps_counts(case["keep_ratio"], list(range(stages)), n + 1)
    assert [s.n_out - 1 for s in steps] == case["keep"] and notes == []
    as_list = [case["keep_ratio"] ** (s + 1) for s in range(stages)]
    assert tps_counts(as_list, list(range(stages)), n + 1)[0] == steps


@pytest.mark.parametrize(
    "make, tokens",
    [
        (lambda at: evit_counts(0.7, at, 65), [65, 47, 47, 35, 26, 26]),
        (lambda at: evit_counts(0.7, at, 65, squeeze=True), [65, 46, 46, 33, 24, 24]),
        (lambda at: tps_counts(0.7, at, 65, squeeze=True), [65, 45, 45, 32, 22, 22]),
        (lambda at: tps_counts(0.7, at, 65), [65, 45, 45, 32, 22, 22]),
        (lambda at: diffrate_counts(PRUNE, MERGE, 65, 1), [65, 55, 46, 38, 30, 12]),
    ],
    ids=["evit", "etps", "dtps", "dynamicvit", "diffrate"],
)
def test_tokens_after_each_block_are_those_of_the_golden_cases(make, tokens):
    assert after_blocks(make(GOLDEN_AT)[0]) == tokens


def test_a_rate_of_1_is_as_good_as_no_stage():
    """The authors' EViT code takes a rate for every block, 1 where nothing happens."""
    steps, notes = evit_counts([1.0, 0.7, 1.0, 0.7, 0.7, 1.0], list(range(6)), 65)
    assert steps == evit_counts([0.7] * 3, GOLDEN_AT, 65)[0]
    assert notes == [f"stage {s} (block {b}) keeps every token" for s, b in ((1, 0), (3, 2), (6, 5))]


def test_what_does_not_stay_is_fused_dropped_or_squeezed():
    rates, at = [0.5], [2]
    assert numbers(evit_counts(rates, at, 11)[0]) == [(2, 11, 6, 7, 5)]
    assert numbers(evit_counts(rates, at, 11, fuse=False)[0]) == [(2, 11, 6, 6, 0)]
    assert numbers(evit_counts(rates, at, 11, squeeze=True)[0]) == [(2, 11, 6, 6, 5)]
    assert numbers(tps_counts(rates, at, 11, squeeze=True)[0]) == [(2, 11, 6, 6, 5)]
    assert numbers(tps_counts(rates, at, 11)[0]) == [(2, 11, 6, 6, 0)]
    assert [(s.site, s.signal, s.layer) for s in evit_counts(rates, at, 11)[0]] == [
        ("post_attn", "class_attention", None)
    ]
    assert [(s.site, s.signal, s.layer) for s in tps_counts(rates, at, 11)[0]] == [("pre_block", "score_head", 0)]


def test_a_fused_token_competes_in_later_blocks():
    steps, _ = evit_counts([0.5, 0.5], [0, 1], 11)
    assert numbers(steps) == [(0, 11, 6, 7, 5), (1, 7, 4, 5, 3)], "six others: five kept and the fused one"


def test_a_single_fused_token_is_said():
    steps, notes = evit_counts([0.7], [2], 4, fuse=False)
    assert (steps, notes) == ([], ["stage 1 (block 2) keeps every token"])
    steps, notes = evit_counts([0.6], [2], 4)
    assert numbers(steps) == [(2, 4, 3, 4, 1)] and "fuses a single token" in notes[0]


def test_prefix_tokens_are_no_others():
    assert numbers(evit_counts([0.5], [0], 15, 5, squeeze=True)[0]) == [(0, 15, 10, 10, 5)]
    assert numbers(tps_counts([0.5], [0], 15, 5, squeeze=True)[0]) == [(0, 15, 10, 10, 5)]


def test_a_list_of_tps_rates_is_of_the_original_patches():
    steps, notes = tps_counts([0.7, 0.7, 0.5], [3, 6, 9], 197, squeeze=True)
    assert [(s.block, s.n_out) for s in steps] == [(3, 138), (9, 99)] and notes == [
        "stage 2 (block 6) keeps every token"
    ]


@pytest.mark.parametrize(
    "rates, said",
    [
        ([0.5, 0.7], "stage 2 .block 6. keeps 137 patches, only 98.*must not grow"),
        (0.001, "stage 1 .block 3. keeps no patch, 0.001 of 196"),
        (0.05, "stage 2 .block 6. keeps no patch"),
        (1e-300, "keeps no patch"),
        ([0.5, 0.001], "stage 2 .block 6. keeps no patch"),
    ],
)
def test_impossible_tps_rates_are_refused(rates, said):
    with pytest.raises(UsageError, match=f"keep_rate: .*{said}"):
        tps_counts(rates, [3, 6], 197, squeeze=True)


@pytest.mark.parametrize(
    "said, values",
    [
        ("0.7", [0.7] * 3),
        ("0.7,0.6,0.5", [0.7, 0.6, 0.5]),
        (" .7 , 1, 5e-1", [0.7, 1.0, 0.5]),
        ("1.", [1.0] * 3),
        (0.7, [0.7] * 3),
        (1, [1.0] * 3),
        ([0.7, 0.6, 0.5], [0.7, 0.6, 0.5]),
        ((0.7,), [0.7] * 3),
    ],
    ids=repr,
)
def test_rates_in_every_form(said, values):
    got = parse_rates(said, 3)
    assert got == values and all(isinstance(v, float) for v in got)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "x",
        "0",
        "-0.5",
        "1.01",
        "nan",
        "inf",
        "1e-400",
        "1e400",
        "0.7,",
        "0.7,,0.5",
        "0_1",
        "0.7;0.6",
        "１",
        "0x1",
        "1" * 5000,
        0,
        -1,
        2,
        0.0,
        float("nan"),
        float("inf"),
        True,
        None,
        [],
        [0.7, True, 0.5],
        [0.7, "0.6", 0.5],
        {"a": 1},
        [[0.7]],
        10**5000,
        b"0.7",
    ],
    ids=range(31),
)
def test_what_is_no_rate_is_refused(said):
    with pytest.raises(UsageError, match="keep_rate .*wanted a number above 0 and at most 1") as e:
        parse_rates(said, 3)
    assert len(str(e.value)) < 250


@pytest.mark.parametrize("said, n_stages", [("0.7,0.6", 3), ([0.7] * 4, 3), ("0.7,0.6", 1)])
def test_rates_are_one_or_one_a_stage(said, n_stages):
    with pytest.raises(UsageError, match=f"keep_rate .*values for {n_stages} stage"):
        parse_rates(said, n_stages)


@pytest.mark.parametrize(
    "said, values", [("3,6,9", [3, 6, 9]), (" 0 , 11", [0, 11]), ("5", [5]), ([3, 6], [3, 6]), ((1,), [1])], ids=repr
)
def test_blocks_in_every_form(said, values):
    assert parse_at(said, 12) == values


@pytest.mark.parametrize(
    "said, words",
    [
        ("", "block numbers"),
        ("x", "block numbers"),
        ("3,", "block numbers"),
        ("1.0", "block numbers"),
        ("-1", "block numbers"),
        ("1_0", "block numbers"),
        ("１", "block numbers"),
        ("9" * 5000, "block numbers"),
        ([], "block numbers"),
        (3, "block numbers"),
        (None, "block numbers"),
        ([True], "block numbers"),
        ([3.0], "block numbers"),
        (["3"], "block numbers"),
        ("12", "no block 12, the model has 12 .0 to 11."),
        ([-1], "no block -1"),
        ([10**5000], "no block"),
        ("3,3", "ascending"),
        ("6,3", "ascending"),
        ([9, 3], "ascending"),
    ],
    ids=range(20),
)
def test_what_is_no_block_is_refused(said, words):
    with pytest.raises(UsageError, match=f"at .*{words}") as e:
        parse_at(said, 12)
    assert len(str(e.value)) < 250


def test_diffrate_prunes_then_merges():
    steps, notes = diffrate_counts(PRUNE, MERGE, 65, 1)
    assert numbers(steps) == [
        (1, 65, 55, 55, 5),
        (2, 55, 46, 46, 4),
        (3, 46, 38, 38, 4),
        (4, 38, 30, 30, 4),
        (5, 30, 12, 12, 8),
    ]
    assert notes == ["every token stays in block 0"]


def test_diffrate_sorts_in_the_last_block_even_when_nothing_goes():
    steps, notes = diffrate_counts([9, 5, 5, 5], [9, 5, 5, 5], 9, 1)
    assert numbers(steps) == [(1, 9, 5, 5, 0), (3, 5, 5, 5, 0)] and notes == ["every token stays in block 0, 2, 3"]


def test_diffrate_counts_that_grow_are_cut_and_said():
    steps, notes = diffrate_counts([8, 9, 4], [6, 8, 5], 9, 1)
    assert numbers(steps) == [(0, 9, 6, 6, 2), (2, 6, 4, 4, 0)]
    assert notes == [
        "every token stays in block 1",
        "prune_kept was cut to the tokens there are in block 1 (9 to 6)",
        "merge_kept was cut to the tokens left after pruning in block 1 (8 to 6), 2 (5 to 4)",
    ]


@pytest.mark.parametrize(
    "prune, merge, n_prefix, said",
    [
        ([5, 5], [5], 1, "2 counts in prune_kept, 1 in merge_kept"),
        ([5], [5], 1, "1 counts for a model with 2 blocks"),
        ([5, 5, 5], [5, 5, 5], 1, "3 counts for a model"),
        ([], [], 1, "wanted a list"),
        (5, [5], 1, "wanted a list"),
        ("55", "55", 1, "wanted a list"),
        ([5, True], [5, 5], 1, "prune_kept has True for block 1"),
        ([5, 5], [5.0, 5], 1, "merge_kept has 5.0 for block 0"),
        ([5, 0], [5, 5], 1, "has 0 for block 1"),
        ([5, -1], [5, 5], 0, "has -1 for block 1"),
        ([5, 10**5000], [5, 5], 1, "for block 1"),
        ([5, 5], [5, 1], 2, "block 1 keeps 1 tokens.*no room for the class token"),
        ([5, 1], [5, 5], 2, "no room for the class token"),
        ([5, 5], [5, 1], 1, "block 1 merges 4 tokens.*wanted merge_kept 2 or more"),
        ([5, 5], [2, 5], 2, "merge_kept 3 or more"),
    ],
    ids=range(15),
)
def test_impossible_diffrate_counts_are_refused(prune, merge, n_prefix, said):
    with pytest.raises(UsageError, match=f"rates: .*{said}"):
        diffrate_counts(prune, merge, 9, n_prefix, depth=2)


def test_diffrate_may_prune_down_to_the_class_token():
    assert numbers(diffrate_counts([5, 1], [5, 1], 9, 1)[0]) == [(0, 9, 5, 5, 0), (1, 5, 1, 1, 0)]
    assert numbers(diffrate_counts([1], [1], 9, 0)[0]) == [(0, 9, 1, 1, 0)]
