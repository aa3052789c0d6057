"""The C++ runtime computes what the Python one does, prepares photos alike, takes many threads, and leaks nothing.

Every run of the program is a test of memory too: it is built with sanitizers (conftest.py).
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tokexport.engines.bundle.folder import sha256_of
from tokexport.engines.bundle.write import write_bundle
from tokexport.engines.images import crop, normalise
from tokexport.export.provenance import Preprocess
from tokexport.tools.demo import digits

from tokexport import export_onnx, load_model, open_runner

from .broken_bundles import BROKEN, changed, other_decision
from .cpp_build import HEADERS, NO_HEADERS, SOURCE, package_folder
from .image_kinds import image_kinds

pytestmark = pytest.mark.programs


ONNXRUNTIME = pytest.param("onnxruntime", marks=pytest.mark.skipif(not HEADERS["onnxruntime"], reason=NO_HEADERS))
RUNTIMES = [pytest.param("openvino"), ONNXRUNTIME]
ANY = ("--runtime", "onnxruntime") if HEADERS["onnxruntime"] else ()  # the one that starts faster under the sanitizers


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Held-out digits, for the bundles."""
    return digits.write_held_out(tmp_path_factory.mktemp("digits"), 16)


@pytest.fixture(scope="session")
def bundles(photos, tmp_path_factory):
    """bundles(name) -> folder: "tome" (any batch), "evit" (batch 3), "one" (ToMe, batch 1), made once."""
    made, folder = {}, tmp_path_factory.mktemp("bundles")
    loaded = load_model(digits.MODEL, digits.KWARGS, checkpoint=digits.WEIGHTS, predictor=digits.HEADS)
    options = {"tome": ("tome", None, {"r": 5}), "one": ("tome", 1, {"r": 8}), "evit": ("evit", 3, {"at": (3, 6)})}

    def bundle(name):
        if name not in made:
            method, batch, more = options[name]
            path = folder / f"{name}.onnx"
            export_onnx(loaded, loaded.schedule(method, **more), path, batch=batch, sources=name == "tome")
            made[name] = write_bundle(path, folder / name, images=photos).path
        return made[name]

    return bundle


CASES = [
    ("openvino", "tome"),
    ("openvino", "one"),
    *((ONNXRUNTIME.values[0], name) for name in ("tome", "evit", "one")),
]
CASES = [pytest.param(*case, marks=ONNXRUNTIME.marks if case[0] != "openvino" else ()) for case in CASES]


@pytest.mark.parametrize("runtime, name", CASES)
def test_outputs_are_those_of_the_python_runner(program, bundles, photos, runtime, name):
    values = json.loads(program("output", bundles(name), *photos[:5], "--runtime", runtime))
    path = next(bundles(name).glob("*.onnx"))
    preprocess = Preprocess(**_preprocess(bundles(name)))
    images = np.stack([normalise(crop(p, preprocess), preprocess) for p in photos[:5]])
    from tokexport.engines.runners import in_batches

    with open_runner(path, {"onnxruntime": "ort"}.get(runtime, runtime)) as runner:
        wanted = in_batches(runner, images)
    assert set(values) == set(wanted)
    for key, value in wanted.items():
        assert values[key]["shape"] == list(value.shape)
        got = np.array(values[key]["values"]).reshape(value.shape)
        assert np.abs(got - value).max() <= 1e-5 * max(1.0, np.abs(value).max()), key


def _preprocess(bundle):
    values = json.loads((bundle / "tokexport.json").read_text())["preprocessing"]
    return {k: values[k] for k in ("size", "mean", "std", "interpolation", "crop", "crop_mode")}


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """Folder's files, among them noise, which shows every rounding."""
    return image_kinds(tmp_path_factory.mktemp("kinds"))


