"""What a step looks at and where it stands are independent: a toy reducer for every signal at every site, exported and verified."""

from dataclasses import replace

import pytest
import torch
from tokexport.export import macs, reducers
from tokexport.export.graph.static_vit import StaticViT
from tokexport.export.models.learned_layers import learned_layers
from tokexport.export.outputs import WITH_SOURCES
from tokexport.export.plan import SIGNALS, MergePlan
from tokexport.export.reducers import dynamicvit, evit, tome
from tokexport.export.reducers.base import Counts, Reducer
from tokexport.export.step import SITES, Step

import tokexport
from tokexport import Schedule, UsageError, load_model, reduce_model

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
MODELS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "q/k norms": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.5}),
    "rotary": ("eva02_tiny_patch14_224", {}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
}


def keep_first(step):
    """Rows that stay when nothing is looked at."""
    return list(range(step.n_kept))


def ignorant():
    """A reducer that looks at nothing: the first tokens stay."""
    reference = lambda s, step, given=None: (
        given or MergePlan(torch.tensor(keep_first(step), device=s.x.device).expand(len(s.x), -1)[..., None])
    )

    def static(s, step):
        from tokexport.export.constants import constant

        return MergePlan(constant(keep_first(step), (s.x[..., :1] * 0).long(), any_batch=s.any_batch))

    regret = lambda s, step, plan: (plan.keep[..., 0] != torch.tensor(keep_first(step))).any(1).float()
    return reference, static, regret


LAYERS = {"score_head": (0, 1), "metric_layer": (0, 1)}  # which trained layer each of the two steps reads


def toy(signal, site):
    """A reducer with two steps, before or behind the attention of blocks 1 and 2, that looks at one signal."""
    learned = signal is not None and SIGNALS[signal].learned
    pairs = signal is not None and SIGNALS[signal].kind == "metric"

    def steps(asked, size):
        n, out = size.n_tokens, []
        for i, block in enumerate((1, 2)):
            layer = LAYERS[signal][i] if learned else None
            out.append(Step(block, site, n, n - 3, n - 3, 3 if pairs else 0, signal, layer))
            n -= 3
        n_layers = 1 + max(LAYERS[signal]) if learned else 0
        return Counts(asked, out, prop_attn=signal in ("keys", "class_attention"), n_layers=n_layers)

    if signal is None:
        reference, static, regret = ignorant()
    else:
        module = tome if pairs else dynamicvit if learned else evit
        reference, static, regret = (getattr(module.REDUCER, part) for part in ("reference", "static", "regret"))
    labels = tome.REDUCER.labels if pairs else None
    signals = () if signal is None else (signal,)
    return Reducer("toy", "Toy", "a toy", steps, (), signals, reference, static, regret, labels=labels)


PAIRS = [(signal, site) for signal in (*SIGNALS, None) for site in SITES]


@pytest.fixture
def use(monkeypatch):
    return lambda signal, site: monkeypatch.setitem(reducers.TABLE, "toy", toy(signal, site))


