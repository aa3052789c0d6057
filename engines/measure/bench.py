"""The benchmark: files of one model, each beside a dense one exported the same way and its free bound, all in one
run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...export.errors import UsageError
from ...export.inspection import Inspection
from ..files import inspect_file, is_engine
from ..inputs import noise_inputs
from ..runners import in_batches, open_runner, require
from ..runners.table import ENGINES
from .candidates import Candidate, Sweep, check_comparable, collect, image_of
from .environment import machine
from .jobs import Job, Times, measure_in_processes
from .latency import PERCENTILES, LatencyReport, LatencyRow, Profile
from .timing import Ratio, ratio


def bench(
    files: list[str | Path],
    *,
    dense: str | Path | None = None,
    runtimes: tuple[str, ...] = ("ort",),
    batches: tuple[int, ...] = (1,),
    threads: int = 1,
    seconds: float = 20.0,
    bound: bool = False,
    processes: int = 1,
    sweep: Sweep | None = None,
    images: np.ndarray | None = None,
    profile: bool = False,
    cuda_graph: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> LatencyReport:
    """Time files against the dense model, interleaved.

    Args:
        files: ONNX files, or engines, of one model; [] for DeiT-S with ToMe r=13 and random weights.
        dense: what they are compared with; None for a dense file exported here as each file was. Engines need one.
        runtimes: what runs ONNX files.
        batches: images in a run; a file of another fixed batch is left out.
        threads: of the processor.
        seconds: most time for each runtime and batch in each process; less when the ratios are precise before.
        bound: also time the free bound of each reduced file (see `bound`).
        processes: how many fresh ones measure; 1 measures here.
        sweep: export the one file's model anew for each value of an option.
        images: [B, 3, H, W] on which a sweep's files are compared with the dense one; None for seeded noise.
        profile: also the time in each part of the model, of runtimes with a profiler.
        cuda_graph: of engines: replay a captured graph.
        progress: told what is done.
    Raises:
        UsageError: files that cannot be compared, or a runtime that is not there.
        EngineError: a measuring process died.
    """
    inspections, dense_file = [inspect_file(f) for f in files], None if dense is None else inspect_file(dense)
    check_request(inspections, dense_file, batches=batches, threads=threads, seconds=seconds, processes=processes)
    check_comparable(inspections, dense_file, sweep=sweep, bound=bound)
    runtimes = _runtimes(inspections, runtimes, cuda_graph=cuda_graph)
    with tempfile.TemporaryDirectory(prefix="tokexport-") as folder:
        candidates = collect(
            inspections, Path(folder), dense=dense and Path(dense), sweep=sweep, bound=bound, progress=progress
        )
        jobs = _jobs(candidates, runtimes, batches, threads=threads, seconds=seconds, cuda_graph=cuda_graph)
        rows = _rows(candidates, jobs, processes=processes, progress=progress)
        if sweep:
            rows = _with_agreement(rows, candidates, runtime=runtimes[0], images=images, progress=progress)
        profiles = _profiles(candidates, jobs, progress=progress) if profile else []
    return LatencyReport(machine(threads), threads, rows, profiles, sweep.option if sweep else None)


def _runtimes(files: list[Inspection], runtimes: tuple[str, ...], *, cuda_graph: bool) -> tuple[str, ...]:
    """What runs the files. Raises: UsageError for a runtime that is not here, or a CUDA graph of what is no engine."""
    if any(is_engine(f.path) for f in files):
        return (ENGINES,)
    if cuda_graph:
        raise UsageError("cuda-graph is of engines (.plan): an ONNX file has no graph to replay")
    for runtime in runtimes:
        require(runtime)
    return runtimes


def check_request(
    files: list[Inspection], dense: Inspection | None, *, batches, threads: int, seconds: float, processes: int
) -> None:
    """Raises: UsageError for numbers that are out of range, or a file of a fixed batch that is not among the batches.

    Args:
        files, dense, batches, threads, seconds, processes: as `bench`.
    """
    if not 0 <= threads <= 1024 or not 0 < seconds < 86400 or not 1 <= processes <= 100:
        raise UsageError(
            f"threads {threads}, seconds {seconds:g}, processes {processes}: wanted 1 to 1024 threads (0: the runtime's own "
            f"choice), more than 0 seconds and at most a day, 1 to 100 processes"
        )
    if not batches or min(batches) < 1:
        raise UsageError(f"batch {', '.join(map(str, batches)) or 'nothing'}: wanted batch sizes of 1 or more")
    for file in files:
        if file.batch not in (None, *batches):
            raise UsageError(f"{file.path} is for batch {file.batch}: give batch {file.batch}")


def _jobs(
    candidates: list[Candidate], runtimes, batches, *, threads: int, seconds: float, cuda_graph: bool
) -> list[Job]:
    """For each runtime and batch size what is timed together: candidates that take the batch, their dense files and
    bounds.
    """
    jobs = []
    for runtime in runtimes:
        for batch in batches:
            fits = {c.path: c for c in candidates if c.inspection.batch in (None, batch)}
            reduced = [c for c in fits.values() if not c.is_dense and c.dense in fits]
            if not reduced:
                continue
            bounds = {
                c.path: c.bound for c in reduced if c.bound and runtime != "torch"
            }  # the reference has no such file
            files = dict.fromkeys([*(c.dense for c in reduced), *(c.path for c in reduced), *bounds.values()])
            pairs = [*((c.dense, c.path) for c in reduced), *((limit, path) for path, limit in bounds.items())]
            image = image_of(reduced[0].inspection)
            jobs.append(
                Job(
                    runtime,
                    batch,
                    threads=threads,
                    seconds=seconds,
                    image=image,
                    files=tuple(files),
                    pairs=tuple(pairs),
                    cuda_graph=cuda_graph,
                )
            )
    return jobs


def _rows(candidates: list[Candidate], jobs: list[Job], *, processes: int, progress) -> list[LatencyRow]:
    rows = []
    for job in jobs:
        progress(f"timing {job.runtime}, batch {job.batch}")
        times = measure_in_processes(job, processes, progress=progress)
        rows += [_row(c, job, times) for c in candidates if c.path in job.files]
    return rows


def _row(candidate: Candidate, job: Job, times: list[Times]) -> LatencyRow:
    """The figures of one file, of one process or of several."""
    inspection = candidate.inspection
    identity = (job.runtime, job.batch, candidate.label, inspection.provenance.schedule.method)
    macs_ratio = inspection.macs_dense / inspection.macs
    path, dense = candidate.path, candidate.dense
    errors = [
        t.errors.get(path) or f"the dense file failed: {t.errors[dense]}"
        for t in times
        if {path, dense} & set(t.errors)
    ]
    if errors:
        return LatencyRow(*identity, macs_ratio, errors[0], value=candidate.value)
    time = _over_processes([_spread(t.seconds[path]) for t in times])
    speedup = _over_processes([ratio(t.seconds[dense], t.seconds[path]) for t in times])
    rounds = [np.array(t.seconds[path]) * 1e3 for t in times]
    figures = {
        "timed": times[0].timed[path],
        "processes": len(times),
        "rounds": sum(map(len, rounds)),
        "ms": time.middle,
        "ms_low": time.low,
        "ms_high": time.high,
        "percentiles": {str(p): float(np.mean([np.percentile(r, p) for r in rounds])) for p in PERCENTILES},
        "images_per_second": job.batch / time.middle * 1e3,
        "end_to_end_ms": float(np.mean([np.median(t.end_to_end[path]) for t in times]) * 1e3),
        "speedup": speedup.middle,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
        "quotient": speedup.middle / macs_ratio,
    }
    return LatencyRow(*identity, macs_ratio, **figures, **_of_bound(candidate, times), value=candidate.value)


def _of_bound(candidate: Candidate, times: list[Times]) -> dict:
    """How near a file comes to its free bound; {} when that was not timed."""
    if not all(candidate.bound in t.seconds for t in times):
        return {}
    bound = _over_processes([ratio(t.seconds[candidate.dense], t.seconds[candidate.bound]) for t in times])
    share = _over_processes([ratio(t.seconds[candidate.bound], t.seconds[candidate.path]) for t in times])
    return {
        "bound": bound.middle,
        "of_bound": share.middle,
        "of_bound_low": share.low,
        "of_bound_high": share.high,
    }


def _spread(seconds: list[float]) -> Ratio:
    """Median, 20 and 80 percentile in milliseconds."""
    low, middle, high = np.percentile(np.array(seconds) * 1e3, [20, 50, 80])
    return Ratio(float(middle), float(low), float(high))


def _over_processes(spreads: list[Ratio]) -> Ratio:
    """Of one process its own spread; of several the mean, the least and the largest of their medians."""
    if len(spreads) == 1:
        return spreads[0]
    middles = [s.middle for s in spreads]
    return Ratio(float(np.mean(middles)), min(middles), max(middles))


def agreement(
    path: str | Path, dense: str | Path, *, runtime: str, images: np.ndarray
) -> tuple[float | None, float | None]:
    """How alike the pooled outputs of a file and of a dense one are.

    Args:
        path, dense: the two files.
        runtime: what runs them.
        images: [B, 3, H, W] float32, or what the files take.
    Returns:
        The mean cosine (None without a pooled output), and the share of images with the same likeliest class (None without classes).
    """
    from ..parity.outputs import cosines, top

    outputs = []
    for file in (path, dense):
        name = inspect_file(file).provenance.pooled
        if name is None:
            return None, None
        with open_runner(file, runtime) as runner:
            outputs.append(in_batches(runner, images)[name].astype(np.float64))
    return float(cosines(*outputs).mean()), float(np.mean(top(*outputs, 1))) if name == "logits" else None


def _with_agreement(
    rows: list[LatencyRow], candidates: list[Candidate], *, runtime: str, images, progress: Callable[[str], None]
) -> list[LatencyRow]:
    progress("comparing with the dense model")
    runtime = "ort" if runtime == "torch" else runtime
    alike = {}
    for c in candidates:
        if not c.is_dense:
            some = noise_inputs(8, c.inspection.provenance) if images is None else images
            alike[c.label] = agreement(c.path, c.dense, runtime=runtime, images=some)
    return [
        replace(row, cosine=alike[row.file][0], top1=alike[row.file][1]) if row.file in alike else row for row in rows
    ]


def _profiles(candidates: list[Candidate], jobs: list[Job], *, progress) -> list[Profile]:
    from .stage_profile import by_part, profiled, stage_times

    profiles = []
    for c in candidates:
        for job in jobs:
            if job.runtime in profiled() and c.path in job.files:
                progress(f"profiling {c.inspection.path.name} in {job.runtime}, batch {job.batch}")
                times = stage_times(
                    c.path, job.runtime, noise_inputs(job.batch, c.inspection.provenance), threads=job.threads
                )
                profiles.append(Profile(job.runtime, job.batch, c.label, by_part(times), times))
    return profiles