@pytest.mark.parametrize(
    "crop_mode, fraction, interpolation",
    [
        ("center", 1.0, "bicubic"),
        ("center", 0.875, "bilinear"),
        ("squash", 0.9, "lanczos"),
        ("border", 1.0, "bicubic"),
        ("border", 0.8, "hamming"),
        ("center", 0.95, "box"),
        ("center", 0.9, "nearest"),
    ],
)
def test_photos_are_prepared_as_in_python(program, bundles, kinds, tmp_path, crop_mode, fraction, interpolation):
    assert len(kinds) >= 40
    folder = shutil.copytree(bundles("tome"), tmp_path / "b")
    values = json.loads((folder / "tokexport.json").read_text())
    values["preprocessing"].update(
        crop_mode=crop_mode, crop=fraction, interpolation=interpolation, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25]
    )
    (folder / "tokexport.json").write_text(json.dumps(values))
    prepared = np.frombuffer(program("input", folder, *kinds), np.float32).reshape(len(kinds), 3, 32, 32)
    preprocess = Preprocess(**_preprocess(folder))
    for path, value in zip(kinds, prepared):
        wanted = normalise(crop(path, preprocess), preprocess)
        pixels = np.abs(value - wanted) * np.reshape(preprocess.std, (3, 1, 1)) * 255
        assert pixels.max() <= 1.001, (path.name, pixels.max())


@pytest.mark.parametrize(
    "spoil, word",
    [
        (lambda b: b[: len(b) // 2], "cannot be read as an image"),
        (lambda b: b"", "wanted JPEG or PNG"),
        (lambda b: b"GIF89a" + b, "wanted JPEG or PNG"),
    ],
)
def test_a_damaged_photo_is_one_error(program, bundles, kinds, tmp_path, spoil, word):
    for source in (kinds[0].parent / "jpeg_6.jpg", kinds[0].parent / "png_6.png"):
        path = tmp_path / f"x{source.suffix}"
        path.write_bytes(spoil(source.read_bytes()))
        text = program("input", bundles("tome"), path, code=2)
        assert word in text and str(path) in text and text.count("\n") == 1


@pytest.mark.parametrize("runtime, name", CASES)
def test_the_proof_passes(program, bundles, runtime, name):
    report = json.loads(program("verify", bundles(name), "--runtime", runtime, "--json"))
    assert report["passed"] and [i["verdict"] for i in report["images"]] == ["equal"] * 4
    assert all(o["n_judged"] == 4 and o["error"] <= 1e-5 for o in report["outputs"]) and all(
        i["pixels"] == 0 for i in report["images"]
    )


def test_a_wrong_proof_fails_and_a_near_tie_does_not(program, bundles, tmp_path):
    faults = {
        "output": lambda t: t["reference.logits"].__setitem__((1, 0), 100),
        "own output": lambda t: t["own.logits"].__setitem__((1, 0), 100),
        "nan": lambda t: t["reference.logits"].__setitem__((1, 0), np.nan),
        "sources": lambda t: t["reference.sources"].__setitem__((1, 5), 63),
        "photo": lambda t: t["photo.1"].__setitem__((3, 3), 255 - t["photo.1"][3, 3]),
        "decision": lambda t: other_decision(t, 0.5),
    }
    for i, (fault, edit) in enumerate(faults.items()):
        folder = shutil.copytree(bundles("tome"), tmp_path / str(i))
        changed(folder, edit)
        report = json.loads(program("verify", folder, "--json", *ANY, code=1))
        assert not report["passed"] and "failed" in [i["verdict"] for i in report["images"]], fault
    folder = shutil.copytree(bundles("tome"), tmp_path / "near")
    changed(folder, lambda t: (other_decision(t, 1e-5), t["reference.logits"].__setitem__((0, 0), 100)))
    report = json.loads(program("verify", folder, "--json", *ANY))
    assert [i["verdict"] for i in report["images"]] == ["flipped", "equal", "equal", "equal"]


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_manifest_is_one_error(program, bundles, photos, tmp_path, fault):
    edit, word = BROKEN[fault]
    folder = shutil.copytree(bundles("tome"), tmp_path / "b")
    values = json.loads((folder / "tokexport.json").read_text())
    edit(values)
    (folder / "tokexport.json").write_text(json.dumps(values))
    text = program("classify", folder, photos[0], code=2)
    assert word in text and text.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"format": [1, NaN]}',
        '{"a": 1, "a": 2}',
        "[" * 100000,
        '{"format": [1, 0]',
        '"\\ud800"',
        "01",
        "",
        '{"a": 1} x',
    ],
)
def test_what_is_no_json_is_one_error(program, bundles, photos, tmp_path, text):
    folder = shutil.copytree(bundles("tome"), tmp_path / "b")
    (folder / "tokexport.json").write_text(text)
    assert "is not JSON" in program("classify", folder, photos[0], code=2)


