"""Checkpoints as their authors' training code writes them: every format loads strictly, gives the same numbers, and runs no code."""

import argparse
import os
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokexport.export.checkpoints import score_heads, timm_names
from tokexport.export.checkpoints.layout import Converted
from tokexport.export.checkpoints.weights import read_state
from tokexport.export.models.load import hash_weights
from tokexport.export.models.score_head import make_heads
from torch import nn

from tokexport import UsageError, load_model

NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model_of(name=NAME, **kwargs):
    """A timm model in which every tensor is random, so that no two states give the same numbers."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, **{**KWARGS, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def heads_state(n_stages=3, width=32):
    """Score heads by the names of the authors' models."""
    return {f"score_predictor.{k}": v for k, v in score_heads.random_heads(width, n_stages, seed=5).items()}


# Training scripts: what stands in the file beside the weights.


def _optimizer(lr=1e-3):
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    weight.sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr
    return optimizer.state_dict()


SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 7}
ARGS = argparse.Namespace(
    model="deit_small_patch16_224", lr=5e-4, clip_grad=None, drop_loc=(3, 6, 9), output_dir="out", distributed=True
)
SUBMITTED = argparse.Namespace(
    output_dir=pathlib.Path("checkpoints/%j"), args=argparse.Namespace(gpu=0)
)  # trained on a cluster

