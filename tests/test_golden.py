"""Numbers and decisions of the authors' code, from the eager reference, the static plans and the exported graphs.

Numbers are compared on robust images only: those whose decisions stand far from a tie.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tokexport import reduce_model
from tokexport.export import apply
from tokexport.export.plan import MergePlan, Signals
from tokexport.export.reducers import tome
from tokexport.export.schedule import Step

FOLDER = Path(__file__).parent / "golden"
CASES = {p.stem: json.loads(p.read_text()) for p in sorted(FOLDER.glob("*.json")) if p.stem != "units"}
TESTED = {name: case for name, case in CASES.items() if case["method"] in ("base", "tome")}
PER_CASE = {"logits", "tokens", "tokens_l2", "num_tokens"}
PER_BLOCK = {"src_idx", "dst_idx", "unm_idx", "src_map", "size"}
TOLERANCE = 2e-4
UNITS = sorted({k.rsplit(".", 1)[0] for k in np.load(FOLDER / "units.npz").files if k.startswith("tome.")})
OWN, ALWAYS, NEVER = None, 0, 10**9  # tokens from which a step is in the gather form; OWN is the exporter's choice
FORMS = {"base": [(1, OWN), (None, OWN)], "tome": [(1, OWN), (3, OWN), (None, OWN), (1, ALWAYS), (None, ALWAYS), (3, NEVER)]}
GRAPHS = [pytest.param(name, *form, id=f"{name}-batch {form[0] or 'any'}-{ {OWN: 'own form', ALWAYS: 'gather', NEVER: 'matmul'}[form[1]]}")
          for name, case in TESTED.items() for form in FORMS[case["method"]]]


def _r(case):
    params = case["params"]
    return None if case["method"] == "base" else tuple(params["r"]) if params["r_kind"] == "tuple" else params["r"]


def _wrong_decisions(plans, arrays, images):
    """Names of the blocks' arrays that differ from the golden ones on these images."""
    wrong, at, size = [], None, None
    for block, plan in plans.items():
        want = {k: arrays[f"layer{block:02d}.{k}"].astype(np.int64) for k in PER_BLOCK}
        keep, src, dst = (t[..., 0] for t in (plan.keep, plan.src, plan.dst))
        if at is None:
            n = keep.shape[1] + src.shape[1]
            at, size = torch.arange(n).expand(len(keep), n), torch.ones(len(keep), n, 1)
        at, size = apply.follow(plan, at), apply.apply_eager(plan, size, size)[1]
        for i in images:
            pairs = set(zip(src[i].tolist(), keep[i][dst[i]].tolist()))
            even = [p for p in keep[i].tolist() if p % 2 == 0]
            got = {
                "src_idx": {s for s, _ in pairs} == set(want["src_idx"][i].tolist()),
                "dst_idx": pairs == set(zip(want["src_idx"][i].tolist(), want["dst_idx"][i].tolist())),
                "unm_idx": even == want["unm_idx"][i].tolist(),
                "src_map": at[i].tolist() == want["src_map"][i].tolist(),
                "size": size[i, :, 0].tolist() == want["size"][i].tolist(),
            }
            wrong += [f"block {block} image {i} {name}" for name, same in got.items() if not same]
    return wrong


@pytest.fixture(scope="module")
def reference(golden, tiny, schedule_of):
    """reference(name) -> (json, arrays, robust images, ReferenceResult, schedule) of a case, computed once."""
    made = {}

    def run(name):
        if name not in made:
            case, arrays = golden.case(name)
            model = tiny(case["model"]).module
            schedule = schedule_of(model, _r(case), case["params"].get("prop_attn", True))
            made[name] = case, arrays, np.flatnonzero(case["fp64_check"]["robust"]), reduce_model(model, schedule).run(golden.image), schedule
        return made[name]

    return run


def test_every_case_and_every_array_is_tested():
    assert TESTED == CASES, "a case of a method without a golden test"
    assert {c["method"] for c in CASES.values()} == {"base", "tome"} and len(CASES) == 6 and len(UNITS) == 9
    for name in CASES:
        arrays = np.load(FOLDER / f"{name}.npz").files
        assert {k.split(".")[-1] for k in arrays} <= PER_CASE | PER_BLOCK, name
        assert sum(CASES[name]["fp64_check"]["robust"]) >= 2, name


@pytest.mark.parametrize("name", TESTED)
def test_the_reference_has_the_authors_token_counts(name, reference):
    case, arrays, _, out, schedule = reference(name)
    assert [m for _, m in schedule.tokens_per_block()] == case["tokens_after_block"]
    assert schedule.n_tokens == case["tokens_in"] and out.tokens.shape == arrays["tokens"].shape


@pytest.mark.parametrize("name", TESTED)
def test_the_reference_has_the_authors_numbers(name, reference, relative):
    _, arrays, robust, out, _ = reference(name)
    assert relative(out.output[robust], arrays["logits"][robust]) <= TOLERANCE
    assert relative(out.tokens[robust], arrays["tokens"][robust]) <= TOLERANCE
    assert relative(out.tokens[robust].norm(dim=-1), arrays["tokens_l2"][robust]) <= TOLERANCE


