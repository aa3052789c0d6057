"""Numbers and decisions of the authors' code, from the eager reference, the static plans and the exported graphs.

Numbers are compared on robust images only: those whose decisions stand far from a tie.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokexport.export import apply, reducers
from tokexport.export.models.learned_layers import learned_layers
from tokexport.export.models.score_head import StaticScoreHead, make_heads
from tokexport.export.plan import MergePlan, Signals
from tokexport.export.reducers import diffrate, etps, tome
from tokexport.export.schedule import Step

from tokexport import reduce_model

FOLDER = Path(__file__).parents[1] / "golden"
CASES = {p.stem: json.loads(p.read_text()) for p in sorted(FOLDER.glob("*.json")) if p.stem != "units"}
TESTED = {
    name: case
    for name, case in CASES.items()
    if case["method"] in ("base", "tome", "evit", "etps", "diffrate", "dtps", "dynamicvit")
}
PER_CASE = {"logits", "tokens", "tokens_l2", "num_tokens"}
TOME = {"src_idx", "dst_idx", "unm_idx", "src_map", "size"}
PER_BLOCK = TOME | {"keep_idx", "drop_idx", "host_idx", "score", "cls_attn", "order", "merge_dst", "node_max"}
TOLERANCE = 2e-4
UNITS = sorted({k.rsplit(".", 1)[0] for k in np.load(FOLDER / "units.npz").files if k.startswith("tome.")})
OWN, ALWAYS, NEVER = None, 0, 10**9  # tokens from which a step is in the gather form; OWN is the exporter's choice
SLOW = {
    (3, OWN),
    (None, ALWAYS),
}  # the golden numbers of the reference are tested for every case, these by `make test-all`
FORMS = {
    **{m: [(1, OWN), (3, OWN), (None, OWN)] for m in ("evit", "etps", "diffrate", "dtps", "dynamicvit")},
    "base": [(1, OWN), (None, OWN)],
    "tome": [(1, OWN), (3, OWN), (None, OWN), (1, ALWAYS), (None, ALWAYS), (3, NEVER)],
}
GRAPHS = [
    pytest.param(
        name,
        *form,
        id=f"{name}-batch {form[0] or 'any'}-{ {OWN: 'own form', ALWAYS: 'gather', NEVER: 'matmul'}[form[1]] }",
        marks=[pytest.mark.slow] if form in SLOW else [],
    )
    for name, case in TESTED.items()
    for form in FORMS[case["method"]]
]


def _r(case):
    params = case["params"]
    return tuple(params["r"]) if params["r_kind"] == "tuple" else params["r"]


def _options(case):
    """Method and options of a case, as `Schedule.parse` takes them."""
    method, params = case["method"], case["params"]
    if method == "base":
        return {"method": "none"}
    if method == "tome":
        return {"method": method, "r": _r(case), "prop_attn": params["prop_attn"]}
    if method == "diffrate":
        return {
            "method": method,
            "rates": {"prune_kept": params["prune_kept_num"], "merge_kept": params["merge_kept_num"]},
        }
    at = params.get("drop_loc") or params["prune_loc"]
    rate = params["keep_rate"][at[0]] if "drop_loc" in params else params["keep_ratio"]
    return {
        "method": method,
        "at": at,
        "keep_rate": rate,
        **({"fuse": params["fuse_token"]} if "fuse_token" in params else {}),
    }


def _wrong_decisions(plans, arrays, images):
    """Names of the blocks' arrays that differ from the golden ones on these images."""
    wrong, at, size = [], None, None
    for block, plan in plans.items():
        want = {k: arrays[f"layer{block:02d}.{k}"].astype(np.int64) for k in TOME}
        keep, src, dst = (t[..., 0] for t in (plan.keep, plan.src, plan.dst))
        if at is None:
            n = keep.shape[1] + src.shape[1]
            at, size = torch.arange(n).expand(len(keep), n), torch.ones(len(keep), n, 1)
        at, size = apply.follow(plan, at, keep.shape[1] + src.shape[1]), apply.apply_eager(plan, size, size)[1]
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


