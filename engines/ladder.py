"""Running a ladder: all rungs are open, and each call is run by the one that its time allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..export.errors import UsageError
from .ladder_manifest import Ladder, Rung, folder_of, read_ladder
from .measure.environment import processor
from .runners import Runner, in_batches, open_runner

if TYPE_CHECKING:
    import numpy as np

ROUNDS = 7  # for the times of a machine that the ladder was not measured on


def open_ladder(
    folder: str | Path,
    runtime: str | None = None,
    *,
    threads: int | None = None,
    share: bool = False,
    measure: bool | None = None,
) -> OpenLadder:
    """Open a ladder for running.

        with open_ladder("ladder") as ladder:
            logits = ladder.run(images, budget_ms=12)["logits"]

    Args:
        folder: of the ladder, made by `tokexport ladder`.
        runtime: what runs it; None for what its times were measured with.
        threads: of the processor, 0 for the runtime's own choice; None for those of the times.
        share: of ONNX Runtime: all rungs read the weights where their file lies, so that together they take the memory of one; each
            is some hundredths slower (docs/ladder.md has figures).
        measure: time the rungs now; None: only where they are shared, or where runtime, threads or processor are not those of the
            stored times.
    Returns:
        An `OpenLadder`; close it, or use it in a `with` block.
    Raises:
        UsageError: it is no ladder, or is damaged, or its file cannot be run here.
        EngineError: the runtime failed.
    """
    ladder = read_ladder(folder)
    runtime, threads = runtime or ladder.runtime, ladder.threads if threads is None else threads
    here = (runtime, threads, processor().name)
    foreign = share or here != (ladder.runtime, ladder.threads, ladder.processor)
    opened = OpenLadder(folder_of(folder), ladder, runtime=runtime, threads=threads, share=share)
    if foreign if measure is None else measure:
        try:
            opened.measure()
        except BaseException:
            opened.close()
            raise
    return opened


class OpenLadder:
    """All rungs of a ladder, opened.

    Args:
        folder: of the ladder.
        ladder: its manifest.
        runtime, threads, share: see `open_ladder`.
    """

    def __init__(self, folder: Path, ladder: Ladder, *, runtime: str, threads: int, share: bool = False):
        self.ladder, self.times = ladder, tuple(rung.ms for rung in ladder.rungs)
        self._runners: list[Runner] = []
        try:
            for rung in ladder.rungs:
                path, options = folder / rung.file.name, {"threads": threads, "batch": ladder.batch}
                self._runners.append(open_runner(path, runtime, share_weights=share, **options))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OpenLadder:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Give back what the runtime holds."""
        for runner in self._runners:
            runner.close()

    def runner(self, place: int) -> Runner:
        """What runs a rung, by its place in `ladder.rungs`."""
        return self._runners[place]

    def pick(self, budget_ms: float | None = None, *, images: int = 1) -> Rung:
        """The rung that `run` takes: the one with the most tokens that is within the budget, the fastest where none is.

        Args:
            budget_ms: milliseconds for all images; None: the rung with the most tokens.
            images: how many.
        """
        return self.ladder.rungs[self._place(budget_ms, images)]

    def run(self, images: np.ndarray, budget_ms: float | None = None) -> dict[str, np.ndarray]:
        """Run images through the rung that their time allows.

        Args:
            images: [B, channels, H, W] float32, prepared as the provenance says; any number, whatever the batch of the files.
            budget_ms: milliseconds for all of them; None: the rung with the most tokens.
        Returns:
            Output name -> array, as a runner gives it.
        Raises:
            UsageError: images of another shape or type, a budget that is no number, or the ladder is closed.
            EngineError: the runtime failed.
        """
        return in_batches(self._runners[self._place(budget_ms, len(images))], images)

    def _place(self, budget_ms: float | None, images: int) -> int:
        if images < 1:
            raise UsageError(f"{images} images: wanted 1 or more")
        if budget_ms is None:
            return self.ladder.pick(None)
        if not isinstance(budget_ms, (int, float)) or budget_ms != budget_ms:
            raise UsageError(f"budget_ms {budget_ms!r}: wanted a number of milliseconds")
        runs = -(-images // (self.ladder.batch or 1))
        return self.ladder.pick(budget_ms / runs, times=self.times)

    def measure(self, clock: Callable[[Runner], Callable[[], float]] | None = None) -> tuple[float, ...]:
        """Time every rung here, and take these times from now on.

        Args:
            clock: runner -> a function that runs it once and gives the seconds; None for the runtime's own time on noise.
        Returns:
            Milliseconds of a run of each.
        """
        import numpy as np

        from .measure.jobs import noise
        from .measure.timing import interleaved

        def own(runner: Runner) -> Callable[[], float]:
            shape = next(iter(runner.inputs.values()))
            return runner.timer({"image": noise(shape[0] or 1, shape[1:])})

        timers = {str(i): (clock or own)(runner) for i, runner in enumerate(self._runners)}
        times = interleaved(timers, ROUNDS)
        self.times = tuple(float(np.median(times[str(i)])) * 1e3 for i in range(len(timers)))
        return self.times
