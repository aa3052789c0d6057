"""A bundle proves itself where there is no PyTorch, and a bundle in which anything was changed does not."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokexport.engines.bundle import decisions, proof
from tokexport.engines.bundle.manifest import DecisionEntry, read_manifest
from tokexport.engines.bundle.write import RefusedError, write_bundle
from tokexport.export.errors import StorageError
from tokexport.tools.cli import group

from tokexport import UsageError


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Eight photos of smooth noise, of odd sizes, one larger than what is stored."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(5)
    for i, size in enumerate([(70, 91), (64, 64), (33, 120), (300, 200), (100, 100), (81, 80), (64, 65), (90, 40)]):
        small = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def with_weights_beside(exported, tmp_path_factory):
    """A tiny ToMe whose weights are in a file of their own."""
    path = tmp_path_factory.mktemp("beside") / "tiny.onnx"
    model = onnx.load(exported("tiny_vit"))
    onnx.save_model(model, path, save_as_external_data=True, location="tiny.onnx.data", size_threshold=1024)
    return path


@pytest.fixture(scope="session")
def bundled(exported, with_weights_beside, photos, tmp_path_factory):
    """bundled(name) -> folder of a bundle of a tiny model, made once."""
    made, folder = {}, tmp_path_factory.mktemp("bundles")
    files = {
        "tome": lambda: exported("tiny_vit"),
        "evit": lambda: exported("tiny_vit", method="evit", at=(1, 3, 4)),
        "nocls": lambda: exported("tiny_vit_nocls"),
        "dense": lambda: exported("tiny_vit", method="none"),
        "beside": lambda: with_weights_beside,
    }

    def bundle(name):
        if name not in made:
            made[name] = write_bundle(files[name](), folder / name, images=photos).path
        return made[name]

    return bundle


def prove(cases):
    """Outcomes of (folder, runtime) in a process without PyTorch."""
    script = Path(__file__).parent / "bare_proof.py"
    text = json.dumps([[str(folder), runtime] for folder, runtime in cases])
    done = subprocess.run([sys.executable, script], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def change(folder, edit):
    """Change the manifest's values in place."""
    values = json.loads((folder / "tokexport.json").read_text())
    edit(values)
    (folder / "tokexport.json").write_text(json.dumps(values))


def rehash(folder):
    """Make the manifest speak of the files as they are now: a fault that hashes do not catch."""

    def edit(values):
        for entry in (values["file"], *values["beside"], values["proof"]["file"]):
            content = (folder / entry["name"]).read_bytes()
            entry.update(sha256=hashlib.sha256(content).hexdigest(), size=len(content))

    change(folder, edit)


def replace_file(folder, name, content):
    (folder / name).write_bytes(content)
    rehash(folder)


def change_proof(folder, edit):
    tensors = load_file(folder / "proof.safetensors")
    edit(tensors)
    save_file(tensors, folder / "proof.safetensors")
    rehash(folder)


def model_name(folder):
    return json.loads((folder / "tokexport.json").read_text())["file"]["name"]


def flipped_weight(folder):
    path = folder / model_name(folder)
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda i: len(i.raw_data))
    array = numpy_helper.to_array(weight).copy()
    array.flat[7] = -array.flat[7] + 1
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)


def linked(folder):
    path = folder / model_name(folder)
    path.rename(folder / "real.onnx")
    path.symlink_to("real.onnx")


def elsewhere(folder):
    """The ONNX file itself names weights that are not the bundle's."""
    path = folder / model_name(folder)
    model = onnx.load(path, load_external_data=False)
    for i in model.graph.initializer:
        for entry in i.external_data:
            if entry.key == "location":
                entry.value = "secret.bin"
    shutil.copy(folder / "tiny.onnx.data", folder / "secret.bin")
    path.write_bytes(model.SerializeToString())
    rehash(folder)


def poisoned(tensors):
    tensors["reference.logits"][0, 0] = np.nan


def other_decision(tensors):
    """Two clear tokens change their fates."""
    host, margin = tensors["host.block1"], tensors["margin.block1"]
    fate = np.where(np.isfinite(margin[0, 0]), margin[0, 0], -1)
    stays = [r for r in np.argsort(-fate) if host[0, r] == r and fate[r] > 0][0]
    host[0, stays] = host[0, host[0] != np.arange(len(host[0]))][0]