def test_a_link_and_a_truncated_proof_are_refused(program, bundles, tmp_path):
    folder = shutil.copytree(bundles("tome"), tmp_path / "link")
    (folder / "tome.onnx").rename(tmp_path / "real.onnx")
    (folder / "tome.onnx").symlink_to(tmp_path / "real.onnx")
    assert "a link" in program("verify", folder, code=2)
    for i, size in enumerate((4, 8, 300, -5)):
        folder = shutil.copytree(bundles("tome"), tmp_path / str(i))
        content = (folder / "proof.safetensors").read_bytes()[:size]
        (folder / "proof.safetensors").write_bytes(content)
        values = json.loads((folder / "tokexport.json").read_text())
        values["proof"]["file"].update(sha256=sha256_of(folder / "proof.safetensors"), size=len(content))
        (folder / "tokexport.json").write_text(json.dumps(values))
        assert "proof.safetensors" in program("verify", folder, *ANY, code=2)


def test_weights_from_elsewhere_are_refused(program, bundles, photos, tmp_path):
    """Named by an initializer, or by a constant deep inside; both before a runtime sees the file."""
    import onnx
    from onnx import helper

    def outside(name):
        tensor = onnx.TensorProto(name=name, data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="../../etc/passwd")
        return tensor

    for i, nested in enumerate((False, True)):
        folder = shutil.copytree(bundles("tome"), tmp_path / str(i))
        model = onnx.load(folder / "tome.onnx")
        if nested:
            inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=outside("c"))], "g", [], [])
            model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=inner))
        else:
            model.graph.initializer.append(outside("more"))
        (folder / "tome.onnx").write_bytes(model.SerializeToString())
        values = json.loads((folder / "tokexport.json").read_text())
        values["file"].update(sha256=sha256_of(folder / "tome.onnx"), size=(folder / "tome.onnx").stat().st_size)
        (folder / "tokexport.json").write_text(json.dumps(values))
        assert "do not trust it" in program("input", folder, photos[0], code=2)


def test_classes_are_those_of_the_bundle(program, bundles, photos):
    found = json.loads(program("classify", bundles("tome"), *photos, "--json", "--top", "3", *ANY))["images"]
    assert sum(i["top"][0]["class"] == int(p.parent.name) for i, p in zip(found, photos)) >= 14
    assert all(len(i["top"]) == 3 and i["top"][0]["score"] >= i["top"][1]["score"] for i in found)
    text = program("classify", bundles("tome"), photos[0], *ANY).decode()
    assert text.startswith(str(photos[0])) and found[0]["top"][0]["label"] in text
    assert "is a classifier" in program("features", bundles("tome"), photos[0], *ANY, code=2)


def test_wrong_use_is_told(program, bundles, photos, environment):
    for args, word in (
        (("classify", bundles("tome")), "wanted photos"),
        (("verify", bundles("tome"), photos[0]), "takes no photos"),
        (("dance", bundles("tome"), photos[0]), "no command"),
        (("bench", bundles("tome"), "--runs", "0"), "whole number from 1"),
        (("bench", bundles("tome"), "--fast"), "no option"),
        (("verify", "nowhere"), "no tokexport.json"),
        (("verify", bundles("tome"), "--runtime", "abacus"), "wanted one of"),
    ):
        assert word in program(*args, code=2)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_bench_counts_what_it_ran(program, bundles, runtime):
    args = ("--runtime", runtime, "--batch", "2", "--runs", "12", "--warmup", "2", "--concurrency", "3", "--json")
    record = json.loads(program("bench", bundles("tome"), *args))
    assert record["runs"] == 12 and record["batch"] == 2 and record["concurrency"] == 3
    assert 0 < record["p50"] <= record["p90"] <= record["p95"] <= record["p99"] and record["images_per_second"] > 0


