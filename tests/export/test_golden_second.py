"""PiToMe, ToFu and DTEM: numbers and decisions of published code, from the reference, the static plans and the exported graphs.

Positions in the data are rows of the sequence that entered the block. Numbers are compared on robust images only.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokexport.export import reducers
from tokexport.export.graph.static_vit import StaticViT
from tokexport.export.models.learned_layers import learned_layers
from tokexport.export.outputs import WITH_SOURCES
from tokexport.export.plan import Signals
from tokexport.export.reducers import pitome
from tokexport.export.step import Step

from tokexport import load_model, reduce_model

from .. import cases

FOLDER = Path(__file__).parents[1] / "golden" / "second"
CASES = {p.stem: json.loads(p.read_text()) for p in sorted(FOLDER.glob("*.json"))}
TOLERANCE = 2e-4


def asked(case):
    """The options of a case, as `schedule` takes them."""
    params, method = case["params"], case["method"]
    if method == "pitome":
        forms = [i for i, first in enumerate(params["bsm_per_layer"]) if first]
        return {"keep_rate": params["ratio_per_layer"], "forms": forms}
    options = {"r": params["r"]}
    return options | ({"norm": params.get("norm", "code")} if method == "tofu" else {})


@pytest.fixture(scope="module")
def computed(golden):
    """computed(name) -> (case, arrays, robust images, loaded, schedule, layers, ReferenceResult), once."""
    made = {}

    def run(name):
        if name not in made:
            case = CASES[name]
            model, kwargs = cases.TINY[case["model"]]
            layers = FOLDER / case["linear"] if case["linear"] else None
            weights = golden.folder / f"{case['model']}.safetensors"
            loaded = load_model(model, {**cases.KWARGS, **kwargs}, checkpoint=weights, predictor=layers)
            schedule = loaded.schedule(case["method"], **asked(case))
            trained = learned_layers(loaded, schedule)
            out = reduce_model(loaded.module, schedule, trained).run(golden.image)
            robust = np.flatnonzero(case["fp64_check"]["robust"])
            made[name] = case, dict(np.load(FOLDER / f"{name}.npz")), robust, loaded, schedule, trained, out
        return made[name]

    return run


def positions(plan):
    """(keep, src, dst) of a plan as rows of the sequence that entered the block; dst of a row is its host's."""
    keep = plan.keep[..., 0]
    if plan.src is None:
        return keep.numpy(), None, None
    return keep.numpy(), plan.src[..., 0].numpy(), keep.gather(1, plan.dst[..., 0]).numpy()


def wrong_decisions(plans, arrays, images):
    """Names of the blocks' arrays that differ on these images."""
    wrong = []
    for block, plan in plans.items():
        keep, src, dst = positions(plan)
        want = {k: arrays[f"layer{block:02d}.{k}"] for k in ("keep", "src", "dst")}
        for i in images:
            if keep[i].tolist() != want["keep"][i].tolist():
                wrong.append(f"block {block} image {i} keep")
            pairs = lambda a, b: set(zip(a.tolist(), b.tolist()))
            if src is not None and pairs(src[i], dst[i]) != pairs(want["src"][i], want["dst"][i]):
                wrong.append(f"block {block} image {i} pairs")
    return wrong


def test_every_case_of_these_methods_is_here():
    assert {c["method"] for c in CASES.values()} == {"pitome", "tofu", "dtem"} and len(CASES) == 9
    assert all(sum(c["fp64_check"]["robust"]) >= 2 for c in CASES.values())


@pytest.mark.parametrize("name", CASES)
def test_the_reference_has_the_published_numbers(name, computed, relative):
    case, arrays, robust, _, schedule, _, out = computed(name)
    assert [m for _, m in schedule.tokens_per_block()] == case["tokens_after_block"]
    assert relative(out.output[robust], arrays["logits"][robust]) <= TOLERANCE
    assert relative(out.tokens[robust], arrays["tokens"][robust]) <= TOLERANCE
    assert relative(out.tokens[robust].norm(dim=-1), arrays["tokens_l2"][robust]) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_the_reference_decides_as_the_published_code(name, computed):
    _, arrays, robust, _, schedule, _, out = computed(name)
    plans = dict(zip([s.block for s in schedule.steps], out.plans, strict=True))
    assert len(plans) >= 3 and wrong_decisions(plans, arrays, robust) == []
    last = f"layer{max(plans):02d}"
    assert (out.sources[robust].numpy() == arrays[f"{last}.src_map"][robust]).all()
    if f"{last}.size" in arrays:
        assert (out.size[robust].numpy() == arrays[f"{last}.size"][robust]).all()