def faults(good, weights_beside, other):
    """Name -> (bundle to start from, what is done to the copy, word of the outcome, whether it is refused)."""
    put = lambda key, value: lambda folder: change(folder, lambda v: v.update({key: value}))
    pre = lambda **values: lambda folder: change(folder, lambda v: v["preprocessing"].update(values))
    name = lambda value: lambda folder: change(folder, lambda v: v["file"].update(name=value))
    return {
        "a flipped weight": (good, flipped_weight, "SHA-256", True),
        "a flipped weight, hashed anew": (good, lambda f: (flipped_weight(f), rehash(f)), "failed", False),
        "another file": (good, lambda f: shutil.copy(other, f / model_name(f)), "bytes", True),
        "another file, hashed anew": (
            good,
            lambda f: replace_file(f, model_name(f), Path(other).read_bytes()),
            "provenance",
            False,
        ),
        "another mean": (good, pre(mean=[0.4, 0.5, 0.5]), "mean of the manifest", False),
        "another size": (good, pre(size=[60, 64]), "preprocessing gives", True),
        "another filter": (good, pre(interpolation="nearest"), "interpolation", False),
        "weights gone": (weights_beside, lambda f: (f / "tiny.onnx.data").unlink(), "not complete", True),
        "weights from elsewhere": (weights_beside, elsewhere, "do not trust", True),
        "a newer format": (good, put("format", [9, 0]), "format 9.0", True),
        "an unknown need": (good, put("needs", ["telepathy"]), "telepathy", True),
        "a link": (good, linked, "a link", True),
        "a way out": (good, name("../x.onnx"), "plain name", True),
        "an absolute name": (good, name("/etc/passwd"), "plain name", True),
        "a truncated proof": (
            good,
            lambda f: replace_file(f, "proof.safetensors", (f / "proof.safetensors").read_bytes()[:-100]),
            "damaged",
            True,
        ),
        "a pickle as proof": (good, lambda f: replace_file(f, "proof.safetensors", b"\x80\x04K\x01."), "damaged", True),
        "a tensor gone": (
            good,
            lambda f: change_proof(f, lambda t: t.pop("own.logits")),
            "own.logits is missing",
            True,
        ),
        "labels of other classes": (good, put("labels", ["cat", "dog"]), "2 of 10 classes", True),
        "not a number in the proof": (good, lambda f: change_proof(f, poisoned), "failed", False),
        "not a number in the manifest": (
            good,
            lambda f: (f / "tokexport.json").write_text('{"format": [1, NaN]}'),
            "not JSON",
            True,
        ),
        "another decision": (good, lambda f: change_proof(f, other_decision), "failed", False),
        "an output that is not there": (
            good,
            lambda f: change(f, lambda v: v["outputs"].pop() and v["outputs"].append({**v["outputs"][0], "name": "x"})),
            "reference.x is missing",
            True,
        ),
        "no manifest": (good, lambda f: (f / "tokexport.json").unlink(), "has no tokexport.json", True),
    }


@pytest.fixture(scope="session")
def outcomes(bundled, exported, tmp_path_factory):
    """Outcome of every fault, and of good bundles, all in one process without PyTorch."""
    folder, cases = tmp_path_factory.mktemp("faults"), {}
    for i, (fault, (source, spoil, *_)) in enumerate(
        faults(bundled("tome"), bundled("beside"), exported("tiny_vit", method="evit", at=(1, 3, 4))).items()
    ):
        cases[fault] = (shutil.copytree(source, folder / str(i)), "ort")
        spoil(cases[fault][0])
    for name in ("tome", "evit", "nocls", "dense", "beside"):
        cases[name] = (bundled(name), None)
    cases["tome on openvino"] = (bundled("tome"), "openvino")
    cases["nowhere"] = (folder / "nowhere", "ort")
    return dict(zip(cases, prove(cases.values()), strict=True))


@pytest.mark.parametrize("name", ["tome", "evit", "nocls", "dense", "beside", "tome on openvino"])
def test_a_good_bundle_passes_without_pytorch(outcomes, name):
    assert outcomes[name]["passed"], outcomes[name]
    assert all(o["n_judged"] == 4 and o["error"] <= 1e-5 for o in outcomes[name]["report"]["outputs"])
    assert all(i["pixels"] <= 1.001 for i in outcomes[name]["report"]["images"])


