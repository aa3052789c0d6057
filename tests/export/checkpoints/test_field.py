"""Checkpoints of the kinds that people's own reports describe: each loads with a word on what was done, or is refused
with what to do."""

import argparse
import collections
import datetime
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tokexport import UsageError, load_model

NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
DINOV3 = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 0}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model_of(name=NAME, **kwargs):
    import timm

    torch.manual_seed(1)
    model = timm.create_model(name, **{**KWARGS, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def state(model):
    return model.state_dict()


def load(value, tmp_path, kwargs=KWARGS, name=NAME, **options):
    torch.save(value, tmp_path / "file")
    return load_model(name, kwargs, checkpoint=tmp_path / "file", **options)


def same(loaded, model):
    with torch.no_grad():
        return torch.equal(loaded.module(X), model(X))


# Prefixes.


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "_orig_mod.module.",
        "module._orig_mod.",
        "model.",
        "net.",
        "backbone.",
        "encoder.",
        "visual.",
        "a.b.c.",
        "module.model.vit_1.",
    ],
)
def test_any_prefix_is_taken_off_and_said(prefix, model, state, tmp_path):
    loaded = load({"state_dict": {prefix + k: v for k, v in state.items()}}, tmp_path)
    assert same(loaded, model) and loaded.notes == [f"the keys' prefix {prefix} is taken off"]


def test_other_parts_of_the_file_are_left_out_and_said(model, state, tmp_path):
    beside = {"criterion.weight": torch.ones(5), "text.a": torch.ones(1), "text.b": torch.ones(1)}
    loaded = load({"state_dict": {**{f"net.{k}": v for k, v in state.items()}, **beside}}, tmp_path)
    assert same(loaded, model)
    assert loaded.notes[1] == "other parts of the file are left out: criterion, text (2 tensors)"
    loaded = load({**state, **beside}, tmp_path)  # without a prefix too
    assert same(loaded, model) and "criterion, text (2 tensors)" in loaded.notes[0]


@pytest.mark.parametrize("head", ["head.", "classifier.", "fc.", "model.head."])
def test_a_backbone_under_its_prefix_and_the_classifier_beside_it(head, model, state, tmp_path):
    prefix = "model.backbone." if head.startswith("model.") else "backbone."
    rest = {prefix + k: v for k, v in state.items() if not k.startswith("head")}
    loaded = load({**rest, f"{head}weight": state["head.weight"], f"{head}bias": state["head.bias"]}, tmp_path)
    assert same(loaded, model) and loaded.notes == [f"the keys' prefix {prefix} is taken off"]


def test_a_part_of_a_vision_transformer_that_the_model_has_not_is_no_other_part(state, tmp_path):
    for extra in ("blocks.0.ls1.gamma", "dist_token", "fc_norm.weight", "cls_token_2"):
        with pytest.raises(UsageError, match="does not fit"):
            load({**state, extra: torch.ones(32)}, tmp_path)


# Several sets of weights.


def test_timms_own_files_give_the_averaged_weights_and_say_so(model, state, tmp_path):
    ema = {k: v + 0.01 for k, v in state.items()}
    file = {
        "epoch": 3,
        "arch": NAME,
        "state_dict": state,
        "state_dict_ema": ema,
        "args": argparse.Namespace(lr=1.0),
        "metric": 71.2,
    }
    loaded = load(file, tmp_path)
    assert torch.equal(loaded.module.norm.weight, ema["norm.weight"]) and loaded.weights["set"] == "state_dict_ema"
    assert (
        "weights: state_dict_ema, the averaged weights" in loaded.notes[0]
        and "state_dict too: choose" in loaded.notes[0]
    )
    loaded = load(file, tmp_path, weights="state_dict")
    assert same(loaded, model) and loaded.weights["set"] == "state_dict"
    with pytest.raises(UsageError, match="wanted one of: state_dict, state_dict_ema"):
        load(file, tmp_path, weights="teacher")


def test_a_student_and_a_teacher_in_one_dictionary(model, state, tmp_path):
    file = {
        "model": {
            f"module.{who}.backbone.{k}": v + add
            for who, add in (("student", 1), ("teacher", 0))
            for k, v in state.items()
        }
    }
    loaded = load(file, tmp_path)
    assert same(loaded, model) and "teacher" in loaded.notes[0] and "student" in loaded.notes[0]
    loaded = load(file, tmp_path, weights="student")
    assert torch.equal(loaded.module.norm.weight, state["norm.weight"] + 1)


def test_sets_that_no_loader_is_known_to_prefer_need_a_name(state, model, tmp_path):
    file = {"left": state, "right": {k: v + 1 for k, v in state.items()}}
    with pytest.raises(UsageError, match=r"several sets of weights that fit \(left, right\): name one with weights"):
        load(file, tmp_path)
    assert same(load(file, tmp_path, weights="left"), model)
    assert same(load({"left": state, "again": state}, tmp_path), model)  # one set by two names is no choice


