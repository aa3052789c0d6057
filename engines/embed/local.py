"""Embedding on one machine, or handing the parts to Ray: what is asked is checked, what is finished is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from ...export.files import sha256_of
from ...export.inspection import Inspection
from ..bundle.target import file_of
from ..data import ImageData, need_pyarrow, open_data
from ..files import inspect_file
from . import folder as folders
from .folder import LISTING, EmbedManifest
from .job import EmbedJob, compute_parts, open_file, plan_job
from .options import EmbedOptions


class Progress(NamedTuple):
    """How far a run is. done: images, those of an earlier run too. total: images. note: what is being done, if it is
    not computing."""

    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class EmbedReport:
    """What a run did.

    Attributes:
        path: of the folder.
        manifest: of it, complete.
        computed: images of this run, the broken ones too; the others were there.
        seconds: this run computed for, the opening of the file left out.
        engine_seconds: of them the file ran; None on a cluster.
    """

    path: Path
    manifest: EmbedManifest
    computed: int
    seconds: float
    engine_seconds: float | None

    @property
    def rate(self) -> float | None:
        """Images per second of this run; None when there was nothing left to do."""
        return self.computed / self.seconds if self.computed else None

    def to_json(self) -> dict:
        """Plain JSON values."""
        m = self.manifest
        return {
            "path": str(self.path),
            "images": m.images,
            "rows": m.images - m.broken,
            "broken": m.broken,
            "parts": m.n_parts,
            "columns": [column.name for column in m.columns],
            "computed": self.computed,
            "seconds": self.seconds,
            "images_per_second": self.rate,
        }


def embed(
    file: str | Path,
    data: str | Path,
    *,
    output: str | Path,
    options: EmbedOptions | None = None,
    progress: Callable[[Progress], None] = lambda state: None,
) -> EmbedReport:
    """A file's outputs for many images, as a folder of parquet parts; a run that was cut off goes on where it was.

    Args:
        file: ONNX file, engine or bundle.
        data: a folder of images, parquet files of encoded ones, or a list of paths: see `data.open_data`.
        output: the folder, new or of an earlier run of the same job, whose finished parts are kept.
        options: see `EmbedOptions`.
        progress: told how far it is.
    Returns:
        What was done; `manifest.broken` images have no row, the folder's errors say why.
    Raises:
        UsageError: wrong arguments, no images, or the folder holds another run.
        MissingPackageError: pyarrow, Ray or the runtime is not installed.
        EngineError: the runtime or a decoding process failed; finished parts are kept.
        StorageError: the disk is full or failed; the same.
    """
    options = options or EmbedOptions()
    need_pyarrow("embed")
    inspection = inspect_file(file_of(file, allow_host_code=options.allow_host_code))
    engine = _here if options.ray is None else _on_cluster
    with folders.opened(output, force=options.force) as folder:
        progress(Progress(0, 0, "looking for images"))
        images = open_data(data, folder / LISTING)
        progress(Progress(0, images.images, "opening the file"))
        with engine(inspection, folder, options) as (job, compute):
            manifest = folders.begin(folder, _manifest(inspection, images, job, options))
            missing = [] if manifest.complete else folders.missing_parts(folder, manifest)
            slices = {part: manifest.slice(part) for part in missing}
            computed, seconds, engine_seconds = sum(b - a for a, b in slices.values()), 0.0, None
            if missing:
                tick = _ticker(progress, manifest.images - computed, manifest.images)
                seconds, engine_seconds = compute(job, images, slices, tick=tick)
        if not manifest.complete:
            manifest = folders.finish(folder, manifest)
    return EmbedReport(Path(output), manifest, computed, seconds, engine_seconds)


def _manifest(inspection: Inspection, images: ImageData, job: EmbedJob, options: EmbedOptions) -> EmbedManifest:
    return EmbedManifest(
        version=version("tokexport"),
        file=inspection.path.name,
        sha256=sha256_of(*inspection.files),
        runtime=job.runtime,
        data=images.kind,
        data_path=images.path,
        data_sha256=images.digest,
        images=images.images,
        part_size=options.images_a_part,
        columns=job.columns,
        labels=inspection.provenance.labels,
    )


def _ticker(progress: Callable[[Progress], None], done: int, total: int) -> Callable[[int], None]:
    """A function that is told of images that are done, and tells `progress` how far the run is."""

    def tick(n: int) -> None:
        nonlocal done
        done += n
        progress(Progress(done, total))

    tick(0)
    return tick


@contextmanager
def _here(inspection: Inspection, folder: Path, options: EmbedOptions) -> Iterator[tuple]:
    """(job, function that computes parts) of this machine, the file opened."""
    from ..runners import runtime_for

    runtime = runtime_for(inspection.path, options.runtime).name
    with open_file(inspection.path, runtime, options.threads, allow_host_code=options.allow_host_code) as runner:
        job = plan_job(inspection, runner, folder=folder, options=options)
        yield job, partial(compute_parts, runner=runner, workers=options.workers)


def _on_cluster(inspection: Inspection, folder: Path, options: EmbedOptions):
    """The same of a Ray cluster."""
    from .cluster import connected

    return connected(inspection, folder, options)
