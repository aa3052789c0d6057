"""Counts: the authors' numbers, what each method does with a token that does not stay, and every refusal."""

import json
from pathlib import Path

import pytest

from tokexport import Schedule, UsageError
from tokexport.export import counts

UNITS = json.loads((Path(__file__).parents[1] / "golden" / "units.json").read_text())
GOLDEN_AT = [1, 3, 4]  # of the golden cases: 65 tokens, 1 prefix token, 6 blocks
PRUNE, MERGE = [65, 60, 50, 42, 34, 20], [65, 55, 46, 38, 30, 12]


def after_blocks(steps, n_tokens=65, n_prefix=1, depth=6):
    """Tokens after each block; the schedule checks that the steps follow each other."""
    return [m for _, m in Schedule("any", n_tokens, n_prefix, depth, steps=steps).tokens_per_block()]


def numbers(steps):
    return [(s.block, s.n_in, s.n_kept, s.n_out, s.n_folded) for s in steps]


@pytest.mark.parametrize("case", UNITS["evit_left_tokens"], ids=lambda c: f"{c['keep_rate']}-{c['n']}")
@pytest.mark.parametrize("n_prefix", [1, 2])
def test_evit_keeps_as_many_as_the_authors_code(case, n_prefix):
    steps, notes = counts.evit([case["keep_rate"]], [0], case["n"] + n_prefix, n_prefix, fuse=False)
    assert [s.n_kept - n_prefix for s in steps] == [case["left"]] and notes == []


@pytest.mark.parametrize("case", UNITS["tps_keep"], ids=lambda c: f"{c['keep_ratio']}-{c['init_n']}")
def test_tps_keeps_as_many_as_the_authors_code(case):
    n, stages = case["init_n"], len(case["keep"])
    steps, notes = counts.tps(
        [case["keep_ratio"]] * stages, list(range(stages)), n + 1, 1, cumulative=False, squeeze=False
    )
    assert [s.n_out - 1 for s in steps] == case["keep"] and notes == []
    as_list = [case["keep_ratio"] ** (s + 1) for s in range(stages)]
    assert counts.tps(as_list, list(range(stages)), n + 1, 1, cumulative=True, squeeze=False)[0] == steps


@pytest.mark.parametrize(
    "make, tokens",
    [
        (lambda r, at: counts.evit(r, at, 65, 1, True), [65, 47, 47, 35, 26, 26]),
        (lambda r, at: counts.etps(r, at, 65, 1), [65, 46, 46, 33, 24, 24]),
        (lambda r, at: counts.tps(r, at, 65, 1, False, True), [65, 45, 45, 32, 22, 22]),
        (lambda r, at: counts.tps(r, at, 65, 1, False, False), [65, 45, 45, 32, 22, 22]),
        (lambda r, at: counts.diffrate(PRUNE, MERGE, 65, 1), [65, 55, 46, 38, 30, 12]),
    ],
    ids=["evit", "etps", "dtps", "dynamicvit", "diffrate"],
)
def test_tokens_after_each_block_are_those_of_the_golden_cases(make, tokens):
    assert after_blocks(make([0.7] * 3, GOLDEN_AT)[0]) == tokens


def test_a_rate_of_1_is_as_good_as_no_stage():
    """The authors' EViT code takes a rate for every block, 1 where nothing happens."""
    steps, notes = counts.evit([1.0, 0.7, 1.0, 0.7, 0.7, 1.0], list(range(6)), 65, 1, True)
    assert steps == counts.evit([0.7] * 3, GOLDEN_AT, 65, 1, True)[0]
    assert notes == [f"stage {s} (block {b}) keeps every token" for s, b in ((1, 0), (3, 2), (6, 5))]


def test_what_does_not_stay_is_fused_dropped_or_squeezed():
    rates, at = [0.5], [2]
    assert numbers(counts.evit(rates, at, 11, 1, True)[0]) == [(2, 11, 6, 7, 5)]
    assert numbers(counts.evit(rates, at, 11, 1, False)[0]) == [(2, 11, 6, 6, 0)]
    assert numbers(counts.etps(rates, at, 11, 1)[0]) == [(2, 11, 6, 6, 5)]
    assert numbers(counts.tps(rates, at, 11, 1, False, True)[0]) == [(2, 11, 6, 6, 5)]
    assert numbers(counts.tps(rates, at, 11, 1, False, False)[0]) == [(2, 11, 6, 6, 0)]
    assert (
        {s.site for s in counts.evit(rates, at, 11, 1, True)[0]}
        == {"post_attn"}
        == {s.site for s in counts.etps(rates, at, 11, 1)[0]}
    )
    assert {s.site for s in counts.tps(rates, at, 11, 1, False, True)[0]} == {"pre_block"}


