"""The files of a benchmark: what is compared with what, and the dense, swept and bound files that are made for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from ...export import reducers
from ...export.errors import UsageError
from ...export.inspection import Inspection, inspect
from ...export.outputs import POOLED, Emission
from ..files import inspect_file, is_engine

MODEL = "deit_small_patch16_224"  # of a benchmark without files, with random weights: they decide nothing about speed


class ExportSettings(NamedTuple):
    """How a file was exported: what a dense one must share to be compared with it. batch: None for any number. tail: None
    for the default.
    """

    batch: int | None = None
    opset: int = 20
    precision: str = "fp32"
    input: str = "float32"
    emission: Emission = POOLED
    target: str = "portable"
    tail: str | None = None


class Sweep(NamedTuple):
    """One option over several values: ("keep_rate", ("0.9", "0.7")); values as the command line writes them."""

    option: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A file that is timed.

    Args:
        inspection: what it is.
        label: what it is called in the report.
        dense: the dense file it is compared with, itself for a dense one.
        bound: the file of its free bound (see `bound`), None when it is not asked for or does not exist.
        value: of the option that is swept.
    """

    inspection: Inspection
    label: str
    dense: str
    bound: str | None = None
    value: str | None = None

    @property
    def path(self) -> str:
        """Of the file."""
        return str(self.inspection.path)

    @property
    def is_dense(self) -> bool:
        """Whether it is what others are compared with."""
        return self.path == self.dense


def settings_of(inspection: Inspection) -> ExportSettings:
    """How a file was exported."""
    p = inspection.provenance
    return ExportSettings(
        inspection.batch,
        p.opset,
        precision=p.precision,
        input=p.input,
        emission=p.emission,
        target=p.target,
        tail=p.tail,
    )


def image_of(inspection: Inspection) -> tuple[int, int, int]:
    """Channels, height, width of the images that a file takes."""
    return (inspection.provenance.dims["channels"], *inspection.provenance.preprocess.size)


def collect(
    files: list[Inspection],
    folder: Path,
    *,
    dense: Path | None = None,
    sweep: Sweep | None = None,
    bound: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Candidate]:
    """Every file of a benchmark, dense ones first.

    Args:
        files: that are compared; [] for DeiT-S with ToMe r=13.
        folder: where files are made.
        dense: what they are compared with; None for dense files made here, exported as each file was.
        sweep: export the one file's model anew for each value.
        bound: also make the free bound of each reduced file.
        progress: told what is made.
    Raises:
        UsageError: the method has no such option, or there is no dense int8 file.
    """
    exporter = _Exporter(folder, files[0] if files else None, progress)
    values: dict[str, str] = {}
    if sweep:
        files, values = _swept(exporter, files, sweep)
    elif not files:
        files = [inspect(exporter.write("tome", {"r": "13"}, ExportSettings()))]
    denses: dict[ExportSettings, Inspection] = {}
    for file in files:
        settings = settings_of(file)
        if settings not in denses:
            denses[settings] = inspect_file(dense or exporter.write("none", {}, settings))
    made = [Candidate(d, dense_label(d), str(d.path)) for d in {str(d.path): d for d in denses.values()}.values()]
    for i, file in enumerate(files):
        limit = None
        if bound and file.provenance.file_schedule.steps:
            from .bound import write_bound

            progress(f"making the free bound of {file.path.name}")
            limit = str(write_bound(file, folder / f"bound.{i}.onnx"))
        path = str(file.path)
        made.append(Candidate(file, path, str(denses[settings_of(file)].path), limit, values.get(path)))
    return list({candidate.path: candidate for candidate in reversed(made)}.values())[::-1]


def dense_label(inspection: Inspection) -> str:
    """What a dense file is called in the report."""
    p = inspection.provenance
    more = ("" if p.target == "portable" else f", for {p.target}") + (", class tail" if p.tail == "class" else "")
    return f"dense, batch {inspection.batch or 'dynamic'}, {p.precision}{more}"