@pytest.mark.parametrize("runtime", RUNTIMES[1:])
def test_a_library_that_is_not_there_is_named(program, bundles, runtime):
    text = program("verify", bundles("tome"), "--runtime", runtime, "--library", "/nowhere/lib.so", code=2)
    assert "/nowhere/lib.so" in text and "TOKEXPORT_ONNXRUNTIME" in text
    assert "OrtGetApiBase" in program("verify", bundles("tome"), "--runtime", runtime, "--library", "libm.so.6", code=2)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_eight_threads_give_what_one_gives(build, environment, bundles, runtime):
    done = subprocess.run(
        [build / "tokexport-threads", bundles("tome"), "8", "1000", runtime],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "8000 runs, 0 differ" in done.stdout and "Sanitizer" not in done.stderr


@pytest.fixture
def engine_bundle(bundles, tmp_path):
    """A bundle that says it is an engine of TensorRT-RTX; what is in it does not matter."""
    folder = shutil.copytree(bundles("tome"), tmp_path / "engine")
    values = json.loads((folder / "tokexport.json").read_text())
    values.update(kind="engine", builder={"name": "rtx", "version": "1", "compute_capability": [], "host_code": False})
    (folder / "tokexport.json").write_text(json.dumps(values))
    return folder


@pytest.mark.skipif(
    not (HEADERS["tensorrt"] and HEADERS["cuda"]),
    reason="no headers of TensorRT or CUDA: pip install kernel-lens triton",
)
def test_tensorrt_is_built_in_and_refuses_another_library(program, engine_bundle):
    assert "tensorrt" in program("--help").decode()
    assert "TOKEXPORT_TENSORRT" in program("verify", engine_bundle, code=2, env={"TOKEXPORT_TENSORRT": "/nowhere.so"})
    assert "getInferLibVersion" in program("verify", engine_bundle, "--library", "libm.so.6", code=2)
    rtx = package_folder("tensorrt_rtx_libs", "") or package_folder("tensorrt_rtx", "")
    libraries = sorted(Path(rtx).rglob("libtensorrt_rtx.so*")) if rtx else []
    if libraries:  # its interface answers to any version with rubbish: the library's own number decides
        assert "is TensorRT-RTX 1, this program was built with the headers of TensorRT 10" in program(
            "verify", engine_bundle, "--library", libraries[0], code=2
        )


def test_native_code_of_an_engine_is_asked_for(program, engine_bundle):
    values = json.loads((engine_bundle / "tokexport.json").read_text())
    values["builder"]["host_code"] = True
    (engine_bundle / "tokexport.json").write_text(json.dumps(values))
    assert "native code" in program("verify", engine_bundle, code=2)


def test_the_example_builds_against_what_is_installed(build, environment, bundles, photos, tmp_path):
    subprocess.run(["cmake", "--install", build, "--prefix", tmp_path / "usr"], check=True, capture_output=True)
    example = tmp_path / "example"
    configure = [
        "cmake",
        "-S",
        SOURCE / "example",
        "-B",
        example,
        f"-DCMAKE_PREFIX_PATH={tmp_path / 'usr'}",
        "-DCMAKE_BUILD_TYPE=Debug",
    ]
    for command in (configure, ["cmake", "--build", example]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    done = subprocess.run(
        [example / "classify", bundles("tome"), *photos[:2]], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 3 and "class " in done.stdout
    text = (SOURCE / "example" / "main.cpp").read_text()
    assert len(text.splitlines()) <= 30 and text in (SOURCE.parents[1] / "docs" / "bundle.md").read_text()
