"""`tokexport env`: what a bug report needs, also where nothing is installed."""

import ctypes
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from tokexport.engines.measure import environment
from tokexport.engines.runners import TABLE
from tokexport.tools.cli import group

BARE = """
import sys
for name in {absent!r}:
    sys.modules[name] = None
sys.argv = ["tokexport", "env", *{args!r}]
from tokexport.tools.cli import main
main()
"""
ABSENT = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "matplotlib",
)


def test_it_names_versions_runtimes_and_hardware():
    out = CliRunner().invoke(group, ["env"])
    assert out.exit_code == 0 and out.stdout == ""
    for word in ("tokexport", "Python", "processor", "instructions", "numpy", "runtime ort", "loads", "NVIDIA driver"):
        assert word in out.stderr


def test_it_runs_where_nothing_is_installed():
    code = BARE.format(absent=ABSENT, args=["--json"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = json.loads(done.stdout)
    assert [r["name"] for r in here["runtimes"]] == list(TABLE)
    assert all("not installed: pip install" in r["problem"] for r in here["runtimes"])
    assert here["python"] and here["system"] and here["processor"]["cores"] >= 1


def test_a_runtime_that_does_not_load_says_why(monkeypatch):
    monkeypatch.setattr(environment, "__import__", lambda name: 1 / 0, raising=False)
    states = {s.name: s.problem for s in environment.runtime_states()}
    assert states["ort"] == "division by zero" and "onnxruntime" in states["ort-cuda"]


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("fpu avx2 fma avx512f avx512_bf16 avx512_vnni amx_int8 amx_bf16 sse", ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")),
        ("fp asimd asimddp i8mm bf16 sve", ("asimd", "asimddp", "sve", "i8mm", "bf16")),
    ],
)  # fmt: skip
def test_instruction_sets_are_read(flags, wanted, monkeypatch):
    key = "Features" if "asimd" in flags else "flags"
    text = f"processor\t: 0\nmodel name\t: A processor\n{key}\t: {flags}\nprocessor\t: 1\n"
    monkeypatch.setattr(environment.Path, "read_text", lambda self: text)
    processor = environment.processor()
    assert processor.name == "A processor" and processor.instructions == wanted


class _Nvml:
    """NVIDIA's management library with one GPU."""

    def __init__(self, code=0):
        self.code, self.closed = code, False

    def nvmlInit_v2(self):
        return self.code

    def nvmlShutdown(self):
        self.closed = True

    def nvmlSystemGetCudaDriverVersion_v2(self, number):
        number._obj.value = 12080

    def nvmlDeviceGetCount_v2(self, number):
        number._obj.value = 1

    def nvmlSystemGetDriverVersion(self, text, length):
        text.value = b"570.1"

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        return 0

    def nvmlDeviceGetName(self, device, text, length):
        text.value = b"A GPU"

    def nvmlDeviceGetMemoryInfo(self, device, memory):
        memory._obj.total = 8_000_000_000

    def nvmlDeviceGetCudaComputeCapability(self, device, major, minor):
        major._obj.value, minor._obj.value = 8, 6


def test_gpus_are_named_with_their_driver(monkeypatch):
    nvml = _Nvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    wanted = environment.GpuDriver("570.1", "12.8", (environment.Gpu("A GPU", 8_000_000_000, "86"),))
    assert environment.gpu_driver() == wanted and nvml.closed
    machine = environment.machine(2)
    assert machine["gpus"] == ["A GPU"] and machine["driver"] == "570.1" and machine["threads"] == 2


def test_a_driver_that_is_not_there_or_broken_is_told(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _Nvml(code=9))
    assert "NVML error 9" in environment.gpu_driver().problem

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert "no NVIDIA driver" in environment.gpu_driver().problem and "gpus" not in environment.machine(1)
