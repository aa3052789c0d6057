"""Where tokens merge and how counts are rounded: blocks by all, even or a list, counts in multiples; and ToFu's own options."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokexport.export import apply
from tokexport.export.checkpoints import metric_layers
from tokexport.export.models import as_plain
from tokexport.export.models.learned_layers import keys_as_metric, learned_layers
from tokexport.export.plan import MergePlan

from tokexport import Schedule, UsageError, load_model, reduce_model

from .. import cases

DINOV2 = {"depth": 12, "n_tokens": 257, "n_prefix": 1}
MERGING = ("tome", "tofu", "dtem")


def counts(method="tome", **options):
    schedule = Schedule.parse(method, **DINOV2, **options)
    return [(s.block, s.n_in - s.n_out) for s in schedule.steps], schedule


@pytest.mark.parametrize("method", MERGING)
def test_blocks_are_all_even_or_a_list(method):
    assert counts(method, r=13)[0] == [(b, 13) for b in range(12)] == counts(method, r=13, at="all")[0]
    assert counts(method, r=26, at="even")[0] == [(b, 26) for b in range(0, 12, 2)]
    assert (
        counts(method, r=20, at="1,4,11")[0] == [(1, 20), (4, 20), (11, 20)] == counts(method, r=20, at=[1, 4, 11])[0]
    )
    assert counts(method, r="9,5", at="3,6,9")[0] == [(3, 9), (6, 5)], "a list has one number for each of the blocks"
    with pytest.raises(UsageError, match="r .*has 4 values for 3 blocks that reduce"):
        counts(method, r="9,5,4,3", at="3,6,9")


@pytest.mark.parametrize("at", ["all", "even", "1,4,11"])
@pytest.mark.parametrize("method, asked", [(m, {"r": 13}) for m in MERGING] + [("pitome", {"keep_rate": 0.93})])
def test_counts_in_multiples(method, asked, at):
    n = len(Schedule.parse(method, **DINOV2, at=at, **asked).steps)
    plain = Schedule.parse(method, **DINOV2, at=at, **asked)
    aligned = Schedule.parse(method, **DINOV2, at=at, align="8", **asked)
    assert all(s.n_out % 8 == 0 for s in aligned.steps) and n - 1 <= len(aligned.steps) <= n
    if method != "pitome":
        assert abs(aligned.n_final - plain.n_final) <= 4, "rounding does not add up"
    assert any("multiples of 8" in note for note in aligned.notes) and not any(
        "multiples" in note for note in plain.notes
    )


def test_rounding_never_merges_more_than_half_nor_where_nothing_was_asked():
    _, schedule = counts(r=[0, 100, 120, 0], at="0,1,2,3", align=64)
    assert [(s.block, s.n_in, s.n_out) for s in schedule.steps] == [(1, 257, 192), (2, 192, 128)]
    assert counts(r=1, align=64)[0][:1] == [(0, 1)], "256 is the nearest multiple below"


@pytest.mark.parametrize("align", [0, -8, "x", 1.5, True, None.__class__, "8.0"], ids=str)
def test_what_is_no_multiple_is_refused(align):
    with pytest.raises(UsageError, match="^align .*wanted a whole number from 1 on"):
        counts(r=13, align=align)


def test_tofu_drops_first_and_fuses_later():
    _, schedule = counts("tofu", r=13)
    assert [s.n_folded for s in schedule.steps] == [0] * 7 + [13] * 5, "12 blocks: 0 to 6 drop, 7 to 11 fuse"
    assert "dropped up to block 6 and fused behind it; norm: MLERP" in schedule.notes[-1]
    _, never = counts("tofu", r=13, prune_until=-1, norm="code")
    assert all(s.n_folded == 13 and s.settings == {"combine": "mlerp_code"} for s in never.steps)
    assert "published code" in never.notes[-1]
    assert all(s.n_folded == 0 for s in counts("tofu", r=13, prune_until="11")[1].steps)
    with pytest.raises(UsageError, match="norm 'l2': wanted mlerp or code"):
        counts("tofu", r=13, norm="l2")


@pytest.mark.parametrize("combine", ["mlerp", "mlerp_code"])
def test_fused_tokens_keep_a_norm_and_zeros_stay_finite(combine, relative):
    x = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
    column = lambda *rows: torch.tensor(rows)[None, :, None]
    plan = MergePlan(column(0, 2, 3), column(1, 4), column(0, 2), combine=combine)
    (eager, _), (static, _) = apply.apply_eager(plan, x, x[..., :1] * 0 + 1), apply.apply_static(plan, x, None)
    assert eager.isfinite().all() and relative(static, eager) <= 1e-6
    assert torch.equal(eager[0, 1], x[0, 2]), "a host without sources stays as it is, a zero one too"
    mean = torch.tensor([1.5, 3.0])
    wanted = mean / mean.norm() * 5 if combine == "mlerp" else mean
    assert relative(eager[0, 0], wanted) <= 1e-6 and (eager[0, 2] == 0).all(), "opposite tokens cancel out"


@pytest.fixture
def dtem(golden, tmp_path):
    """A checkpoint as DTEM's training leaves it: the tiny model with metric layers, and qkv joined with them."""
    state = load_file(golden.folder / "tiny_vit.safetensors")
    layers = load_file(golden.folder / "second" / "tiny_vit.dtem_linear_f16.safetensors")
    out = dict(state)
    for block in range(6):
        for part in ("weight", "bias"):
            name = f"blocks.{block}.attn.qkv."
            out[f"{name}qkv_layer.{part}"] = state[f"{name}{part}"].clone()
            out[f"{name}metric_layer.{part}"] = layers[f"{name}metric_layer.{part}"]
            out[f"{name}{part}"] = torch.cat([state[f"{name}{part}"], layers[f"{name}metric_layer.{part}"]])

    def save(change=None):
        tensors = dict(out) if change is None else change(dict(out))
        path = tmp_path / "dtem.pth"
        torch.save({"epoch": 30, "state_dict": {f"module.{k}": v for k, v in tensors.items()}}, path)
        return path

    return save


