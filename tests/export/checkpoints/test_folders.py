"""Folders of timm and names of hubs; what they say of the model, its labels and preprocessing, and what a user states
beside it."""

import json

import numpy as np
import pytest
import torch
from tokexport.tools.commands.model_options import file_stem, load

from tokexport import UsageError, load_model

NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def timm_folder(folder, **config):
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model(NAME, **KWARGS).eval()
    model.pretrained_cfg |= {
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "interpolation": "bilinear",
        "crop_pct": 0.8,
    }
    save_for_hf(model, str(folder), model_args=KWARGS, model_config=config or {"label_names": ["x", "y", "z"]})
    return model


def test_a_timm_folder_needs_no_name(tmp_path):
    model = timm_folder(tmp_path)
    for loaded in (load_model(checkpoint=tmp_path), load_model(f"local-dir:{tmp_path}", pretrained=True)):
        with torch.no_grad():
            assert torch.equal(loaded.module(X), model(X))
        assert loaded.name == NAME and loaded.labels == ("x", "y", "z")
        p = loaded.preprocess
        assert (p.size, p.mean, p.std) == ((32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert (p.interpolation, p.crop) == ("bilinear", 0.8)
        assert loaded.weights["source"] == "checkpoint" and loaded.weights["file"] == str(tmp_path)
    loaded = load_model(f"local-dir:{tmp_path}")  # as in timm: the name alone is no weights
    assert loaded.weights["source"] == "random" and loaded.module.embed_dim == 32


def test_an_export_of_a_folder_is_rebuilt(tmp_path, schedule_of):
    from tokexport.export.rebuild import rebuild

    from tokexport import export_onnx, inspect

    timm_folder(tmp_path / "model")
    loaded = load_model(checkpoint=tmp_path / "model")
    export_onnx(loaded, schedule_of(loaded.module), tmp_path / "x.onnx", simplify=False)
    provenance = inspect(tmp_path / "x.onnx").provenance
    assert provenance.labels == ("x", "y", "z") and provenance.preprocess == loaded.preprocess
    assert rebuild(provenance, tmp_path / "x.onnx").weights["sha256"] == loaded.weights["sha256"]


def test_options_stand_in_place_of_the_folders(tmp_path):
    timm_folder(tmp_path)
    loaded = load_model(kwargs={"num_classes": 0}, checkpoint=tmp_path, preprocess={"mean": 0.5, "size": (48, 40)})
    p = loaded.preprocess
    assert (p.size, p.mean, p.std) == ((48, 40), (0.5,) * 3, (0.4, 0.5, 0.6))
    assert loaded.labels == () and loaded.module.patch_embed.grid_size == (6, 5)
    assert any("resized from 4x4 to 6x5" in n for n in loaded.notes) and any(
        "classifier is left out" in n for n in loaded.notes
    )


def test_a_size_that_contradicts_img_size_is_refused():
    with pytest.raises(UsageError, match="size 48x40 and img_size 32 contradict each other"):
        load_model(NAME, KWARGS, preprocess={"size": (48, 40)})
    assert load_model(NAME, KWARGS, preprocess={"size": (32, 32)}).preprocess.size == (32, 32)


def test_folders_that_say_nothing_or_too_little(tmp_path):
    with pytest.raises(
        UsageError, match="wanted one file of weights in the folder, there is none of model.safetensors"
    ):
        load_model(checkpoint=tmp_path)
    timm_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="no model_type .* and no architecture"):
        load_model(checkpoint=tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UsageError, match="is no JSON object"):
        load_model(checkpoint=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    with pytest.raises(UsageError, match="model type 'swin' is not known; wanted one of vit, deit"):
        load_model(checkpoint=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(UsageError, match="NaFlex form"):
        load_model(checkpoint=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit", "patch_size": "x"}')
    with pytest.raises(UsageError, match="no number"):
        load_model(checkpoint=tmp_path)
    (tmp_path / "config.json").unlink()
    assert load_model(NAME, KWARGS, checkpoint=tmp_path).weights["file"] == str(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(UsageError, match="holds no state dict"):
        load_model(NAME, KWARGS, checkpoint=tmp_path)


def test_a_hub_that_is_not_reached_is_said():
    with pytest.raises(
        UsageError,
        match=r"model hf-hub:someone/vit: the hub was not reached, .*give a downloaded folder with checkpoint",
    ):
        load_model("hf-hub:someone/vit", pretrained=True)
    with pytest.raises(UsageError, match="wanted hf-hub:ORG/NAME"):
        load_model("hf-hub:../../etc", pretrained=True)
    with pytest.raises(UsageError, match="local-dir:/nowhere: no such folder"):
        load_model("local-dir:/nowhere")


def test_a_repository_in_the_hubs_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--vit" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    model = timm_folder(snapshot)
    (tmp_path / "models--someone--vit" / "refs").mkdir()
    (tmp_path / "models--someone--vit" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    loaded = load_model("hf-hub:someone/vit", pretrained=True)
    with torch.no_grad():
        assert torch.equal(loaded.module(X), model(X))
    assert loaded.name == "hf-hub:someone/vit" and loaded.weights["source"] == "pretrained"
    again = load_model(loaded.name, loaded.kwargs, pretrained=True)  # as a file's provenance is rebuilt
    assert again.weights["sha256"] == loaded.weights["sha256"]


def test_the_command_lines_options_become_arguments(tmp_path):
    timm_folder(tmp_path)
    options = {
        "checkpoint": str(tmp_path),
        "mean": "0.5",
        "std": "0.1,0.2,0.3",
        "size": "32x32",
        "crop_pct": 0.9,
        "activation": "sigmoid",
    }
    loaded = load(options)
    assert loaded.preprocess.std == (0.1, 0.2, 0.3) and loaded.preprocess.crop == 0.9 and loaded.activation == "sigmoid"
    for key, value, words in (
        ("mean", "a", "--mean 'a'"),
        ("size", "32", "--size '32': wanted HEIGHTxWIDTH"),
        ("pos_grid", "8", "--pos-grid"),
    ):
        with pytest.raises(UsageError, match=words):
            load({**options, key: value})
    assert file_stem({"checkpoint": str(tmp_path)}) == tmp_path.name and file_stem({}) == "deit_small_patch16_224"
    assert file_stem({"model": "hf-hub:timm/vit_x.y"}) == "vit_x.y" and file_stem({"model": "local-dir:/a/b/"}) == "b"


# big_vision and JAX ViT.


def npz_of(model, path):
    """A model's weights as JAX ViT writes them."""
    s, width = {k: v.numpy() for k, v in model.state_dict().items()}, 32
    out = {"embedding/kernel": s["patch_embed.proj.weight"].transpose(2, 3, 1, 0), "embedding/bias": s["patch_embed.proj.bias"],
           "cls": s["cls_token"], "Transformer/posembed_input/pos_embedding": s["pos_embed"], "head/kernel": s["head.weight"].T,
           "head/bias": s["head.bias"], "Transformer/encoder_norm/scale": s["norm.weight"], "Transformer/encoder_norm/bias": s["norm.bias"]}  # fmt: skip
    for i in range(2):
        b, p = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for j, n in ((0, "norm1"), (2, "norm2")):
            out |= {f"{p}LayerNorm_{j}/scale": s[f"{b}{n}.weight"], f"{p}LayerNorm_{j}/bias": s[f"{b}{n}.bias"]}
        attention = f"{p}MultiHeadDotProductAttention_1/"
        for n, w, c in zip(
            ("query", "key", "value"), np.split(s[f"{b}attn.qkv.weight"], 3), np.split(s[f"{b}attn.qkv.bias"], 3)
        ):
            out |= {f"{attention}{n}/kernel": w.T.reshape(width, 2, -1), f"{attention}{n}/bias": c.reshape(2, -1)}
        out |= {
            f"{attention}out/kernel": s[f"{b}attn.proj.weight"].T.reshape(2, -1, width),
            f"{attention}out/bias": s[f"{b}attn.proj.bias"],
        }
        for j, n in ((0, "fc1"), (1, "fc2")):
            out |= {
                f"{p}MlpBlock_3/Dense_{j}/kernel": s[f"{b}mlp.{n}.weight"].T,
                f"{p}MlpBlock_3/Dense_{j}/bias": s[f"{b}mlp.{n}.bias"],
            }
    np.savez(path, **out)
    return out


def test_jax_arrays_fill_the_model_and_nothing_is_left_random(tmp_path):
    import timm

    torch.manual_seed(2)
    model = timm.create_model(NAME, **KWARGS).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    arrays = npz_of(model, tmp_path / "x.npz")
    loaded = load_model(NAME, KWARGS, checkpoint=tmp_path / "x.npz")
    with torch.no_grad():
        assert torch.allclose(loaded.module(X), model(X), atol=1e-6)
    assert loaded.notes == ["checkpoint format: big_vision or JAX ViT (.npz), by timm's own loader"]
    assert (
        "position embedding resized from 17 to 37 rows"
        in load_model(NAME, {**KWARGS, "img_size": 48}, checkpoint=tmp_path / "x.npz").notes[1]
    )
    for kwargs, words in (
        ({"num_classes": 5}, "3 classes, the model 5: give num_classes=3"),
        ({"depth": 3}, "2 blocks, the model 3: give depth=2"),
    ):
        with pytest.raises(UsageError, match=words):
            load_model(NAME, {**KWARGS, **kwargs}, checkpoint=tmp_path / "x.npz")
    np.savez(tmp_path / "less.npz", **{k: v for k, v in arrays.items() if k != "head/bias"})
    with pytest.raises(UsageError, match="does not fi"):
        load_model(NAME, KWARGS, checkpoint=tmp_path / "less.npz")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(UsageError, match="wanted the arrays of big_vision's"):
        load_model(NAME, KWARGS, checkpoint=tmp_path / "other.npz")


def test_of_transformers_folder_without_its_processor_says_what_is_taken(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    }
    transformers.ViTModel(transformers.ViTConfig(**sizes)).save_pretrained(tmp_path)
    assert any("no preprocessor_config.json" in n for n in load_model(checkpoint=tmp_path).notes)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not known"),
        ({"hidden_size": 0}, "no number|cannot be made"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UsageError, match=words):
            load_model(checkpoint=tmp_path)
