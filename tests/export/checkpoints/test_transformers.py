"""Hugging Face folders and files, torchvision's and OpenCLIP's weights: their own code computes the dense model, ours
must agree to 1e-5."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokexport import UsageError, load_model

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="the extra test brings it; it is the oracle")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "tree"}, "label2id": {"cat": 0, "dog": 1, "tree": 2}}
# model class, config class, options: pooled (from the module's outputs) and tokens after the last norm where the class gives them.
last = lambda model, out: out.last_hidden_state
CASES = {
    "ViT": ("ViTModel", "ViTConfig", {}, lambda m, o: o.last_hidden_state[:, 0], last),
    "ViT classifier": ("ViTForImageClassification", "ViTConfig", LABELS, lambda m, o: o.logits, None),
    "ViT without qkv bias": (
        "ViTForImageClassification",
        "ViTConfig",
        {"qkv_bias": False},
        lambda m, o: o.logits,
        None,
    ),
    "DeiT": ("DeiTModel", "DeiTConfig", {}, lambda m, o: o.last_hidden_state[:, 0], last),
    "DeiT classifier": ("DeiTForImageClassification", "DeiTConfig", LABELS, lambda m, o: o.logits, None),
    "DeiT distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", LABELS, lambda m, o: o.logits, None),
    "ViTMAE": ("ViTMAEModel", "ViTMAEConfig", {"mask_ratio": 0.0}, lambda m, o: o.last_hidden_state[:, 0], last),
    "DINOv2": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2}, lambda m, o: o.pooler_output, last),
    "DINOv2 SwiGLU": ("Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True}, lambda m, o: o.pooler_output, last),
    "DINOv2 registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {"mlp_ratio": 2, "num_register_tokens": 3},
        lambda m, o: o.pooler_output,
        last,
    ),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 4}, lambda m, o: o.pooler_output, last),
    "DINOv3 without biases": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {"query_bias": False, "value_bias": False},
        lambda m, o: o.pooler_output,
        last,
    ),
    "DINOv3 gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 2},
        lambda m, o: o.pooler_output,
        last,
    ),
    "CLIP vision": (
        "CLIPVisionModel",
        "CLIPVisionConfig",
        {},
        lambda m, o: o.pooler_output,
        lambda m, o: getattr(m, "vision_model", m).post_layernorm(o.last_hidden_state),
    ),
    "CLIP projection": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {"projection_dim": 24, "hidden_act": "gelu"},
        lambda m, o: o.image_embeds,
        None,
    ),
    "SigLIP": ("SiglipVisionModel", "SiglipVisionConfig", {}, lambda m, o: o.pooler_output, last),
}


def saved(name, folder):
    """A random model of a case in a folder as transformers saves it, and the model."""
    import transformers

    cls, config, options, _, _ = CASES[name]
    torch.manual_seed(1)
    model = getattr(transformers, cls)(getattr(transformers, config)(**SIZES, **options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


def tokens_of(module, x):
    """Tokens after the last norm, the reference's own."""
    return module.forward_features(x)


def run(name, model):
    if name == "ViTMAE":  # the encoder shuffles its patches: without masking, in this order
        noise = torch.arange(16.0)[None].expand(2, -1)
        return model(X, noise=noise)
    return model(X)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    return request.param, folder, saved(request.param, folder)


@torch.no_grad()
def test_a_folder_gives_the_numbers_of_transformers(case, relative):
    name, folder, model = case
    pooled, tokens = CASES[name][3:]
    loaded, out = load_model(checkpoint=folder), run(name, model)
    assert relative(loaded.module(X), pooled(model, out)) < 1e-5
    if tokens is not None:
        assert relative(tokens_of(loaded.module, X), tokens(model, out)) < 1e-5
    assert any(n.startswith("the folder is of Hugging Face") for n in loaded.notes)
    assert loaded.labels == (("cat", "dog", "tree") if CASES[name][2] is LABELS else ())


@torch.no_grad()
def test_tensors_as_they_are_in_memory_load_as_well(case, relative, tmp_path):
    """torch.save(model.state_dict()), whose names differ from the saved files' since transformers 5."""
    name, folder, model = case
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "x.ckpt")
    whole = load_model(checkpoint=folder)
    loaded = load_model(whole.name, whole.kwargs, checkpoint=tmp_path / "x.ckpt")
    assert relative(loaded.module(X), whole.module(X)) == 0


