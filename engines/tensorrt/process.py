"""Running `child`, the process that builds, and listening to it until it ends, in whatever way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from ...export.errors import BuildError, StorageError, UsageError
from ...export.records import decode, encode
from .request import BuildTask
from .sidecar import Tensor

ERRORS = {kind.__name__: kind for kind in (UsageError, BuildError, StorageError)}  # what a child may report


@dataclass(frozen=True)
class Built:
    """What came out of a build.

    Attributes:
        version: of the builder.
        layers: of the typed network, {kind: {type: count}}.
        inputs: of the engine, in order.
        outputs: of the engine, in order.
        seconds: of building; 0 for a dry run.
    """

    version: str
    layers: dict[str, dict[str, int]]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    seconds: float


@dataclass
class _Messages:
    """What a child has said so far."""

    result: dict | None = None
    error: tuple[str, str] | None = None  # (kind, text)
    logs: list[tuple[str, str]] = field(default_factory=list)  # (severity, text)
    phases: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # open ones: (steps done, steps), the outermost first

    def take(self, message: dict) -> None:
        if "phase" in message:
            name, _, steps = message["phase"]
            self.phases[name] = 0, max(steps, 1)
        elif "step" in message:
            name, done = message["step"]
            self.phases[name] = done, self.phases.get(name, (0, 1))[1]
        elif "done" in message:
            self.phases.pop(message["done"], None)
        elif "log" in message:
            self.logs.append(tuple(message["log"]))
        elif "error" in message:
            self.error = tuple(message["error"])
        elif "result" in message:
            self.result = message["result"]

    def texts(self, *, warnings: bool) -> list[str]:
        """The builder's warnings, or its errors, each once."""
        return list(dict.fromkeys(text for severity, text in self.logs if (severity == "WARNING") == warnings))


def run_child(task: BuildTask, progress: Callable[[str, float], None]) -> tuple[Built, tuple[str, ...]]:
    """Build in a process of its own, which may crash.

    Args:
        task: what is to be built, and where.
        progress: called with a stage and the share of it that is done.
    Returns:
        What was built, and the builder's warnings, each once.
    Raises:
        UsageError, BuildError, StorageError: as the child reports it; BuildError too when it ended without a result.
    """
    read_end, write_end = os.pipe()
    with (
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryFile("w+", errors="replace") as chatter,
        _library_path(task) as folder,
    ):
        json.dump(encode(task), stdin)
        stdin.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", f"{__package__}.child", str(write_end)],
            stdin=stdin,
            stdout=chatter,
            stderr=chatter,
            pass_fds=(write_end,),
            env=None if folder is None else {**os.environ, "LD_LIBRARY_PATH": folder},
        )
        os.close(write_end)
        try:
            with os.fdopen(read_end, "rb") as channel:
                messages = _listen(channel, progress)
            exit_code = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        chatter.seek(0)
        last_words = chatter.read().strip().splitlines()[-1:]
    if messages.result is None:
        raise _failure(messages, exit_code, last_words)
    return decode(Built, messages.result, name="the builder's result"), tuple(messages.texts(warnings=True))


@contextmanager
def _library_path(task: BuildTask) -> Iterator[str | None]:
    """The search path of libraries that the child needs; None for this process's own.

    At the first node of a plugin, the parser of TensorRT-RTX 1.7.1 ends the process unless it can open libtensorrt_rtx.so by that
    name, which its wheel does not have. Can go when a version parses `test_an_engine_with_the_plugin` without it.
    """
    spec = find_spec("tensorrt_rtx_libs") if task.plugin and task.request.builder == "rtx" else None
    there = sorted(Path(spec.submodule_search_locations[0]).glob("libtensorrt_rtx.so*")) if spec else []
    if not there:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="tokexport-") as folder:
        (Path(folder) / "libtensorrt_rtx.so").symlink_to(there[0])
        yield os.pathsep.join(filter(None, [folder, os.environ.get("LD_LIBRARY_PATH")]))


def _listen(channel, progress: Callable[[str, float], None]) -> _Messages:
    """The child's messages until it ends. One that it died in the middle of is none."""
    messages = _Messages()
    for line in channel:
        try:
            messages.take(json.loads(line))
        except ValueError:
            continue
        if messages.phases:
            done, steps = next(iter(messages.phases.values()))
            progress(f"building: {next(reversed(messages.phases)).lower()}", done / steps)
    return messages


def _failure(messages: _Messages, exit_code: int, last_words: list[str]) -> Exception:
    """Why there is no result, as the error to raise."""
    if messages.error:
        kind, reason = messages.error
    else:
        kind, reason = (
            "BuildError",
            f"the builder {_ending(exit_code)}{': ' + last_words[0][:300] if last_words else ''}",
        )
    lines = [f"no engine was built: {reason}", *(text[:500] for text in messages.texts(warnings=False)[:5])]
    return ERRORS.get(kind, BuildError)("\n  ".join(lines))


def _ending(exit_code: int) -> str:
    """How a process ended, in words."""
    if exit_code >= 0:
        return f"ended with {exit_code} and gave no result"
    name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else "unknown"
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"was ended by signal {-exit_code} ({name}{hint})"
