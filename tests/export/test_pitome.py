"""PiToMe beyond the golden cases: counts as published, its options, and that a margin is what a score must move."""

from dataclasses import replace

import pytest
import torch
from tokexport.export.reducers import pitome

from tokexport import Schedule, UsageError, reduce_model

DEIT = {"depth": 12, "n_tokens": 197, "n_prefix": 1}


def merged(**options):
    return [s.n_in - s.n_out for s in Schedule.parse("pitome", **DEIT, **options).steps]


def test_what_merges_is_the_published_count():
    assert merged(keep_rate=0.95) == [9, 9, 8, 8, 8, 7, 7, 7, 6, 6, 6, 5]
    twenty = Schedule.parse("pitome", depth=1, n_tokens=21, n_prefix=1, keep_rate=0.9)
    assert twenty.steps[0].n_out == 19, "floor(20 - 20 * 0.9) is 2 in float64; 20 * (1 - 0.9) would give 1"


def test_a_rate_of_1_leaves_a_block_alone():
    schedule = Schedule.parse("pitome", **DEIT, keep_rate=[1.0] * 11 + [0.9])
    assert [s.block for s in schedule.steps] == [11] and schedule.notes == ()


def test_what_merges_is_cut_to_half_and_said():
    schedule = Schedule.parse("pitome", depth=2, n_tokens=8, n_prefix=1, keep_rate=0.1, forms="first")
    assert [(s.n_in, s.n_out) for s in schedule.steps] == [(8, 4), (4, 3)], (
        "four of seven in the first form, one of three"
    )
    assert schedule.notes == ("what merges was cut to half of the tokens in block 0 (6 to 4), 1 (2 to 1)",)


@pytest.mark.parametrize(
    "forms, blocks",
    [
        ("first", [0, 1, 2]),
        ("last", [3, 4]),
        ("all", [0, 1, 2, 3, 4]),
        ("none", []),
        ("0,4", [0, 4]),
        ([], []),
        ([2], [2]),
    ],
    ids=str,
)
def test_the_blocks_of_the_first_form(forms, blocks):
    assert pitome.parse_forms(forms, 5) == blocks
    schedule = Schedule.parse("pitome", depth=5, n_tokens=65, keep_rate=0.9, forms=forms)
    assert [s.block for s in schedule.steps if s.settings["form"] == pitome.ALL_RANKS] == blocks


@pytest.mark.parametrize("forms", ["half", "0,0", "5", [1.5], None, 3])
def test_what_is_no_form_is_refused(forms):
    with pytest.raises(UsageError, match="^forms .*or first, last, all, none"):
        pitome.parse_forms(forms, 5)


@pytest.mark.parametrize(
    "margin, numbers",
    [("0.75", [0.75, 0.75]), ("0.75:0.4", [0.75, 0.4]), (0.9, [0.9, 0.9]), ([0.5, 0.0], [0.5, 0.0])],
    ids=str,
)
def test_a_margin_falls_over_the_blocks(margin, numbers):
    assert pitome.parse_margin(margin) == numbers
    steps = Schedule.parse("pitome", depth=4, n_tokens=65, keep_rate=0.9, margin=margin).steps
    assert [s.settings["margin"] for s in steps] == [numbers[0] - numbers[1] * i / 4 for i in range(4)]


@pytest.mark.parametrize("margin", ["", "a", "1:2:3", "nan", "0.7,0.4", [], [1, 2, 3], None, 5, "1e9"])
def test_what_is_no_margin_is_refused(margin):
    with pytest.raises(UsageError, match="^margin .*wanted"):
        pitome.parse_margin(margin)


def test_a_schedule_survives_json_with_its_settings():
    schedule = Schedule.parse("pitome", **DEIT, forms="last", margin="0.9:0.3")
    assert Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize("forms", ["all", "none"])
def test_an_energy_that_moves_past_its_margin_changes_the_plan(forms, tiny, golden, monkeypatch):
    """Margins of ranks are gaps of energies, as shares of their range."""
    loaded = tiny("tiny_vit")
    schedule = loaded.schedule("pitome", keep_rate=[0.8] + [1.0] * 5, forms=forms)
    seen, own = [], pitome.energies
    monkeypatch.setattr(pitome, "energies", lambda s, step: seen.append((s, own(s, step))) or seen[-1][1])
    reduce_model(loaded.module, schedule).run(golden.image[:1])
    (signals, (energy, cosine)), step = seen[0], schedule.steps[0]
    plan = pitome.reference(signals, step)
    fate = pitome.margins(signals, step, plan).fate[0, 1:]
    spread = float(energy.amax() - energy.amin())
    same = lambda other: torch.equal(other.keep, plan.keep) and torch.equal(other.src.sort(1)[0], plan.src.sort(1)[0])
    changed = 0
    for row in range(0, energy.shape[1], 5):
        for share, expected in ((1.02, False), (0.98, True)):
            outcomes = []
            for sign in (1, -1):
                moved = energy.clone()
                moved[0, row] += sign * share * float(fate[row]) * spread
                monkeypatch.setattr(pitome, "energies", lambda s, step, moved=moved: (moved, cosine))
                outcomes.append(same(pitome.reference(signals, step)))
            assert all(outcomes) or not expected, row
            changed += not all(outcomes)
    assert changed >= 5, "past their margins, most rows change the plan"


def test_a_plan_out_of_place_is_no_near_tie(tiny, golden):
    loaded = tiny("tiny_vit")
    schedule = loaded.schedule("pitome", keep_rate=0.9)
    reference = reduce_model(loaded.module, schedule)
    plans = reference.run(golden.image).plans
    prefix_merged = replace(plans[0], src=torch.zeros_like(plans[0].src))
    host_is_no_host = replace(plans[0], dst=torch.zeros_like(plans[0].dst))
    for wrong in (prefix_merged, host_is_no_host):
        assert (reference.run(golden.image, replay=[wrong, *plans[1:]]).regrets[0] == torch.inf).all()