def _ranked_wrong(plans, arrays, images, squeezes=False):
    """The same for the methods that sort: order, hosts, sizes and map against the golden arrays of each block."""
    wrong, n = [], 65
    own = [
        np.arange(n)
    ] * 3  # our row number of each of their rows: a block that keeps every token sorts in their code, not in ours
    at, size = torch.arange(n).expand(3, n), torch.ones(3, n, 1)
    for block in sorted({int(k[5:7]) for k in arrays if k.startswith("layer")}):
        layer = f"layer{block:02d}."
        if block not in plans:
            own = [a[order] for a, order in zip(own, arrays[f"{layer}order"])]
            continue
        n, plan = size.shape[1], plans[block]
        want = {k.removeprefix(layer): v for k, v in arrays.items() if k.startswith(layer)}
        at, size = apply.follow(plan, at, n, squeezes=squeezes), apply.apply_eager(plan, size, size)[1]
        for i in images:
            keep = plan.keep[i, :, 0].tolist()
            src, dst = ([], []) if plan.src is None else (plan.src[i, :, 0].tolist(), plan.dst[i, :, 0].tolist())
            got = {"src_map": at[i].tolist() == want["src_map"][i].tolist()}
            if "keep_idx" in want:
                got["keep_idx"] = keep == [0, *(want["keep_idx"][i] + 1).tolist()]
            if "host_idx" in want:
                got["host_idx"] = set(zip(src, dst)) == {
                    (int(s) + 1, int(d) + 1) for s, d in zip(want["drop_idx"][i], want["host_idx"][i])
                }
            if "order" in want:
                got["order"] = keep + src == own[i][want["order"][i]].tolist()[: len(keep) + len(src)]
                got["size"] = np.allclose(size[i, :, 0], want["size"][i], atol=1e-5)
            if "merge_dst" in want:
                got["merge_dst"] = dst == want["merge_dst"][i].tolist()
                got["node_max"] = np.allclose(plan.w_size[i, :, 0], want["node_max"][i], atol=1e-5)
            wrong += [f"block {block} image {i} {name}" for name, same in got.items() if not same]
        own = [np.arange(size.shape[1])] * 3
    return wrong


@pytest.fixture(scope="module")
def reference(golden, tiny, schedule_of):
    """reference(name) -> (json, arrays, robust images, ReferenceResult, schedule) of a case, computed once."""
    made = {}

    def run(name):
        if name not in made:
            case, arrays = golden.case(name)
            model = tiny(case["model"]).module
            schedule = schedule_of(model, **_options(case))
            heads = learned_layers(tiny(case["model"]), schedule)
            out = reduce_model(model, schedule, heads).run(golden.image)
            made[name] = case, arrays, np.flatnonzero(case["fp64_check"]["robust"]), out, schedule
        return made[name]

    return run


def test_every_case_and_every_array_is_tested():
    assert TESTED == CASES, "a case of a method without a golden test"
    second = {json.loads(p.read_text())["method"] for p in (FOLDER / "second").glob("*.json")}  # test_golden_second
    assert {c["method"] for c in CASES.values()} | second == {"base", *reducers.TABLE} - {"none"}
    assert len(CASES) == 11 and len(UNITS) == 9
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
    assert len(plans) == {"base": 0, "tome": 6, "diffrate": 5}.get(case["method"], 3)
    if case["method"] == "tome":
        assert _wrong_decisions(plans, arrays, robust) == []
    elif plans:
        squeezes = reducers.get(case["method"]).squeezes
        assert _ranked_wrong(plans, arrays, robust, squeezes) == []
    if plans:
        last = f"layer{max(plans):02d}"
        assert (out.sources[robust].numpy() == arrays[f"{last}.src_map"][robust]).all()
        if f"{last}.size" in arrays:
            assert np.allclose(out.size[robust].numpy(), arrays[f"{last}.size"][robust], atol=1e-5)


@pytest.mark.parametrize("name, batch, gather_from", GRAPHS)
def test_the_graph_has_the_authors_numbers_and_sources(
    name, batch, gather_from, reference, exported, run_onnx, golden, relative
):
    case, arrays, robust, _, _ = reference(name)
    path = exported(case["model"], batch=batch, gather_from=gather_from, **_options(case))
    got = run_onnx(path, golden.image)
    assert relative(got["logits"][robust], arrays["logits"][robust]) <= TOLERANCE
    maps = [k for k in sorted(arrays) if k.endswith(".src_map")]
    wanted = arrays[maps[-1]] if maps else np.broadcast_to(np.arange(case["tokens_in"]), (3, case["tokens_in"]))
    assert (got["sources"][robust] == wanted[robust]).all()


