"""Files of candidate schedules, exported when they are first asked for and timed beside the dense one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...export.errors import EngineError
from ...export.outputs import POOLED
from ...export.schedule import Schedule
from ...export.tail import choose_tail
from ..measure.curves import keep_steps
from ..measure.jobs import Job, measure
from ..measure.latency_model import LatencyCurves, LatencyModel
from ..measure.timing import Ratio, ratio

if TYPE_CHECKING:
    from ...export.models.load import LoadedModel

DENSE_SECONDS = 4.0  # for the dense file alone


class FileTime(NamedTuple):
    """Of one file. speedup: over the dense file, round by round. ms: of a run, the dense file's median over that speedup's."""

    ms: float
    speedup: Ratio


def key_of(schedule: Schedule) -> str:
    """What two schedules of one model share when their files are the same."""
    return json.dumps(
        [schedule.method, *(schedule.to_json()[k] for k in ("steps", "prop_attn", "pool"))], sort_keys=True
    )


class TimedFiles:
    """Files of one model under any schedule.

    Args:
        loaded: the model.
        folder: where they are written.
        runtime, dtype, batch, threads: of the files, and what they are timed with.
        seconds: most time for one comparison.
    """

    def __init__(
        self, loaded: LoadedModel, folder: Path, *, runtime: str, dtype: str, batch: int, threads: int, seconds: float
    ):
        self.loaded, self.folder, self.dtype, self.batch = loaded, folder, dtype, batch
        self.runtime, self.threads, self.seconds = runtime, threads, seconds
        self._paths: dict[str, Path] = {}

    def path_of(self, schedule: Schedule) -> Path:
        """The file of a schedule."""
        from ...export.graph.export import export_onnx

        key = key_of(schedule)
        if key not in self._paths:
            path = self.folder / f"{len(self._paths)}.{schedule.method}.onnx"
            export_onnx(self.loaded, schedule, path, batch=self.batch, dtype=self.dtype, force=True)
            self._paths[key] = path
        return self._paths[key]

    @property
    def tail_dims(self) -> dict | None:
        """What the last block's part in the time is told from where the files have the class tail; else None."""
        from ...export.models import as_plain

        plain = as_plain(self.loaded.module)
        tail = choose_tail(None, POOLED, rows=plain.pooling.rows, n_prefix=plain.n_prefix)
        return plain.dims if tail == "class" else None

    def forget(self, schedule: Schedule) -> None:
        """Remove the file of a schedule."""
        path = self._paths.pop(key_of(schedule), None)
        for part in [] if path is None else self.folder.glob(f"{path.name}*"):
            part.unlink()

    def times(
        self, schedules: Sequence[Schedule], dense: Schedule, seconds: float | None = None
    ) -> dict[str, FileTime]:
        """By `key_of`, the time of each schedule's file and of the dense one, interleaved; one that the runtime fails on is left out.

        Args:
            schedules: what is compared.
            dense: what with.
            seconds: most time; None for the usual.
        Raises:
            EngineError: the dense file failed.
        """
        paths = {key_of(s): str(self.path_of(s)) for s in [dense, *schedules]}
        first = paths[key_of(dense)]
        plain = self.loaded.preprocess
        image = (len(plain.mean), *plain.size)
        job = Job(
            runtime=self.runtime,
            batch=self.batch,
            threads=self.threads,
            seconds=self.seconds if seconds is None else seconds,
            image=image,
            files=tuple(dict.fromkeys(paths.values())),
            pairs=tuple((first, path) for path in paths.values() if path != first),
        )
        times = measure(job)
        if first in times.errors:
            raise EngineError(f"the dense file was not timed: {times.errors[first]}")
        dense_ms = float(np.median(times.seconds[first])) * 1e3
        speedups = {k: ratio(times.seconds[first], times.seconds[p]) for k, p in paths.items() if p in times.seconds}
        return {key: FileTime(dense_ms / speedup.middle, speedup) for key, speedup in speedups.items()}


def fitted_model(
    curves: LatencyCurves,
    files: TimedFiles,
    schedules: dict[str, Schedule],
    *,
    dense: Schedule,
    fresh: bool = False,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> LatencyModel:
    """The latency model of a file's blocks: scaled to the dense file, with the cost of a reduction of every method.

    Costs that are with the curves in the cache are taken from there; the others are fitted on one file of each method, and kept.

    Args:
        curves: of the blocks.
        files: of the model.
        schedules: method -> one to fit on.
        dense: the model without a reduction.
        fresh: fit again what is known.
        progress: told what is timed and the share done.
    Returns:
        The model; a method whose file the runtime fails on has no cost in it.
    Raises:
        EngineError: the dense file failed.
    """
    wanted = {m: s for m, s in schedules.items() if fresh or m not in curves.steps}
    for i, schedule in enumerate([dense, *wanted.values()]):
        progress(f"exporting {schedule.method} to time it", i / (len(wanted) + 2))
        files.path_of(schedule)
    progress("timing the dense model" + (f" and {', '.join(wanted)}" if wanted else ""), 1 - 1 / (len(wanted) + 2))
    times = files.times(list(wanted.values()), dense, None if wanted else min(DENSE_SECONDS, files.seconds))
    model = LatencyModel.of_dense(curves, dense, ms=times[key_of(dense)].ms, tail_dims=files.tail_dims)
    for schedule in wanted.values():
        if key_of(schedule) in times:
            model = model.fitted(schedule, ms=times[key_of(schedule)].ms)
        files.forget(schedule)
    if wanted:
        keep_steps(curves, model.steps)
    return model
