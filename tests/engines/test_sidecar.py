"""The sidecar of an engine: what it says, when it is refused, and what makes another engine of the same request."""

import ctypes
import json
import os
from dataclasses import replace

import pytest
from tokexport.engines.files import EngineInspection, is_engine
from tokexport.engines.tensorrt import build, runtime
from tokexport.engines.tensorrt import request as requests
from tokexport.engines.tensorrt.process import Built
from tokexport.engines.tensorrt.request import BuildOptions, make_request
from tokexport.engines.tensorrt.sidecar import Builder, Tensor, read_sidecar, sidecar, write_sidecar
from tokexport.export import files
from tokexport.export.files import read_model, write_model
from tokexport.export.inspection import inspect

import tokexport
from tokexport import UsageError, build_engine

BUILT = Built("1.7", {"CONVOLUTION": {"FLOAT": 1}}, (Tensor("image", "float32", (None, 3, 64, 64)),), (), 0.1)


@pytest.fixture
def fake_builder(monkeypatch):
    """A builder that writes a few bytes, on a machine with the GPU that is set; all around it is real."""
    state = {"gpu": runtime.Gpu("Card A", "89"), "tasks": []}

    def run_child(task, progress):
        state["tasks"].append(task)
        if task.engine:
            with open(task.engine, "wb") as f:
                f.write(b"engine")
        if task.new_timing_cache:
            old = open(task.timing_cache, "rb").read() if os.path.exists(task.timing_cache) else b""
            with open(task.new_timing_cache, "wb") as f:
                f.write(old + b"+")
        outputs = tuple(Tensor(name, "float32", (None, 10)) for name in task.request.outputs)
        return replace(BUILT, outputs=outputs), ()

    monkeypatch.setattr(build, "run_child", run_child)
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(runtime, "installed_version", lambda name: "1.7")
    monkeypatch.setattr(runtime, "gpus", lambda: int(state["gpu"] is not None))
    monkeypatch.setattr(runtime, "current_gpu", lambda: state["gpu"])
    return state


@pytest.fixture
def split(exported, tmp_path, monkeypatch):
    """A file with its weights beside it."""
    proto, weights = read_model(exported("tiny_vit", method="tome", r=8))
    with monkeypatch.context() as patch:
        patch.setattr(files, "TWO_GB", 0)
        write_model(proto, weights, tmp_path / "v.onnx")
    return tmp_path / "v.onnx"


def test_a_sidecar_says_what_the_engine_takes_gives_and_runs_on(split, fake_builder):
    engine = build_engine(split, builder="rtx").engine
    assert read_sidecar(split.with_suffix(".plan")) == engine
    assert engine.gpu == fake_builder["gpu"] and engine.compute_capability == ("89",)
    assert engine.inputs == BUILT.inputs and engine.output_names == engine.provenance.outputs
    assert engine.profile == (1, 8, 32) and engine.batch is None and engine.builder == Builder("rtx", "1.7")
    assert engine.source_sha256 == files.sha256_of(split, split.with_name("v.onnx.data"))
    data = json.loads(sidecar(split.with_suffix(".plan")).read_text())
    assert data["format"] == [1, 0] and data["needs"] == [] and "format" not in data["provenance"]


def test_the_weights_beside_a_file_and_the_gpu_are_part_of_what_was_asked(split, fake_builder):
    ask = lambda: build_engine(split, builder="rtx")
    assert not ask().cached and ask().cached
    data = split.with_name("v.onnx.data")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UsageError, match="exists"):
        ask()
    data.write_bytes(whole)
    assert ask().cached
    for other in (runtime.Gpu("Card B", "89"), runtime.Gpu("Card A", "90")):
        fake_builder["gpu"] = other
        with pytest.raises(UsageError, match="exists"):
            ask()
    assert not build_engine(split, builder="rtx", force=True).cached and ask().cached


