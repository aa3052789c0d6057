"""Writing a ladder: every rung is exported as a file of its own would be, then its weights go to the one file that all rungs share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..export import macs
from ..export.errors import EngineError, UsageError
from ..export.files import read_model
from ..export.inspection import Inspection, inspect
from ..export.records import to_document
from ..export.schedule import Schedule
from .bundle.folder import check_place, entry_of, written_aside
from .ladder_manifest import NAME, WEIGHTS, Ladder, Rung, write_manifest
from .measure.environment import processor
from .measure.jobs import Job, Times, measure, noise
from .measure.timing import ratio

if TYPE_CHECKING:
    from ..export.models.load import LoadedModel

SHARED = 256  # bytes; smaller constants stay in the graph
PAGE, LINE = 4096, 64  # large weights begin at a page, so that they can be mapped; others at a line of the cache
NOISE = 8  # images, where no photos are given
Progress = Callable[[str, float], None]


class LadderSettings(NamedTuple):
    """How the rungs are written and timed.

    Args:
        runtime: what they are timed in.
        dtype: of the trunk, a graph precision.
        batch: images in a run; None for any number, timed with one.
        threads: of the processor, 0 for the runtime's own choice.
        seconds: most time for timing all of them.
    """

    runtime: str = "ort"
    dtype: str = "fp32"
    batch: int | None = 1
    threads: int = 1
    seconds: float = 20.0


DEFAULT = LadderSettings()


def write_ladder(
    loaded: LoadedModel,
    schedules: Sequence[tuple[str, Schedule]],
    folder: str | Path,
    *,
    settings: LadderSettings = DEFAULT,
    pixels: np.ndarray | None = None,
    force: bool = False,
    progress: Progress = lambda text, share: None,
) -> Ladder:
    """Write a folder with one file of weights, a graph for every schedule, and `ladder.json`.

    Args:
        loaded: from `load_model`.
        schedules: (label, schedule) of every rung, in any order; none twice.
        folder: where the ladder goes, written aside and renamed.
        settings: how the rungs are written and timed.
        pixels: images [n, channels, H, W] float32 that errors are measured on; None for noise, which says little.
        force: replace a ladder that is there.
        progress: called with what is done and the share done.
    Returns:
        What was written.
    Raises:
        UsageError: wrong settings or place, no schedule or one twice; nothing is written then.
        EngineError, GraphError, StorageError: the runtime, the export or the disk failed.
    """
    from .runners import require
    from .search.image_errors import ErrorMeter

    require(settings.runtime)
    folder = check_place(folder, force=force, manifest=NAME, kind="ladder")
    ordered = _ordered(loaded, schedules)
    images = noise(NOISE, _image(loaded)) if pixels is None else pixels
    with written_aside(folder) as new:
        dense = _export(loaded, ordered, new, settings, progress)
        progress("timing the rungs", 0.6)
        times = _times(loaded, new, len(ordered), dense, settings)
        progress("running the dense model", 0.8)
        meter, rungs = ErrorMeter(loaded, images), []
        for i, (label, schedule) in enumerate(ordered):
            progress(f"{label} on the images", 0.82 + 0.18 * i / len(ordered))
            error = meter.errors(schedule).mean
            rungs.append(_rung(inspect(new / _name(i)), label, error, times=times, dense=dense or new / _name(0)))
        if dense is not None:
            dense.unlink()
        n_images = 0 if pixels is None else len(pixels)
        ladder = _manifest(new, tuple(rungs), settings, measure=meter.kind, images=n_images)
        write_manifest(ladder, new)
    return ladder


def _manifest(folder: Path, rungs: tuple[Rung, ...], settings: LadderSettings, *, measure: str, images: int) -> Ladder:
    """What `ladder.json` says of the files in a folder."""
    return Ladder(
        version=version("tokexport"),
        weights=entry_of(folder / WEIGHTS),
        rungs=rungs,
        runtime=settings.runtime,
        processor=processor().name,
        threads=settings.threads,
        dtype=settings.dtype,
        batch=settings.batch,
        measure=measure,
        images=images,
        provenance=to_document(inspect(folder / _name(0)).provenance),
    )


def _ordered(loaded: LoadedModel, schedules: Sequence[tuple[str, Schedule]]) -> list[tuple[str, Schedule]]:
    """From the most arithmetic to the least. Raises: UsageError for none, and for one that is there twice."""
    from ..export.models import as_plain
    from .search.candidate_times import key_of

    if not schedules:
        raise UsageError("ladder: no rungs were asked for; wanted one schedule or more")
    labels: dict[str, str] = {}
    for label, schedule in schedules:
        same = labels.setdefault(key_of(schedule), label)
        if same != label or [name for name, _ in schedules].count(label) > 1:
            raise UsageError(f"ladder: rungs {same} and {label} are the same: leave one out")
    dims = as_plain(loaded.module).dims
    return sorted(schedules, key=lambda rung: -macs.count(dims, rung[1]))


def _name(i: int) -> str:
    return f"rung{i}.onnx"


def _image(loaded: LoadedModel) -> tuple[int, int, int]:
    return (len(loaded.preprocess.mean), *loaded.preprocess.size)


def _export(loaded, ordered: list, folder: Path, settings: LadderSettings, progress: Progress) -> Path | None:
    """Export every rung and share its weights. Returns: a dense file for comparison, where no rung is dense."""
    from ..export.graph.export import export_onnx

    options = {"batch": settings.batch, "dtype": settings.dtype}
    shared, single = SharedWeights(folder / WEIGHTS), folder / "single.onnx"
    with shared:
        for i, (label, schedule) in enumerate(ordered):
            progress(f"exporting {label}", 0.6 * i / (len(ordered) + 1))
            export_onnx(loaded, schedule, single, force=True, **options)
            shared.write_graph(single, folder / _name(i))
            for part in folder.glob("single.onnx*"):
                part.unlink()
        if any(not schedule.steps for _, schedule in ordered):
            return None
        progress("exporting the dense model to compare with", 0.6 * len(ordered) / (len(ordered) + 1))
        dense = Schedule("none", *ordered[0][1].size)
        return export_onnx(loaded, dense, folder / "dense.onnx", **options).path


class SharedWeights:
    """One file of weights that any number of graphs read; equal bytes are there once.

    Args:
        path: of the file, in the folder of the graphs.
    """

    def __init__(self, path: Path):
        self.path, self._places = path, {}

    def __enter__(self) -> SharedWeights:
        self._file = open(self.path, "wb")
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def write_graph(self, source: Path, path: Path) -> None:
        """Write an ONNX file again, with its weights in the shared file.

        Args:
            source: the file.
            path: of the graph, in the folder of the shared file.
        """
        import onnx
        from onnx_ir.serde import deserialize_tensor

        proto, weights = read_model(source)
        floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
        kept = []
        for initializer in proto.graph.initializer:
            if initializer.data_type in floats and len(initializer.raw_data) > SHARED:
                weights[initializer.name] = deserialize_tensor(initializer)
            else:
                kept.append(onnx.TensorProto.FromString(initializer.SerializeToString()))
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
        for name, tensor in weights.items():
            entry = proto.graph.initializer.add(
                name=name, data_type=int(tensor.dtype), dims=list(tensor.shape), data_location=onnx.TensorProto.EXTERNAL
            )
            place = self._place(tensor.tobytes())
            for key, value in (("location", self.path.name), ("offset", place), ("length", tensor.nbytes)):
                entry.external_data.add(key=key, value=str(value))
        path.write_bytes(proto.SerializeToString())
        self._file.flush()

    def _place(self, values: bytes) -> int:
        """Where these bytes are in the file."""
        digest = hashlib.sha256(values).digest()
        if digest not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % (PAGE if len(values) > PAGE else LINE)))
            self._places[digest] = self._file.tell()
            self._file.write(values)
        return self._places[digest]


def _times(loaded, folder: Path, n: int, dense: Path | None, settings: LadderSettings) -> Times:
    """All rungs and the dense file, interleaved. Raises: EngineError where one fails."""
    files = tuple(str(folder / _name(i)) for i in range(n))
    first = str(dense or folder / _name(0))
    job = Job(
        runtime=settings.runtime,
        batch=settings.batch or 1,
        threads=settings.threads,
        seconds=settings.seconds,
        image=_image(loaded),
        files=tuple(dict.fromkeys([first, *files])),
        pairs=tuple((first, file) for file in files if file != first),
    )
    times = measure(job)
    if times.errors:
        raise EngineError("; ".join(dict.fromkeys(times.errors.values())))
    return times


def _rung(file: Inspection, label: str, error: float, *, times: Times, dense: Path) -> Rung:
    """What the manifest says of a rung; dense: the file it was timed beside."""
    first, own = times.seconds[str(dense)], times.seconds[str(file.path)]
    speedup = ratio(first, own).middle
    schedule = file.provenance.schedule
    return Rung(
        file=entry_of(file.path),
        label=label,
        method=schedule.method,
        tokens=tuple(m for _, m in schedule.tokens_per_block()),
        macs=file.macs,
        macs_ratio=file.macs_dense / file.macs,
        ms=float(np.median(first)) * 1e3 / speedup,
        speedup=speedup,
        error=error,
    )
