"""The C++ runtime takes a ladder: every rung gives what it gives in Python, a budget picks the same one, a bad ladder is one error."""

import json
import shutil
import subprocess

import numpy as np
import onnx
import pytest
from tokexport.engines.bundle.folder import sha256_of
from tokexport.engines.bundle.write import write_bundle
from tokexport.engines.images import load_images
from tokexport.engines.ladder_manifest import read_ladder
from tokexport.engines.ladder_write import LadderSettings, write_ladder
from tokexport.engines.measure.environment import processor
from tokexport.export.provenance import Preprocess
from tokexport.tools.demo import digits

from tokexport import export_onnx, load_model, open_ladder

from .cpp_build import HEADERS, NO_HEADERS, SOURCE

pytestmark = pytest.mark.programs

ONNXRUNTIME = pytest.param("onnxruntime", marks=pytest.mark.skipif(not HEADERS["onnxruntime"], reason=NO_HEADERS))
RUNTIMES = [ONNXRUNTIME, pytest.param("openvino")]
NAMES = {"onnxruntime": "ort"}  # of runtimes, in Python
ANY = ("--runtime", "onnxruntime" if HEADERS["onnxruntime"] else "openvino")
TIMES = {"r=0": 20.0, "r=2": 12.0, "r=4": 10.0}  # set, so that no clock of a busy machine decides


def edited(folder, edit):
    """A ladder whose manifest is changed: edit(values)."""
    values = json.loads((folder / "ladder.json").read_text())
    edit(values)
    (folder / "ladder.json").write_text(json.dumps(values))
    return folder


