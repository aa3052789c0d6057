"""The C++ runtime for its tests: one build for all of them, with the address and undefined-behaviour sanitizers in it."""

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from .cpp_build import HEADERS, SOURCE, built, needed_programs, package_folder


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Folder of the sanitized build; workers take turns, and the second finds it done."""
    if needed_programs():
        pytest.skip(f"not installed: {', '.join(needed_programs())} (apt install cmake g++ libjpeg-dev libpng-dev)")
    from openvino.utils import get_cmake_path

    options = [
        f"-DOpenVINO_DIR={get_cmake_path()}",
        "-DTOKEXPORT_SANITIZE=ON",
        "-DTOKEXPORT_TESTS=ON",
        "-DCMAKE_CXX_FLAGS=-O1",
        "-DCMAKE_BUILD_TYPE=None",
    ]
    options += [f"-DONNXRUNTIME_INCLUDE_DIR={HEADERS['onnxruntime']}"] if HEADERS["onnxruntime"] else []
    if HEADERS["tensorrt"] and HEADERS["cuda"]:
        options += [f"-DTENSORRT_INCLUDE_DIR={HEADERS['tensorrt']}", f"-DCUDA_INCLUDE_DIR={HEADERS['cuda']}"]
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    kept = os.environ.get("TOKEXPORT_CPP_BUILD")  # a folder to build in again and again while working on it
    with open(base / "cpp.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return built(Path(kept) if kept else base / "cpp", *options)


@pytest.fixture(scope="session")
def environment():
    """Where the libraries are, and what the sanitizers are to report."""
    library = next(Path(package_folder("onnxruntime", "capi")).glob("libonnxruntime.so.*"))
    supp = SOURCE / "tests" / "leaks.supp"
    return {
        **os.environ,
        "TOKEXPORT_ONNXRUNTIME": str(library),
        "LSAN_OPTIONS": f"suppressions={supp}:print_suppressions=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TBB_ENABLE_SANITIZERS": "1",  # OpenVINO's TBB else opens a library in a way that the address sanitizer refuses
    }


@pytest.fixture(scope="session")
def program(build, environment):
    """program(*args, code=0) -> what tokexport-run writes to stdout (bytes); a leak or a bad access fails."""

    def run(*args, code=0, env=None):
        done = subprocess.run(
            [build / "tokexport-run", *map(str, args)],
            capture_output=True,
            env={**environment, **(env or {})},
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, (args, done.returncode, done.stdout[-500:], done.stderr.decode()[-3000:])
        assert b"Sanitizer" not in done.stderr and b"runtime error" not in done.stderr
        return done.stdout if code in (0, 1) else done.stderr.decode()

    return run