@pytest.mark.parametrize("fault", faults("", "", ""))
def test_a_planted_fault_is_caught(outcomes, fault):
    _, _, word, refused = faults("", "", "")[fault]
    assert outcomes[fault]["passed"] is (None if refused else False), outcomes[fault]
    assert word in outcomes[fault]["text"] and "\n" not in outcomes[fault]["text"]


def test_a_folder_that_is_no_bundle_is_refused(outcomes):
    assert outcomes["nowhere"]["passed"] is None and "no such folder" in outcomes["nowhere"]["text"]


def test_the_same_arguments_give_the_same_bytes(bundled, exported, photos, tmp_path):
    again = write_bundle(exported("tiny_vit"), tmp_path / "again", images=photos).path
    names = sorted(p.name for p in again.iterdir())
    assert names == sorted(p.name for p in bundled("tome").iterdir())
    assert all((again / n).read_bytes() == (bundled("tome") / n).read_bytes() for n in names)


def test_clear_images_are_chosen(exported, photos, tmp_path):
    """Of eight images the four clearest, in the order they were given."""
    one = write_bundle(exported("tiny_vit"), tmp_path / "one", images=photos, n_images=1)
    assert len(one.photos) == 1 and one.unclear == 0
    manifest = read_manifest(one.path)
    tensors = load_file(one.path / "proof.safetensors")
    assert all((tensors[f"margin.block{s.block}"] > s.near_tie).all() for s in manifest.decisions)
    assert max(min(tensors["photo.0"].shape[:2]), 1) <= 2 * 64


def test_a_file_that_fails_is_not_bundled(exported, photos, tmp_path):
    model = onnx.load(exported("tiny_vit"))
    weight = max(model.graph.initializer, key=lambda i: len(i.raw_data))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.5), weight.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(RefusedError, match="does not pass verify"):
        write_bundle(tmp_path / "wrong.onnx", tmp_path / "b", images=photos)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wrong.onnx"]
    out = CliRunner().invoke(
        group, ["bundle", str(tmp_path / "wrong.onnx"), "-o", str(tmp_path / "b"), "--images", str(photos)]
    )
    assert out.exit_code == 1 and "not bundled" in out.stderr and not (tmp_path / "b").exists()


def test_what_is_there_is_not_replaced(exported, bundled, photos, tmp_path, monkeypatch):
    folder = tmp_path / "b"
    shutil.copytree(bundled("dense"), folder)
    with pytest.raises(UsageError, match="exists: give force"):
        write_bundle(exported("tiny_vit", method="none"), folder, images=photos)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no bundle"):
        write_bundle(exported("tiny_vit", method="none"), other, images=photos, force=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tokexport.engines.bundle.write._write_proof", full)
        with pytest.raises(StorageError, match="No space left"):
            write_bundle(exported("tiny_vit", method="none"), folder, images=photos, force=True)
    assert proof.verify_bundle(folder).passed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "other"]
    write_bundle(exported("tiny_vit", method="none"), folder, images=photos, n_images=2, force=True)
    assert len(proof.verify_bundle(folder).images) == 2


def test_an_explained_flip_ends_what_is_judged(bundled, tmp_path):
    """A near-tie decided otherwise is no failure; the image's later decisions and outputs are not looked at."""
    folder = shutil.copytree(bundled("tome"), tmp_path / "b")

    def near_tie(tensors):
        other_decision(tensors)
        tensors["margin.block1"][:, 0] = 0
        tensors["reference.logits"][0] += 100

    change_proof(folder, near_tie)
    report = proof.verify_bundle(folder)
    assert report.passed and [i.verdict for i in report.images] == ["flipped", "equal", "equal", "equal"]
    assert report.images[0].difference.block == 1 and report.outputs[0].n_judged == 3

    def all_flip(tensors):
        tensors["margin.block0"][:] = 0
        for i in range(4):
            host = tensors["host.block0"]
            stays = [r for r in range(5, 60) if host[i, r] == r][0]
            host[i, stays] = host[i, host[i] != np.arange(len(host[i]))][0]

    change_proof(folder, all_flip)
    report = proof.verify_bundle(folder)
    assert not report.passed and "no image could be judged" in report.summary()