def test_a_fused_token_competes_in_later_blocks():
    steps, _ = counts.evit([0.5, 0.5], [0, 1], 11, 1, True)
    assert numbers(steps) == [(0, 11, 6, 7, 5), (1, 7, 4, 5, 3)], "six others: five kept and the fused one"


def test_a_single_fused_token_is_said():
    steps, notes = counts.evit([0.7], [2], 4, 1, False)
    assert (steps, notes) == ((), ["stage 1 (block 2) keeps every token"])
    steps, notes = counts.evit([0.6], [2], 4, 1, True)
    assert numbers(steps) == [(2, 4, 3, 4, 1)] and "fuses a single token" in notes[0]


def test_prefix_tokens_are_no_others():
    assert numbers(counts.etps([0.5], [0], 15, 5)[0]) == [(0, 15, 10, 10, 5)]
    assert numbers(counts.tps([0.5], [0], 15, 5, False, True)[0]) == [(0, 15, 10, 10, 5)]


def test_a_list_of_tps_rates_is_of_the_original_patches():
    steps, notes = counts.tps([0.7, 0.7, 0.5], [3, 6, 9], 197, 1, cumulative=True, squeeze=True)
    assert [(s.block, s.n_out) for s in steps] == [(3, 138), (9, 99)] and notes == [
        "stage 2 (block 6) keeps every token"
    ]


@pytest.mark.parametrize(
    "rates, cumulative, said",
    [
        ([0.5, 0.7], True, "stage 2 .block 6. keeps 137 patches, only 98.*must not grow"),
        ([0.001, 0.001], False, "stage 1 .block 3. keeps no patch, 0.001 of 196"),
        ([0.05, 0.05], False, "stage 2 .block 6. keeps no patch"),
        ([1e-300, 1e-300], False, "keeps no patch"),
        ([0.5, 0.001], True, "stage 2 .block 6. keeps no patch"),
    ],
)
def test_impossible_tps_rates_are_refused(rates, cumulative, said):
    with pytest.raises(UsageError, match=f"--keep-rate: .*{said}"):
        counts.tps(rates, [3, 6], 197, 1, cumulative, True)


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
    got = counts.parse_rates(said, 3)
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
    with pytest.raises(UsageError, match="--keep-rate .*wanted a number above 0 and at most 1") as e:
        counts.parse_rates(said, 3)
    assert len(str(e.value)) < 250


@pytest.mark.parametrize("said, n_stages", [("0.7,0.6", 3), ([0.7] * 4, 3), ("0.7,0.6", 1)])
def test_rates_are_one_or_one_a_stage(said, n_stages):
    with pytest.raises(UsageError, match=f"--keep-rate .*values for {n_stages} stage"):
        counts.parse_rates(said, n_stages)


@pytest.mark.parametrize(
    "said, values", [("3,6,9", [3, 6, 9]), (" 0 , 11", [0, 11]), ("5", [5]), ([3, 6], [3, 6]), ((1,), [1])], ids=repr
)
def test_blocks_in_every_form(said, values):
    assert counts.parse_at(said, 12) == values


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
    with pytest.raises(UsageError, match=f"--at .*{words}") as e:
        counts.parse_at(said, 12)
    assert len(str(e.value)) < 250


def test_diffrate_prunes_then_merges():
    steps, notes = counts.diffrate(PRUNE, MERGE, 65, 1)
    assert numbers(steps) == [
        (1, 65, 55, 55, 5),
        (2, 55, 46, 46, 4),
        (3, 46, 38, 38, 4),
        (4, 38, 30, 30, 4),
        (5, 30, 12, 12, 8),
    ]
    assert notes == ["every token stays in block 0"]


def test_diffrate_sorts_in_the_last_block_even_when_nothing_goes():
    steps, notes = counts.diffrate([9, 5, 5, 5], [9, 5, 5, 5], 9, 1)
    assert numbers(steps) == [(1, 9, 5, 5, 0), (3, 5, 5, 5, 0)] and notes == ["every token stays in block 0, 2, 3"]


def test_diffrate_counts_that_grow_are_cut_and_said():
    steps, notes = counts.diffrate([8, 9, 4], [6, 8, 5], 9, 1)
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
    with pytest.raises(UsageError, match=f"--rates: .*{said}"):
        counts.diffrate(prune, merge, 9, n_prefix, depth=2)


def test_diffrate_may_prune_down_to_the_class_token():
    assert numbers(counts.diffrate([5, 1], [5, 1], 9, 1)[0]) == [(0, 9, 5, 5, 0), (1, 5, 1, 1, 0)]
    assert numbers(counts.diffrate([1], [1], 9, 0)[0]) == [(0, 9, 1, 1, 0)]
