"""`tokexport run`: likely classes, images alike, and what it refuses."""

import json

import numpy as np
import pytest
from PIL import Image
from tokexport.engines.images import load_images
from tokexport.export.inspection import inspect
from tokexport.tools.cli import group

from tokexport import UsageError, export_onnx, load_model, open_runner

KWARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five images: two almost alike, a black one."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    pixels = random.integers(0, 256, (3, 80, 80, 3), dtype=np.uint8)
    for name, image in zip("abcde", [pixels[0], pixels[1], pixels[2], np.zeros_like(pixels[0]), pixels[0] // 2 * 2]):
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """files(classes, batch) -> a ToMe file."""
    folder, made = tmp_path_factory.mktemp("files"), {}

    def export(classes, batch=None):
        if (classes, batch) not in made:
            path = made[classes, batch] = folder / f"{classes}.{batch}.onnx"
            loaded = load_model("vit_tiny_patch16_224", {**KWARGS, "num_classes": classes})
            export_onnx(loaded, loaded.schedule("tome", r=8), path, batch=batch)
        return made[classes, batch]

    return export


def run(*args):
    from click.testing import CliRunner

    return CliRunner().invoke(group, ["run", *map(str, args)])


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
@pytest.mark.parametrize("batch", [None, 1, 2])
def test_the_five_likeliest_classes(batch, runtime, files, photos):
    path = files(10, batch)
    rows = json.loads(run(path, photos, "--runtime", runtime, "--json").stdout)["images"]
    assert [r["image"] for r in rows] == [str(photos / f"{n}.png") for n in "abcde"]
    pixels = load_images(sorted(photos.iterdir()), inspect(path).provenance.preprocess)
    with open_runner(files(10)) as runner:
        logits = runner.run({"image": pixels})["logits"].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for row, likely in zip(rows, p):
        assert [t["class"] for t in row["top"]] == list(np.argsort(-likely)[:5])
        assert np.allclose([t["probability"] for t in row["top"]], np.sort(likely)[::-1][:5], atol=1e-5)


def test_few_classes_are_all_listed(files, photos):
    (row,) = json.loads(run(files(3), photos / "a.png", "--json").stdout)["images"]
    assert sorted(t["class"] for t in row["top"]) == [0, 1, 2] and sum(
        t["probability"] for t in row["top"]
    ) == pytest.approx(1)


def test_features_find_the_image_most_alike(files, photos):
    rows = json.loads(run(files(0), photos, "--json").stdout)["images"]
    near = {r["image"][-5]: r["nearest"][-5] for r in rows}
    assert near["a"] == "e" and near["e"] == "a" and rows[0]["cosine"] > 0.99
    (alone,) = json.loads(run(files(0), photos / "a.png", "--json").stdout)["images"]
    assert alone["nearest"] is None and alone["length"] > 0
    assert "give more images" in run(files(0), photos / "a.png").stderr


def test_what_is_refused(files, photos, tmp_path):
    (tmp_path / "v.plan").write_bytes(b"x")
    for args, word in (
        ([files(10), tmp_path / "none.png"], "no such file"),
        ([files(10), tmp_path], "no image"),
        ([tmp_path / "v.plan", photos], "no v.plan.json"),
        ([tmp_path / "v.onnx", photos], "no such file"),
        ([files(10), photos, "--runtime", "abacus"], "unknown runtime"),
    ):
        error = run(*args).exception
        assert isinstance(error, UsageError) and word in str(error)
    assert run(files(10)).exit_code == 2


def test_any_number_of_images_goes_through_any_batch(exported, run_onnx):
    """More than fit into one run, of a free batch and of a fixed one: as many outputs, in order."""
    from tokexport.engines.runners import AT_ONCE, in_batches

    from tokexport import open_runner

    image = np.random.default_rng(0).standard_normal((AT_ONCE + 5, 3, 64, 64)).astype(np.float32)
    wanted = run_onnx(exported("tiny_vit", method="tome", r=8, batch=1), image)["logits"]
    for batch in (None, 3, 1):
        with open_runner(exported("tiny_vit", method="tome", r=8, batch=batch)) as runner:
            assert np.abs(in_batches(runner, image)["logits"] - wanted).max() < 1e-4
