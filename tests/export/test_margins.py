"""A margin is what it says: a score that moves by a little more decides the token otherwise, by a little less it does not."""

from dataclasses import replace

import pytest
import torch
from tokexport.export import reducers
from tokexport.export.models.learned_layers import learned_layers
from tokexport.export.reducers import matching

from tokexport import reduce_model


def observed(loaded, schedule, image, monkeypatch):
    """(signals, step, plan, margins) of every step of the reference."""
    reducer, asked = reducers.get(schedule.method), []
    own = reducer.regret
    watched = replace(reducer, regret=lambda s, step, plan: asked.append((s, step, plan)) or own(s, step, plan))
    monkeypatch.setitem(reducers.TABLE, schedule.method, watched)
    reference = reduce_model(loaded.module, schedule, learned_layers(loaded, schedule))
    plans = reference.run(image).plans
    margins = reference.run(image, replay=plans, margins=True).margins
    return [(*rest, m) for rest, m in zip(asked, margins, strict=True) if rest[1].n_in > 1]


def fates(plan, n):
    """0 stays, 1 folded, 2 dropped: [n] of the first image."""
    fate = torch.full((n,), 2)
    fate[plan.keep[0, :, 0]] = 0
    if plan.src is not None:
        fate[plan.src[0, :, 0]] = 1
    return fate


def moved(reducer, signals, step, row, by, monkeypatch):
    """The plan when the score of one row moves: of keys its similarity to every host."""
    if signals.metric is None:
        score, lifted = signals.score.clone(), signals.score[0, row, 0]
        log = step.signal != "score_head"
        score[0, row, 0] = (lifted.log() + by).exp() if log else lifted + by
        return reducer.reference(replace(signals, score=score), step)
    a, b, scores = matching.similarities(signals, step.n_in)
    scores = scores.clone()
    scores[0, (a == row).nonzero()[0, 0]] += by
    with monkeypatch.context() as patch:
        patch.setattr(matching, "similarities", lambda *_: (a, b, scores))
        return reducer.reference(signals, step)


def test_a_margin_is_what_a_score_must_move(tiny, schedule_of, options, golden, monkeypatch):
    loaded = tiny("tiny_vit")
    schedule = schedule_of(
        loaded.module, **{k: v for k, v in options.items() if k != "method"}, method=options["method"]
    )
    reducer = reducers.get(schedule.method)
    if schedule.method == "pitome":
        pytest.skip("it ranks by energies: see test_pitome.py")
    judged = 0
    for signals, step, plan, margins in (
        observed(loaded, schedule, golden.image[:1], monkeypatch) if schedule.steps else ()
    ):
        fate, before = margins.fate[0], fates(plan, step.n_in)
        assert fate.min() >= 0 and not fate.isnan().any() and not margins.host.isnan().any()
        for row in torch.arange(step.n_in)[(fate > 1e-4) & (fate < 100)].tolist()[::7]:
            for share, changes in ((1.02, True), (0.98, False)):
                after = [
                    fates(moved(reducer, signals, step, row, sign * share * float(fate[row]), monkeypatch), step.n_in)[
                        row
                    ]
                    for sign in (1, -1)
                ]
                assert any(a != before[row] for a in after) == changes, (step, row, share)
            judged += 1
        if plan.dst is not None and not plan.n_extra:
            assert ((margins.host[0] < 10) == (before == 1)).all() or step.n_kept <= signals.n_prefix + 1
    assert judged or not schedule.steps


def test_a_host_margin_leads_the_second_best(tiny, schedule_of, golden, monkeypatch):
    loaded = tiny("tiny_vit")
    signals, step, plan, margins = observed(loaded, schedule_of(loaded.module, 8), golden.image[:1], monkeypatch)[0]
    a, b, scores = matching.similarities(signals, step.n_in)
    for row in plan.src[0, :, 0].tolist():
        first, second = scores[0, (a == row).nonzero()[0, 0]].sort(descending=True).values[:2]
        assert torch.isclose(margins.host[0, row], first - second)


def test_the_place_counts_where_order_decides(tiny, schedule_of, golden, monkeypatch):
    """Without a class token ToMe leaves its tokens in order of similarity, by which the next block partitions them."""
    loaded = tiny("tiny_vit_nocls")
    signals, step, plan, margins = observed(loaded, schedule_of(loaded.module, 8), golden.image[:1], monkeypatch)[0]
    a, _, scores = matching.similarities(signals, step.n_in)
    left = plan.keep[0, : step.n_kept - step.n_in // 2, 0]
    values = scores[0].amax(-1)[left // 2]
    assert torch.allclose(
        margins.fate[0, left[3]], torch.minimum(values[2] - values[3], values[3] - values[4]), atol=1e-6
    )