def set_times(values):
    for rung in values["rungs"]:
        rung["ms"] = TIMES[rung["label"]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return digits.write_held_out(tmp_path_factory.mktemp("digits"), 5)


@pytest.fixture(scope="module")
def ladders(tmp_path_factory):
    """ladders(batch) -> folder of a ladder of the digits model, for one image, three, or any number (None), made once."""
    made, folder = {}, tmp_path_factory.mktemp("ladders")
    loaded = load_model(digits.MODEL, digits.KWARGS, checkpoint=digits.WEIGHTS)

    def ladder(batch=1):
        if batch not in made:
            made[batch] = folder / f"batch_{batch}"
            schedules = [(f"r={r}", loaded.schedule("tome", r=r)) for r in (4, 0, 2)]
            write_ladder(loaded, schedules, made[batch], settings=LadderSettings(batch=batch, seconds=0.2))
            edited(made[batch], set_times)
        return made[batch]

    return ladder


@pytest.fixture
def copied(ladders, tmp_path):
    return shutil.copytree(ladders(), tmp_path / "ladder")


def images_of(folder, photos):
    """Photos as Python prepares them for a ladder."""
    values = read_ladder(folder).provenance["preprocess"]
    return load_images(photos, Preprocess(**values))


CASES = [("onnxruntime", 1), ("onnxruntime", 3), ("onnxruntime", None), ("openvino", 1), ("openvino", None)]
CASES = [pytest.param(*case, marks=ONNXRUNTIME.marks if case[0] == "onnxruntime" else ()) for case in CASES]


@pytest.mark.parametrize("runtime, batch", CASES)
def test_every_rung_gives_what_it_gives_in_python(runtime, batch, program, ladders, photos):
    folder = ladders(batch)
    runs = -(-len(photos) // (batch or 1))
    images = images_of(folder, photos)
    with open_ladder(folder, NAMES.get(runtime, runtime), threads=1, measure=False) as ladder:
        for ms in TIMES.values():
            args = ("--runtime", runtime, "--times", "stored", "--budget-ms", ms * runs)
            values = json.loads(program("output", folder, *photos, *args))
            wanted = ladder.run(images, budget_ms=ms * runs)
            assert values.keys() == wanted.keys() == {"logits"}
            logits = np.array(values["logits"]["values"]).reshape(values["logits"]["shape"])
            assert logits.shape == wanted["logits"].shape
            assert np.abs(logits - wanted["logits"]).max() <= 1e-5 * max(1.0, np.abs(wanted["logits"]).max())


def test_rungs_differ(program, ladders, photos):
    """So that equal outputs of the same rung say something."""
    ask = lambda ms: program("output", ladders(), photos[0], *ANY, "--times", "stored", "--budget-ms", ms)
    assert len({ask(ms) for ms in TIMES.values()}) == 3


@pytest.mark.parametrize("batch", [1, 3, None])
def test_a_budget_picks_the_rung_that_it_picks_in_python(batch, program, ladders):
    folder = ladders(batch)
    cases = [(1, b) for b in (0.5, 10, 11.9, 12, 19.99, 20, 1e9)] + [(5, b) for b in (1, 24, 40, 60, 100)]
    with open_ladder(folder, NAMES.get(ANY[1], ANY[1]), threads=1, measure=False) as ladder:
        for n, budget in cases:
            answer = rungs(program, folder, "--runtime", "none", "--budget-ms", budget, "--batch", n)
            assert answer["picked"] == ladder.pick(budget, images=n).label, (n, budget)
        assert rungs(program, folder, "--runtime", "none")["picked"] == ladder.pick(None).label == "r=0"


def test_classes_are_those_of_the_digits(program, ladders, photos):
    answer = json.loads(
        program("classify", ladders(), *photos, *ANY, "--budget-ms", "1", "--times", "stored", "--json")
    )
    assert len(answer["images"]) == len(photos)
    right = [i["top"][0]["class"] == int(p.parent.name) for i, p in zip(answer["images"], photos)]
    assert answer["rung"] == "r=4" and sum(right) >= 4
    assert "is a classifier" in program("features", ladders(), photos[0], *ANY, "--times", "stored", code=2)


def test_a_rung_that_is_too_slow_is_said(build, environment, ladders, photos):
    ask = lambda ms: subprocess.run(
        [build / "tokexport-run", "classify", ladders(), photos[0], *ANY, "--times", "stored", "--budget-ms", ms],
        capture_output=True,
        text=True,
        env=environment,
    )
    fits, late = ask("11"), ask("3")
    assert fits.returncode == late.returncode == 0 and "rung r=4: 10.000 ms a run" in fits.stderr
    assert "none is within the budget" in late.stderr and "none is within" not in fits.stderr


def rungs(program, folder, *args):
    return json.loads(program("rungs", folder, *args, "--json"))


@pytest.mark.skipif(not HEADERS["onnxruntime"], reason=NO_HEADERS)
def test_times_are_measured_where_the_stored_ones_are_of_others(program, copied):
    stored = rungs(program, copied, "--budget-ms", "12")
    assert not stored["measured"] and stored["picked"] == "r=2" and stored["runtime"] == "ONNX Runtime"
    assert {r["label"]: r["ms"] for r in stored["rungs"]} == TIMES
    for args in (("--threads", "2"), ("--runtime", "openvino"), ("--share-weights",), ("--times", "measured")):
        measured = rungs(program, copied, *args)
        assert measured["measured"] and all(0 < r["ms"] != TIMES[r["label"]] for r in measured["rungs"]), args
    assert not rungs(program, copied, "--threads", "2", "--times", "stored")["measured"]
    edited(copied, lambda v: v.update(processor=processor().name + " of another"))
    assert rungs(program, copied)["measured"]
    edited(copied, lambda v: v.update(processor=processor().name, runtime="torch"))
    assert rungs(program, copied)["measured"], "a runtime that is not built in"


@pytest.mark.skipif(not HEADERS["onnxruntime"], reason=NO_HEADERS)
def test_rungs_that_share_weights_compute_the_same(program, ladders, photos):
    ask = lambda *args: json.loads(program("output", ladders(), *photos, *ANY, "--times", "stored", *args))["logits"]
    apart, shared = (np.array(v["values"]) for v in (ask(), ask("--share-weights")))
    assert np.abs(apart - shared).max() < 1e-5
    refused = program("rungs", ladders(), "--share-weights", "--runtime", "openvino", code=2)
    assert "share_weights: OpenVINO" in refused


def test_the_text_names_the_rung_that_runs(program, copied):
    text = program("rungs", copied / "ladder.json", *ANY, "--times", "stored", "--budget-ms", "15").decode()
    first, *rows = text.splitlines()
    assert "3 rungs, fp32, 32 x 32 pixels, 10 classes" in first and "as stored" in first
    assert [row[0] for row in rows] == [" ", ">", " "] and "r=2" in rows[1] and "12.000 ms" in rows[1]


def test_bench_times_one_rung(program, ladders):
    args = (
        *ANY,
        "--times",
        "stored",
        "--budget-ms",
        "12",
        "--runs",
        "6",
        "--warmup",
        "1",
        "--concurrency",
        "2",
        "--json",
    )
    record = json.loads(program("bench", ladders(), *args))
    assert record["rung"] == "r=2" and record["runs"] == 6 and 0 < record["p50"] <= record["p99"]


def test_photos_are_prepared_as_in_python(program, ladders, photos):
    raw = np.frombuffer(program("input", ladders(), *photos), np.float32)
    images = images_of(ladders(), photos)
    assert np.abs(raw.reshape(images.shape) - images).max() <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_eight_threads_give_what_one_gives(runtime, build, environment, ladders):
    command = [build / "tokexport-threads", ladders(), "8", "300", runtime]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "2400 runs, 0 differ" in done.stdout and "Sanitizer" not in done.stderr


def test_wrong_use_is_told(program, ladders, photos, tmp_path):
    for args, words in (
        (("verify", ladders()), "is a ladder, which has no proof"),
        (("classify", ladders()), "wanted photos"),
        (("rungs", ladders(), photos[0]), "takes no photos"),
        (("classify", ladders(), photos[0], "--budget-ms", "fast"), "wanted milliseconds"),
        (("classify", ladders(), photos[0], "--budget-ms", "nan"), "wanted milliseconds"),
        (("classify", ladders(), photos[0], "--budget-ms", "0"), "wanted milliseconds"),
        (("rungs", ladders(), "--times", "never"), "wanted auto, stored or measured"),
        (("rungs", ladders(), "--threads", "2000"), "threads 2000"),
        (("rungs", ladders(), "--runtime", "abacus"), "wanted one of"),
        (("rungs", tmp_path), "is no ladder"),
        (("classify", tmp_path, photos[0], "--budget-ms", "9"), "is no ladder"),
        (("classify", tmp_path, photos[0]), "no tokexport.json"),
        (("rungs", tmp_path / "ladder.json"), "has no ladder.json"),
    ):
        text = program(*args, code=2)
        assert words in text and text.count("\n") == 1, text


def rewritten(folder, name):
    """Put the hash and size of a changed file into the manifest."""
    entry = {"sha256": sha256_of(folder / name), "size": (folder / name).stat().st_size}
    edited(folder, lambda v: [f.update(entry) for f in files_of(v) if f["name"] == name])


def files_of(values):
    return [values["weights"], *(rung["file"] for rung in values["rungs"])]


def cut_weights(folder):
    with open(folder / "weights.data", "r+b") as file:
        file.truncate(1000)


def flip_a_weight(folder):
    with open(folder / "weights.data", "r+b") as file:
        file.seek(5000)
        file.write(b"\x01" * 8)


def link_the_weights(folder):
    (folder / "weights.data").rename(folder.parent / "real")
    (folder / "weights.data").symlink_to(folder.parent / "real")


def read_from_elsewhere(folder):
    model = onnx.load(folder / "rung1.onnx", load_external_data=False)
    tensor = next(i for i in model.graph.initializer if i.external_data)
    next(e for e in tensor.external_data if e.key == "location").value = "../../etc/passwd"
    (folder / "rung1.onnx").write_bytes(model.SerializeToString())
    rewritten(folder, "rung1.onnx")


def no_onnx(folder):
    (folder / "rung1.onnx").write_bytes(b"\x3a\xff\xff")
    rewritten(folder, "rung1.onnx")


def manifest(edit):
    return lambda folder: edited(folder, edit)


def first_rung(**values):
    return manifest(lambda v: v["rungs"][0].update(values))


def provenance(**values):
    return manifest(lambda v: v["provenance"].update(values))


BROKEN = {
    "a missing rung": (lambda f: (f / "rung1.onnx").unlink(), "has no rung1.onnx"),
    "missing weights": (lambda f: (f / "weights.data").unlink(), "has no weights.data"),
    "cut weights": (cut_weights, "has 1000 bytes, wanted"),
    "another weight": (flip_a_weight, "SHA-256 differs"),
    "a link": (link_the_weights, "is a link"),
    "weights of elsewhere": (read_from_elsewhere, "do not trust it"),
    "no ONNX file": (no_onnx, "is not an ONNX file"),
    "no JSON": (lambda f: (f / "ladder.json").write_text("{"), "is not JSON"),
    "newer": (manifest(lambda v: v.update(format=[2, 0])), "format 2"),
    "a need": (manifest(lambda v: v.update(needs=["magic"])), "needs magic"),
    "a need of the files": (provenance(needs=["magic"]), "needs magic"),
    "a way out": (manifest(lambda v: v["weights"].update(name="../weights.data")), "wanted a plain name"),
    "a rung outside": (manifest(lambda v: v["rungs"][1]["file"].update(name="/etc/passwd")), "wanted a plain name"),
    "a file twice": (manifest(lambda v: v["rungs"][1]["file"].update(name="rung0.onnx")), "names a file twice"),
    "no rungs": (manifest(lambda v: v.update(rungs=[])), "there are none"),
    "no time": (first_rung(ms=0), "above 0"),
    "no number": (first_rung(ms="12"), "wanted a number"),
    "a field": (manifest(lambda v: v.pop("runtime")), "'runtime' is missing"),
    "a batch of none": (manifest(lambda v: v.update(batch=0)), "batch: wanted 1 or more"),
    "threads": (manifest(lambda v: v.update(threads=-3)), "threads: wanted"),
    "another size": (manifest(lambda v: v["provenance"]["preprocess"].update(size=[0, 32])), "size and crop"),
    "channels": (manifest(lambda v: v["provenance"]["dims"].update(channels=2)), "1 or 3 channels"),
    "input": (provenance(input="film"), "input 'film'"),
    "activation": (provenance(activation="magic"), "activation 'magic'"),
    "classes": (manifest(lambda v: v["provenance"]["dims"].update(classes=1000)), "do not belong together"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_bad_ladder_is_one_error(fault, program, copied, photos):
    spoil, words = BROKEN[fault]
    spoil(copied)
    text = program("classify", copied, photos[0], *ANY, "--times", "stored", code=2)
    assert words in text.splitlines()[-1] and text.count("Error: ") == 1, text


def test_a_bundle_whose_classes_are_not_its_files_is_one_error(program, tmp_path, photos):
    """Of a bundle as of a ladder: the file gives fewer logits than its manifest says."""
    loaded = load_model(digits.MODEL, digits.KWARGS, checkpoint=digits.WEIGHTS)
    export_onnx(loaded, loaded.schedule("none"), tmp_path / "v.onnx")
    folder = write_bundle(tmp_path / "v.onnx", tmp_path / "b", images=photos, n_images=1).path
    values = json.loads((folder / "tokexport.json").read_text())
    values.update(classes=1000, labels=[])
    values["outputs"][0]["shape"][-1] = 1000
    (folder / "tokexport.json").write_text(json.dumps(values))
    assert "do not belong together" in program("classify", folder, photos[0], *ANY, code=2)


def test_the_page_shows_the_example_that_compiles(build, environment, ladders, photos, tmp_path):
    page = (SOURCE.parents[1] / "docs" / "ladder.md").read_text()
    code = page.split("```cpp\n")[1].split("```")[0]
    (tmp_path / "main.cpp").write_text(code)
    shutil.copy(SOURCE / "example" / "CMakeLists.txt", tmp_path)
    usr, example = tmp_path / "usr", tmp_path / "example"
    for command in (
        ["cmake", "--install", build, "--prefix", usr],
        ["cmake", "-S", tmp_path, "-B", example, f"-DCMAKE_PREFIX_PATH={usr}", "-DCMAKE_BUILD_TYPE=Debug"],
        ["cmake", "--build", example],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    done = subprocess.run([example / "classify", ladders(), photos[0]], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(str(photos[0])) and "class " in done.stdout
