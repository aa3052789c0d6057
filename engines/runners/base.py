"""One way to run a file, whatever runs it: a runner, which is opened, run and closed, and any number of images
through any batch.

A runtime's module (see `table`) has `open_file(path, runtime, options)`, which gives a `Runner` of its own:

    class ToyRunner(Runner):
        def _run(self, feeds): ...        # {"image": array} -> {name: array}
        def _release(self): ...           # drop what the runtime holds
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...export.errors import EngineError, FailureError, UsageError

if TYPE_CHECKING:
    import numpy as np

AT_ONCE = 16  # images in one run of a file that takes any number


@dataclass(frozen=True)
class RunnerOptions:
    """How a file is opened.

    Args:
        threads: of the processor, 0 for the runtime's own choice.
        outputs: inner values to give beside the file's outputs.
        batch: the one batch size that a file with a free batch will be run with; None when there are several.
        cuda_graph: capture an engine's work once for each shape and replay it.
        allow_host_code: run native code that an engine carries in itself.
        share_weights: leave weights where the file has them, mapped into memory, so that files of one set of weights share them.
    """

    threads: int = 0
    outputs: tuple[str, ...] = ()
    batch: int | None = None
    cuda_graph: bool = False
    allow_host_code: bool = False
    share_weights: bool = False


class Runner(ABC):
    """An opened file. Use it in a `with` block, or call `close`: only then is what the runtime holds given back.

    Args:
        runtime: name of the runtime.
        words: what people call the runtime.
        inputs: name -> shape, None for an axis of any length.
        outputs: the same, of what a run gives.
        input_types: name -> "uint8" and the like, of inputs that are not float32.
    """

    timed = "one run, from an array to arrays, by the host's clock"  # what `timer` measures, in words

    def __init__(
        self,
        runtime: str,
        words: str,
        *,
        inputs: dict[str, tuple],
        outputs: dict[str, tuple],
        input_types: dict[str, str] | None = None,
    ):
        self.runtime, self.words, self.inputs, self.outputs = runtime, words, inputs, outputs
        self.input_types = {**dict.fromkeys(inputs, "float32"), **(input_types or {})}
        self.closed = False

    @abstractmethod
    def _run(self, feeds: dict) -> dict:
        """What the runtime gives: input name -> array, output name -> array."""

    def _release(self) -> None:  # noqa: B027  most runtimes hold nothing
        """Drop what the runtime holds."""

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Give back what the runtime holds; the runner cannot run afterwards. Closing twice is no error."""
        if not self.closed:
            self.closed = True
            self._release()

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One run with checked inputs.

        Args:
            feeds: input name -> array of the file's type, float32 but for a few files. Of an engine also CUDA
                tensors, which are read where they are; what it gives are then tensors on the same GPU, and nothing
                waits for them.
        Returns:
            Output name -> array: float32, or int64 for indices.
        Raises:
            UsageError: an input is missing, of another shape or type, or not finite; or the runner is closed.
            EngineError: the runtime failed.
        """
        for name, shape in self.inputs.items():
            _check_input(name, shape, self.input_types[name], feeds)
        return self.run_unchecked(feeds)

    def run_unchecked(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`run` without a look at the inputs, for loops that run the same ones again. Raises: as `run`, but for
        inputs.
        """
        self._check_open()
        try:
            return self._run(feeds)
        except (UsageError, FailureError):
            raise
        except Exception as e:  # runtimes have exception types of their own
            raise EngineError(f"{self.words} failed while running the file: {' '.join(str(e).split())[:400]}") from None

    def timer(self, feeds: dict[str, np.ndarray]) -> Callable[[], float]:
        """A function that runs these inputs once and gives the seconds that the runtime itself took (`timed` says
        what is in them).

        Whatever can be is done before: inputs are checked and lie where the runtime reads them.
        """
        self.run(feeds)
        return stopwatch(self._prepared(feeds))

    def _prepared(self, feeds: dict) -> Callable[[], object]:
        """A function that is one run of these inputs and nothing else."""
        return lambda: self._run(feeds)

    def _check_open(self) -> None:
        if self.closed:
            raise UsageError(
                f"this runner of {self.words} is closed: open the file again, and run inside the `with` block"
            )


def stopwatch(call: Callable[[], object]) -> Callable[[], float]:
    """A function that makes the call and gives the seconds it took by the host's clock."""

    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return seconds


def _check_input(name: str, shape: tuple, type_name: str, feeds: dict) -> None:
    """Raises: UsageError when an input is missing, of another shape or type, or (of arrays) not finite."""
    import numpy as np

    if name not in feeds:
        raise UsageError(f"input {name!r} is missing: got {', '.join(feeds) or 'nothing'}")
    value = feeds[name]
    fits = len(value.shape) == len(shape) and all(n in (None, m) for m, n in zip(value.shape, shape))
    if not fits or str(value.dtype).removeprefix("torch.") != type_name:
        wanted = " x ".join("any" if n is None else str(n) for n in shape)
        raise UsageError(
            f"input {name!r} is {value.dtype} {' x '.join(map(str, value.shape))}, wanted {type_name} {wanted}"
        )
    if isinstance(value, np.ndarray) and not np.isfinite(value).all():
        raise UsageError(
            f"input {name!r} has values that are not finite: {np.size(value) - np.isfinite(value).sum()} of {np.size(value)}"
        )


def in_batches(runner: Runner, images: np.ndarray, tokens: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Outputs for any number of images, whatever batch the file takes.

    Runs are of the file's fixed batch, the last one filled up with copies and cut again, or of at most AT_ONCE images.

    Args:
        runner: an opened file with one input.
        images: [B, 3, H, W] float32, B at least 1.
        tokens: inner values that hold rows of all images at once, [B N, C]; they are given as [B, N, C].
    Returns:
        Output name -> [B, ...]. Decisions of a file for one image, which have no batch axis, get one.
    """
    import numpy as np

    batch = next(iter(runner.inputs.values()))[0]
    step = batch or AT_ONCE
    if len(images) > step:
        parts = [in_batches(runner, images[i : i + step], tokens) for i in range(0, len(images), step)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    missing = (batch or len(images)) - len(images)
    full = np.concatenate([images, np.repeat(images[-1:], missing, 0)]) if missing else images

    def by_image(name: str, value):
        if name in tokens:
            return value.reshape(len(full), -1, value.shape[-1])
        return value[None] if batch == 1 and "." in name else value

    outputs = runner.run({next(iter(runner.inputs)): full})
    return {name: by_image(name, value)[: len(images)] for name, value in outputs.items()}


def failure(path: Path, runtime, error: Exception) -> Exception:
    """The error that says a file could not be opened: what is said in words already stays, anything else is the
    runtime's failure.
    """
    if isinstance(error, (UsageError, FailureError)):
        return error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return EngineError(f"{path}: {runtime.words} cannot load it: {lines[0][:300]}")