def test_native_code_of_an_engine_is_asked_for(bundled, tmp_path):
    folder = shutil.copytree(bundled("dense"), tmp_path / "b")
    builder = {"name": "rtx", "version": "1", "compute_capability": [], "host_code": True}
    change(folder, lambda v: v.update(kind="engine", builder=builder))
    with pytest.raises(UsageError, match="native code"):
        proof.verify_bundle(folder)


STEP = DecisionEntry(0, "post_attn", 4, 3, 3, 1, "keys", 0.1, {"keep": "k", "src": "s", "dst": "d"}, "int64", (0, 1, 2))


def fates_of(keep, src, dst):
    columns = {"k": keep, "s": src, "d": dst}
    return decisions.read_fates({k: np.array(v).reshape(1, -1, 1) for k, v in columns.items()}, STEP)


def test_fates_do_not_depend_on_the_order():
    a, b = fates_of([0, 3, 1], [2], [1]), fates_of([0, 1, 3], [2], [2])
    margins = [np.ones((2, 1, 4), np.float32)]
    compare = lambda other, **options: decisions.compare(
        [a], margins, file=[other], steps=[STEP], image=0, tokens=4, **{"ordered": False, **options}
    )
    assert compare(a) == (None, False) and compare(b) == (None, True)
    ordered = compare(b, ordered=True).difference
    assert ordered.tokens == 2 and not ordered.explained
    other_host = compare(fates_of([0, 3, 1], [2], [2])).difference
    assert other_host.tokens == 1 and other_host.margin == 1
    margins[0][1, 0, 2] = 0.05
    assert compare(fates_of([0, 3, 1], [2], [2])).difference.explained
    other_row = compare(fates_of([0, 2, 1], [3], [1])).difference
    assert other_row.tokens == 2 and not other_row.explained
    margins[0][0, 0, 2:] = 0.09
    assert compare(fates_of([0, 2, 1], [3], [1])).difference.explained
    margins[0][0, 0, 2] = np.nan
    assert not compare(fates_of([0, 2, 1], [3], [1])).difference.explained


@pytest.mark.parametrize(
    "columns", [([0, 3, 3], [2], [1]), ([0, 3, 9], [2], [1]), ([0, 3, 1], [-2], [1]), ([0, 3, 1], [2], [7])]
)
def test_what_is_no_decision_is_refused(columns):
    with pytest.raises(decisions.DecisionError):
        fates_of(*columns)


def test_the_command_says_what_is_in_it(exported, photos, tmp_path):
    args = ["bundle", str(exported("tiny_vit")), "-o", str(tmp_path / "b"), "--images", str(photos), "--json"]
    out = CliRunner().invoke(group, args)
    assert out.exit_code == 0, out.output
    record = json.loads(out.stdout)
    assert record["images"] == 4 and record["unclear"] == 0 and "photos" in out.stderr
    again = CliRunner().invoke(group, args)
    assert isinstance(again.exception, UsageError) and "exists" in str(again.exception)
    missing = CliRunner().invoke(group, [*args[:4], "-o", str(tmp_path / "c"), "--images", str(tmp_path / "none")])
    assert "no such" in str(missing.exception)
    assert SimpleNamespace(**record).path == str(tmp_path / "b")


def test_verify_runs_the_proof(bundled, exported, photos, tmp_path):
    run = lambda *args: CliRunner().invoke(group, ["verify", *map(str, args)])
    out = run(bundled("tome"), "--json")
    assert out.exit_code == 0 and json.loads(out.stdout)["passed"]
    folder = shutil.copytree(bundled("tome"), tmp_path / "b")
    change_proof(folder, other_decision)
    out = run(folder, bundled("dense"), "--runtime", "ort")
    assert out.exit_code == 1 and "another decision in block 1" in out.stderr and "FAILED" in out.stderr
    for args in (
        (bundled("tome"), exported("tiny_vit")),
        (bundled("tome"), "--images", photos),
        (bundled("tome"), "--bisect"),
    ):
        assert "brings its own proof" in str(run(*args).exception)


def test_order_decides_only_without_a_class_token(bundled):
    ordered = {name: read_manifest(bundled(name)).ordered for name in ("tome", "nocls", "evit", "dense")}
    assert ordered == {"tome": False, "nocls": True, "evit": False, "dense": False}
