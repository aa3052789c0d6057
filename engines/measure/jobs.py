"""One job of a benchmark: files timed together, in this process or in fresh ones.

    python -m tokexport.engines.measure.jobs JOB.json TIMES.json

The same file in two processes differs by one to three percent against another (where its memory came to lie, how the
machine's cores were taken): what is to be told to a percent is measured in several.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ...export.errors import EngineError, FailureError, UsageError
from ..inputs import noise
from ..runners import open_runner
from ..runners.base import stopwatch
from .timing import Timer, interleaved_until_precise

END_TO_END = 0.2  # share of a job's time that goes to whole calls, from array to array


@dataclass(frozen=True)
class Job:
    """What is timed together.

    Args:
        runtime: what runs the files; "trt" for engines.
        batch: images in a run.
        threads: of the processor, 0 for the runtime's own choice.
        seconds: most time for all files.
        image: channels, height, width.
        files: paths, in the order they run in each round.
        pairs: (file, file) whose ratio of times is to be known.
        cuda_graph: of engines: replay a captured graph.
    """

    runtime: str
    batch: int
    threads: int
    seconds: float
    image: tuple[int, int, int]
    files: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    cuda_graph: bool = False


@dataclass(frozen=True)
class Times:
    """What one process measured of a job.

    Args:
        seconds: file -> the runtime's own time, one a round.
        end_to_end: file -> time of whole calls, from a checked array to arrays, one a round.
        timed: file -> what `seconds` measures, in words.
        errors: file -> why it was not timed.
    """

    seconds: dict[str, list[float]]
    end_to_end: dict[str, list[float]]
    timed: dict[str, str]
    errors: dict[str, str]


def measure(job: Job) -> Times:
    """Time a job's files in this process, interleaved. A file that fails has an error, the others their times."""
    feeds: dict[str, dict] = {}
    errors: dict[str, str] = {}
    runners: dict = {}
    timers: dict[str, Timer] = {}
    with contextlib.ExitStack() as stack:
        for file in job.files:
            try:
                runner = open_runner(file, job.runtime, threads=job.threads, batch=job.batch, cuda_graph=job.cuda_graph)
                runners[file] = stack.enter_context(runner)
                feeds[file] = _feeds(runner, job)
                timers[file] = runner.timer(feeds[file])
            except (UsageError, FailureError) as e:
                errors[file] = str(e)
        if not timers:
            return Times({}, {}, {}, errors)
        pairs = [pair for pair in job.pairs if set(pair) <= set(timers)]
        alone = interleaved_until_precise(timers, pairs, seconds=job.seconds * (1 - END_TO_END))
        whole = {file: stopwatch(lambda f=file: runners[f].run(feeds[f])) for file in timers}
        end_to_end = interleaved_until_precise(whole, [], seconds=job.seconds * END_TO_END, fewest=3)
    return Times(alone, end_to_end, {file: runners[file].timed for file in timers}, errors)


def _feeds(runner, job: Job) -> dict[str, np.ndarray]:
    """Noise in the form of the opened file's own input: float32 or pixels, channels first or last."""
    name, shape = next(iter(runner.inputs.items()))
    channels, height, width = job.image
    last = shape[-1] == channels and shape[1:3] == (height, width)
    image = (height, width, channels) if last else job.image
    return {name: noise(job.batch, image, runner.input_types[name])}


def measure_in_processes(
    job: Job, processes: int, *, progress: Callable[[str], None] = lambda stage: None
) -> list[Times]:
    """Time a job in fresh processes, one after another; the files run in another order in each.

    Args:
        job: what is timed.
        processes: how many; 1 is this process itself.
        progress: told which process runs.
    Raises:
        EngineError: a process died; the text has its last words.
    """
    if processes == 1:
        return [measure(job)]
    results = []
    for i in range(processes):
        progress(f"{job.runtime}, batch {job.batch}, process {i + 1} of {processes}")
        turn = i % len(job.files)
        results.append(_measure_apart(replace(job, files=job.files[turn:] + job.files[:turn])))
    return results


def _measure_apart(job: Job) -> Times:
    with tempfile.TemporaryDirectory(prefix="tokexport-") as folder:
        request, answer = Path(folder) / "job.json", Path(folder) / "times.json"
        request.write_text(json.dumps(asdict(job)))
        command = [sys.executable, "-m", __name__, str(request), str(answer)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        if done.returncode != 0 or not answer.is_file():
            words = "; ".join(done.stderr.strip().splitlines()[-3:]) or "it said nothing"
            raise EngineError(f"a process that timed {job.runtime} ended with {done.returncode}: {words[:400]}")
        return Times(**json.loads(answer.read_text()))


def main(request: str, answer: str) -> None:
    """Read a job, measure it, write its times."""
    fields = json.loads(Path(request).read_text())
    tuples = {key: tuple(fields[key]) for key in ("image", "files")}
    job = Job(**{**fields, **tuples, "pairs": tuple(map(tuple, fields["pairs"]))})
    Path(answer).write_text(json.dumps(asdict(measure(job))))


if __name__ == "__main__":
    main(*sys.argv[1:])