def _unit(golden, key):
    """Signals, step and the wanted arrays of one call of the authors' bipartite_soft_matching and merge_wavg."""
    _, kind, n, r = key.split(".")
    part = {k.rsplit(".", 1)[1]: torch.from_numpy(v) for k, v in golden.units[1].items() if k.startswith(f"{key}.")}
    n, prefix = int(n[1:]), {"none": 0, "cls": 1, "dist": 2}[kind]
    kept = n - min(int(r[1:]), (n - prefix) // 2)
    metric = part["metric"] / part["metric"].norm(dim=-1, keepdim=True)
    signals = Signals(part["x"], prefix, prefix > 0, part["size"][..., None], metric)
    return signals, Step(0, "post_attn", n, kept, kept), part


@pytest.mark.parametrize("form", ["reference", "gather", "matmul"])
@pytest.mark.parametrize("key", UNITS)
def test_a_single_merge_is_the_authors(key, form, golden, relative):
    signals, step, part = _unit(golden, key)
    if form == "reference":
        plan = tome.reference(signals, step)
        out, size = apply.apply_eager(plan, signals.x, signals.size)
    else:
        plan = apply.lay_out(tome.static(signals, step), apply.Form(form), any_batch=False)
        out, size = apply.apply_static(plan, signals.x, signals.size)
        names = torch.tensor(plan.layout.labels)
        plan = MergePlan(plan.keep, plan.src, (plan.dst == names).to(torch.int8).argmax(-1, keepdim=True))
    n = step.n_in
    assert relative(out, part["out"]) <= 1e-6 and relative(size[..., 0], part["out_size"]) <= 1e-6
    assert (apply.follow(plan, torch.arange(n).expand(2, n), n) == part["src_map"]).all()


def test_wrong_decisions_are_seen(reference):
    _, arrays, robust, out, schedule = reference("tiny_vit.tome_r8_prop")
    blocks = [s.block for s in schedule.steps]
    swapped = {
        **dict(zip(blocks, out.plans)),
        5: MergePlan(out.plans[5].keep, out.plans[5].src, out.plans[5].dst.roll(1, 1), combine="size"),
    }
    found = _wrong_decisions(swapped, arrays, robust)
    assert found and all("block 5" in f for f in found) and any("dst_idx" in f for f in found)
    reordered = {0: MergePlan(out.plans[0].keep.flip(1), out.plans[0].src, out.plans[0].dst, combine="size")}
    assert any("unm_idx" in f for f in _wrong_decisions(reordered, arrays, robust))


@pytest.mark.parametrize("name", ["evit_k07_fuse", "etps_k07", "diffrate_dec", "dtps_k07", "dynamicvit_k07"])
def test_wrong_orders_and_hosts_are_seen(name, reference):
    case, arrays, robust, out, schedule = reference(f"tiny_vit.{name}")
    squeezes = reducers.get(case["method"]).squeezes
    plans = dict(zip([s.block for s in schedule.steps], out.plans))
    last = max(plans)
    plan = plans[last]
    swapped = {**plans, last: replace(plan, keep=torch.cat([plan.keep[:, :1], plan.keep[:, 1:].flip(1)], 1))}
    assert any("src_map" in f and f"block {last}" in f for f in _ranked_wrong(swapped, arrays, robust, squeezes))
    if plan.src is not None and not plan.n_extra:
        assert any(
            f.endswith(("host_idx", "merge_dst"))
            for f in _ranked_wrong({**plans, last: replace(plan, dst=plan.dst.roll(1, 1))}, arrays, robust, squeezes)
        )


def test_a_score_head_is_the_authors(golden, relative):
    arrays = golden.units[1]
    head = make_heads(
        {f"0.{k.removeprefix('pred.w.')}": torch.from_numpy(v) for k, v in arrays.items() if k.startswith("pred.w.")},
        16,
    )[0]
    x = torch.from_numpy(arrays["pred.x"])
    assert relative(head(x), arrays["pred.out"]) <= 1e-6
    score = StaticScoreHead(head)(torch.cat([torch.full((2, 1, 16), 9.0), x], 1), 1)[:, 1:, 0]
    assert (
        score.argsort(descending=True) == torch.from_numpy(arrays["pred.out"])[..., 0].argsort(descending=True)
    ).all()


def _squeezed(golden, key):
    """Kept and dropped tokens behind a class token, as eTPS sees them, and the step."""
    kept, dropped, out = (torch.from_numpy(golden.units[1][f"{key}.{k}"]) for k in ("kept", "dropped", "out"))
    n = 1 + kept.shape[1] + dropped.shape[1]
    x = torch.cat([torch.ones_like(kept[:, :1]), kept, dropped], 1)
    score = torch.arange(n, 0.0, -1)[None, :, None].expand(2, -1, -1)
    return (
        Signals(x, 1, True, score=score),
        Step(0, "post_attn", n, 1 + kept.shape[1], 1 + kept.shape[1]),
        out,
        dropped.shape[1],
    )


@pytest.mark.parametrize("form", ["reference", "static"])
def test_a_squeeze_is_the_authors(form, golden, relative):
    s, step, out, _ = _squeezed(golden, "tps")
    got = (
        apply.apply_eager(etps.reference(s, step), s.x, s.x[..., :1])[0]
        if form == "reference"
        else apply.apply_static(etps.static(s, step), s.x, None)[0]
    )
    assert relative(got[:, 1:], out) <= 1e-6


def test_of_tied_hosts_the_first_receives(golden, relative):
    """Their inference code gives a tied token to every best host; the others' rows must still be theirs."""
    s, step, out, _ = _squeezed(golden, "tps_tie")
    mask = torch.from_numpy(golden.units[1]["tps_tie.mask"]).int()
    tied = mask.sum(-1) > 1
    assert tied.any()
    plan = etps.reference(s, step)
    assert (plan.dst[..., 0] - 1 == mask.argmax(-1)).all(), "the first of the best"
    static = etps.static(s, step)
    assert (static.dst == plan.dst).all()
    got = apply.apply_eager(plan, s.x, s.x[..., :1])[0][:, 1:]
    for i in range(2):
        touched = mask[i][tied[i]].sum(0) > 0
        assert relative(got[i][~touched], out[i][~touched]) <= 1e-6 and relative(got[i], out[i]) > 1e-6 * bool(
            touched.any()
        )


def test_a_merge_of_diffrate_is_the_authors(golden, relative):
    arrays = {
        k.removeprefix("diffrate."): torch.from_numpy(v)
        for k, v in golden.units[1].items()
        if k.startswith("diffrate.")
    }
    kept = arrays["out"].shape[1]
    s = Signals(
        arrays["x"], 1, True, arrays["size"][..., None], score=torch.arange(9, 0.0, -1)[None, :, None].expand(2, -1, -1)
    )
    step = Step(0, "post_attn", 9, kept, kept)
    for out, size in (
        apply.apply_eager(diffrate.reference(s, step), s.x, s.size),
        apply.apply_static(diffrate.static(s, step), s.x, s.size),
    ):
        assert relative(out, arrays["out"]) <= 1e-6
        wanted = arrays["out_size"]
        finite = wanted > 0
        assert (
            finite.any()
            and relative(size[..., 0][finite], wanted[finite]) <= 1e-6
            and (size > 0).all()
            and size.log().isfinite().all()
        )


def test_a_size_below_zero_stays_positive():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, -0.3]]])
    s = Signals(x, 1, True, torch.tensor([[[1.0], [1.0], [2.0], [3.0]]]), score=torch.arange(4, 0.0, -1)[None, :, None])
    step = Step(0, "post_attn", 4, 2, 2)
    for plan, form in (
        (diffrate.reference(s, step), apply.apply_eager),
        (diffrate.static(s, step), apply.apply_static),
    ):
        out, size = form(plan, s.x, s.size)
        assert out.isfinite().all() and size[0, 1] == apply.SMALLEST and size[0, 0] == 1


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
