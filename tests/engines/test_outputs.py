"""Files with every output: verified row by row, for every method; each row is fed a wrong answer; pixels through the whole chain."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import onnx
import pytest
from PIL import Image
from tokexport.engines.bundle.proof import verify_bundle
from tokexport.engines.bundle.write import write_bundle
from tokexport.engines.inputs import load_inputs, noise_inputs
from tokexport.engines.measure.bench import bench
from tokexport.engines.measure.dense_features import patch_features, spearman
from tokexport.engines.measure.evaluate import check_classifier
from tokexport.engines.parity.compare import Chunk, Comparison
from tokexport.engines.parity.sides import open_side, run_reference
from tokexport.engines.predict import predict
from tokexport.export.inspection import inspect
from tokexport.export.outputs import row_of
from tokexport.export.rebuild import reference_of

from tokexport import UsageError, export_onnx, load_model, open_runner, verify

from ..cases import METHODS, mostly_slow


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photos of smooth colours, larger than the models' images."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(3)
    for i in range(3):
        small = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        small.resize((120, 90), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def written(tiny, schedule_of, tmp_path_factory):
    """written(method, ..., schedule options) -> path of a file of tiny_vit, made once."""
    made, folder = {}, tmp_path_factory.mktemp("outputs")

    def write(method, options=None, kind="tiny_vit", **asked):
        key = json.dumps([method, options, kind, asked], sort_keys=True, default=str)
        if key not in made:
            loaded = tiny(kind)
            schedule = schedule_of(loaded.module, method=method, **(options or METHODS[method].tiny))
            made[key] = export_onnx(loaded, schedule, folder / f"{len(made)}.onnx", **asked).path
        return made[key]

    return write


@pytest.fixture(scope="module")
def short():
    """A model of three blocks and 26 tokens; layers that methods want trained are random."""
    sizes = {"img_size": 40, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return load_model("vit_tiny_patch16_224", sizes)


@pytest.mark.parametrize("method", mostly_slow(METHODS, "none", "tome", "evit"))
def test_every_method_verifies_output_by_output(short, tmp_path, method):
    schedule = short.schedule(method, **METHODS[method].short(26))
    asked = {"emit": "pooled,tokens,patches", "dropped": "zero", "input": "uint8", "simplify": False}
    report = verify(export_onnx(short, schedule, tmp_path / "v.onnx", **asked).path)
    names = ["logits", "tokens", "sizes", "sources", "positions", "patches", "honesty", "mask"]
    assert report.passed and [o.name for o in report.outputs] == names, report.summary()
    assert {o.name for o in report.outputs if o.exact} == {"sizes", "sources", "mask"}


@pytest.fixture(scope="module")
def sides(written):
    """(provenance, images, the file's side, the reference's, reach) of a file with every kind of output."""
    path = written("diffrate", emit="pooled,tokens,patches", layers=(), dropped="zero")
    provenance = inspect(path).provenance
    images = noise_inputs(2, provenance)
    wanted, reach = run_reference(reference_of(provenance, path), images)
    with open_side(path) as run:
        return provenance, images, run(images), wanted, reach


NAMES = ("logits", "tokens", "sizes", "sources", "positions", "patches", "honesty", "mask")


@pytest.mark.parametrize("name", (None, *NAMES))
def test_one_wrong_value_of_one_output_fails_that_row_alone(sides, name):
    provenance, images, side, wanted, reach = sides
    assert set(NAMES) == set(provenance.outputs)
    if name is not None:
        values = side.outputs[name].copy()
        spoiled = values[1].reshape(-1)
        at = int(np.abs(spoiled).argmin())  # where it is easiest to miss
        spoiled[at] += 1 if row_of(name).exact else 0.02 * max(np.abs(spoiled).max(), 1.0)
        side = replace(side, outputs={**side.outputs, name: values})
    comparison = Comparison(provenance.file_schedule, "fp32", outputs=provenance.outputs)
    comparison.add(None, Chunk(0, ["a", "b"], images), side=side, wanted=wanted, reach=reach)
    assert {row.name for row in comparison.outputs() if not row.passed} == ({name} - {None})
    assert comparison.verdicts["failed"] == (name is not None)


def test_blocks_behind_the_last_one_that_is_read_are_left_out(written, photos):
    path = written("tome", emit="tokens", layers="-2,1")
    inspection = inspect(path)
    p = inspection.provenance
    assert p.emission.layers == (1, 4) and p.pooled is None
    assert p.outputs == tuple(f"{k}_{b}" for b in (1, 4) for k in ("tokens", "sizes", "sources", "positions"))
    model = onnx.load(path, load_external_data=False)
    assert not [n.name for n in model.graph.node if n.name.startswith(("block5", "head"))]
    assert max(s.block for s in p.schedule.steps) == 4
    assert inspection.macs < inspect(written("tome")).macs and verify(path, bisect=True).passed
    with pytest.raises(UsageError, match="neither classes nor features"):
        predict(path, photos[:1])
    with pytest.raises(UsageError, match="eval needs a classifier"):
        check_classifier(inspection)


def test_outputs_that_do_not_go_together_are_refused_before_anything_is_written(tiny, tmp_path):
    loaded = tiny("tiny_vit")
    for asked, words in {
        "emit pool": ({"emit": "pool"}, "emit pool: wanted some of pooled"),
        "emit nothing": ({"emit": ""}, "wanted some of"),
        "twice": ({"emit": "pooled,pooled"}, "wanted each once"),
        "layers alone": ({"layers": "1"}, "add one of them to emit"),
        "layer 6": ({"emit": "tokens", "layers": "6"}, "the model has 6 blocks, 0 to 5"),
        "-1 and 5": ({"emit": "tokens", "layers": [-1, 5]}, "name block 5 twice"),
        "words": ({"emit": "tokens", "layers": "last"}, "wanted numbers of blocks"),
        "norm": ({"emit": "tokens", "norm_layers": True}, "give layers too"),
        "layout": ({"layout": "nchw"}, "add patches to emit"),
        "dropped": ({"emit": "patches", "dropped": "first"}, "wanted nlc or nchw"),
        "input": ({"input": "uint16"}, "input 'uint16': wanted float32"),
    }.values():
        with pytest.raises(UsageError, match=words):
            export_onnx(loaded, loaded.schedule("none"), tmp_path / "v.onnx", **asked)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "form, batch", mostly_slow(product(["uint8", "uint8-nchw"], [None, 1]), ("uint8", None), ("uint8-nchw", 1))
)
def test_pixels_give_what_normalised_images_give(written, photos, form, batch):
    plain, pixels = written("tome", batch=batch), written("tome", batch=batch, input=form)
    p = inspect(pixels).provenance
    assert p.input == ("uint8-nhwc" if form == "uint8" else form) and p.needs == ("uint8_input",)
    inputs = load_inputs(photos[:1], p)
    assert inputs.dtype == np.uint8 and inputs.shape == ((1, 64, 64, 3) if form == "uint8" else (1, 3, 64, 64))
    with open_runner(pixels) as a, open_runner(plain) as b:
        got = a.run({"image": inputs})["logits"]
        wanted = b.run({"image": load_inputs(photos[:1], inspect(plain).provenance)})["logits"]
        with pytest.raises(UsageError, match="wanted uint8"):
            a.run({"image": inputs.astype(np.float32)})
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
    kinds = [n.op_type for n in onnx.load(pixels).graph.node]
    extra = len(kinds) - len(onnx.load(plain).graph.node)
    assert kinds[:2] == (["Transpose", "Cast"] if form == "uint8" else ["Cast", "Conv"])
    assert extra == (2 if form == "uint8" else 1), "a Cast and a Transpose are all that pixels cost"


def test_pixels_go_through_verify_bench_run_and_the_reference(written, photos):
    path = written("tome", input="uint8")
    assert verify(path, photos).passed and verify(path, runtime="openvino").passed
    report = bench([path], seconds=0.2, runtimes=("ort", "torch"))
    assert not [row.error for row in report.rows if row.error] and all(row.ms > 0 for row in report.rows)
    scores = predict(path, photos)
    plain = predict(written("tome"), photos)
    assert [s.top[0].index for s in scores] == [s.top[0].index for s in plain]


def test_verify_sees_a_mean_that_was_folded_wrong(written, tmp_path):
    model = onnx.load(written("tome", input="uint8"))
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    bias = next(i for i in model.graph.initializer if i.name == conv.input[2])
    values = onnx.numpy_helper.to_array(bias) * np.float32(1.05)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, tmp_path / "off.onnx")
    assert not verify(tmp_path / "off.onnx").passed


def test_a_bundle_holds_pixels_and_every_output(written, photos, tmp_path):
    path = written("evit", emit="pooled,tokens,patches", input="uint8", dropped="zero")
    bundle = write_bundle(path, tmp_path / "bundle", images=photos, n_images=2)
    manifest = bundle.manifest
    assert manifest.inputs[0].type == "uint8" and manifest.preprocessing.layout == "nhwc"
    assert {o.name: o.limit == 0 for o in manifest.outputs} == {n: row_of(n).exact for n in NAMES}
    report = verify_bundle(tmp_path / "bundle")
    assert report.passed and len(report.outputs) == len(NAMES)


def test_patches_are_compared_with_the_dense_models(written, photos):
    (dense,) = patch_features(written("none", emit="patches"), photos[:1])
    assert dense.cosine > 1 - 1e-6 and dense.spearman is None and not dense.honesty.any()
    (reduced,) = patch_features(written("tome", emit="patches", layout="nchw"), photos[:1])
    assert 0.5 < reduced.cosine < 1 - 1e-4 and -1 <= reduced.spearman <= 1 and reduced.honesty.max() > 1e-3
    with pytest.raises(UsageError, match="made with patches in emit"):
        patch_features(written("tome"), photos[:1])


def test_spearman_is_that_of_the_text_book():
    assert spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 40, 80])) == pytest.approx(1.0)
    assert spearman(np.array([1, 2, 3, 4]), np.array([4, 3, 2, 1])) == pytest.approx(-1.0)
    assert spearman(np.array([1, 1, 2, 3]), np.array([1, 2, 3, 4])) == pytest.approx(0.9486833)
    assert spearman(np.ones(3), np.arange(3)) is None
