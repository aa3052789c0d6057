"""What machine and which versions figures were made with, and what a bug report needs. Needs no package but Python's
own.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "tokexport",
    "numpy",
    "pillow",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxsim",
    "torch",
    "torchvision",
    "timm",
    "safetensors",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-rtx-cu12",
    "tensorrt-rtx-cu13",
    "nvidia-cuda-runtime",
    "nvidia-cuda-runtime-cu12",
    "triton",
    "matplotlib",
)
# Instruction sets that decide how fast the products of a ViT are, as Linux (/proc/cpuinfo) and macOS (sysctl) write
# them.
INSTRUCTION_SETS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "fphp", "asimdhp", "sve", "sve2", "i8mm", "bf16",
)  # fmt: skip


@dataclass(frozen=True)
class Processor:
    """A processor. cores: logical ones that this process may use. instructions: those of INSTRUCTION_SETS that it
    has.
    """

    name: str
    cores: int
    instructions: tuple[str, ...]


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it. memory: bytes. capability: compute capability, "86"."""

    name: str
    memory: int
    capability: str


@dataclass(frozen=True)
class GpuDriver:
    """NVIDIA's driver. cuda: the newest CUDA it runs, "13.0". problem: why nothing can be said, "" when something
    can.
    """

    version: str = ""
    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class RuntimeState:
    """A runtime of the table, here. problem: why it cannot be used, "" when it can."""

    name: str
    words: str
    problem: str


@dataclass(frozen=True)
class Environment:
    """What a bug report needs. versions: of the installed packages. runtimes: every row of the table."""

    tokexport: str
    python: str
    system: str
    processor: Processor
    versions: dict[str, str]
    runtimes: tuple[RuntimeState, ...]
    driver: GpuDriver

    def to_json(self) -> dict:
        """Plain JSON values."""
        return asdict(self)


def environment() -> Environment:
    """What a bug report needs. Every runtime is loaded, which takes some seconds."""
    versions = installed_versions()
    return Environment(
        versions.get("tokexport", "not installed"),
        f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor(),
        versions=versions,
        runtimes=runtime_states(),
        driver=gpu_driver(),
    )


def machine(threads: int) -> dict:
    """What the record of a benchmark names: processor, GPUs, driver, versions and threads, as plain JSON values.

    Args:
        threads: that the runtimes were given; 0 for their own choice.
    """
    driver, cpu = gpu_driver(), processor()
    gpus = {"gpus": [g.name for g in driver.gpus], "driver": driver.version, "cuda": driver.cuda} if driver.gpus else {}
    return {
        "cpu": cpu.name,
        "cores": cpu.cores,
        "instructions": list(cpu.instructions),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **gpus,
        "versions": installed_versions(),
    }


def installed_versions() -> dict[str, str]:
    """Versions of those PACKAGES that are installed; none is imported."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def runtime_states() -> tuple[RuntimeState, ...]:
    """Which runtimes of the table can be used here, and why the others cannot."""
    from ..runners.table import TABLE

    states = []
    for runtime in TABLE.values():
        problem = ""
        try:
            runtime.check()
            if runtime.package is not None:
                __import__(runtime.package)
        except Exception as e:  # a package that is there may fail to load in any manner
            problem = " ".join(str(e).split())[:300] or type(e).__name__
        states.append(RuntimeState(runtime.name, runtime.words, problem))
    return tuple(states)


def processor() -> Processor:
    """The processor of this machine, from /proc/cpuinfo on Linux and from sysctl on macOS."""
    entries: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            entries.setdefault(key.strip(), value.strip())
    except OSError:
        entries = _sysctl()
    flags = set((entries.get("flags") or entries.get("Features") or "").lower().split())
    name = entries.get("model name") or platform.processor() or platform.machine() or "unknown"
    return Processor(name, usable_cores(), tuple(s for s in INSTRUCTION_SETS if s in flags))


def usable_cores() -> int:
    """Logical cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _sysctl() -> dict[str, str]:
    """macOS's words for what Linux has in /proc/cpuinfo; {} elsewhere."""
    if platform.system() != "Darwin":
        return {}
    ask = lambda *names: subprocess.run(["sysctl", *names], capture_output=True, text=True).stdout
    arm = [line for line in ask("hw.optional.arm").splitlines() if line.endswith(": 1")]
    features = [line.partition(":")[0].rpartition("FEAT_")[2].lower() for line in arm]
    words = {"dotprod": "asimddp", "fp16": "fphp", "i8mm": "i8mm", "bf16": "bf16"}
    intel = ask("-n", "machdep.cpu.features", "machdep.cpu.leaf7_features").lower().replace(".", "_")
    flags = " ".join([intel, "asimd" if arm else "", *(words[f] for f in features if f in words)])
    return {"model name": ask("-n", "machdep.cpu.brand_string").strip(), "flags": flags}


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def gpu_driver() -> GpuDriver:
    """NVIDIA's driver and GPUs, asked of its management library: no CUDA package is needed, and nothing runs on a
    GPU.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return GpuDriver(problem="no NVIDIA driver: libnvidia-ml.so.1 is not there")
    code = nvml.nvmlInit_v2()
    if code != 0:
        return GpuDriver(problem=f"NVIDIA's management library does not start (NVML error {code})")
    try:
        cuda, count = ctypes.c_int(), ctypes.c_uint()
        nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        text = ctypes.create_string_buffer(96)
        nvml.nvmlSystemGetDriverVersion(text, 96)
        gpus = tuple(_gpu(nvml, i) for i in range(count.value))
        return GpuDriver(text.value.decode(), f"{cuda.value // 1000}.{cuda.value % 1000 // 10}", gpus)
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml, index: int) -> Gpu:
    device, text, memory = ctypes.c_void_p(), ctypes.create_string_buffer(96), _Memory()
    major, minor = ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
        return Gpu("a GPU that cannot be asked", 0, "")
    nvml.nvmlDeviceGetName(device, text, 96)
    nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
    nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    return Gpu(text.value.decode(), memory.total, f"{major.value}{minor.value}")
