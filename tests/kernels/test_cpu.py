"""The node on CPUs: the library of ONNX Runtime and of OpenVINO against the PyTorch twin, and how libraries are built and found."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper
from tokexport.engines import plugin
from tokexport.export.errors import BuildError, UsageError
from tokexport.kernels.token_reduce import Reduction

FOLDS = ("mean", "squeeze", "sum", "drop")
ONNX_TYPE = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}


def case(*counts, **options):
    """A case as data: what `make` in conftest.py is called with."""
    return counts, options


CASES = {
    **{
        f"{n} tokens, {r} merged": case("pairs", n, r, width=64, channels=48)
        for n, r in ((5, 1), (5, 2), (50, 24), (171, 85))
    },
    "197 tokens": case("pairs", 197, 13, heads=6, width=64, channels=384),
    "one image, by score": case("pairs", 65, 20, 0, by_score=1, one=True),
    "5 prefix": case("pairs", 65, 30, 5, width=20, channels=13),
    "1370 tokens": case("pairs", 1370, 684, batch=1, channels=8, heads=1),
    "ties": case("pairs", 257, 100, kind="exact"),
    "zeros": case("pairs", 50, 20, kind="zeros"),
    "all alike": case("pairs", 50, 20, kind="alike"),
    "pruned": case("pruned", 65, 16),
    **{f"{f}": case("scored", f, 197, 138, 40 * (f != "drop"), channels=100) for f in FOLDS},
    **{f"{f}, ties": case("scored", f, 50, 30, 13 * (f != "drop"), 2, kind="exact") for f in FOLDS},
    "squeeze, one image": case("scored", "squeeze", 5, 2, 3, one=True),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["XDG_CACHE_HOME"])


@pytest.fixture(scope="module", params=plugin.CPU_KINDS)
def library(request, cache):
    """The library of each runtime, built here; skipped by name where something to build it with is missing."""
    try:
        return plugin.build_cpu(request.param)
    except UsageError as e:
        pytest.skip(f"{request.param}: {e}")


def model(made, free_batch=True, **attributes):
    """An ONNX file of one node that takes a case."""
    op = Reduction(**made["op"])
    kinds = {"x": ONNX_TYPE[made["x"].dtype], "size": TensorProto.FLOAT, "log_size": TensorProto.FLOAT}
    inputs = {name: made[name] for name in ("x", "signal", "size") if made[name] is not None}
    free = free_batch and made["x"].ndim == 3
    infos = [
        helper.make_tensor_value_info(name, ONNX_TYPE[t.dtype], ["batch", *t.shape[1:]] if free else list(t.shape))
        for name, t in inputs.items()
    ]
    outs = [helper.make_tensor_value_info(f"{o}_out", kinds.get(o, TensorProto.INT64), None) for o in op.outputs]
    node = helper.make_node(
        "TokenReduce", list(inputs), [o.name for o in outs], domain="tokexport", **{**op.attributes, **attributes}
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("tokexport", 1)]
    graph = helper.make_graph([node], "node", infos, outs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(), inputs


def run(library, made, threads=1, free_batch=True, **attributes):
    """Outputs of the node by name, in the runtime that the library is for."""
    proto, inputs = model(made, free_batch, **attributes)
    feeds = {name: t.numpy() for name, t in inputs.items()}
    if library.kind == "ort":
        ort = pytest.importorskip("onnxruntime")
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, threads
        options.register_custom_ops_library(str(library.path))
        values = ort.InferenceSession(proto, options).run(None, feeds)
    else:
        ov = pytest.importorskip("openvino")
        core = ov.Core()
        core.add_extension(str(library.path))
        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(threads)}
        compiled = core.compile_model(core.read_model(proto), "CPU", hints)
        came = compiled(feeds)
        values = [np.array(came[o]) for o in compiled.outputs]
    return {name: torch.from_numpy(v) for name, v in zip(Reduction(**made["op"]).outputs, values, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_the_node_is_its_twin(library, node, name):
    counts, options = CASES[name]
    made = node.make(*counts, **options)
    node.assert_equals_twin(made, run(library, made))


def test_a_fixed_batch_and_threads_over_images_give_the_same(library, node):
    made = node.make("pairs", 50, 13, batch=5)
    first = run(library, made)
    for threads, free in ((1, False), (2, True)):
        for name, value in run(library, made, threads, free).items():
            assert torch.equal(value, first[name]), name


def test_outputs_that_are_not_asked_for_are_not_there(library, node):
    made = node.make("pairs", 50, 13)
    every = run(library, made)
    for sizes, decisions, wanted in ((0, 0, ["x"]), (1, 0, ["x", "size"]), (0, 1, ["x", "keep", "src", "dst"])):
        op = {**made["op"], "sizes": sizes, "decisions": decisions}
        came = run(library, {**made, "op": op})
        assert list(came) == wanted and all(torch.equal(v, every[k]) for k, v in came.items())


def test_half_floats_are_merged_in_float32(library, node):
    made = node.make("pairs", 50, 13, dtype=torch.float16)
    if library.kind == "openvino":
        pytest.skip("OpenVINO turns a float16 model into float32 before it runs it")
    node.assert_equals_twin(made, run(library, made))


def test_values_that_are_no_numbers_still_give_rows_of_the_input(library, node):
    made = node.make("pairs", 50, 13, spoilt=("signal", float("nan")))
    came = run(library, made)
    for image in torch.cat([came["keep"], came["src"]], 1)[..., 0].tolist():
        assert sorted(image) == list(range(50))


@pytest.mark.parametrize(
    "wrong", [{"n_kept": 60}, {"n_prefix": -1}, {"fold": "melt"}, {"n_folded": 1}, {"n_in": 60}, {"sizes": 7}], ids=str
)
def test_a_node_that_cannot_be_is_refused(library, node, wrong):
    made = node.make("pairs", 50, 13)
    with pytest.raises(Exception, match="n_in|fold|sizes|TokenReduce|tokens|inputs"):
        run(library, made, **wrong)


def test_a_library_is_found_where_it_was_built_and_built_once(library, cache):
    assert plugin.find_library(library.kind) == library
    assert library.path.is_file() and cache in library.path.parents
    stamp = library.path.stat().st_mtime_ns
    assert plugin.build_cpu(library.kind) == library and library.path.stat().st_mtime_ns == stamp
    assert not list(plugin.cache_folder().glob(".building-*"))


@pytest.mark.parametrize("field", ["tokexport", "sources", "runtime", "processor"])
def test_a_library_for_something_else_is_not_found(library, field, tmp_path, monkeypatch):
    folder = tmp_path / "tokexport" / f"{library.kind}-1"
    shutil.copytree(library.path.parent, folder)
    data = json.loads((folder / "manifest.json").read_text())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plugin.find_library(library.kind)
    (folder / "manifest.json").write_text(json.dumps({**data, field: "other"}))
    assert plugin.find_library(library.kind) is None
    with pytest.raises(UsageError, match=f"another: {field} other"):
        plugin.find_library(library.kind, needed=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"kind": "ort"}', '{"kind": "../x", "chips": []}'])
def test_a_damaged_manifest_is_no_library(tmp_path, monkeypatch, text):
    folder = tmp_path / "tokexport" / "ort-1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plugin.find_library("ort") is None


def refused(tmp_path, monkeypatch, *arguments, **environment):
    """What the command says when it refuses, its cache empty and its search path as given."""
    from tokexport.tools.commands.plugin import command

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    came = CliRunner().invoke(command, arguments)
    assert isinstance(came.exception, UsageError), came.output
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob(".building-*"))
    return str(came.exception)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    say = lambda *a, **k: refused(tmp_path, monkeypatch, *a, **k)
    assert "not built: run `tokexport plugin build`" in say("path")
    assert "plugin build --cpu" in say("path", "--cpu")
    assert "wanted ort or openvino" in say("build", "--cpu", "--runtime", "torch")
    assert "wanted some of 75, 80" in say("build", "--arch", "77")
    assert "wanted compute capabilities" in say("build", "--arch", "new")
    assert "leave out --cpu" in say("build", "--cpu", "--arch", "80")
    assert "go with --cpu" in say("build", "--march", "native")
    assert "has no NvInfer.h" in say("build", "--tensorrt-include", str(tmp_path))
    assert "has no onnxruntime_cxx_api.h" in say(
        "build", "--cpu", "--runtime", "ort", "--onnxruntime-include", str(tmp_path)
    )
    monkeypatch.setitem(plugin.PLACES, "onnxruntime_cxx_api.h", (str(tmp_path),))
    monkeypatch.delenv("ONNXRUNTIME_INCLUDE_DIR", raising=False)
    assert "ONNXRUNTIME_INCLUDE_DIR" in say("build", "--cpu", "--runtime", "ort")
    monkeypatch.delenv("CXX", raising=False)
    assert "C++17 compiler" in say("build", "--cpu", "--runtime", "openvino", PATH=str(tmp_path))


def test_old_tensorrt_headers_are_refused(tmp_path):
    (tmp_path / "NvInferVersion.h").write_text(
        "#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 6\n#define NV_TENSORRT_PATCH 1\n"
    )
    with pytest.raises(UsageError, match="TensorRT 8.6.1: wanted 10 or later"):
        plugin._tensorrt_release(tmp_path)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="openvino, which is not installed"):
        plugin.build_cpu("openvino")
    (tmp_path / "NvInfer.h").touch()
    with pytest.raises(UsageError, match="needs Triton, which is not installed"):
        plugin.build_plugin((80,), tensorrt_include=tmp_path)


def test_a_compiler_that_fails_leaves_nothing(tmp_path, monkeypatch):
    plugin._tools() if shutil.which("cmake") and shutil.which("c++") else pytest.skip("no compiler or no CMake")
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BuildError, match="cpu does not build"):
        plugin.build_cpu("openvino", march="no-such-processor")
    assert not list((tmp_path / "tokexport").iterdir())


@pytest.fixture(scope="module")
def reduced(tiny, tmp_path_factory):
    """reduced(method) -> path of a tiny model whose reductions are nodes."""
    from tokexport import export_onnx

    folder, loaded, paths = tmp_path_factory.mktemp("reduced"), tiny("tiny_vit"), {}

    def export(method):
        if method not in paths:
            paths[method] = folder / f"{method}.onnx"
            asked = {"r": 8} if method == "tome" else {"at": (1, 3, 4)}
            export_onnx(loaded, loaded.schedule(method, **asked), paths[method], plugin=True)
        return paths[method]

    return export


@pytest.mark.parametrize("method", ["tome", "evit", "dtps"])
def test_a_model_with_the_native_node_decides_and_computes_as_the_reference(library, reduced, method):
    from tokexport import verify

    report = verify(reduced(method), runtime=f"{library.kind}-plugin")
    assert report.passed and report.decisions == 1.0


def test_a_model_with_the_native_node_gives_what_its_body_gives(library, reduced, golden):
    from tokexport.engines.runners import open_runner

    came = {}
    for runtime in (library.kind, f"{library.kind}-plugin"):
        with open_runner(reduced("tome"), runtime) as runner:
            came[runtime] = runner.run({"image": golden.image.numpy()})["logits"]
    assert np.abs(came[library.kind] - came[f"{library.kind}-plugin"]).max() < 1e-5


def test_a_native_runtime_refuses_a_file_without_nodes_and_a_missing_library(library, exported, tmp_path, monkeypatch):
    from tokexport.engines.runners import open_runner

    with pytest.raises(UsageError, match="has no TokenReduce nodes for a native library to run"):
        open_runner(exported("tiny_vit"), f"{library.kind}-plugin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="is not built: run `tokexport plugin build --cpu`"):
        open_runner(exported("tiny_vit"), f"{library.kind}-plugin")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--cpu", "--runtime", "openvino"], ["--arch", "80"]], ids=["cpu", "tensorrt"])
def test_an_installed_wheel_builds_its_libraries_outside_the_checkout(arguments, tmp_path):
    root, checkout = tmp_path / "checkout", Path(plugin.__file__).resolve().parent.parent
    hidden = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info")
    unneeded = lambda folder, names: hidden(folder, names) | ({"tests", "docs"} if folder == str(checkout) else set())
    shutil.copytree(checkout, root, ignore=unneeded)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, root], check=True)
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.endswith("py3-none-any.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "tokexport", "plugin", "build", "--json", *arguments]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    if run.returncode == 2 and (
        "is not installed" in run.stderr or "building needs" in run.stderr or "no NvInfer.h" in run.stderr
    ):
        pytest.skip(run.stderr)
    assert run.returncode == 0, run.stderr
    (built,) = json.loads(run.stdout)
    assert Path(built["path"]).is_file() and tmp_path / "cache" in Path(built["path"]).parents