def test_a_set_of_another_width_is_no_choice(state, model, tmp_path):
    file = {"big": model_of(embed_dim=64).state_dict(), "small": state}
    assert same(load(file, tmp_path), model)


@pytest.mark.parametrize("word", ["model_ema", "ema_state_dict", "module", "model_state_dict", "weights", "what ever"])
def test_any_word_wraps_just_one_set(word, model, state, tmp_path):
    loaded = load({word: state, "epoch": 1}, tmp_path)
    assert same(loaded, model) and loaded.notes == []
    assert same(load({"a": {"b": {word: state}}}, tmp_path), model)


# Values beside the tensors.


def foreign_dict(module, name, monkeypatch):
    """A subclass of dict that pickles under a library's name, as that library's own files hold it."""
    parts = module.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(".".join(parts[: i + 1])))
    cls = type(name, (dict,), {"__module__": module, "__qualname__": name})
    setattr(sys.modules[module], name, cls)
    return cls


BESIDE = {
    "numpy": np.zeros(3),
    "numpy scalar": np.float64(1.0),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "counter": collections.Counter("abc"),
    "version": torch.__version__,
    "device": torch.device("cpu"),
    "dtype": torch.float16,
    "time": datetime.datetime(2024, 1, 1),
    "set": {1, 2},
    "bytes": b"abc",
    "complex": 1 + 2j,
    "namespace": types.SimpleNamespace(a=argparse.Namespace(b=1)),
    "module": torch.nn.Linear(1, 1),
    "sparse": torch.eye(2).to_sparse(),
}


