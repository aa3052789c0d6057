"""The C++ runtime: where its sources and the headers that it needs are, and how it is built."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "engines" / "cpp"


def package_folder(package, inside):
    spec = importlib.util.find_spec(package)
    folders = [Path(d) / inside for d in (spec.submodule_search_locations if spec else []) or []]
    return next((str(f) for f in folders if f.is_dir()), None)


def first(*folders):
    return next((f for f in folders if f and os.path.isdir(f)), None)


HEADERS = {
    "onnxruntime": first(os.environ.get("ONNXRUNTIME_INCLUDE_DIR"), "/usr/include/onnxruntime"),
    "tensorrt": first(os.environ.get("TENSORRT_INCLUDE_DIR"), package_folder("kernel_lens", "include/tensorrt")),
    "cuda": first(
        os.environ.get("CUDA_INCLUDE_DIR"),
        package_folder("triton", "backends/nvidia/include"),
        "/usr/local/cuda/include",
    ),
}


NO_HEADERS = "no headers of ONNX Runtime: set ONNXRUNTIME_INCLUDE_DIR (engines/cpp/onnxruntime_headers.sh finds them)"


def built(folder, *options):
    """Configure and build; one job at a time, since compiling takes memory."""
    done = subprocess.run(["cmake", "-S", SOURCE, "-B", folder, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    done = subprocess.run(["cmake", "--build", folder, "-j", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "warning:" not in done.stdout + done.stderr
    return folder


def needed_programs():
    missing = [p for p in ("cmake", "g++") if shutil.which(p) is None]
    missing += [
        h
        for h in ("jpeglib.h", "png.h")
        if not any(Path(d, h).is_file() for d in ("/usr/include", "/usr/local/include"))
    ]
    return missing