def check_comparable(files: list[Inspection], dense: Inspection | None, *, sweep: Sweep | None, bound: bool) -> None:
    """Whether files can be compared.

    Args:
        files: that are compared.
        dense: what they are compared with, None when it is made.
        sweep: when the first file is exported anew.
        bound: whether free bounds are asked for.
    Raises:
        UsageError: the files are not of one model, the dense one is of another, is reduced or among them, or engines
        and ONNX files are
            mixed.
    """
    every = [*files, *([dense] if dense else [])]
    engines = [f for f in every if is_engine(f.path)]
    if engines and (len(engines) < len(every) or dense is None or sweep):
        raise UsageError(
            f"{engines[0].path} is an engine: engines are compared with each other, all files and the dense one"
        )
    if engines and bound:
        raise UsageError(f"{engines[0].path} is an engine: the free bound is made from ONNX files")
    models = {(f.provenance.model, str(f.provenance.model_kwargs)) for f in every}
    if len(models) > 1:
        raise UsageError(
            f"bench compares files of one model, these are of {', '.join(' '.join(m) for m in sorted(models))}"
        )
    if dense and dense.path in [f.path for f in files]:
        raise UsageError(f"dense {dense.path} is among the files that are compared with it: leave it out there")
    if dense and dense.provenance.schedule.steps:
        raise UsageError(
            f"dense {dense.path} is reduced ({dense.provenance.schedule.method}): wanted one made with method none"
        )
    other = next((f for f in files if dense and f.provenance.tail != dense.provenance.tail), None)
    if other is not None:
        raise UsageError(
            f"dense {dense.path} has tail {dense.provenance.tail}, {other.path} has {other.provenance.tail}: one that computes "
            f"less of its last block would win by that; wanted a dense one exported with tail {other.provenance.tail}"
        )
    if sweep and len(files) > 1:
        raise UsageError(f"sweep changes one file's {sweep.option}: give one file, not {len(files)}")


def _swept(exporter: _Exporter, files: list[Inspection], sweep: Sweep) -> tuple[list[Inspection], dict[str, str]]:
    """A file for each value, and which value each has."""
    takers = reducers.takers(sweep.option)
    method, options, settings = takers[0] if takers else "none", {}, ExportSettings()
    if files:
        schedule = files[0].provenance.schedule
        method, options, settings = schedule.method, dict(schedule.options), settings_of(files[0])
    if method not in takers:
        raise UsageError(
            f"sweep of {sweep.option}: {files[0].path if files else 'it'} is {method}, which has no {sweep.option}; it goes "
            f"with {', '.join(takers) or 'no method'}"
        )
    made = {v: inspect(exporter.write(method, {**options, sweep.option: v}, settings)) for v in sweep.values}
    return list(made.values()), {str(file.path): v for v, file in made.items()}


class _Exporter:
    """Exports the model of a file (MODEL without one) under any method; the model is loaded when it is first needed."""

    def __init__(self, folder: Path, origin: Inspection | None, progress: Callable[[str], None]):
        self.folder, self.origin, self.progress, self.loaded = folder, origin, progress, None

    def write(self, method: str, options: dict, settings: ExportSettings) -> Path:
        """A file in the folder; one that was made before is taken.

        Args:
            method: of the reducer table.
            options: of it.
            settings: what the file shares with those it is compared with.
        Raises:
            UsageError: int8, whose scales are not ours to choose.
        """
        from ...export.graph.export import export_onnx

        if settings.precision == "int8":
            raise UsageError(
                "an int8 file is compared with a dense int8 file that was calibrated on the same images: make one (tokexport onnx "
                "--method none --dtype int8 --calib IMAGES --for cpu) and give it as dense"
            )
        values = ".".join(f"{k}={v}" for k, v in options.items() if k in reducers.swept()).replace("/", "_")
        numbers = [
            str(settings.batch or "dynamic"),
            str(settings.opset),
            settings.precision,
            settings.input,
            settings.target,
            settings.tail or "",
        ]
        numbers.append(f"{crc32(repr(settings.emission).encode()):08x}")
        path = self.folder / ".".join(filter(None, [method, values, *numbers, "onnx"]))
        if path.exists():
            return path
        self.progress(f"exporting {method} {values}")
        loaded = self._model()
        schedule = loaded.schedule(method, **options)
        options = {
            "batch": settings.batch,
            "opset": settings.opset,
            "dtype": settings.precision,
            "input": settings.input,
            "target": settings.target,
            "tail": settings.tail,
        }
        return export_onnx(loaded, schedule, path, **options, **asdict(settings.emission)).path

    def _model(self):
        if self.loaded is None:
            self.loaded = model_of(self.origin)
        return self.loaded


def model_of(origin: Inspection | None):
    """The model of a file (MODEL for None), with the file's weights when they can be found: they decide nothing about speed."""
    from ...export.models.load import load_model
    from ...export.rebuild import rebuild

    if origin is None:
        return load_model(MODEL)
    provenance = origin.provenance
    try:
        return rebuild(provenance, origin.path)
    except UsageError:
        return load_model(provenance.model, provenance.model_kwargs)
