"""What is computed of a part, wherever it is computed: the job, and the writing of one part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...export.errors import StorageError
from ...export.files import aside
from ...export.inspection import Inspection
from ...export.provenance import Provenance
from ..data import ImageData
from ..decode import BrokenImage, DecodedChunk, Decoder, default_workers, model_input
from ..runners import Runner, in_batches, open_runner
from ..runners.base import AT_ONCE
from .columns import Column, clean, columns_of, error_schema, finite, schema_of, table_of, values_of
from .folder import error_path, part_path
from .options import EmbedOptions

ROW_GROUP_BYTES = 32 << 20  # rows are held back until they are so many, or the part ends


@dataclass(frozen=True)
class EmbedJob:
    """All that a process needs to compute parts.

    Attributes:
        file: ONNX file or engine.
        provenance: of it.
        folder: of the parts.
        columns: of them.
        runtime: what runs an ONNX file.
        threads: of the runtime, 0 for its own choice.
        chunk: images that are decoded and run together.
        allow_host_code: run native code that an engine carries.
    """

    file: Path
    provenance: Provenance
    folder: Path
    columns: tuple[Column, ...]
    runtime: str
    threads: int
    chunk: int
    allow_host_code: bool = False

    def open(self) -> Runner:
        """The file, opened. Raises: as `open_runner`."""
        return open_file(self.file, self.runtime, self.threads, allow_host_code=self.allow_host_code)

    def outputs(self, runner: Runner, chunk: DecodedChunk) -> dict[str, np.ndarray]:
        """The file's outputs for the images of a chunk that could be read, at least one.

        Args:
            runner: the opened file.
            chunk: of images.
        """
        pixels = model_input(chunk.pixels, self.provenance.preprocess, self.provenance.input)
        outputs = in_batches(runner, pixels)
        return {name: outputs[name] for name in self.provenance.outputs}


@dataclass(frozen=True)
class PartCount:
    """What a part came to. rows: images with a row. broken: images in the errors table."""

    part: int
    rows: int
    broken: int


def open_file(path: Path, runtime: str, threads: int, *, allow_host_code: bool = False) -> Runner:
    """A file for runs of one batch size.

    Args:
        path: ONNX file or engine.
        runtime: what runs an ONNX file.
        threads: of the runtime, 0 for its own choice.
        allow_host_code: run native code that an engine carries.
    """
    batch = AT_ONCE if runtime == "openvino" else None
    return open_runner(path, runtime, threads=threads, batch=batch, allow_host_code=allow_host_code)


def plan_job(inspection: Inspection, runner: Runner, *, folder: Path, options: EmbedOptions) -> EmbedJob:
    """The job of a file.

    Args:
        inspection: of the file.
        runner: the file, opened.
        folder: of the parts.
        options: of the run.
    Raises:
        UsageError: the file has no such columns or classes.
    """
    provenance, batch = inspection.provenance, next(iter(runner.inputs.values()))[0]
    return EmbedJob(
        file=inspection.path.resolve(),
        provenance=provenance,
        folder=folder.resolve(),
        columns=columns_of(provenance, runner.outputs, top=options.top, names=options.columns),
        runtime=runner.runtime,
        threads=options.threads,
        chunk=AT_ONCE if batch is None else batch * max(1, AT_ONCE // batch),  # whole batches of the file
        allow_host_code=options.allow_host_code,
    )


def compute_parts(
    job: EmbedJob,
    images: ImageData,
    slices: dict[int, tuple[int, int]],
    *,
    runner: Runner,
    workers: int | None,
    tick: Callable[[int], None],
) -> tuple[float, float]:
    """Compute parts on this machine, images decoded in processes ahead of the file.

    Args:
        job: what to compute.
        images: of the whole run.
        slices: part -> (index of its first image, index behind its last).
        runner: the file, opened.
        workers: decoding processes; None for half the cores.
        tick: told the images of each chunk that is done.
    Returns:
        Seconds, and those of them that were not spent on waiting for images.
    """
    waited = 0.0

    def timed(chunks: Iterator[DecodedChunk]) -> Iterator[DecodedChunk]:
        nonlocal waited
        while True:
            start = time.perf_counter()
            chunk = next(chunks, None)
            waited += time.perf_counter() - start
            if chunk is None:
                return
            yield chunk

    if workers is None:
        workers = default_workers(sum(stop - start for start, stop in slices.values()))
    with Decoder(job.provenance.preprocess, workers) as decoder:
        start = time.perf_counter()
        for part, (first, stop) in slices.items():
            chunks = timed(decoder.chunks(images.items(first, stop), job.chunk))
            write_part(job, runner, part=part, chunks=chunks, tick=tick)
        seconds = time.perf_counter() - start
    return seconds, seconds - waited


def write_part(
    job: EmbedJob,
    runner: Runner,
    *,
    part: int,
    chunks: Iterable[DecodedChunk],
    tick: Callable[[int], None] = lambda images: None,
) -> PartCount:
    """Compute a part and write it, aside and renamed; its errors first. Rows are written as they come.

    Args:
        job: what to compute.
        runner: the file, opened by `job.open`.
        part: its number.
        chunks: its images, decoded, in order.
        tick: told the images of each chunk that is done.
    Raises:
        EngineError: the runtime failed. StorageError: the disk did. The part is then not there.
    """
    import pyarrow.parquet as pq

    rows, broken = 0, []
    with _kept_parts(), aside(part_path(job.folder, part)) as new:
        with pq.ParquetWriter(new, schema_of(job.columns), compression="zstd") as writer:
            held, size = [], 0
            for chunk in chunks:
                table, errors = _table(job, runner, chunk)
                broken += errors
                if table is not None:
                    rows += len(table)
                    held.append(table)
                    size += table.nbytes
                if size >= ROW_GROUP_BYTES:
                    _write(writer, held)
                    held, size = [], 0
                tick(len(chunk.items) + len(chunk.broken))
            _write(writer, held)
        if broken:
            _write_errors(error_path(job.folder, part), broken)
        else:
            error_path(job.folder, part).unlink(missing_ok=True)
    return PartCount(part, rows, len(broken))


def _table(job: EmbedJob, runner: Runner, chunk: DecodedChunk):
    """(rows of a chunk or None, its broken images): of values that are not finite there are no rows."""
    broken = list(chunk.broken)
    if not chunk.items:
        return None, broken
    outputs = job.outputs(runner, chunk)
    good = finite(outputs)
    for i in np.flatnonzero(~good):
        small = ": fp16 may be too small for this model" if job.provenance.precision == "fp16" else ""
        words = f"the file gives values that are not finite{small}"
        broken.append(BrokenImage(chunk.items[i].index, chunk.items[i].name, words))
    items = [item for item, kept in zip(chunk.items, good) if kept]
    if not items:
        return None, broken
    values = values_of(job.columns, {name: v[good] for name, v in outputs.items()}, job.provenance.activation)
    return table_of(job.columns, [i.index for i in items], [i.name for i in items], values), broken


def _write(writer, tables: list) -> None:
    """Write tables as one row group."""
    import pyarrow as pa

    if tables:
        table = pa.concat_tables(tables)
        writer.write_table(table, row_group_size=max(1, len(table)))


def _write_errors(path: Path, broken: list[BrokenImage]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = sorted(broken, key=lambda b: b.index)
    columns = [[b.index for b in rows], [clean(b.name) for b in rows], [clean(b.error) for b in rows]]
    schema = error_schema()
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema)]
    with aside(path) as new:
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), new)


@contextmanager
def _kept_parts() -> Iterator[None]:
    """What is said of a disk that fails: parts that were finished are kept."""
    try:
        yield
    except StorageError as e:
        words = str(e).replace(
            "nothing was left behind", "finished parts are kept: make room and run it again to go on"
        )
        raise StorageError(words) from None
