"""Native libraries of the node `TokenReduce`: built from the package's sources into the user's cache, and found there again.

Kinds: "tensorrt" (the plugin, GPU kernels inside), "ort" (custom operator of ONNX Runtime), "openvino" (extension). A library is known by
tokexport's version and sources, the release of its runtime and the processor it is for; one that differs in any of them is not found.
Nothing is ever loaded because a file names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ..export.errors import BuildError, MissingPackageError, UsageError

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
KINDS = {"tensorrt": "TensorRT", "ort": "ONNX Runtime", "openvino": "OpenVINO"}
CPU_KINDS = ("ort", "openvino")
LIBRARY = {"tensorrt": "libtokexport_plugin.so", "ort": "libtokexport_ort.so", "openvino": "libtokexport_openvino.so"}
SOURCES = {
    "tensorrt": ("triton", "plugin", "cpu/reduction.hpp", "token_reduce.py"),
    "ort": ("cpu",),
    "openvino": ("cpu",),
}
X86 = "x86-64-v3"  # processors with AVX2: of 2013 and later
PACKAGES = {"ort": ("onnxruntime-gpu", "onnxruntime"), "openvino": ("openvino",)}
PLACES = {
    "NvInfer.h": (
        "/usr/include",
        f"/usr/include/{platform.machine()}-linux-gnu",
        "/usr/local/tensorrt/include",
        "/opt/tensorrt/include",
    ),
    "cuda_runtime_api.h": ("/usr/local/cuda/include",),
    "onnxruntime_cxx_api.h": ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/local/include"),
}


@dataclass(frozen=True)
class NativeLibrary:
    """A library in the cache.

    Attributes:
        kind: "tensorrt", "ort" or "openvino".
        path: of the library.
        tokexport: the version that built it.
        sources: hash of the sources.
        runtime: release of the runtime it is for; for "tensorrt" that of the headers.
        processor: of the machine, and what the code may use of it: "x86_64 x86-64-v3".
        chips: compute capabilities with kernels of their own, "tensorrt" only.
    """

    kind: str
    path: Path
    tokexport: str
    sources: str
    runtime: str
    processor: str
    chips: tuple[int, ...] = ()


def cache_folder() -> Path:
    """Where libraries are built: $XDG_CACHE_HOME/tokexport, or ~/.cache/tokexport."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokexport"


def find_library(kind: str, *, needed: bool = False) -> NativeLibrary | None:
    """The library of this tokexport, for the runtime that is installed and this processor; of several the newest.

    Args:
        kind: of KINDS.
        needed: raise when there is none.
    Returns:
        NativeLibrary, or None.
    Raises:
        UsageError: there is none and it is needed; the message says what to do, and what does not fit in those that are there.
    """
    here, misfits = _identity(kind), []
    for manifest in sorted(cache_folder().glob(f"{kind}-*/manifest.json"), key=lambda p: -p.stat().st_mtime):
        library = _read(manifest)
        if library is None:
            continue
        of = {**asdict(library), "processor": _default_if_own(library.processor)}
        wrong = [f"{k} {of[k]}, here {v}" for k, v in here.items() if v is not None and of[k] != v]
        if not wrong:
            return library
        misfits += wrong[:1]
    if needed:
        command = "tokexport plugin build" + ("" if kind == "tensorrt" else " --cpu")
        other = f" (one is there for another: {misfits[0]})" if misfits else ""
        raise UsageError(f"the native library for {KINDS[kind]} is not built{other}: run `{command}`")
    return None