@pytest.mark.parametrize("batch", [1, None])
@pytest.mark.parametrize("name", CASES)
def test_the_static_graph_computes_the_same(name, batch, computed, golden, relative):
    _, _, robust, loaded, schedule, trained, out = computed(name)
    static = StaticViT(loaded.module, schedule, batch, trained, emission=WITH_SOURCES)
    with torch.no_grad():
        parts = [static(part) for part in golden.image[robust].split(1 if batch else 3)]
    assert relative(torch.cat([p["logits"] for p in parts]), out.output[robust]) <= TOLERANCE
    assert torch.equal(torch.cat([p["sources"] for p in parts]), out.sources[robust])


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c["method"] == "pitome"])
def test_energies_are_the_published_ones(name, computed, golden, relative, monkeypatch):
    """Of the first block, whose input is no matter of earlier decisions: `energy` is by input row, without the class token."""
    case, arrays, _, loaded, schedule, _, _ = computed(name)
    step, seen = schedule.steps[0], []
    reducer = reducers.get("pitome")
    assert step.settings["margin"] == case["params"]["margin_per_layer"][step.block]

    spy = lambda s, step, given=None: seen.append(s) or reducer.reference(s, step, given)
    monkeypatch.setitem(reducers.TABLE, "pitome", replace(reducer, reference=spy))
    reduce_model(loaded.module, schedule).run(golden.image)
    energy = pitome.energies(seen[0], step)[0]
    wanted = arrays[f"layer{step.block:02d}.energy"]
    assert relative(energy, wanted) <= 1e-5
    order = energy.sort(1, descending=True).indices.numpy() + seen[0].n_prefix
    assert (order == arrays[f"layer{step.block:02d}.energy_order"]).all()


@pytest.mark.parametrize("name", CASES)
def test_wrong_decisions_are_seen_and_judged(name, computed, golden):
    """Other hosts and another order are no near-ties: they give something away in the reference's scores."""
    _, arrays, robust, loaded, schedule, trained, out = computed(name)
    plans, last = list(out.plans), len(out.plans) - 1
    plan = plans[last]
    other = torch.where(plan.dst + 1 < schedule.steps[last].n_kept, plan.dst + 1, plan.dst - 1)
    flipped = replace(plan, dst=other)
    assert wrong_decisions({schedule.steps[last].block: flipped}, arrays, robust)
    reference = reduce_model(loaded.module, schedule, trained)
    own = reference.run(golden.image, replay=plans)
    assert all((r == 0).all() for r in own.regrets)
    worse = reference.run(golden.image, replay=[*plans[:-1], flipped])
    assert (worse.regrets[last] > 1e-3).all()
    p = schedule.n_prefix
    upside_down = replace(plan, keep=torch.cat([plan.keep[:, :p], plan.keep[:, p:].flip(1)], 1))
    assert (reference.run(golden.image, replay=[*plans[:-1], upside_down]).regrets[last] > 1e-3).all()


def test_a_crowd_of_equal_tokens_has_no_order_and_is_still_reduced():
    step = Step(0, "post_attn", 9, 6, 6, signal="keys", settings={"form": pitome.ALL_RANKS, "margin": 0.5})
    s = Signals(torch.ones(1, 9, 4), 1, True, metric=torch.ones(1, 9, 4) / 2)
    plan = pitome.reference(s, step)
    assert plan.keep.shape == (1, 6, 1) and pitome.regret(s, step, plan).item() == 0
    assert plan.src[0, :, 0].tolist() == [1, 3, 5], "of equal energies the lower position ranks first"
