"""The table of runtimes: one row each. To add one, write its module (see `base`) and its row here. Imports nothing
heavy.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ...export.errors import MissingPackageError, UsageError


@dataclass(frozen=True)
class Runtime:
    """What runs files.

    Args:
        name: what it is asked for by: "ort".
        words: what people call it: "ONNX Runtime".
        package: the package it is, by its import name; None when the module itself knows which of several a file needs.
        extra: the extra of tokexport that installs it.
        module: where it lives, relative to this package or absolute. The module has `open_file(path, runtime,
            options)` -> `Runner`, and may have `check(runtime)`, which raises a UsageError when the runtime cannot be
            used here although it is installed.
        device: "cpu" or "gpu": where it computes.
        reads: "onnx" or "engine": which files it runs.
        profiler: name of the module's function (path, images, *, rounds, threads) -> {node name: milliseconds a run};
            None without one.
        provider: of ONNX Runtime: its execution provider.
        library: the kind of native library (`engines/plugin`) that runs a file's nodes `TokenReduce`; None: their bodies are run.
    """

    name: str
    words: str
    package: str | None
    extra: str
    module: str
    device: str = "cpu"
    reads: str = "onnx"
    profiler: str | None = None
    provider: str | None = None
    library: str | None = None

    def load(self):
        """The runtime's module, imported."""
        return import_module(self.module, __package__)

    def check(self) -> None:
        """Raises: MissingPackageError when it is not installed, UsageError when it is and cannot be used here."""
        if self.package is not None and not installed(self.package):
            raise MissingPackageError(self.package, self.extra, self.words)
        if self.library is not None:
            from ..plugin import find_library

            find_library(self.library, needed=True)
        check = getattr(self.load(), "check", None)
        if check is not None:
            check(self)


ENGINES = "trt"  # the row that runs engines
TABLE = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            "ort", "ONNX Runtime", "onnxruntime", "cpu", ".ort", profiler="profile", provider="CPUExecutionProvider"
        ),
        Runtime("openvino", "OpenVINO", "openvino", "cpu", ".openvino", profiler="profile"),
        Runtime(
            "ort-plugin",
            "ONNX Runtime with the native node",
            "onnxruntime",
            "cpu",
            ".ort",
            provider="CPUExecutionProvider",
            library="ort",
        ),
        Runtime("openvino-plugin", "OpenVINO with the native node", "openvino", "cpu", ".openvino", library="openvino"),
        Runtime("torch", "PyTorch, the eager reference", "torch", "export", ".eager"),
        Runtime(
            "ort-cuda",
            "ONNX Runtime with CUDA",
            package="onnxruntime",
            extra="gpu",
            module=".ort",
            device="gpu",
            provider="CUDAExecutionProvider",
        ),
        Runtime(
            "ort-tensorrt",
            "ONNX Runtime with TensorRT",
            package="onnxruntime",
            extra="gpu",
            module=".ort",
            device="gpu",
            provider="TensorrtExecutionProvider",
        ),
        Runtime(ENGINES, "TensorRT", package=None, extra="trt", module=".tensorrt", device="gpu", reads="engine"),
    )
}


def installed(package: str) -> bool:
    """Whether a package could be imported; it is not."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ValueError, ImportError):  # a module that is blocked has no spec
        return False


def names() -> list[str]:
    """Names of the runtimes that run ONNX files: what a --runtime option takes."""
    return [r.name for r in TABLE.values() if r.reads == "onnx"]


def require(name: str) -> Runtime:
    """The runtime of this name, for ONNX files.

    Raises:
        UsageError: there is none of this name, or it cannot be used here.
        MissingPackageError: it is not installed.
    """
    if name not in names():
        raise UsageError(f"unknown runtime {name!r}: wanted one of {', '.join(names())}")
    TABLE[name].check()
    return TABLE[name]


def runtime_for(path: str | Path, name: str = "ort") -> Runtime:
    """The runtime that runs a file: of an engine always the one for engines, whatever else is installed.

    Args:
        path: an ONNX file or an engine.
        name: the runtime that is asked for, for an ONNX file.
    Raises:
        UsageError, MissingPackageError: as `require`, for an ONNX file only.
    """
    from ..files import is_engine

    if not is_engine(path):
        return require(name)
    if name not in TABLE:
        raise UsageError(f"unknown runtime {name!r}: wanted one of {', '.join(names())}")
    return TABLE[ENGINES]
