"""TensorRT 10 and 11 and TensorRT-RTX as one: which is there, what it lacks, and networks that are strongly typed in all of them."""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from importlib import import_module

from ...export.errors import MissingPackageError, UsageError

PACKAGES = {"rtx": ("tensorrt_rtx", "rtx", "TensorRT-RTX"), "tensorrt": ("tensorrt", "trt", "TensorRT")}


@dataclass(frozen=True)
class Runtime:
    """An installed TensorRT. name: "rtx" or "tensorrt". words: what people call it. trt: the module."""

    name: str
    words: str
    version: str
    trt: object

    @property
    def ahead_of_time(self) -> bool:
        """Whether engines are built without a GPU, for the compute capabilities that are named."""
        return self.name == "rtx"

    @property
    def capabilities(self) -> dict[str, object]:
        """Compute capabilities engines can be built for without such a GPU: {"86": ComputeCapability.SM86, ...}; empty for TensorRT."""
        if not self.ahead_of_time:
            return {}
        return {
            k.removeprefix("SM"): v for k, v in self.trt.ComputeCapability.__members__.items() if k.startswith("SM")
        }

    def network_flags(self) -> int:
        """Flags of a strongly typed network: TensorRT 10 must be told, the others know no other."""
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)


def gpus() -> int:
    """NVIDIA GPUs that the driver shows; 0 without a driver. Asks the driver itself: no CUDA package is imported."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def choose(said: str = "auto") -> str:
    """The runtime that is meant: "rtx" or "tensorrt". "auto": TensorRT where it and a GPU are there, TensorRT-RTX otherwise.

    Raises: UsageError for another word, MissingPackageError when it is not installed.
    """
    if said not in ("auto", *PACKAGES):
        raise UsageError(f"--builder {said!r}: wanted auto, {', '.join(PACKAGES)}")
    there = [name for name, (package, _, _) in PACKAGES.items() if importlib.util.find_spec(package)]
    if said == "auto":
        said = "tensorrt" if "tensorrt" in there and ("rtx" not in there or gpus()) else "rtx"
    if said not in there:
        raise MissingPackageError(*PACKAGES[said][:2], f"building engines with {PACKAGES[said][2]}")
    return said


def load(name: str) -> Runtime:
    """Import the runtime that `choose` named. Raises: UsageError when its libraries do not load."""
    package, _, words = PACKAGES[name]
    try:
        trt = import_module(package)
    except Exception as e:
        raise UsageError(
            f"{words} is installed but cannot be loaded ({type(e).__name__}: {e}): it needs NVIDIA's own libraries"
        ) from None
    return Runtime(name, words, trt.__version__, trt)
