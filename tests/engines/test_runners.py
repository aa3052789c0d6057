"""Runners: a runtime is one file and one row, closing is final, what failed is told from what was asked wrongly,
nothing else is needed.
"""

import gc
import json
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokexport.engines.runners import tensorrt as engine_runner
from tokexport.engines.runners.table import TABLE, Runtime, runtime_for
from tokexport.export.errors import EngineError, MissingPackageError
from tokexport.tools.cli import group

from tokexport import UsageError, evaluate, open_runner, verify

IMAGE = np.zeros((2, 3, 64, 64), np.float32)
TOY = """
from pathlib import Path
from tokexport.engines.runners.base import Runner, RunnerOptions
from tokexport.engines.runners.table import TABLE

def open_file(path, runtime, options):
    inner = TABLE["ort"].load().open_file(path, TABLE["ort"], options)
    return ToyRunner(runtime.name, runtime.words, inputs=inner.inputs, outputs=inner.outputs, inner=inner)

class ToyRunner(Runner):
    timed = "one run of a toy"
    def __init__(self, *args, inner, **options):
        super().__init__(*args, **options)
        self.inner = inner
    def _run(self, feeds):
        return self.inner.run(feeds)
    def _release(self):
        self.inner.close()
"""


@pytest.fixture(scope="module")
def tome(exported):
    return exported("tiny_vit", method="tome", r=8)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A runtime: one file and one row."""
    (tmp_path / "toy_runtime.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(TABLE, "toy", Runtime("toy", "the toy runtime", "toy_runtime", "toy", "toy_runtime"))
    yield "toy"
    sys.modules.pop("toy_runtime", None)


def test_a_runtime_is_one_file_and_one_row(toy, tome, tmp_path):
    assert verify(tome, runtime=toy).passed
    args = ["bench", str(tome), "--runtime", toy, "--batch", "1", "--seconds", "0.2", "--json"]
    rows = json.loads(CliRunner().invoke(group, args).stdout)["rows"]
    assert [r["runtime"] for r in rows] == [toy, toy] and rows[1]["timed"] == "one run of a toy"
    from PIL import Image

    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "p.png")
    out = CliRunner().invoke(group, ["run", str(tome), str(tmp_path / "p.png"), "--runtime", toy, "--json"])
    assert json.loads(out.stdout)["runtime"] == toy


@pytest.mark.parametrize("command", ["run", "bench", "eval", "viz"])
def test_help_lists_the_table(command):
    out = CliRunner().invoke(group, [command, "--help"])
    words = "".join(out.stdout.split())  # a line may break within a name
    assert all(name in words for name in ("ort", "ort-cuda", "ort-tensorrt", "openvino", "torch")), out.stdout


def test_a_missing_package_names_its_extra(tome, monkeypatch):
    monkeypatch.setitem(TABLE, "ort", Runtime("ort", "ONNX Runtime", "no_such_package", "cpu", ".ort"))
    with pytest.raises(MissingPackageError, match=r"ONNX Runtime needs .*tokexport\[cpu\]"):
        open_runner(tome)


@pytest.mark.parametrize("runtime", ["ort", "openvino", "torch"])
def test_a_closed_runner_is_closed(runtime, tome):
    with open_runner(tome, runtime, threads=1) as runner:
        runner.run({"image": IMAGE})
    with pytest.raises(UsageError, match="closed: open the file again"):
        runner.run({"image": IMAGE})
    with pytest.raises(UsageError, match="closed"):
        runner.run_unchecked({"image": IMAGE})
    runner.close()


@pytest.mark.parametrize("runtime, held", [("ort", "_session"), ("openvino", "_compiled"), ("torch", "_reference")])
def test_closing_gives_back_what_the_runtime_holds(runtime, held, tome):
    runner = open_runner(tome, runtime, threads=1)
    alive = weakref.ref(getattr(runner, held))
    runner.close()
    gc.collect()
    assert alive() is None


def test_a_runner_is_closed_when_its_block_fails(tome):
    with pytest.raises(ZeroDivisionError), open_runner(tome) as runner:
        1 / 0
    assert runner.closed


def test_torch_has_its_threads_back(tome):
    before = torch.get_num_threads()
    with open_runner(tome, "torch", threads=before + 1) as runner:
        assert torch.get_num_threads() == before
        runner.run({"image": IMAGE})
        assert torch.get_num_threads() == before
        with pytest.raises(EngineError):
            runner.run_unchecked({"image": np.zeros((1, 7), np.float32)})
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("runtime", ["ort", "openvino", "torch"])
def test_a_failing_runtime_is_no_wrong_use(runtime, tome):
    """Inputs are a matter of use (exit 2), what fails behind them is the runtime's (exit 3)."""
    with open_runner(tome, runtime, threads=1) as runner:
        with pytest.raises(UsageError, match="wanted float32 any x 3 x 64 x 64"):
            runner.run({"image": np.zeros((1, 7), np.float32)})
        with pytest.raises(EngineError, match="failed while running the file"):
            runner.run_unchecked({"no such input": IMAGE})


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_a_file_of_bytes_takes_bytes(runtime, tmp_path):
    import onnx
    from onnx import TensorProto, helper

    value = lambda name, kind: helper.make_tensor_value_info(name, kind, ["batch", 4])
    node = helper.make_node("Cast", ["image"], ["out"], to=TensorProto.FLOAT)
    graph = helper.make_graph([node], "g", [value("image", TensorProto.UINT8)], [value("out", TensorProto.FLOAT)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "bytes.onnx")
    with open_runner(tmp_path / "bytes.onnx", runtime) as runner:
        assert runner.run({"image": np.full((2, 4), 255, np.uint8)})["out"].max() == 255
        with pytest.raises(UsageError, match="is float32 2 x 4, wanted uint8 any x 4"):
            runner.run({"image": np.zeros((2, 4), np.float32)})


def test_a_file_that_a_runtime_refuses_is_the_runtimes_failure(tome, tmp_path):
    import onnx

    model = onnx.load(tome)
    next(n for n in model.graph.node if n.op_type == "LayerNormalization").op_type = "Relu"  # which takes one input
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(EngineError, match="ONNX Runtime cannot load it"):
        open_runner(tmp_path / "broken.onnx")


def test_bf16_in_onnx_runtime_on_the_cpu_is_refused_in_words(typed):
    with pytest.raises(UsageError, match="no bf16 operators on the CPU: use OpenVINO"):
        open_runner(typed("bf16", method="tome", r=8))


# Engines: a TensorRT that is not there, as far as the runner looks at it.


class _Context:
    def __init__(self, faults):
        self.faults, self.addresses = faults, {}

    def set_input_shape(self, name, shape):
        self.shape = shape
        return "shape" not in self.faults

    def get_tensor_shape(self, name):
        return (self.shape[0], 10)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return "address" not in self.faults

    def execute_async_v3(self, stream):
        return "execute" not in self.faults


class _Engine:
    num_io_tensors = 2

    def __init__(self, faults):
        self.faults = faults

    def get_tensor_name(self, i):
        return ("image", "logits")[i]

    def get_tensor_mode(self, name):
        return "in" if name == "image" else "out"

    def get_tensor_shape(self, name):
        return (-1, 3, 64, 64) if name == "image" else (-1, 10)

    def get_tensor_dtype(self, name):
        return "f32"

    def create_execution_context(self):
        return None if "context" in self.faults else _Context(self.faults)


def _builder(faults):
    class Logger:
        Severity = SimpleNamespace(ERROR=1)

    class TrtRuntime:
        def __init__(self, logger):
            logger.log(1, "out of memory")

        def deserialize_cuda_engine(self, content):
            return None if "engine" in faults else _Engine(faults)

    trt = SimpleNamespace(
        ILogger=Logger,
        Runtime=TrtRuntime,
        TensorIOMode=SimpleNamespace(OUTPUT="out"),
        float32="f32",
        int64="i64",
        int32="i32",
    )
    return SimpleNamespace(words="TensorRT", version="1", trt=trt, ahead_of_time=False)


class _Stream:
    cuda_stream = 0
    waits = 0

    def wait_stream(self, other):
        pass

    def synchronize(self):
        _Stream.waits += 1


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """engine(*faults) -> a runner of an engine of 1 to 32 images on a TensorRT with these faults."""

    class Event:
        def __init__(self, enable_timing):
            pass

        record = synchronize = lambda self, *_: None
        elapsed_time = lambda self, end: 2.5

    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(engine_runner, "_to_gpu", lambda image: torch.from_numpy(image))
    path = tmp_path / "v.plan"
    path.write_bytes(b"engine")
    sidecar = SimpleNamespace(profile=[1, 8, 32], plugin=None)
    return lambda *faults: engine_runner.EngineRunner(path, sidecar, _builder(faults))


def test_an_engine_runs(engine):
    with engine() as runner:
        assert runner.inputs == {"image": (None, 3, 64, 64)} and runner.outputs == {"logits": (None, 10)}
        assert runner.run({"image": IMAGE})["logits"].shape == (2, 10)
        with pytest.raises(UsageError, match="built for 1 to 32 images a run, these are 40"):
            runner.run({"image": np.repeat(IMAGE, 20, 0)})


@pytest.mark.parametrize(
    "fault, words",
    [
        ("engine", "cannot load it: out of memory"),
        ("context", "it has no room to run"),
        ("shape", "refuses images of 2 x 3 x 64 x 64: out of memory"),
        ("address", "refuses the memory of 'image'"),
        ("execute", "the engine failed: out of memory"),
    ],
)
def test_every_answer_of_tensorrt_is_looked_at(fault, words, engine):
    with pytest.raises(EngineError, match=words):
        engine(fault).run({"image": IMAGE})


def test_a_closed_engine_holds_no_memory(engine):
    runner = engine()
    runner.run({"image": IMAGE})
    runner._captures["shape"] = object()
    held, waits = [weakref.ref(runner._engine), weakref.ref(runner._context)], _Stream.waits
    runner.close()
    assert [ref() for ref in held] == [None, None] and not runner._captures
    assert _Stream.waits == waits + 1, "the GPU is done before its memory is given back"
    with pytest.raises(UsageError, match="closed"):
        runner.run({"image": IMAGE})


def test_an_engine_is_timed_by_events_without_copies(engine, monkeypatch):
    copies = []
    monkeypatch.setattr(engine_runner, "_to_gpu", lambda image: copies.append(1) or torch.from_numpy(image))
    with engine() as runner:
        timer = runner.timer({"image": IMAGE})
        copies.clear()
        assert [timer() for _ in range(3)] == [0.0025] * 3 and not copies
        assert "CUDA events" in runner.timed
    with pytest.raises(UsageError, match="closed"):
        timer()


@pytest.fixture
def without_onnxruntime(monkeypatch):
    """A host where onnxruntime is not installed."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)


def test_an_engine_needs_no_onnxruntime(without_onnxruntime, tome, tmp_path):
    """What is asked of an engine comes as far as the engine; an ONNX file is refused for want of the package."""
    plan = tmp_path / "v.plan"
    plan.write_bytes(b"x")
    assert runtime_for(plan).name == "trt"
    for args in (
        ["run", plan, tmp_path],
        ["viz", plan, tmp_path],
        ["eval", plan, "--images", tmp_path],
        ["bench", plan],
    ):
        error = CliRunner().invoke(group, list(map(str, args))).exception
        assert isinstance(error, UsageError) and "has no v.plan.json" in str(error), error
    for args in (["run", tome, tmp_path], ["eval", tome, "--images", tmp_path]):
        error = CliRunner().invoke(group, list(map(str, args))).exception
        assert isinstance(error, MissingPackageError) and "onnxruntime" in str(error)


def test_a_real_engine_needs_no_onnxruntime(without_onnxruntime, tome, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: engine builds need it")
    from PIL import Image
    from tokexport.engines.tensorrt.build import build_engine

    plan = build_engine(
        tome, tmp_path / "v.plan", precision="fp16", builder="rtx", capabilities=("80",), decisions=True
    ).path
    (tmp_path / "0").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "0" / "p.png")
    photo = str(tmp_path / "0" / "p.png")
    for call in (
        lambda: open_runner(plan),
        lambda: evaluate(plan, [(photo, 0)]),
        lambda: CliRunner().invoke(group, ["run", str(plan), photo], catch_exceptions=False, standalone_mode=False),
        lambda: CliRunner().invoke(
            group,
            ["viz", str(plan), photo, "-o", str(tmp_path / "v.png")],
            catch_exceptions=False,
            standalone_mode=False,
        ),
    ):
        with pytest.raises(UsageError, match="for compute capability 80|no NVIDIA GPU here"):
            call()