def load(golden, **weights):
    name, kwargs = cases.TINY["tiny_vit"]
    return load_model(name, {**cases.KWARGS, **kwargs}, **weights)


def test_a_checkpoint_of_dtem_brings_its_metric_layers(golden, dtem):
    whole = load(golden, checkpoint=dtem())
    linear = golden.folder / "second" / "tiny_vit.dtem_linear_f16.safetensors"
    apart = load(golden, checkpoint=golden.folder / "tiny_vit.safetensors", predictor=linear)
    assert any("DTEM (metric layers for 6 blocks)" in note for note in whole.notes)
    assert whole.heads.keys() == apart.heads.keys() and len(whole.heads) == 12
    outputs = []
    for loaded in (whole, apart):
        schedule = loaded.schedule("dtem", r=8)
        outputs.append(reduce_model(loaded.module, schedule, learned_layers(loaded, schedule))(golden.image))
    assert torch.equal(*outputs)
    tome = apart.schedule("tome", r=8)
    assert not torch.equal(reduce_model(apart.module, tome)(golden.image), outputs[0]), "the metric decides"


def test_a_stale_joined_copy_is_refused(golden, dtem):
    def stale(state):
        state["blocks.3.attn.qkv.weight"] = state["blocks.3.attn.qkv.weight"] + 1e-3
        return state

    with pytest.raises(UsageError, match="blocks.3.attn.qkv.weight is not made of qkv_layer and metric_layer"):
        load(golden, checkpoint=dtem(stale))


def test_trained_weights_without_metric_layers_are_refused(golden):
    loaded = load(golden, checkpoint=golden.folder / "tiny_vit.safetensors")
    with pytest.raises(UsageError, match='dtem needs 6 trained metric layers.*predictor="FILE"'):
        learned_layers(loaded, loaded.schedule("dtem", r=8))


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("5.")},
            "metric layers for 5 blocks, the model has 6",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "2.metric_layer.bias"}, "missing 2.metric_layer.bias"),
        (
            lambda s: s | {"1.metric_layer.weight": torch.ones(16, 32)},
            r"1.metric_layer.weight is \(16, 32\), wanted \(16, 64\)",
        ),
        (lambda s: s | {"1.metric_layer.bias": torch.full((16,), torch.nan)}, "1.metric_layer.bias is not of finite"),
    ],
)
def test_metric_layers_must_fit(change, said):
    layers = metric_layers.random_layers(64, 16, n_blocks=6, seed=0)
    metric_layers.check_layers(layers, 64, n_blocks=6)
    with pytest.raises(UsageError, match=said):
        metric_layers.check_layers(change(layers), 64, n_blocks=6)


def test_dtem_with_the_keys_as_its_metric_is_tome(golden, tmp_path):
    loaded = load(golden, checkpoint=golden.folder / "tiny_vit.safetensors")
    save_file(keys_as_metric(as_plain(loaded.module)), tmp_path / "keys.safetensors")
    loaded = load(golden, checkpoint=golden.folder / "tiny_vit.safetensors", predictor=tmp_path / "keys.safetensors")
    out = {}
    for method in ("tome", "dtem"):
        schedule = loaded.schedule(method, r=8)
        out[method] = reduce_model(loaded.module, schedule, learned_layers(loaded, schedule)).run(golden.image[1:])
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(out["tome"].plans, out["dtem"].plans, strict=True))
    assert torch.allclose(out["tome"].output, out["dtem"].output, atol=1e-5)


def test_keys_that_are_normed_by_head_are_no_linear_layer():
    normed = load_model("vit_tiny_patch16_224", {"depth": 1, "qk_norm": True})
    with pytest.raises(UsageError, match="norms its keys by head"):
        keys_as_metric(as_plain(normed.module))


def test_a_file_of_neither_kind_of_layers_is_refused(golden, tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="no score heads and no metric layers"):
        load(golden, predictor=tmp_path / "x.safetensors")