@pytest.mark.parametrize("name", TESTED)
def test_the_reference_decides_as_the_authors_code_in_every_block(name, reference):
    case, arrays, robust, out, schedule = reference(name)
    plans = dict(zip([s.block for s in schedule.steps], out.plans, strict=True))
    assert len(plans) == (6 if case["method"] == "tome" else 0)
    assert _wrong_decisions(plans, arrays, robust) == []
    if plans:
        last = f"layer{max(plans):02d}"
        assert (out.sources[robust].numpy() == arrays[f"{last}.src_map"][robust]).all()
        assert (out.size[robust].numpy() == arrays[f"{last}.size"][robust]).all()


@pytest.mark.parametrize("name, batch, gather_from", GRAPHS)
def test_the_graph_has_the_authors_numbers_and_sources(name, batch, gather_from, reference, exported, run_onnx, golden, relative):
    case, arrays, robust, _, _ = reference(name)
    path = exported(case["model"], _r(case), batch, case["params"].get("prop_attn", True), gather_from)
    got = run_onnx(path, golden.image)
    assert relative(got["logits"][robust], arrays["logits"][robust]) <= TOLERANCE
    last = f"layer{len(case['tokens_after_block']) - 1:02d}.src_map"
    wanted = arrays[last] if last in arrays else np.broadcast_to(np.arange(case["tokens_in"]), (3, case["tokens_in"]))
    assert (got["sources"][robust] == wanted[robust]).all()


def _unit(golden, key):
    """Signals, step and the wanted arrays of one call of the authors' bipartite_soft_matching and merge_wavg."""
    _, kind, n, r = key.split(".")
    part = {k.rsplit(".", 1)[1]: torch.from_numpy(v) for k, v in golden.units[1].items() if k.startswith(f"{key}.")}
    n, prefix = int(n[1:]), {"none": 0, "cls": 1, "dist": 2}[kind]
    kept = n - min(int(r[1:]), (n - prefix) // 2)
    signals = Signals(part["x"], part["size"][..., None], part["metric"] / part["metric"].norm(dim=-1, keepdim=True), prefix, prefix > 0)
    return signals, Step(0, "post_attn", n, kept, kept), part


@pytest.mark.parametrize("form", ["reference", "gather", "matmul"])
@pytest.mark.parametrize("key", UNITS)
def test_a_single_merge_is_the_authors(key, form, golden, relative):
    signals, step, part = _unit(golden, key)
    if form == "reference":
        plan = tome.reference(signals, step)
        out, size = apply.apply_eager(plan, signals.x, signals.size)
    else:
        plan = tome.static(signals, step, form == "matmul")
        out, size = apply.apply_static(plan, signals.x, signals.size)
        names = torch.tensor(plan.labels)
        plan = MergePlan(plan.keep, plan.src, (plan.dst == names).to(torch.int8).argmax(-1, keepdim=True))
    n = step.n_in
    assert relative(out, part["out"]) <= 1e-6 and relative(size[..., 0], part["out_size"]) <= 1e-6
    assert (apply.follow(plan, torch.arange(n).expand(2, n)) == part["src_map"]).all()


def test_wrong_decisions_are_seen(reference):
    _, arrays, robust, out, schedule = reference("tiny_vit.tome_r8_prop")
    blocks = [s.block for s in schedule.steps]
    swapped = {**dict(zip(blocks, out.plans)), 5: MergePlan(out.plans[5].keep, out.plans[5].src, out.plans[5].dst.roll(1, 1))}
    found = _wrong_decisions(swapped, arrays, robust)
    assert found and all("block 5" in f for f in found) and any("dst_idx" in f for f in found)
    reordered = {0: MergePlan(out.plans[0].keep.flip(1), out.plans[0].src, out.plans[0].dst)}
    assert any("unm_idx" in f for f in _wrong_decisions(reordered, arrays, robust))


def test_wrong_numbers_are_seen(reference, relative):
    _, arrays, _, out, _ = reference("tiny_vit.tome_r8_prop")
    wrong = out.output.clone()
    wrong[1, 3] += 1e-3 * wrong.abs().max()
    assert relative(wrong, arrays["logits"]) > TOLERANCE
    assert relative(wrong * float("nan"), wrong) == relative(wrong[:2], wrong) == float("inf")


@pytest.mark.parametrize("r, prop_attn", [(9, True), (8, False)])
def test_another_r_or_attention_gives_other_numbers(r, prop_attn, golden, tiny, schedule_of, relative):
    model = tiny("tiny_vit").module
    out = reduce_model(model, schedule_of(model, r, prop_attn))(golden.image)
    assert relative(out, golden.case("tiny_vit.tome_r8_prop")[1]["logits"]) > 10 * TOLERANCE