@pytest.mark.parametrize("signal, site", PAIRS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_signal_at_every_site_is_reproduced(kind, signal, site, use, relative):
    if kind == "no class token" and signal == "class_attention":
        pytest.skip("there is no class token to attend")
    use(signal, site)
    name, kwargs = MODELS[kind]
    loaded = load_model(name, {**KWARGS, **kwargs}, seed=2)
    schedule = loaded.schedule("toy")
    assert [s.site for s in schedule.steps] == [site] * 2
    heads = learned_layers(loaded, schedule)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    wanted = reduce_model(loaded.module, schedule, heads).run(image)
    for batch in (1, 2, None):
        static = StaticViT(loaded.module, schedule, batch, heads, emission=WITH_SOURCES)
        with torch.no_grad():
            parts = [static(part) for part in image.split(1 if batch == 1 else 2)]
        assert relative(torch.cat([p[static.output_name] for p in parts]), wanted.output) <= 1e-5
        assert torch.equal(torch.cat([p["sources"] for p in parts]), wanted.sources)


@pytest.mark.parametrize("signal, site", PAIRS)
def test_every_signal_at_every_site_is_exported_and_verified(signal, site, use, tmp_path):
    use(signal, site)
    loaded = load_model(MODELS["plain"][0], KWARGS, seed=2)
    result = tokexport.export_onnx(loaded, loaded.schedule("toy"), tmp_path / "v.onnx", sources=True)
    report = tokexport.verify(result.path)
    assert report.passed and report.decisions == 1.0, report.summary()
    assert result.macs < result.macs_dense


def test_what_is_looked_at_before_a_block_is_what_the_block_would_compute(use, relative):
    """Without a reduction in between, the signal before the attention is the block's own behind it."""
    loaded = load_model(MODELS["plain"][0], KWARGS, seed=2)
    seen = {}
    for site in SITES:
        for signal in ("keys", "class_attention", "mean_attention"):
            use(signal, site)
            reducer = reducers.TABLE["toy"]
            spy = lambda s, step, given=None: seen.setdefault((signal, site), s) and reducer.reference(s, step, given)
            reducers.TABLE["toy"] = replace(reducer, reference=spy)
            schedule = loaded.schedule("toy")
            reduce_model(loaded.module, schedule).run(torch.ones(1, 3, 32, 32).cumsum(-1) / 32)
    for signal in ("keys", "class_attention", "mean_attention"):
        part = SIGNALS[signal].kind
        before, behind = (getattr(seen[signal, site], part) for site in SITES)
        assert relative(before, behind) <= 1e-6
    assert (
        relative(seen["class_attention", SITES[0]].score[:, 1:], seen["mean_attention", SITES[0]].score[:, 1:]) > 1e-3
    )


def test_the_cost_of_a_signal_is_counted():
    dims = {"width": 8, "attn_width": 8, "mlp": [(8, 32), (32, 8)], "classes": 5, "heads": 1, "patches": 16}
    dims |= {"patch_values": 48, "pool": "token"}
    step = lambda signal, site: Step(1, site, 17, 10, 10, 0, signal, 0 if signal in LAYERS else None)
    dims |= {"metric_width": 4}
    cost = {(s, site): macs.signal(dims, step(s, site), n_prefix=1) for s in (*SIGNALS, None) for site in SITES}
    assert {s for (s, site), n in cost.items() if site == "post_attn" and n} == {"score_head", "metric_layer"}
    assert cost["metric_layer", "pre_block"] == cost["metric_layer", "post_attn"] == 17 * 8 * 4
    assert cost["keys", "pre_block"] == 17 * 8 * 8
    assert cost["class_attention", "pre_block"] == 17 * 8 * 8 + 8 * 8 + 17 * 8
    assert cost["mean_attention", "pre_block"] == 2 * 17 * 8 * 8 + 17 * 17 * 8
    assert cost["score_head", "pre_block"] == cost["score_head", "post_attn"] == 16 * (64 + 32 + 8 + 4)
    assert cost[None, "pre_block"] == 0


def test_steps_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="signal 'smell': wanted one of keys"):
        Step(0, "post_attn", 9, 8, 8, signal="smell")
    with pytest.raises(UsageError, match="layer None with signal score_head"):
        Step(0, "post_attn", 9, 8, 8, signal="score_head")
    with pytest.raises(UsageError, match="layer 1 with signal keys"):
        Step(0, "post_attn", 9, 8, 8, signal="keys", layer=1)
    head = Step(0, "pre_block", 9, 8, 8, signal="score_head", layer=1)
    with pytest.raises(UsageError, match="reads layer 1 of 1"):
        Schedule("dynamicvit", 9, 1, 2, steps=(head,), n_layers=1)
    before, behind = Step(0, "pre_block", 9, 8, 8), Step(0, "post_attn", 8, 7, 7)
    with pytest.raises(UsageError, match="block 0 has two steps"):
        Schedule("tome", 9, 1, 2, steps=(before, behind))


@pytest.mark.parametrize(
    "values, said",
    [
        (("foo", 9, 1, 2), "unknown method 'foo'"),
        (("tome", -3, 1, 2), "n_tokens is -3"),
        (("tome", 9, 10, 2), "10 prefix tokens of 9"),
        (("tome", 9, -1, 2), "n_prefix is -1"),
        (("tome", 9, 1, 0), "depth is 0"),
        (("tome", 9.0, 1, 2), "n_tokens is 9.0"),
        (("tome", True, 0, 2), "n_tokens is True"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(values, said):
    with pytest.raises(UsageError, match=said):
        Schedule(*values)


def test_a_step_that_loses_prefix_tokens_is_refused():
    with pytest.raises(UsageError, match="keeps 4 tokens, fewer than the 5 prefix tokens"):
        Schedule("evit", 9, 5, 2, steps=(Step(0, "post_attn", 9, 4, 4, 0),))


def test_a_schedule_says_how_attention_and_pool_use_sizes():
    size = {"n_tokens": 65, "depth": 6}
    assert (
        Schedule.parse("tome", r=8, **size).prop_attn
        and not Schedule.parse("tome", r=8, prop_attn=False, **size).prop_attn
    )
    assert (
        Schedule.parse("tome", r=8, pool="size", **size).pool == "size"
        and Schedule.parse("evit", at=[1], **size).pool == "mean"
    )
    assert not Schedule.parse("evit", at=[1], **size).prop_attn
    with pytest.raises(UsageError, match="prop_attn 'no': wanted true or false"):
        Schedule.parse("tome", r=8, prop_attn="no", **size)