def build_plugin(
    chips: tuple[int, ...] = (),
    *,
    tensorrt_include: str | Path | None = None,
    force: bool = False,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> NativeLibrary:
    """Compile the GPU kernels and the TensorRT plugin around them; needs no GPU.

    Args:
        chips: compute capabilities with kernels of their own, e.g. (86, 89); all that are known by default. PTX for the rest comes too.
        tensorrt_include: folder of NvInfer.h; default $TENSORRT_INCLUDE_DIR, the usual places, or the package kernel-lens.
        force: build again what is there.
        progress: called with what is done and the share of the whole.
    Returns:
        NativeLibrary.
    Raises:
        UsageError: an unknown chip; no headers, no compiler, no CMake, no Triton.
        BuildError: the compiler refused; nothing was kept.
    """
    chips = tuple(sorted(set(chips))) or _chips()
    unknown = [c for c in chips if c not in _chips()]
    if unknown:
        raise UsageError(f"arch {', '.join(map(str, unknown))}: wanted some of {', '.join(map(str, _chips()))}")
    headers = _headers("NvInfer.h", "TENSORRT_INCLUDE_DIR", tensorrt_include, ("kernel_lens", "include/tensorrt"))
    if find_spec("triton") is None:
        raise UsageError(
            f"building the plugin needs Triton, which is not installed: pip install triton (it has wheels for Linux on x86-64 and Arm; "
            f"this is {platform.system()} on {platform.machine()})"
        )
    cuda = _headers("cuda_runtime_api.h", "CUDA_INCLUDE_DIR", None, ("triton", "backends/nvidia/include"))
    _tools()
    identity = {**_identity("tensorrt"), "runtime": _tensorrt_release(headers)}
    with _Place("tensorrt", identity, chips, force) as place:
        if place.done:
            return place.done
        kernels = place.folder / "kernels"
        kernels.mkdir()
        _embed(chips, kernels, progress)
        progress("the plugin", 0.97)
        options = {"TENSORRT_INCLUDE_DIR": headers, "CUDA_INCLUDE_DIR": cuda, "KERNELS_DIR": kernels}
        return place.finish(_cmake(KERNELS / "plugin", place.folder, options, LIBRARY["tensorrt"]))


def build_cpu(
    kind: str, *, onnxruntime_include: str | Path | None = None, march: str | None = None, force: bool = False
) -> NativeLibrary:
    """Compile the node for a runtime on the CPU.

    Args:
        kind: "ort" or "openvino".
        onnxruntime_include: folder of onnxruntime_cxx_api.h; default $ONNXRUNTIME_INCLUDE_DIR or the usual places.
        march: processors the code is for, as GCC's -march; default x86-64-v3 (AVX2), on Arm the compiler's own.
        force: build again what is there.
    Returns:
        NativeLibrary.
    Raises:
        UsageError: no headers, no compiler, no CMake; MissingPackageError: no runtime to build it for.
        BuildError: the compiler refused; nothing was kept.
    """
    package = {"ort": "onnxruntime", "openvino": "openvino"}.get(kind)
    if package is None:
        raise UsageError(f"kind {kind!r}: wanted {' or '.join(CPU_KINDS)}")
    if find_spec(package) is None:
        raise MissingPackageError(package, "cpu", f"building the library for {KINDS[kind]}")
    march = _march() if march is None else march
    options: dict[str, object] = {"RUNTIME": kind, "MARCH": march}
    if kind == "ort":
        options["ONNXRUNTIME_INCLUDE_DIR"] = _headers(
            "onnxruntime_cxx_api.h", "ONNXRUNTIME_INCLUDE_DIR", onnxruntime_include, None
        )
    else:
        from openvino.utils import get_cmake_path

        options["OpenVINO_DIR"] = get_cmake_path()
    _tools()
    identity = {**_identity(kind), "processor": _processor(march)}
    with _Place(kind, identity, (), force) as place:
        return place.done or place.finish(_cmake(KERNELS / "cpu", place.folder, options, LIBRARY[kind]))


def _chips() -> tuple[int, ...]:
    from ..kernels.triton.compile import CHIPS

    return CHIPS


def _embed(chips: tuple[int, ...], folder: Path, progress) -> None:
    from ..kernels.plugin.embed import embed
    from ..kernels.triton.compile import compile_all

    try:
        embed(compile_all(chips, progress=lambda what, share: progress(what, 0.95 * share)), folder)
    except (UsageError, OSError):
        raise
    except Exception as e:  # Triton, LLVM and ptxas have errors of their own
        raise BuildError(f"the GPU kernels do not compile: {type(e).__name__}: {str(e)[:600]}") from None


def _flags() -> str:
    """What this processor can do, in the kernel's words; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")


def _march() -> str:
    if platform.machine() != "x86_64":
        return ""
    return X86 if "avx2" in _flags().split() else "x86-64-v2"


def _processor(march: str) -> str:
    """For what code is: with another march than ours, for the very processor that it was built on."""
    own = "" if march == _march() else f" {hashlib.sha256(_flags().encode()).hexdigest()[:8]}"
    return f"{platform.machine()} {march}".strip() + own


def _default_if_own(processor: str) -> str:
    """The default's name for code that was built on this very processor."""
    return (
        _processor(_march()) if processor == _processor(processor.split()[1] if " " in processor else "") else processor
    )


def _identity(kind: str) -> dict[str, str | None]:
    """By what a library is known to be ours and to fit; None for what may be anything."""
    release = None
    for package in PACKAGES.get(kind, ()):
        try:
            release = release or version(package)
        except PackageNotFoundError:
            continue
    processor = platform.machine() if kind == "tensorrt" else _processor(_march())
    return {"tokexport": version("tokexport"), "sources": _sources(kind), "runtime": release, "processor": processor}


def _sources(kind: str) -> str:
    digest = hashlib.sha256()
    for part in SOURCES[kind]:
        path = KERNELS / part
        for file in sorted(
            f for f in (path.rglob("*") if path.is_dir() else [path]) if f.suffix in (".py", ".cpp", ".hpp", ".txt")
        ):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _read(manifest: Path) -> NativeLibrary | None:
    """A library of the cache; None for one that is damaged or not whole."""
    try:
        data = json.loads(manifest.read_text())
        library = NativeLibrary(
            **{**data, "path": manifest.parent / LIBRARY[data["kind"]], "chips": tuple(data["chips"])}
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return library if library.path.is_file() else None


class _Place:
    """A folder in the cache in which a library is built, renamed into place when it is whole and cleared away if it is not."""

    def __init__(self, kind: str, identity: dict, chips: tuple[int, ...], force: bool):
        self.kind, self.identity, self.chips = kind, identity, chips
        key = hashlib.sha256(json.dumps([kind, identity, chips], sort_keys=True).encode()).hexdigest()[:12]
        self.place = cache_folder() / f"{kind}-{key}"
        self.done = None if force else _read(self.place / "manifest.json")
        self.folder = self.place

    def __enter__(self):
        if not self.done:
            try:
                cache_folder().mkdir(parents=True, exist_ok=True)
                self.folder = Path(tempfile.mkdtemp(prefix=".building-", dir=cache_folder()))
            except OSError as e:
                raise UsageError(
                    f"{cache_folder()}: {e.strerror}: set XDG_CACHE_HOME to a folder that can be written"
                ) from None
        return self

    def finish(self, library: Path) -> NativeLibrary:
        """Keep the library and its manifest only."""
        clean = self.folder / "whole"
        clean.mkdir()
        shutil.copy2(library, clean / LIBRARY[self.kind])
        made = NativeLibrary(self.kind, self.place / LIBRARY[self.kind], chips=self.chips, **self.identity)
        (clean / "manifest.json").write_text(
            json.dumps({k: v for k, v in asdict(made).items() if k != "path"}, indent=1)
        )
        if self.place.exists():
            self.place.rename(self.folder / "old")
        clean.rename(self.place)
        return made

    def __exit__(self, *_):
        if not self.done:
            shutil.rmtree(self.folder, ignore_errors=True)


def _tools() -> None:
    """Raises: UsageError when there is nothing to build with."""
    compilers = [os.environ.get("CXX") or "", "c++", "g++", "clang++"]
    if not any(c and shutil.which(c.split()[0]) for c in compilers):
        raise UsageError(
            "building needs a C++17 compiler: none of $CXX, c++, g++, clang++ is there (Debian: apt install g++)"
        )
    for tool, words in (("cmake", "apt install cmake, or pip install cmake"), ("make", "apt install make")):
        if shutil.which(tool) is None and not (tool == "make" and shutil.which("ninja")):
            raise UsageError(f"building needs {tool}, which is not there: {words}")


def _headers(file: str, variable: str, given: str | Path | None, package: tuple[str, str] | None) -> Path:
    """The folder of a header: as given, else by the environment, the usual places, or a package that carries it."""
    asked = given or os.environ.get(variable)
    if asked:
        if not (Path(asked) / file).is_file():
            raise UsageError(f"{asked} has no {file}: wanted the folder that it lies in")
        return Path(asked).resolve()
    places = [Path(p) for p in PLACES[file]]
    spec = find_spec(package[0]) if package else None
    if spec and spec.submodule_search_locations:
        places.append(Path(spec.submodule_search_locations[0]) / package[1])
    for place in places:
        if (place / file).is_file():
            return place
    hint = {
        "NvInfer.h": "they come with TensorRT, or with `pip install --no-deps kernel-lens`",
        "cuda_runtime_api.h": "they come with the CUDA toolkit or Triton",
        "onnxruntime_cxx_api.h": "they come with ONNX Runtime's C++ release or Debian 13's libonnxruntime-dev; 1.21 and later will do",
    }[file]
    raise UsageError(f"no {file} in {', '.join(map(str, places))}: {hint}; say where it is with {variable}")


def _tensorrt_release(include: Path) -> str:
    """ "10.14.1", from NvInferVersion.h."""
    file = include / "NvInferVersion.h"
    text = file.read_text(errors="replace") if file.is_file() else ""
    parts = [
        re.search(rf"define (?:NV_TENSORRT|TRT)_{k}(?:_ENTERPRISE)?\s+(\d+)", text) for k in ("MAJOR", "MINOR", "PATCH")
    ]
    if not all(parts):
        raise UsageError(f"{file} does not say which TensorRT it is of")
    release = ".".join(p[1] for p in parts)
    if int(parts[0][1]) < 10:
        raise UsageError(
            f"{include} has the headers of TensorRT {release}: wanted 10 or later, which knows plugins of version 3"
        )
    return release


def _cmake(source: Path, folder: Path, options: dict, library: str) -> Path:
    build = folder / "build"
    arguments = [f"-D{name}={value}" for name, value in options.items()]
    for command in (
        ["cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *arguments],
        ["cmake", "--build", build],
    ):
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if run.returncode:
            words = [
                line for line in (run.stdout + run.stderr).splitlines() if "rror" in line
            ] or run.stderr.splitlines()
            raise BuildError("\n  ".join([f"{source.name} does not build:", *(w.strip()[:300] for w in words[:5])]))
    return build / library