def test_every_family_has_a_case():
    import transformers
    from tokexport.export.checkpoints.transformers_configs import FAMILIES

    made = {getattr(transformers, c[1]).model_type for c in CASES.values()}
    assert made >= set(FAMILIES) - {"clip", "siglip"}


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
@torch.no_grad()
def test_two_towers_give_the_image_side(kind, relative, tmp_path):
    import transformers

    vision = {**SIZES, **({"projection_dim": 24} if kind == "CLIP" else {})}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    config, cls = (
        (transformers.CLIPConfig, transformers.CLIPModel)
        if kind == "CLIP"
        else (transformers.SiglipConfig, transformers.SiglipModel)
    )
    options = {"projection_dim": 24} if kind == "CLIP" else {}
    model = cls(config(vision_config=vision, text_config=text, **options)).eval()
    model.save_pretrained(tmp_path)
    loaded = load_model(checkpoint=tmp_path)
    features = model.get_image_features(pixel_values=X)
    features = getattr(features, "pooler_output", features)
    assert relative(loaded.module(X), features) < 1e-5
    assert any("other parts of the file are left out" in n and "text_model" in n for n in loaded.notes)
    assert loaded.activation == ("none" if kind == "CLIP" else None)


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
@torch.no_grad()
def test_classifiers_on_the_mean_of_patches(kind, relative, tmp_path):
    import transformers

    config, cls = (
        ("CLIPConfig", "CLIPForImageClassification")
        if kind == "CLIP"
        else ("SiglipConfig", "SiglipForImageClassification")
    )
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(vision_config=SIZES, **LABELS)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    model.save_pretrained(tmp_path)
    loaded = load_model(checkpoint=tmp_path)
    assert relative(loaded.module(X), model(pixel_values=X).logits) < 1e-5 and loaded.labels == ("cat", "dog", "tree")


def test_a_classifier_on_two_features_is_refused_in_words(tmp_path):
    import transformers

    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SIZES, mlp_ratio=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="class token and the mean of the patches.*num_classes=0"):
        load_model(checkpoint=tmp_path)
    loaded = load_model(kwargs={"num_classes": 0}, checkpoint=tmp_path)
    assert any("the classifier is left out" in n for n in loaded.notes)
    with torch.no_grad():
        assert torch.allclose(loaded.module(X), model.eval().dinov2(X).pooler_output, atol=1e-5)


def test_the_folder_gives_preprocessing_and_the_reduced_model_too(tmp_path, schedule_of):
    saved("ViT classifier", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({
        "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "resample": 3,
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 255}))  # fmt: skip
    loaded = load_model(checkpoint=tmp_path)
    p = loaded.preprocess
    assert (p.size, p.mean, p.std) == ((32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (p.interpolation, p.crop, p.crop_mode) == ("bicubic", 0.8, "center")
    from tokexport import reduce_model

    schedule = schedule_of(loaded.module, r=3)
    assert reduce_model(loaded.module, schedule)(X).shape == (2, 3)


def test_shards_with_an_index_and_names_that_are_no_plain_files(tmp_path, relative):
    model = saved("ViT", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    whole = load_model(checkpoint=tmp_path).module(X)
    keys = sorted(state)
    (tmp_path / "model.safetensors").unlink()
    parts = {"a.safetensors": keys[: len(keys) // 2], "b.safetensors": keys[len(keys) // 2 :]}
    for name, part in parts.items():
        save_file({k: state[k] for k in part}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {k: n for n, part in parts.items() for k in part}}))
    assert relative(load_model(checkpoint=tmp_path).module(X), whole) == 0
    loaded = load_model(checkpoint=tmp_path)
    assert relative(load_model(loaded.name, loaded.kwargs, checkpoint=index).module(X), whole) == 0
    for name in ("../a.safetensors", "/etc/passwd", "..", "c.safetensors", "x\\y"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UsageError, match="shard"):
            load_model(checkpoint=tmp_path)
    index.write_text(json.dumps({"weight_map": {"not.there": "a.safetensors"}}))
    with pytest.raises(UsageError, match="is not in a.safetensors"):
        load_model(checkpoint=tmp_path)
    assert model is not None


@torch.no_grad()
def test_torchvision(relative, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5).eval()
    for p in model.parameters():
        p += 0.1 * torch.randn_like(p)
    torch.save(model.state_dict(), tmp_path / "tv")
    kwargs = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
        "mlp_ratio": 2,
    }
    loaded = load_model("vit_tiny_patch16_224", kwargs, checkpoint=tmp_path / "tv")
    assert relative(loaded.module(X), model(X)) < 1e-5 and loaded.notes == ["checkpoint format: torchvision's ViT"]


@pytest.mark.parametrize("tower", ["native", "timm"])
@torch.no_grad()
def test_open_clip(tower, relative, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2, "head_width": 64}
    text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 24}
    name = "vit_base_patch16_clip_quickgelu_224"
    if tower == "timm":
        name = "vit_tiny_patch16_224"
        vision = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": 32}
        pytest.importorskip("timm")
        import timm
        from torch import nn

        class Head(nn.Module):
            def __init__(self):
                super().__init__()
                self.proj = nn.Linear(128, 24, bias=False)

        trunk = timm.create_model(name, **{**kwargs, "num_classes": 0}).eval()
        head = Head()
        state = {f"visual.trunk.{k}": v for k, v in trunk.state_dict().items()} | {
            f"visual.head.{k}": v for k, v in head.state_dict().items()
        }
        torch.save({**state, "text.weight": torch.ones(2)}, tmp_path / "open_clip_pytorch_model.bin")
        wanted = head.proj(trunk(X))
    else:
        model = CLIP(24, vision, text, quick_gelu=True).eval()
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
        torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
        wanted = model.encode_image(X)
    loaded = load_model(name, kwargs, checkpoint=tmp_path / "open_clip_pytorch_model.bin")
    assert relative(loaded.module(X), wanted) < 1e-5
    assert any("OpenCLIP" in n for n in loaded.notes) and any("left out" in n for n in loaded.notes)
    assert open_clip is not None
