"""TensorRT 10 and 11 and TensorRT-RTX as one: which is there, what it lacks; networks are strongly typed in all."""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

from ...export.errors import MissingPackageError, UsageError


class Package(NamedTuple):
    """Where a builder comes from: `module` is imported, `extra` brings it, `words` are what people call it."""

    module: str
    extra: str
    words: str
    distributions: tuple[str, ...]  # names of it in the registry


PACKAGES = {
    "rtx": Package("tensorrt_rtx", "rtx", "TensorRT-RTX", ("tensorrt-rtx-cu13", "tensorrt_rtx")),
    "tensorrt": Package("tensorrt", "trt", "TensorRT", ("tensorrt",)),
}
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver tells it: `compute_capability` without the point, e.g. "89"."""

    name: str
    compute_capability: str


@dataclass(frozen=True)
class Runtime:
    """An installed TensorRT: `name` "rtx" or "tensorrt", `words` what people call it, `trt` the module."""

    name: str
    words: str
    version: str
    trt: Any

    @property
    def ahead_of_time(self) -> bool:
        """Whether engines are built without a GPU, for the compute capabilities that are named."""
        return self.name == "rtx"

    @property
    def capabilities(self) -> dict[str, object]:
        """What engines can be built for without such a GPU: {"86": ComputeCapability.SM86, ...}."""
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
    driver = _driver()
    count = ctypes.c_int()
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def current_gpu() -> Gpu | None:
    """The GPU that engines are built on, the first that the driver shows; None without one."""
    if not gpus():
        return None
    driver, device, name = _driver(), ctypes.c_int(), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)
    digits = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        digits.append(str(value.value))
    return Gpu(name.value.decode(errors="replace"), "".join(digits))


def _driver():
    """NVIDIA's driver library, initialised; None where it is not, or has no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def choose(builder: str = "auto") -> str:
    """The builder that is meant; of "auto" TensorRT where it and a GPU are there, TensorRT-RTX otherwise.

    Raises: UsageError for another word, MissingPackageError when it is not installed.
    """
    if builder not in ("auto", *PACKAGES):
        raise UsageError(f"builder {builder!r}: wanted auto, {', '.join(PACKAGES)}")
    installed = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package.module)]
    if builder == "auto":
        builder = "tensorrt" if "tensorrt" in installed and ("rtx" not in installed or gpus()) else "rtx"
    if builder not in installed:
        package = PACKAGES[builder]
        raise MissingPackageError(package.module, package.extra, f"building engines with {package.words}")
    return builder


def load(name: str) -> Runtime:
    """Import the TensorRT that `choose` named. Raises: UsageError when its libraries do not load."""
    package = PACKAGES[name]
    try:
        trt = import_module(package.module)
    except Exception as e:
        raise UsageError(
            f"{package.words} is installed but cannot be loaded ({type(e).__name__}: {e}): "
            f"it needs NVIDIA's own libraries"
        ) from None
    return Runtime(name, package.words, trt.__version__, trt)


def installed_version(name: str) -> str:
    """The version of an installed TensorRT, from its package where that tells it: importing it takes a second."""
    from importlib.metadata import PackageNotFoundError, version

    for distribution in PACKAGES[name].distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return load(name).version
