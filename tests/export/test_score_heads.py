"""Score heads: from a checkpoint or a file of their own, read strictly, and computing what the paper says."""

import pytest
import torch
from safetensors.torch import save_file
from tokexport.export.checkpoints import score_heads
from tokexport.export.models.load import hash_weights
from tokexport.export.models.score_head import make_heads
from torch import nn

from tokexport import UsageError, load_model

from .scripts import KWARGS, NAME, SCRIPTS, X, heads_state, model_of


@pytest.mark.parametrize("script, slot", [("DynamicViT", True), ("TPS", True), ("TPS", False)])
def test_score_heads_come_with_the_checkpoint(script, slot, tmp_path):
    model, heads = model_of(no_embed_class=not slot), heads_state()
    torch.save(SCRIPTS[script]({**model.state_dict(), **heads}), tmp_path / "vit.pth")
    loaded = load_model(NAME, KWARGS, checkpoint=tmp_path / "vit.pth")
    assert "checkpoint format: DynamicViT or dTPS (score heads for 3 stages)" in loaded.notes and len(
        loaded.notes
    ) == 2 - slot + (script == "DynamicViT")
    assert torch.allclose(loaded.module(X), model(X), atol=1e-6, rtol=0)
    assert loaded.heads.keys() == {k.removeprefix("score_predictor.") for k in heads}
    assert all(torch.equal(loaded.heads[k.removeprefix("score_predictor.")], v) for k, v in heads.items())
    assert (
        loaded.weights["sha256"]
        == hash_weights({**loaded.module.state_dict(), **heads})
        != hash_weights(loaded.module.state_dict())
    )


def test_a_head_computes_what_the_paper_says():
    heads = score_heads.random_heads(32, 1, seed=0)
    for k in heads:  # no bias of zero, no neutral norm
        heads[k] = heads[k] + 0.1 * torch.randn_like(heads[k])
    w, x = (lambda name: heads[f"0.{name}"].double()), torch.randn(2, 7, 32, dtype=torch.float64)
    linear = lambda t, name: t @ w(f"{name}.weight").T + w(f"{name}.bias")
    gelu = lambda t: t * 0.5 * (1 + torch.erf(t / 2**0.5))
    z = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    z = z * w("in_conv.0.weight") + w("in_conv.0.bias")
    z = gelu(linear(z, "in_conv.1"))
    z = torch.cat([z[..., :16], z[..., 16:].mean(1, keepdim=True).expand(-1, 7, -1)], -1)
    z = linear(gelu(linear(gelu(linear(z, "out_conv.0")), "out_conv.2")), "out_conv.4")
    assert torch.allclose(
        make_heads(heads, 32).double()[0](x), z - z.exp().sum(-1, keepdim=True).log(), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(
    "name, write",
    [
        ("plain.pth", lambda p, h: torch.save({k.removeprefix("score_predictor."): v for k, v in h.items()}, p)),
        ("prefixed.safetensors", lambda p, h: save_file(h, p)),
        ("whole.pth", lambda p, h: torch.save(SCRIPTS["DynamicViT"]({**model_of().state_dict(), **h}), p)),
        ("parameters.pt", lambda p, h: torch.save({k: nn.Parameter(v) for k, v in h.items()}, p)),
    ],
)
def test_score_heads_come_from_a_file_of_their_own(name, write, tmp_path):
    heads = heads_state()
    write(tmp_path / name, heads)
    loaded = load_model(NAME, KWARGS, predictor=tmp_path / name)
    assert loaded.weights["predictor"] == str(tmp_path / name)
    assert loaded.heads.keys() == {k.removeprefix("score_predictor.") for k in heads}
    assert all(torch.equal(loaded.heads[k.removeprefix("score_predictor.")], v) for k, v in heads.items())
    assert not any(v.requires_grad for v in loaded.heads.values())
    assert loaded.weights["sha256"] != load_model(NAME, KWARGS).weights["sha256"]
    score_heads.check_heads(loaded.heads, 32, 3)


def test_the_predictors_file_wins_over_the_checkpoint_and_a_note_says_so(tmp_path):
    torch.save({**model_of().state_dict(), **heads_state(2)}, tmp_path / "vit.pth")
    torch.save(heads_state(3), tmp_path / "heads.pth")
    loaded = load_model(NAME, KWARGS, checkpoint=tmp_path / "vit.pth", predictor=tmp_path / "heads.pth")
    assert loaded.notes[-1] == f"score heads are taken from {tmp_path / 'heads.pth'}, not from the checkpoint"
    assert {k.split(".")[0] for k in loaded.heads} == {"0", "1", "2"}


@pytest.mark.parametrize(
    "write, said",
    [
        (None, "predictor .*no such file"),
        (
            lambda p: torch.save({"a": torch.ones(1)}, p),
            "holds no score heads and no metric layers; wanted keys such as",
        ),
        (lambda p: torch.save(model_of().state_dict(), p), "holds no score heads"),
        (lambda p: p.write_text("?"), "predictor .*(damaged|cannot be read)"),
    ],
)
def test_a_predictors_file_without_heads_is_refused(write, said, tmp_path):
    if write:
        write(tmp_path / "heads.pth")
    with pytest.raises(UsageError, match=said):
        load_model(NAME, KWARGS, predictor=tmp_path / "heads.pth")


@pytest.mark.parametrize(
    "change, width, n_stages, said",
    [
        (lambda h: h, 48, 3, ["for width 32, the model has 48"]),
        (lambda h: h, 32, 2, ["for 3 stages", "2 blocks"]),
        (lambda h: {k: v for k, v in h.items() if k[0] != "1"}, 32, 3, ["for 2 stages"]),
        (
            lambda h: {k.replace("1.", "7.", 1) if k[0] == "1" else k: v for k, v in h.items()},
            32,
            3,
            [f"missing 1.{k}" for k in list(score_heads.head_shapes(32))[:8]] + ["more"],
        ),
        (
            lambda h: {**h, "0.extra": torch.ones(1), "0.out_conv.0.bias": torch.ones(3)},
            32,
            3,
            ["unexpected 0.extra", "0.out_conv.0.bias is (3,), wanted (16,)"],
        ),
        (lambda h: {**h, "2.in_conv.1.bias": torch.full((32,), torch.nan)}, 32, 3, ["2.in_conv.1.bias is not finite"]),
        (lambda h: h, 30, 3, ["multiple of 4"]),
    ],
)
def test_all_that_is_wrong_with_heads_is_listed(change, width, n_stages, said):
    heads = score_heads.random_heads(32, 3, seed=0)
    score_heads.check_heads(heads, 32, 3)
    with pytest.raises(UsageError) as e:
        score_heads.check_heads(change(heads), width, n_stages)
    assert all(words in str(e.value) for words in said)


def test_random_heads_come_from_the_seed_and_tell_tokens_apart():
    one, same, other = (score_heads.random_heads(32, 2, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one) and not torch.equal(
        one["0.in_conv.1.weight"], other["0.in_conv.1.weight"]
    )
    assert not torch.equal(one["0.in_conv.1.weight"], one["1.in_conv.1.weight"])
    scores = make_heads(one, 32)[0](torch.randn(1, 16, 32))[0, :, 0].sort().values
    assert scores.diff().min() > 1e-4 and 0.8 < one["0.in_conv.1.weight"].std() * 32**0.5 < 1.2