@pytest.mark.parametrize("kind", [*BESIDE, "lightning", "yacs"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_values_beside_the_tensors_do_not_block(kind, zipped, model, state, tmp_path, monkeypatch):
    module, name = {"yacs": ("yacs.config", "CfgNode")}.get(kind, ("lightning.fabric.utilities.data", "AttributeDict"))
    value = BESIDE[kind] if kind in BESIDE else foreign_dict(module, name, monkeypatch)(lr=1e-3)
    torch.save({"model": state, "other": value}, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    assert same(load_model(NAME, KWARGS, checkpoint=tmp_path / "file"), model)


def test_a_dictionary_of_a_foreign_class_holds_a_state_dict_all_the_same(model, state, tmp_path, monkeypatch):
    torch.save({"model": foreign_dict("yacs.config", "CfgNode", monkeypatch)(state)}, tmp_path / "file")
    monkeypatch.undo()
    assert same(load_model(NAME, KWARGS, checkpoint=tmp_path / "file"), model)


@pytest.mark.parametrize("wrap, where", [(lambda m: m, "the file"), (lambda m: {"ema": m, "epoch": 1}, "'ema'")])
def test_a_whole_module_is_refused_by_its_place_and_class(wrap, where, model, tmp_path):
    with pytest.raises(UsageError) as e:
        load(wrap(model), tmp_path)
    assert f"refused: {where} is an object of class timm.models.vision_transformer.VisionTransformer" in str(e.value)
    assert "torch.save(model.state_dict(), ...)" in str(e.value)


# DINOv3, as its authors write it.


def dinov3_file(name):
    import timm

    torch.manual_seed(1)
    model = timm.create_model(name, **DINOV3).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    names = (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"))
    state, mask = {}, torch.ones(144)
    mask[48:96] = 0
    for key, value in model.state_dict().items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        state[key] = value
    for i in range(2):
        q, v = (state.pop(f"blocks.{i}.attn.{part}_bias", torch.zeros(48)) for part in "qv")
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat(
            [q, torch.full((48,), torch.nan), v]
        )  # what is masked may be anything
        state[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    return model, state | {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(6).bfloat16()}


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"])
def test_dinov3_by_its_authors(name, tmp_path):
    model, state = dinov3_file(name)
    loaded = load(state, tmp_path, DINOV3, name)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.module(x), model(x))
    assert loaded.notes[0].startswith("checkpoint format: DINOv3")


def test_a_bias_that_the_model_has_not_is_dropped_only_when_it_is_zero(tmp_path):
    with pytest.raises(UsageError, match="biases .*that this model has not: give its _qkvb variant"):
        load(dinov3_file("vit_small_patch16_dinov3_qkvb")[1], tmp_path, DINOV3, "vit_small_patch16_dinov3")


# Position grids.


def grid_file(tmp_path):
    save_file(model_of(img_size=(64, 16)).state_dict(), tmp_path / "grid.safetensors")
    return tmp_path / "grid.safetensors"


@pytest.mark.parametrize(
    "img_size, pos_grid, source, words",
    [
        ((128, 32), (8, 2), (8, 2), "resized from 8x2 to 16x4 patches, as timm does"),
        ((128, 32), None, (4, 4), "resized from 4x4 to 16x4 patches, as timm does (4x4 is a guess"),
        (32, (8, 2), (8, 2), "resized from 8x2 to 4x4 patches"),  # as many patches, another shape
        ((64, 16), (4, 4), (4, 4), "resized from 4x4 to 8x2 patches"),
        ((64, 16), None, None, "taken for 8x2, as in the model: if they are another grid (4x4?), say it with pos_grid"),
        ((64, 16), (8, 2), None, ""),
    ],
)
def test_the_grid_of_positions_is_stated_or_its_guess_is_said(img_size, pos_grid, source, words, tmp_path):
    from timm.layers import resample_abs_pos_embed

    file = grid_file(tmp_path)
    loaded = load_model(NAME, {**KWARGS, "img_size": img_size}, checkpoint=file, pos_grid=pos_grid)
    pos, grid = model_of(img_size=(64, 16)).pos_embed, loaded.module.patch_embed.grid_size
    wanted = pos if source is None else resample_abs_pos_embed(pos, list(grid), list(source), 1)
    assert (
        torch.allclose(loaded.module.pos_embed, wanted)
        and words in "".join(loaded.notes)
        and bool(loaded.notes) == bool(words)
    )
    assert loaded.weights.get("pos_grid") == (list(pos_grid) if pos_grid else None)


def test_a_grid_of_other_positions_is_refused(tmp_path):
    with pytest.raises(UsageError, match="pos_grid 3x3: the file has 16 positions"):
        load_model(NAME, KWARGS, checkpoint=grid_file(tmp_path), pos_grid=(3, 3))
    with pytest.raises(UsageError, match="speak of a checkpoint"):
        load_model(NAME, KWARGS, pos_grid=(3, 3))


def test_positions_of_no_grid_are_asked_for(tmp_path):
    file = model_of(img_size=(56, 24)).state_dict()  # 7x3
    with pytest.raises(UsageError, match="22 positions, the model 17(.|\n)*pos_grid"):
        load(file, tmp_path)
    torch.save(file, tmp_path / "file")
    loaded = load_model(NAME, KWARGS, checkpoint=tmp_path / "file", pos_grid=(7, 3))
    assert loaded.notes == ["position embedding resized from 7x3 to 4x4 patches, as timm does"]


# What a model of one class says, and DiffRate.


def test_one_class_has_a_sigmoid(tmp_path):
    loaded = load(model_of(num_classes=1).state_dict(), tmp_path, {**KWARGS, "num_classes": 1})
    assert loaded.activation == "sigmoid" and "its logit is read with a sigmoid" in loaded.notes[0]
    loaded = load(model_of(num_classes=1).state_dict(), tmp_path, {**KWARGS, "num_classes": 1}, activation="none")
    assert loaded.activation == "none" and loaded.notes == []


def test_a_checkpoint_with_learned_rates_gives_them(state, model, tmp_path):
    rates = {}
    for i in range(2):
        for part in ("prune", "merge"):
            p = torch.zeros(17)
            p[3 + i] = 1
            rates |= {
                f"blocks.{i}.{part}_ddp.kept_token_candidate": torch.arange(17.0, 0, -1),
                f"blocks.{i}.{part}_ddp.selected_probability": p,
            }
    loaded = load({"model": {**state, **rates}}, tmp_path)
    assert same(loaded, model) and loaded.rates == {"prune_kept": [15, 14], "merge_kept": [15, 14]}
    assert loaded.schedule("diffrate", rates="checkpoint").tokens_per_block()[-1][-1] == 14
    plain = load(state, tmp_path)
    assert plain.rates is None
    with pytest.raises(UsageError, match="rates checkpoint: the weights have learned none"):
        plain.schedule("diffrate", rates="checkpoint")


def test_a_file_of_a_choice_is_found_again_when_it_is_rebuilt(state, tmp_path, schedule_of):
    """The set of weights and the grid that were chosen are in the provenance."""
    from tokexport.export.rebuild import rebuild

    from tokexport import export_onnx, inspect

    torch.save({"a": model_of(img_size=(64, 16)).state_dict(), "b": state}, tmp_path / "file")
    loaded = load_model(NAME, KWARGS, checkpoint=tmp_path / "file", weights="a", pos_grid=(8, 2))
    export_onnx(loaded, schedule_of(loaded.module), tmp_path / "x.onnx", simplify=False)
    provenance = inspect(tmp_path / "x.onnx").provenance
    assert provenance.activation == "softmax" and provenance.weights["set"] == "a"
    assert rebuild(provenance, tmp_path / "x.onnx").weights["sha256"] == loaded.weights["sha256"]