def test_a_named_capability_does_not_ask_what_gpu_is_here(exported, fake_builder):
    inspection = inspect(exported("tiny_vit", method="tome", r=8))
    load = lambda name: runtime.Runtime(name, "", "", type("trt", (), {"ComputeCapability": SM}))
    SM = type("SM", (), {"__members__": {"SM86": 1, "SM89": 2}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests.runtimes, "load", load)
        named = make_request(inspection, BuildOptions(builder="rtx", capabilities=["86"]))
        fake_builder["gpu"] = None
        assert named.gpu is None and make_request(inspection, BuildOptions(builder="rtx", capabilities=["86"])) == named


def test_what_the_driver_says_of_a_gpu(monkeypatch):
    class Driver:
        def cuInit(self, flags):
            return 0

        def cuDeviceGetCount(self, count):
            count._obj.value = 2
            return 0

        def cuDeviceGet(self, device, index):
            device._obj.value = 7 + index
            return 0

        def cuDeviceGetName(self, name, size, device):
            name.value = f"Card {device.value}".encode()
            return 0

        def cuDeviceGetAttribute(self, value, attribute, device):
            value._obj.value = {75: 12, 76: 0}[attribute]
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert runtime.gpus() == 2 and runtime.current_gpu() == runtime.Gpu("Card 7", "120")
    monkeypatch.setattr(Driver, "cuInit", lambda self, flags: 100)  # CUDA_ERROR_NO_DEVICE
    assert runtime.gpus() == 0 and runtime.current_gpu() is None


def test_a_timing_cache_is_kept_only_where_it_is_asked_for(split, fake_builder):
    folder = split.parent
    build_engine(split, builder="tensorrt")
    assert sorted(p.name for p in folder.iterdir()) == ["v.onnx", "v.onnx.data", "v.plan", "v.plan.json"]
    assert fake_builder["tasks"][-1].new_timing_cache is None
    for times in (1, 2):
        build_engine(split, builder="tensorrt", timing_cache=folder / "t.cache", force=True)
        assert (folder / "t.cache").read_bytes() == b"+" * times
    with pytest.raises(UsageError, match="has no such cache"):
        build_engine(split, builder="rtx", timing_cache=folder / "t.cache", force=True)
    for wrong, words in (
        (split, "files that are read"),
        (folder / "w.plan", "where the engine goes"),
        (folder, "directory"),
    ):
        with pytest.raises(UsageError, match=words):
            build_engine(split, folder / "w.plan", builder="tensorrt", timing_cache=wrong)
    assert not (folder / "w.plan").exists()


def test_what_contradicts_the_file_or_makes_no_sense_is_refused(split, fake_builder):
    for options, words in (
        ({"profile": (4, 2, 8)}, "batch 4:2:8: wanted smallest:best:largest"),
        ({"profile": (1, 2)}, "wanted smallest:best:largest"),
        ({"profile": (1, 2.5, 3)}, "wanted smallest:best:largest"),
        ({"workspace": -1}, "workspace -1"),
        ({"opt_level": 6}, "opt-level 6: wanted 0 to 5"),
        ({"precision": "fp7"}, "precision 'fp7'"),
        ({"builder": "trt9"}, "builder 'trt9'"),
    ):
        with pytest.raises(UsageError, match=words):
            build_engine(split, **{"builder": "tensorrt", **options})
    with pytest.raises(TypeError, match="colour"):
        build_engine(split, colour="red")


SPOILED = {
    "layers": [None, {"a": 1}, {"a": {"b": "1"}}],
    "profile": ["x", [1], None, [8, 4, 32]],
    "builder": [{}, "rtx", {"name": "gcc", "version": "1"}],
    "compute_capability": [86, None],
    "gpu": ["A", {"name": "A"}],
    "size": ["a", 0],
    "warnings": [None],
    "batch": ["q", 3],
    "precision": [5, "fp7"],
    "provenance": [{}, None],
    "inputs": [[], [{"name": "image"}]],
    "outputs": [None, ["logits"]],
    "format": [None, [2, 0], [1]],
    "needs": [None, ["cast"], "plugin"],
    "more": [1],
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_sidecar_with_other_kinds_of_values_is_refused_and_no_cache_hit(name, split, fake_builder):
    path = build_engine(split, builder="rtx").path
    data = json.loads(sidecar(path).read_text())
    for value in SPOILED[name]:
        sidecar(path).write_text(json.dumps({**data, name: value}))
        with pytest.raises(UsageError, match=r"v\.plan\.json"):
            read_sidecar(path)
        with pytest.raises(UsageError, match="exists"):
            build_engine(split, builder="rtx")


def test_an_engine_that_is_not_what_its_sidecar_says_is_refused(split, fake_builder):
    path = build_engine(split, builder="rtx").path
    whole, text = path.read_bytes(), sidecar(path).read_text()
    for spoil, words in (
        (lambda: path.write_bytes(whole[:-1]), "truncated"),
        (lambda: sidecar(path).write_text(text[:-9]), "is not JSON"),
        (lambda: sidecar(path).write_bytes(b"\xff"), "is not JSON"),
        (lambda: sidecar(path).write_text("[]"), "wanted an object"),
        (lambda: sidecar(path).write_text(json.dumps({"runtime": {}})), "made before format 1.*tokexport trt"),
        (lambda: sidecar(path).unlink(), "moved without it"),
    ):
        path.write_bytes(whole)
        sidecar(path).write_text(text)
        spoil()
        for look in (read_sidecar, tokexport.inspect):
            with pytest.raises(UsageError, match=words):
                look(path)


def test_an_engine_is_told_from_a_photo_with_notes(split, fake_builder):
    path = build_engine(split, split.with_name("v.engine"), builder="rtx").path
    assert is_engine(path) and is_engine("none.plan") and not is_engine(split)
    photo = split.with_name("photo.jpg")
    for text in ("{}", "[]", "no json", '{"builder": 1}'):
        photo.with_name("photo.jpg.json").write_text(text)
        assert not is_engine(photo)


def test_inspect_takes_engines_too(split, fake_builder):
    path = build_engine(split, builder="rtx").path
    inspection = tokexport.inspect(path)
    assert isinstance(inspection, EngineInspection) and inspection.engine == read_sidecar(path)
    assert inspection.macs == tokexport.inspect(split).macs and inspection.files == (path, sidecar(path))
    assert inspection.to_json()["sha256"] == inspection.engine.sha256 and json.dumps(inspection.to_json())


def test_a_sidecar_that_is_written_is_read(split, fake_builder):
    path = build_engine(split, builder="rtx").path
    other = replace(read_sidecar(path), compute_capability=("80",), gpu=None)
    write_sidecar(path, other)
    assert read_sidecar(path) == other


def test_a_bundle_reads_what_built_an_engine_and_where_it_runs(split, fake_builder):
    from tokexport.engines.bundle import describe

    path = build_engine(split, builder="rtx").path
    builder = describe._builder(path)
    assert (builder.name, builder.version, builder.compute_capability) == ("rtx", "1.7", ("89",))
    assert describe._runtime_version(path, True, "trt") == ("rtx", "1.7")
    assert describe._stored(path, True)["model"] == read_sidecar(path).provenance.model
