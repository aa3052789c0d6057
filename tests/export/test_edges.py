"""Edges that users met: confident score heads, a single token left, a reduction before block 0."""

import onnx
import pytest
import torch
from tokexport.export.checkpoints.score_heads import random_heads
from tokexport.export.graph.static_vit import StaticViT
from tokexport.export.models import as_plain
from tokexport.export.models.learned_layers import learned_layers
from tokexport.export.outputs import WITH_SOURCES
from tokexport.export.reducers import TABLE as METHODS
from tokexport.tools.show.terminal import tokens_words

from tokexport import Schedule, UsageError, export_onnx, load_model, reduce_model, verify

from .. import cases

KWARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 10}


def made(tmp_path, method, name="vit_tiny_patch16_224", batch=None, predictor=None, n_prefix=1, kwargs={}, **options):
    loaded = load_model(name, {**KWARGS, **kwargs}, seed=3, predictor=predictor)
    s = Schedule.parse(method=method, depth=4, n_tokens=64 + n_prefix, n_prefix=n_prefix, **options)
    export_onnx(loaded, s, tmp_path / "v.onnx", batch=batch)
    return tmp_path / "v.onnx"


@pytest.mark.parametrize("shift", [0, 5, 20])
@pytest.mark.parametrize("method", ["dynamicvit", "dtps"])
def test_confident_heads_are_judged_as_any(method, shift, tmp_path):
    """log-probabilities to keep of nearly 1 are all nearly 0; the odds still tell the tokens apart, and an order upside down."""
    from safetensors.torch import save_file

    heads = random_heads(64, 2, seed=1)
    for stage in range(2):
        heads[f"{stage}.out_conv.4.bias"] += heads[f"{stage}.out_conv.4.bias"].new_tensor([shift, -shift])
    save_file(heads, tmp_path / "h.safetensors")
    path = made(tmp_path, method, predictor=tmp_path / "h.safetensors", at=(1, 2))
    report = verify(path)
    assert report.passed and report.decisions == 1.0, report.summary()
    model = onnx.load(path)
    last = [i for i in model.graph.initializer if list(i.dims) == [16, 1]]
    assert len(last) == 2
    for i in last:
        i.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(i), i.name))
    onnx.save(model, path)
    assert not verify(path).passed


@pytest.mark.parametrize("batch", [1, 2, None])
@pytest.mark.parametrize("case", ["siglip", "class token only", "one patch"])
def test_a_single_token_may_be_left(case, batch, tmp_path):
    if case == "siglip":
        path = made(
            tmp_path,
            "evit",
            "vit_base_patch16_siglip_224",
            batch,
            n_prefix=0,
            kwargs={"num_classes": 0},
            at=(1, 2),
            keep_rate=0.01,
            fuse=False,
            score="mean",
        )
    elif case == "class token only":
        path = made(tmp_path, "diffrate", batch=batch, rates={"prune_kept": [65, 1, 1, 1], "merge_kept": [65, 1, 1, 1]})
    else:
        path = made(tmp_path, "evit", batch=batch, kwargs={"global_pool": "map"}, at=(0,), keep_rate=0.01, fuse=False)
    report = verify(path)
    assert report.passed, report.summary()


def test_the_tokens_of_the_image_come_first(tmp_path):
    s = Schedule.parse(method="dynamicvit", depth=4, n_tokens=65, n_prefix=1, at=(0,), keep_rate=0.5)
    assert tokens_words(s.n_tokens, s.tokens_per_block()) == "65 in, then 33 33 33 33"


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_has_64_bits(seed):
    with pytest.raises(UsageError, match="64 bits"):
        load_model("vit_tiny_patch16_224", KWARGS, seed=seed)


SIZES = {
    "384 pixels": (384, 16),
    "not square": ((64, 96), 8),
    "patch 14": (224, 14),
    "patch 32": (256, 32),
    "not a multiple": ((70, 100), 8),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_any_image_and_patch_size(size, method, relative):
    """The static model computes what the reference does, whatever the grid; published DiffRate counts are scaled to it."""
    pixels, patch = SIZES[size]
    case = cases.METHODS[method]
    loaded = load_model(
        "vit_tiny_patch16_224",
        {**KWARGS, "img_size": pixels, "patch_size": patch, "embed_dim": 32, "depth": case.depth},
        seed=3,
    )
    model = loaded.module
    s = loaded.schedule(method, **case.any_size)
    heads = learned_layers(loaded, s)
    image = torch.randn(2, 3, *as_plain(model).preprocess.size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = StaticViT(model, s, None, heads, emission=WITH_SOURCES)(image)
    wanted = reduce_model(model, s, heads).run(image)
    assert relative(got["logits"], wanted.output) <= 1e-4 and torch.equal(got["sources"], wanted.sources)
    assert s.n_tokens == 1 + model.patch_embed.num_patches and (method == "none") == (s.n_final == s.n_tokens)
