"""Models by name and weights by file: what is taken, what is refused, and that nothing in a file is run."""

import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokexport.export.models.load import hash_weights, parse_kwargs

from tokexport import UsageError, load_model

NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4, "num_classes": 10}


@pytest.fixture(scope="module")
def state(golden):
    return load_file(golden.folder / "tiny_vit.safetensors")


class Opens:
    """Pickled, it makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "name, kwargs, said",
    [
        ("deit_smal_patch16_224", {}, "unknown model 'deit_smal_patch16_224'.*deit_small_patch16_224"),
        ("qqqqqq", {}, "unknown model 'qqqqqq': wanted a timm model name$"),
        (NAME, {"depht": 3}, "does not take these model-kwargs.*depht"),
        (NAME, {"img_size": "big"}, "cannot be made|does not take"),
        (NAME, {"embed_dim": 65}, "cannot be made with"),
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 24, "depths": (1, 1, 1, 1)},
            "SwinTransformer is no plain Vision Transformer",
        ),
        ("resnet18", {}, "ResNet is no plain Vision Transformer"),
        (NAME, {**KWARGS, "patch_drop_rate": 0.5}, "patch_drop is PatchDropout"),
        (NAME, {**KWARGS, "global_pool": ""}, "global_pool is ''"),
        (NAME, {**KWARGS, "dynamic_img_pad": True}, "fixed img_size"),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused_by_name(name, kwargs, said):
    with pytest.raises(UsageError, match=said):
        load_model(name, kwargs)


def test_all_parts_that_are_not_plain_are_listed():
    with pytest.raises(UsageError) as e:
        load_model(NAME, {**KWARGS, "patch_drop_rate": 0.5, "global_pool": ""})
    assert "patch_drop" in str(e.value) and "global_pool" in str(e.value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "optimizer": {}},
    ],
    ids=["plain", "model", "state_dict", "model in state_dict", "module.", "model and module."],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_a_checkpoint_is_unwrapped(wrap, suffix, state, tmp_path, tiny):
    torch.save(wrap(state), tmp_path / f"vit{suffix}")
    loaded = load_model(NAME, KWARGS, checkpoint=tmp_path / f"vit{suffix}")
    assert loaded.weights == {
        "source": "checkpoint",
        "file": str(tmp_path / f"vit{suffix}"),
        "sha256": hash_weights(tiny("tiny_vit").module.state_dict()),
    }
    prefixed = any("module." in k for k in wrap({"k": 0}).get("model", wrap({"k": 0})))
    assert (
        loaded.notes == (["the keys' prefix module. is taken off"] if prefixed else []) and not loaded.module.training
    )


def test_safetensors_fill_every_tensor(tiny, state):
    own = tiny("tiny_vit").module.state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in state)


def test_what_does_not_fit_is_told_in_one_line_then_at_most_twelve_keys_then_what_to_do(state, tmp_path):
    wrong = {k: v for k, v in state.items() if not k.startswith("blocks.5.")} | {
        "blocks.0.extra": torch.zeros(1),
        "extra.two": torch.zeros(1),
    }
    wrong["head.weight"], wrong["blocks.0.norm1.bias"] = torch.zeros(7, 64), torch.zeros(3)
    save_file(wrong, tmp_path / "vit.safetensors")
    with pytest.raises(UsageError) as e:
        load_model(NAME, KWARGS, checkpoint=tmp_path / "vit.safetensors")
    first, *keys, advice = str(e.value).splitlines()
    assert (
        "66 of its 80 tensors match; the file has 5 blocks, the model 6; the file has 7 classes, the model 10" in first
    )
    assert keys[:2] == [
        "  unexpected blocks.0.extra",
        "  blocks.0.norm1.bias is (3,), wanted (64,)",
    ]  # what nothing explains
    assert len(keys) == 13 and keys[-1] == "  and 3 more" and all("extra.two" not in k for k in keys)
    assert advice == "give depth=5, or its model; give num_classes=7"


def test_a_pickle_with_code_loads_and_the_code_is_not_run(state, tmp_path):
    torch.save({"model": state, "args": Opens(tmp_path / "ran")}, tmp_path / "vit.pth")
    load_model(NAME, KWARGS, checkpoint=tmp_path / "vit.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "vit.pth", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file was no danger: this test tests nothing"


def _truncated(path, state):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name, write, said",
    [
        ("no.pth", None, "no such file"),
        ("folder.pth", lambda p, s: p.mkdir(), "wanted one file of weights in the folder, there is none"),
        ("empty.pth", lambda p, s: p.touch(), "it is empty"),
        ("half.pth", _truncated, "a damaged zip"),
        ("half.safetensors", _truncated, "no safetensors"),
        ("text.pth", lambda p, s: p.write_text("not a checkpoint"), "of no known kind; wanted safetensors"),
        ("page.pth", lambda p, s: p.write_text("<!DOCTYPE html>"), "a web page"),
        ("lfs.pth", lambda p, s: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        ("list.pth", lambda p, s: torch.save([1, 2], p), "holds no state dict"),
        ("nothing.pth", lambda p, s: torch.save({}, p), "holds no state dict"),
        ("numbers.pth", lambda p, s: torch.save({"epoch": 3}, p), "holds no state dict"),
        ("tensor.pth", lambda p, s: torch.save(torch.zeros(3), p), "holds no state dict"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_and_named(name, write, said, state, tmp_path):
    path = tmp_path / name
    if write:
        write(path, state)
    with pytest.raises(UsageError, match=said) as e:
        load_model(NAME, KWARGS, checkpoint=path)
    assert str(path) in str(e.value)


def test_checkpoint_and_pretrained_exclude_each_other(golden):
    with pytest.raises(UsageError, match="give one of them"):
        load_model(NAME, KWARGS, checkpoint=golden.folder / "tiny_vit.safetensors", pretrained=True)


@pytest.mark.parametrize(
    "kind, img_size, grid",
    [
        ("tiny_vit", 96, (12, 12)),
        ("tiny_vit_nocls", 48, (6, 6)),
        ("tiny_vit_distilled", (64, 96), (8, 12)),
    ],
)
def test_position_embeddings_of_another_grid_are_resized_as_timm_does(kind, img_size, grid, tiny, golden):
    from timm.models.vision_transformer import checkpoint_filter_fn

    like, file = tiny(kind), golden.folder / f"{kind}.safetensors"
    loaded = load_model(like.name, {**like.kwargs, "img_size": img_size}, checkpoint=file)
    wanted = checkpoint_filter_fn(load_file(file), loaded.module)["pos_embed"]
    assert torch.equal(loaded.module.pos_embed, wanted) and not torch.equal(
        loaded.module.pos_embed.mean(1), like.module.pos_embed.mean(1)
    )
    assert loaded.notes == [
        f"position embedding resized from 8x8 to {grid[0]}x{grid[1]} patches, as timm does (8x8 is a guess from 64 positions; "
        "pos_grid states it)"
    ]


def test_position_embeddings_of_another_width_are_not_resized(state, tmp_path):
    save_file({**state, "pos_embed": torch.zeros(1, 65, 32)}, tmp_path / "vit.safetensors")
    with pytest.raises(UsageError, match=re.escape("pos_embed is (1, 65, 32), wanted (1, 65, 64)")):
        load_model(NAME, KWARGS, checkpoint=tmp_path / "vit.safetensors")


def test_the_suffix_plays_no_part(state, tmp_path):
    save_file(state, tmp_path / "vit.pth")
    torch.save(state, tmp_path / "vit.safetensors")
    torch.save(state, tmp_path / "vit")
    for name in ("vit.pth", "vit.safetensors", "vit"):
        assert torch.equal(
            load_model(NAME, KWARGS, checkpoint=tmp_path / name).module.norm.weight, state["norm.weight"]
        )


def test_loading_leaves_the_global_random_numbers_where_they_are():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    load_model(NAME, KWARGS, seed=1)
    assert torch.equal(torch.rand(3), wanted)


def test_random_weights_are_those_of_timm_for_the_seed():
    import timm

    torch.manual_seed(3)
    wanted = timm.create_model(NAME, **KWARGS).state_dict()
    own = load_model(NAME, KWARGS, seed=3).module.state_dict()
    assert all(torch.equal(own[k], wanted[k]) for k in wanted)


def test_random_weights_come_from_the_seed_and_say_so():
    one, same, other = (load_model(NAME, KWARGS, seed=seed) for seed in (1, 1, 2))
    assert one.weights == same.weights and one.weights["sha256"] != other.weights["sha256"]
    assert one.weights["source"] == "random" and one.weights["seed"] == 1 and "random (seed 1)" in one.notes[0]


def test_the_hash_changes_with_every_kind_of_change():
    model = load_model(NAME, KWARGS).module
    seen = {hash_weights(model.state_dict())}
    with torch.no_grad():
        model.blocks[3].mlp.fc1.bias[7] += 1e-7
        seen.add(hash_weights(model.state_dict()))
        model.blocks[3].mlp.fc1.bias[7] = -0.0
        seen.add(hash_weights(model.state_dict()))
    model.head.weight.data = model.head.weight.data.T.contiguous()
    seen.add(hash_weights(model.state_dict()))
    seen.add(hash_weights(model.half().state_dict()))
    assert len(seen) == 5


@pytest.mark.parametrize(
    "pair, value",
    [
        ("img_size=384", {"img_size": 384}),
        ("global_pool=avg", {"global_pool": "avg"}),
        ("init_values=1e-5", {"init_values": 1e-5}),
        ("class_token=False", {"class_token": False}),
        ("class_token=false", {"class_token": False}),
        ("qkv_bias=TRUE", {"qkv_bias": True}),
        ("pos_embed=none", {"pos_embed": "none"}),
        ("norm_layer=None", {"norm_layer": None}),
        ("img_size=(64,96)", {"img_size": (64, 96)}),
        ("a=b=c", {"a": "b=c"}),
    ],
)
def test_options_are_python_values_else_text(pair, value):
    assert parse_kwargs([pair]) == value


@pytest.mark.parametrize("pair", ["img_size", "=3", "img size=3", ""])
def test_what_is_no_option_is_refused(pair):
    with pytest.raises(UsageError, match="wanted KEY=VALUE"):
        parse_kwargs([pair])
