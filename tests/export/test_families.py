"""A model family is one file with an adapter and one row of FAMILIES: a toy that timm knows nothing of is reduced and exported."""

import sys
import types

import pytest
import torch
from tokexport.export import models
from tokexport.export.graph.static_vit import StaticViT
from tokexport.export.models import as_plain
from tokexport.export.models.load import LoadedModel
from tokexport.export.models.plain_vit import BlockParts, PlainViT, Pooling, linear
from tokexport.export.outputs import WITH_SOURCES
from tokexport.export.provenance import Preprocess
from torch import nn

from tokexport import UsageError, export_onnx, load_model, reduce_model

WIDTH, HEADS, GRID = 16, 2, (4, 5)


class ToyBlock(nn.Module):
    """Separate queries, keys and values, as Hugging Face's models have them."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.dense = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x):
        y = self.before(x)
        q, k, v = (layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.dense(self.after(x))


class ToyViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.where = nn.Parameter(torch.randn(1, 1 + GRID[0] * GRID[1], WIDTH))
        self.layers = nn.ModuleList(ToyBlock() for _ in range(3))
        self.norm, self.classify = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)

    def embed(self, image):
        patches = self.project(image).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(image), -1, -1), patches], 1) + self.where

    def forward(self, image):
        x = self.embed(image)
        for layer in self.layers:
            x = layer(x)
        return self.classify(self.norm(x)[:, 0])


def parts(block: ToyBlock) -> BlockParts:
    layers = (block.query, block.key, block.value)
    qkv = linear(torch.cat([m.weight for m in layers]), torch.cat([m.bias for m in layers]))
    same = nn.Identity()
    return BlockParts(
        norm1=block.before,
        qkv=qkv,
        heads=HEADS,
        scale=(WIDTH // HEADS) ** -0.5,
        q_norm=same,
        k_norm=same,
        norm=same,
        gate=None,
        proj=block.out,
        gamma1=None,
        norm2=block.after,
        mlp=block.dense,
        gamma2=None,
        mlp_last="2",
    )


def adapt(model: nn.Module) -> PlainViT | None:
    if not isinstance(model, ToyViT):
        return None
    n = GRID[0] * GRID[1]
    dims = {
        "width": WIDTH,
        "attn_width": WIDTH,
        "mlp": [(WIDTH, 32), (32, WIDTH)],
        "classes": 7,
        "channels": 3,
        "gate": 0,
    }
    dims |= {"heads": 1, "patches": n, "patch_values": 48, "pool": "token"}
    return PlainViT(
        module=model,
        n_tokens=n + 1,
        n_prefix=1,
        has_class_token=True,
        patch=model.project,
        patch_norm=nn.Identity(),
        norm_pre=nn.Identity(),
        norm=model.norm,
        pooling=Pooling(lambda x: model.classify(x[:, 0]), (model.classify,), nn.Identity(), rows=(0,)),
        embed=model.embed,
        positions=lambda: torch.cat([model.token[0] + model.where[0, :1], model.where[0, 1:]]).detach(),
        blocks=lambda: [parts(b) for b in model.layers],
        n_blocks=3,
        dims=dims,
        preprocess=Preprocess((GRID[0] * 4, GRID[1] * 4), (0.5,) * 3, (0.5,) * 3),
    )


@pytest.fixture
def toy(monkeypatch):
    family = types.ModuleType("toy_family")
    family.adapt, family.WANTED = adapt, "a toy"
    monkeypatch.setitem(sys.modules, "toy_family", family)
    monkeypatch.setitem(models.FAMILIES, "toy", "toy_family")
    torch.manual_seed(3)
    model = ToyViT().eval().requires_grad_(False)
    return LoadedModel(model, "toy", {}, {"source": "random", "seed": 0, "sha256": ""}, [], as_plain(model).preprocess)


def test_a_model_of_no_family_is_refused_by_name():
    with pytest.raises(UsageError, match="ToyViT is no plain Vision Transformer: wanted timm's"):
        reduce_model(ToyViT(), load_model("vit_tiny_patch16_224", {"depth": 1}).schedule("none"))


@pytest.mark.parametrize(
    "method, asked", [("none", {}), ("tome", {"r": 3}), ("evit", {"at": [1]}), ("dtps", {"at": [1, 2]})]
)
def test_a_toy_family_is_reduced_and_exported(toy, method, asked, relative, run_onnx, tmp_path):
    from tokexport.export.models.learned_layers import learned_layers

    schedule = toy.schedule(method, **asked)
    assert schedule.n_tokens == 21 and schedule.depth == 3
    heads = learned_layers(toy, schedule)
    image = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(1))
    wanted = reduce_model(toy.module, schedule, heads).run(image)
    if method == "none":
        assert relative(wanted.output, toy.module(image)) <= 1e-5
    with torch.no_grad():
        static = StaticViT(toy.module, schedule, None, heads, emission=WITH_SOURCES)(image)
    assert relative(static["logits"], wanted.output) <= 1e-5 and torch.equal(static["sources"], wanted.sources)
    export_onnx(toy, schedule, tmp_path / "toy.onnx", sources=True)
    got = run_onnx(tmp_path / "toy.onnx", image)
    assert relative(got["logits"], wanted.output) <= 1e-4 and (got["sources"] == wanted.sources.numpy()).all()
