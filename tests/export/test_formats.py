"""Checkpoints as their authors' training code writes them: every format loads strictly, gives the same numbers, and runs no code."""

import pytest
import torch
from tokexport.export.checkpoints import timm_names
from tokexport.export.checkpoints.layout import Converted
from torch import nn

from tokexport import UsageError, load_model

from .scripts import KWARGS, NAME, SCRIPTS, X, model_of

# Training scripts: what stands in the file beside the weights.


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
