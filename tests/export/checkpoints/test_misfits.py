"""Files that do not fit, or not whole: what was asked away is no error, and the rest is one line with advice that is right."""

import pytest
import torch

from tokexport import UsageError, load_model

NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def model_of(name=NAME, **kwargs):
    import timm

    torch.manual_seed(1)
    return timm.create_model(name, **{**KWARGS, **kwargs}).eval()


@pytest.fixture(scope="module")
def state():
    return model_of().state_dict()


def load(value, tmp_path, kwargs=KWARGS):
    torch.save(value, tmp_path / "file")
    return load_model(NAME, kwargs, checkpoint=tmp_path / "file")


def test_no_classes_leave_the_classifier_out(state, tmp_path):
    bare = {**KWARGS, "num_classes": 0}
    for extra in ({}, {"head.0.weight": torch.ones(16, 32), "head.3.bias": torch.ones(5)}):
        heads = {k: v for k, v in state.items() if not k.startswith("head")} if extra else state
        loaded = load({**heads, **extra}, tmp_path, bare)
        assert loaded.notes == ["the classifier is left out (num_classes=0): head (2 tensors)"]
        assert torch.equal(loaded.module.norm.weight, state["norm.weight"]) and loaded.activation is None


MISFITS = {
    "classes": (
        lambda s: model_of(num_classes=9).state_dict(),
        ["the file has 9 classes, the model 5: give num_classes=9"],
        1,
    ),
    "channels": (
        lambda s: model_of(in_chans=1).state_dict(),
        ["for images of 1 channel, the model for 3: give in_chans=1"],
        1,
    ),
    "depth": (
        lambda s: model_of(depth=5).state_dict(),
        ["the file has 5 blocks, the model 2", "and 24 more", "give depth=5"],
        15,
    ),
    "layers in the head": (
        lambda s: {
            **{k: v for k, v in s.items() if "head" not in k},
            "head.0.weight": s["head.weight"],
            "head.3.weight": s["head.weight"],
        },
        ["classifier has layers of its own (head.0, head.3)", "num_classes=0"],
        6,
    ),
    "no head": (
        lambda s: {k: v for k, v in s.items() if "head" not in k},
        ["has no classifier: give num_classes=0"],
        1,
    ),
    "width": (lambda s: model_of(embed_dim=64).state_dict(), ["for width 64, the model has 32", "embed_dim=64"], 15),
    "patch": (
        lambda s: model_of(patch_size=16).state_dict(),
        ["patches of 16 pixels, the model for 8", "patch_size=16"],
        1,
    ),
    "registers": (lambda s: model_of(reg_tokens=2).state_dict(), ["the file has 2 register tokens", "reg_tokens=2"], 1),
    "scale": (
        lambda s: model_of(init_values=1.0).state_dict(),
        ["the file has LayerScale, the model none", "init_values=1e-5"],
        6,
    ),
    "pool": (lambda s: model_of(global_pool="avg").state_dict(), ["average pooling", "give global_pool=avg"], 6),
    "qk norm": (lambda s: model_of(qk_norm=True).state_dict(), ["norms of queries and keys", "qk_norm=true"], 10),
    "bias": (
        lambda s: {k: v for k, v in s.items() if "qkv.bias" not in k},
        ["the model has biases", "qkv_bias=false"],
        1,
    ),
    "distilled": (
        lambda s: model_of("deit_tiny_distilled_patch16_224").state_dict(),
        ["a distillation token", "deit_small_distilled"],
        6,
    ),
    "attention pool": (
        lambda s: model_of(global_pool="map", class_token=False).state_dict(),
        ["only the file pools by attention", "global_pool=map"],
        15,
    ),
    "nothing": (
        lambda s: {"a.weight": torch.ones(1), "b.weight": torch.ones(1)},
        ["nothing in the file is named like"],
        15,
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_misfit_is_one_line_then_at_most_twelve_keys_then_right_advice(kind, state, tmp_path):
    make, words, lines = MISFITS[kind]
    with pytest.raises(UsageError) as e:
        load(make(state), tmp_path)
    message = str(e.value)
    assert all(w in message for w in words), message
    assert "of its 32 tensors match" in message.splitlines()[0] and len(message.splitlines()) <= lines


def test_the_advice_of_a_misfit_is_right(state, tmp_path):
    """What it says to give makes the file load."""
    for kwargs in (
        {"num_classes": 9},
        {"in_chans": 1},
        {"depth": 5},
        {"patch_size": 16},
        {"reg_tokens": 2},
        {"qk_norm": True},
    ):
        file = model_of(**kwargs).state_dict()
        with pytest.raises(UsageError) as e:
            load(file, tmp_path)
        key, value = next(iter(kwargs.items()))
        assert f"{key}={str(value).lower()}" in str(e.value)
        load(file, tmp_path, {**KWARGS, **kwargs})


def test_a_grey_model_reads_photos_in_grey_with_one_mean(tmp_path):
    loaded = load(model_of(in_chans=1).state_dict(), tmp_path, {**KWARGS, "in_chans": 1})
    assert loaded.preprocess.mean == (0.5,) and loaded.preprocess.std == (0.5,)
    assert loaded.notes == ["photos are read in grey with mean 0.5 and std 0.5: state others with mean and std"]
