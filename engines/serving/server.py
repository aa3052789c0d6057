"""A real Triton server on this machine's loopback: for tests and for a first look, without a container.

PyPI's nvidia-pytriton holds one with the Python backend. It is unpacked, never installed (it asks for numpy 1):

    FOLDER/pytriton/tritonserver, FOLDER/nvidia_pytriton.libs    the wheel, unpacked
    FOLDER/site                                                  numpy 1, which this server was built for

FOLDER is what TOKEXPORT_TRITONSERVER names, else ~/.cache/tokexport/tritonserver; `make serve-demo` fills it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...export.errors import EngineError, UsageError

VARIABLE = "TOKEXPORT_TRITONSERVER"
PATIENCE = 120.0  # seconds until it must be ready


def server_folder() -> Path:
    """Where the server is looked for."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "tokexport" / "tritonserver")


def find_server() -> Path:
    """The folder of an unpacked server.

    Raises:
        UsageError: there is none, or none for this Python; the message says how it comes there.
    """
    folder = server_folder()
    program, stub = folder / "pytriton/tritonserver/bin/tritonserver", _stub(folder)
    if not program.is_file():
        raise UsageError(
            f"there is no Triton server in {folder}: `make serve-demo` unpacks one there, or {VARIABLE} names the folder of "
            f"another"
        )
    if not stub.is_file():
        raise UsageError(f"the Triton server in {folder} has no Python backend for Python {_python()}")
    if not (folder / "site/numpy").is_dir():
        raise UsageError(f"{folder}/site has no numpy: pip install --no-deps --target {folder}/site 'numpy<2'")
    return folder


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _stub(folder: Path) -> Path:
    return folder / "pytriton/tritonserver/python_backend_stubs" / _python() / "triton_python_backend_stub"


@contextmanager
def serving(repository: str | Path, *, patience: float = PATIENCE) -> Iterator[str]:
    """Run the server on a repository until the block ends.

    Args:
        repository: a Triton model repository; all its models must load.
        patience: seconds until it must be ready.
    Yields:
        Its address, "http://127.0.0.1:PORT".
    Raises:
        UsageError: there is no server.
        EngineError: it did not come up; its own words are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="tokexport-serve-") as name:
        log, port = Path(name) / "log", _free_port()
        with open(log, "wb") as out:
            process = subprocess.Popen(
                command(repository, port, backends=Path(name) / "backends"),
                env=environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        address = f"http://127.0.0.1:{port}"
        try:
            _wait(process, address, log, patience)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def command(repository: str | Path, port: int, *, backends: Path) -> list[str]:
    """The command line of a server on the loopback, HTTP alone.

    Args:
        repository: of models.
        port: to listen on.
        backends: a folder to make, where the Python backend and the stub of this Python are put together.
    """
    folder = find_server()
    place = backends / "python"
    shutil.copytree(folder / "pytriton/tritonserver/backends/python", place)
    shutil.copy2(_stub(folder), place)
    (place / _stub(folder).name).chmod(0o755)
    program = folder / "pytriton/tritonserver/bin/tritonserver"
    program.chmod(program.stat().st_mode | 0o111)
    return [
        str(program),
        f"--model-repository={Path(repository).resolve()}",
        f"--backend-directory={backends}",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--disable-auto-complete-config",
        "--exit-timeout-secs=5",
    ]


def environment() -> dict[str, str]:
    """The environment of the server: its libraries, this Python, and the packages that models may import."""
    folder = find_server()
    libraries = [str(folder / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
    packages = [str(folder / "site"), *(p for p in sys.path if p.endswith(("site-packages", "dist-packages")))]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        "PYTHONHOME": sys.base_prefix,
        "TOKEXPORT_SITE_PACKAGES": os.pathsep.join(packages),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(process: subprocess.Popen, address: str, log: Path, patience: float) -> None:
    """Until the server is ready. Raises: EngineError."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            raise EngineError(f"the Triton server ended ({process.returncode}): {complaints(log)}")
        try:
            with urllib.request.urlopen(f"{address}/v2/health/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise EngineError(f"the Triton server was not ready after {patience:.0f} s: {complaints(log)}")


def complaints(log: Path) -> str:
    """The lines of a server's log that say what is wrong, the first few."""
    lines = log.read_text("utf-8", "replace").splitlines()
    signs = ("error", "fail", "unavailable", "invalid")
    errors = [line for line in lines if any(sign in line.lower() for sign in signs) and "CudaDriver" not in line]
    return " / ".join(" ".join(line.split())[:300] for line in (errors or lines)[:4])