SCRIPTS = {
    "DeiT's release": lambda s: {"model": s},
    "DeiT, EViT": lambda s: {
        "model": s,
        "optimizer": _optimizer(),
        "lr_scheduler": {"base_values": [5e-4], "t_in_epochs": True},
        "epoch": 29,
        "model_ema": {k: torch.zeros_like(v) for k, v in s.items()},
        "scaler": SCALER,
        "args": ARGS,
    },
    "MAE": lambda s: {"model": s, "optimizer": _optimizer(), "epoch": 99, "scaler": SCALER, "args": SUBMITTED},
    "DynamicViT": lambda s: {
        "model": s,
        "optimizer": _optimizer(np.float64(1e-3) * 0.01),
        "epoch": "best",
        "scaler": SCALER,
        "args": ARGS,
        "best": 79.3,
        "best_ema": 0.0,
        "model_ema": {k: torch.zeros_like(v) for k, v in s.items()},
    },
    "TPS": lambda s: {
        "net": s,
        "optimizer": _optimizer(),
        "epoch": 29,
        "metrics": {"acc1": 79.7},
        "scheduler": {"base_values": [5e-4]},
        "scaler": SCALER,
    },
    "DiffRate": lambda s: {
        "model": s,
        "optimizer": _optimizer(),
        "lr_scheduler": {},
        "epoch": 2,
        "scaler": SCALER,
        "args": ARGS,
    },
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_of_each_training_script_loads(script, zipped, tmp_path):
    model = model_of()
    torch.save(SCRIPTS[script](model.state_dict()), tmp_path / "vit.pth", _use_new_zipfile_serialization=zipped)
    loaded = load_model(NAME, KWARGS, checkpoint=tmp_path / "vit.pth")
    choice = ["weights: model, as DeiT's training script evaluates it; there is model_ema too: choose with weights"]
    assert torch.equal(loaded.module(X), model(X)) and loaded.heads == {}
    assert loaded.notes == (choice if script in ("DeiT, EViT", "DynamicViT") else [])


# Formats: (the original model, its state as the authors name it, options to load it with, the script that writes it), for each row.


def _gammas():
    model = model_of(init_values=0.1)
    return (
        model,
        {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in model.state_dict().items()},
        {"init_values": 0.1},
        "DeiT's release",
    )


def _dinov2():
    from timm.layers import SwiGLUPacked

    swiglu = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    model = model_of(init_values=0.1, num_classes=0, **swiglu)
    state = {k.replace("fc1", "w12").replace("fc2", "w3"): v for k, v in model.state_dict().items()}
    return model, {**state, "mask_token": torch.ones(1, 32)}, {"init_values": 0.1, "num_classes": 0, **swiglu}, None


def _diffrate():
    model = model_of()
    rates = {
        f"blocks.{i}.{step}_ddp.{part}": torch.arange(16.0, 0, -1)
        for i in range(2)
        for step in ("prune", "merge")
        for part in ("kept_token_candidate", "selected_probability")
    }
    return model, {**model.state_dict(), **rates}, {}, "DiffRate"


def _no_class_slot():
    model = model_of(no_embed_class=True)
    assert model.pos_embed.shape[1] == 16
    return model, model.state_dict(), {}, "TPS"


def _class_slot():
    model = model_of()
    return model, model.state_dict(), {"no_embed_class": True}, "DeiT, EViT"


CASES = {
    "LayerScale": _gammas,
    "DINOv2": _dinov2,
    "DiffRate": _diffrate,
    "position embedding without": _no_class_slot,
    "position embedding with a": _class_slot,
}


def test_each_row_of_the_table_has_a_case():
    assert [next(c for c in CASES if row.name.startswith(c)) for row in timm_names.DIALECTS] == list(CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_format_gives_the_numbers_of_the_original(case, tmp_path):
    model, state, kwargs, script = CASES[case]()
    torch.save(SCRIPTS[script](state) if script else state, tmp_path / "vit.pth")
    loaded = load_model(NAME, {**KWARGS, **kwargs}, checkpoint=tmp_path / "vit.pth")
    assert torch.allclose(loaded.module(X), model(X), atol=1e-6, rtol=0)
    row = next(r for r in timm_names.DIALECTS if r.name.startswith(case))
    assert [n for n in loaded.notes if not n.startswith("weights: ")] == [f"checkpoint format: {row.name}"]
    other = {k: v + 0.05 if v.is_floating_point() else v for k, v in state.items()}
    torch.save(other, tmp_path / "other.pth")
    assert not torch.allclose(
        load_model(NAME, {**KWARGS, **kwargs}, checkpoint=tmp_path / "other.pth").module(X), model(X), atol=1e-6, rtol=0
    )


def test_dinov2_with_registers_adds_positions_before_it_inserts_them(tmp_path):
    """In the original, registers have no position and the class token has one."""
    model = model_of(reg_tokens=4, init_values=0.1)
    with torch.no_grad():
        model.pos_embed[:, 1:5] = 0
    state = {k.replace("reg_token", "register_tokens"): v for k, v in model.state_dict().items()}
    state |= {
        "pos_embed": torch.cat([model.pos_embed[:, :1], model.pos_embed[:, 5:]], 1),
        "mask_token": torch.ones(1, 32),
    }
    torch.save(state, tmp_path / "vit.pth")
    loaded = load_model(
        NAME, {**KWARGS, "reg_tokens": 4, "init_values": 0.1, "no_embed_class": True}, checkpoint=tmp_path / "vit.pth"
    )
    assert torch.allclose(loaded.module(X), model(X), atol=1e-6, rtol=0)
    assert [n.split(" (")[0] for n in loaded.notes] == [
        "checkpoint format: DINOv2",
        "checkpoint format: position embedding with a row for the class token",
    ]


def test_positions_without_a_class_row_are_resized_as_timm_does(tmp_path):
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    state = model_of(no_embed_class=True).state_dict()
    like = timm.create_model(NAME, **{**KWARGS, "img_size": 48, "no_embed_class": True}).eval()
    like.load_state_dict(checkpoint_filter_fn(dict(state), like))
    torch.save({"net": state}, tmp_path / "vit.pth")
    loaded = load_model(NAME, {**KWARGS, "img_size": 48}, checkpoint=tmp_path / "vit.pth")
    x = torch.randn(1, 3, 48, 48)
    assert torch.allclose(loaded.module(x), like(x), atol=1e-6, rtol=0)
    assert loaded.notes[1] == (
        "position embedding resized from 4x4 to 6x6 patches, as timm does (4x4 is a guess from 16 positions; pos_grid states it)"
    )


@pytest.mark.parametrize("kwargs, prefix", [({}, 1), ({"reg_tokens": 2}, 3)])
def test_prefix_tokens_without_a_position_get_zeros(kwargs, prefix, tmp_path):
    """Any constant over the channels would give the same logits, for the norms take it away: the rows themselves are looked at."""
    model = model_of(no_embed_class=True, **kwargs)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    loaded = load_model(NAME, {**KWARGS, **kwargs}, checkpoint=tmp_path / "vit.pth")
    assert (
        torch.equal(loaded.module.pos_embed[:, prefix:], model.pos_embed)
        and not loaded.module.pos_embed[:, :prefix].any()
    )
    assert torch.allclose(loaded.module(X), model(X), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "rows, wanted, n_patches, word",
    [
        (17, 17, 16, None),
        (16, 17, 16, "without"),
        (16, 16, 16, None),
        (17, 16, 16, "with a"),  # 4x4
        (36, 17, 16, "without"),
        (37, 17, 16, None),
        (37, 16, 16, "with a"),
        (36, 16, 16, None),  # another square grid
        (15, 16, 15, "without"),
        (16, 16, 15, None),
        (16, 15, 15, None),
        (17, 16, 15, None),
        (17, 15, 15, "with a"),  # 3x5: 16 may be its own
        (10, 11, 10, None),
        (9, 10, 10, None),
        (11, 10, 10, "with a"),  # 2x5: 10 rows are rather 3x3 and a class token, as for timm
        (23, 17, 16, None),
        (0, 17, 16, None),
    ],
)
def test_rows_of_the_class_token_are_told_from_the_count(rows, wanted, n_patches, word):
    state = {"pos_embed": torch.zeros(1, rows, 4), "cls_token": torch.ones(1, 1, 4)}
    own = {"pos_embed": torch.zeros(1, wanted, 4), "cls_token": torch.zeros(1, 1, 4)}
    names = [r.name for r in timm_names.DIALECTS if r.known(state, own, n_patches)]
    assert len(names) == (word is not None) and all(n.startswith(f"position embedding {word}") for n in names)


@pytest.mark.parametrize(
    "change",
    [
        {"pos_embed": torch.zeros(2, 17, 32)},
        {"pos_embed": torch.zeros(1, 17, 8)},
        {"pos_embed": torch.zeros(17, 32)},
        {"cls_token": torch.zeros(1, 1, 1)},
        {"cls_token": torch.zeros(8)},
    ],
)
def test_tensors_of_other_shapes_are_not_converted_but_listed(change, tmp_path):
    torch.save({**model_of().state_dict(), **change}, tmp_path / "vit.pth")
    with pytest.raises(UsageError, match=r"(pos_embed|cls_token) is \(|has 17 positions"):
        load_model(NAME, {**KWARGS, "no_embed_class": True}, checkpoint=tmp_path / "vit.pth")


def test_files_by_timms_names_are_left_as_they_are():
    for name, kwargs in [
        (NAME, {}),
        (NAME, {"global_pool": "avg"}),
        (NAME, {"init_values": 0.1, "reg_tokens": 2}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("eva02_tiny_patch14_224", {"patch_size": 8}),
        (NAME, {"no_embed_class": True}),
        (NAME, {"class_token": False, "global_pool": "avg"}),
    ]:
        model = model_of(name, **kwargs)
        state = model.state_dict()
        found = timm_names.LAYOUTS[1].convert(state, model)
        assert isinstance(found, Converted) and found.notes == () and found.state == state
        assert all(found.state[k] is state[k] for k in state)


def test_a_fine_tuned_mae_loads_with_average_pooling_and_otherwise_says_so(tmp_path):
    model = model_of(global_pool="avg")
    assert "fc_norm.weight" in model.state_dict() and "norm.weight" not in model.state_dict()
    torch.save(SCRIPTS["MAE"](model.state_dict()), tmp_path / "mae.pth")
    assert torch.equal(
        load_model(NAME, {**KWARGS, "global_pool": "avg"}, checkpoint=tmp_path / "mae.pth").module(X), model(X)
    )
    with pytest.raises(UsageError, match="average pooling .*\n(.*\n)*give global_pool=avg"):
        load_model(NAME, KWARGS, checkpoint=tmp_path / "mae.pth")


def test_a_pretrained_mae_has_no_classifier_and_gives_its_encoder_when_asked(tmp_path):
    state = {
        **model_of(num_classes=0).state_dict(),
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_pos_embed": torch.zeros(1, 17, 16),
        "decoder_embed.weight": torch.zeros(16, 32),
        "decoder_blocks.0.norm1.weight": torch.zeros(16),
    }
    torch.save({"model": state}, tmp_path / "mae.pth")
    with pytest.raises(UsageError, match="the file has no classifier: give num_classes=0"):
        load_model(NAME, KWARGS, checkpoint=tmp_path / "mae.pth")
    loaded = load_model(NAME, {**KWARGS, "num_classes": 0}, checkpoint=tmp_path / "mae.pth")
    assert "the decoder of MAE's pretraining" in loaded.notes[-1]


@pytest.mark.parametrize(
    "kwargs, said",
    [({"num_classes": 0}, "num_classes=0"), ({"init_values": 0.1}, "the file has LayerScale.*init_values=1e-5")],
)
def test_a_model_of_other_options_is_refused_with_the_option(kwargs, said, tmp_path):
    torch.save(
        {k.replace("ls1.gamma", "gamma_1"): v for k, v in model_of(**kwargs).state_dict().items()}, tmp_path / "vit.pth"
    )
    with pytest.raises(UsageError, match=f"(?s){said}"):
        load_model(NAME, KWARGS, checkpoint=tmp_path / "vit.pth")


def test_a_tensor_by_two_names_is_refused(tmp_path):
    model = model_of()
    state = {**model.state_dict(), "blocks.0.gamma_1": torch.ones(32), "blocks.0.ls1.gamma": torch.ones(32)}
    with pytest.raises(UsageError, match="blocks.0.ls1.gamma twice"):
        timm_names.LAYOUTS[1].convert(state, model)


# Score heads.


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


# No code of a file is run.


class Calls:
    """Pickled, it calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class State(argparse.Namespace):
    """Pickled, it is a Namespace with a class of its own."""


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "hide",
    [
        lambda call: argparse.Namespace(output_dir=call),
        lambda call: {"lr": call},
        lambda call: State(a=1, b=call),
        lambda call: [call, Calls(eval, "1/0")],
        lambda call: Calls(np.load, "x.npy", None, True),
        lambda call: [torch.nn.Linear(1, 1), call],
    ],
    ids=["in args", "in a dictionary", "own class", "eval", "numpy.load", "module"],
)
def test_a_pickle_that_calls_anything_loads_and_nothing_is_called(hide, zipped, tmp_path):
    state = model_of().state_dict()
    content = {"model": state, "args": hide(Calls(os.mkdir, str(tmp_path / "ran")))}
    torch.save(content, tmp_path / "vit.pth", _use_new_zipfile_serialization=zipped)
    loaded = load_model(NAME, KWARGS, checkpoint=tmp_path / "vit.pth")
    assert not (tmp_path / "ran").exists() and torch.equal(loaded.module.cls_token, state["cls_token"])


def test_the_values_beside_the_weights_are_not_even_made(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(argparse.Namespace, "__init__", lambda self, **values: made.append(values))
    state = {"w": torch.ones(2)}
    torch.save(
        {"model": state, "args": ARGS, "lr": np.float64(1.0), "small": np.float32(2.0), "n": np.int64(3)},
        tmp_path / "vit.pth",
    )
    assert torch.equal(read_state(tmp_path / "vit.pth")["w"], state["w"]) and made == []
    torch.save({"model": ARGS, "w": 1}, tmp_path / "args.pth")
    with pytest.raises(UsageError, match="holds no state dict .*it has: model, w"):
        load_model(NAME, KWARGS, checkpoint=tmp_path / "args.pth")
    assert made == []


def test_a_dictionary_that_holds_itself_is_refused(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "vit.pth")
    with pytest.raises(UsageError, match="holds no state dict"):
        read_state(tmp_path / "vit.pth")


def test_names_that_are_no_files_give_one_sentence(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    torch.save({"net": {"w": torch.ones(1)}}, tmp_path / "latest")
    assert read_state(tmp_path / "latest").keys() == {"w"}
    for name, said in [
        ("folder.pth", "is a directory, wanted a file"),
        ("x" * 5000 + ".pth", "no such file"),
        ("a\0b.pth", "no such file"),
    ]:
        with pytest.raises(UsageError, match=said):
            read_state(tmp_path / name)
