"""What a large run would cost, from a rate measured here: in machine-hours."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...export.errors import UsageError
from ...export.inspection import Inspection
from ..bundle.target import file_of
from ..data import need_pyarrow, open_data
from ..decode import Decoder, default_workers
from ..files import inspect_file
from .folder import ERRORS, LISTING, PARTS, part_path
from .job import open_file, plan_job, write_part
from .options import EmbedOptions

SECONDS = 10.0  # of measuring, after a warm-up of two chunks
MANY = 1 << 20  # images, of which the default of workers is that of a long run


@dataclass(frozen=True)
class Estimate:
    """What a run of so many images would cost.

    Attributes:
        images: of the run. machines: that it is spread over, each like this one.
        measured: images that were measured. seconds: that they took, decoding, the file and writing together.
        engine_seconds: of them the file ran and rows were written; the rest was waiting for images.
        workers: decoding processes. bytes_a_row: on disk.
    """

    images: int
    machines: int
    measured: int
    seconds: float
    engine_seconds: float
    workers: int
    bytes_a_row: float

    @property
    def rate(self) -> float:
        """Images per second of one machine."""
        return self.measured / self.seconds

    @property
    def machine_hours(self) -> float:
        """Hours of one machine."""
        return self.images / self.rate / 3600

    @property
    def hours(self) -> float:
        """Hours until all machines together are done."""
        return self.machine_hours / self.machines

    def to_json(self) -> dict:
        """Plain JSON values."""
        return {
            "images": self.images,
            "machines": self.machines,
            "measured_images": self.measured,
            "measured_seconds": self.seconds,
            "waiting_for_images": 1 - self.engine_seconds / self.seconds,
            "workers": self.workers,
            "images_per_second": self.rate,
            "machine_hours": self.machine_hours,
            "hours": self.hours,
            "bytes": self.bytes_a_row * self.images,
        }


def estimate(
    file: str | Path,
    data: str | Path,
    *,
    images: int,
    machines: int = 1,
    options: EmbedOptions | None = None,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda stage: None,
) -> Estimate:
    """Measure the rate of the whole pipeline on this machine, and what so many images cost by it. Nothing is kept.

    Args:
        file: ONNX file, engine or bundle.
        data: as of `embed`; its images are measured again and again when they are few.
        images: of the large run.
        machines: that it is to be spread over.
        options: as of `embed`.
        seconds: to measure for, after a warm-up.
        progress: told what is being done.
    Raises:
        UsageError: as `embed`, or no image could be read.
    """
    options = options or EmbedOptions()
    if images < 1 or machines < 1:
        raise UsageError(f"estimate of {images} images on {machines} machines: wanted 1 or more of both")
    need_pyarrow("embed")
    inspection = inspect_file(file_of(file, allow_host_code=options.allow_host_code))
    workers = default_workers(MANY) if options.workers is None else options.workers
    progress("measuring")
    meter, count, size = _measured(inspection, data, options, workers=workers, seconds=seconds)
    if not count.rows:
        raise UsageError(f"images {data}: none of the {count.broken} that were tried can be read")
    return Estimate(
        images,
        machines,
        meter.images,
        seconds=meter.seconds,
        engine_seconds=meter.seconds - meter.waited,
        workers=workers,
        bytes_a_row=size / count.rows,
    )


def _measured(inspection: Inspection, data: str | Path, options: EmbedOptions, *, workers: int, seconds: float):
    """(meter, count of the part, its bytes) of a run into a folder that is thrown away."""
    runner = open_file(inspection.path, options.runtime, options.threads, allow_host_code=options.allow_host_code)
    with tempfile.TemporaryDirectory() as name, runner:
        folder = Path(name)
        for place in (PARTS, ERRORS):
            (folder / place).mkdir()
        source = open_data(data, folder / LISTING)
        job = plan_job(inspection, runner, folder=folder, options=options)
        with Decoder(inspection.provenance.preprocess, workers) as decoder:
            meter = _Meter(decoder.chunks(_around(source), job.chunk), seconds)
            count = write_part(job, runner, part=0, chunks=meter.chunks(), tick=meter.tick)
        return meter, count, part_path(folder, 0).stat().st_size


def _around(source):
    """The images of a set, again from the first after the last."""
    while True:
        yield from source.items()


class _Meter:
    """Passes chunks on until enough is measured; the first two are the warm-up."""

    WARM_UP = 2

    def __init__(self, source, seconds: float):
        self._source, self._least = source, seconds
        self.images, self.waited, self.seconds, self._done = 0, 0.0, 0.0, 0

    def chunks(self):
        """The chunks; ends when the time is over, one measured chunk at least."""
        while self._done <= self.WARM_UP or time.perf_counter() - self._start < self._least:
            before = time.perf_counter()
            chunk = next(self._source)
            self.waited += time.perf_counter() - before
            yield chunk

    def tick(self, n: int) -> None:
        """Told of each chunk that is done."""
        self._done += 1
        if self._done == self.WARM_UP:
            self._start, self.images, self.waited = time.perf_counter(), 0, 0.0
        elif self._done > self.WARM_UP:
            self.images += n
            self.seconds = time.perf_counter() - self._start
