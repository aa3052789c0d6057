"""An ONNX file of tokexport to a TensorRT engine, with a sidecar that says what it is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...export import precisions
from ...export.errors import UsageError
from ...export.files import aside, check_output, sha256_of
from ...export.inspection import Inspection, inspect
from .. import nodes
from ..plugin import find_library
from . import runtime as runtimes
from .process import Built, run_child
from .request import BuildOptions, BuildRequest, BuildTask, make_request, resolve_precision
from .sidecar import ENDING, Builder, EngineFile, Plugin, read_sidecar, sidecar, write_sidecar

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class BuildResult:
    """What `build_engine` did.

    Attributes:
        path: of the engine.
        engine: what its sidecar says, None for a dry run.
        layers: of the typed network, {kind: {type: count}}.
        cached: whether an identical engine was there and nothing was built.
        seconds: of building.
        warnings: of the builder, each once.
        builder: what built it.
    """

    path: Path
    engine: EngineFile | None
    layers: dict[str, dict[str, int]]
    cached: bool
    seconds: float
    warnings: tuple[str, ...]
    builder: Builder


def build_engine(
    path: str | Path,
    output: str | Path | None = None,
    *,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress = lambda stage, share: None,
    **options: Any,
) -> BuildResult:
    """Build a TensorRT engine in a process of its own; an identical one that is there already is taken as it is.

    Args:
        path: ONNX file made by `export_onnx`.
        output: of the engine, default the file's name with .plan; OUTPUT.json lies beside it.
        dry_run: parse and report only.
        force: replace what is at output.
        progress: called with a stage and the share of it that is done, 0 to 1.
        options: fields of `BuildOptions`: precision, builder, capabilities, profile, calibration, decisions, ...
    Raises:
        UsageError: wrong options, a file that no engine can be built from, or a builder that is missing.
        BuildError, StorageError: the builder refused, failed or crashed, or the disk did; nothing is written.
    """
    inspection, asked = inspect(path), BuildOptions(**options)
    if inspection.refusals:
        raise UsageError(f"{path} is no file to build engines from: " + "; ".join(inspection.refusals[:5]))
    _check_target(inspection)
    images = _calibration_images(inspection, asked)
    request = make_request(inspection, asked, images=images, dry_run=dry_run)
    place = Path(path).with_suffix(".plan") if output is None else Path(output)
    if place.suffix == ".onnx":
        raise UsageError(
            f"output {place}: an engine is no ONNX file: wanted another suffix, e.g. {place.with_suffix('.plan')}"
        )
    job = _Job(inspection, request, images, None if asked.timing_cache is None else Path(asked.timing_cache), progress)
    if dry_run:
        if output is not None:  # what is wrong with it is told now, not after a build
            check_output(output, True, job.inputs, beside=(ENDING,))
        return job.dry_run(place)
    return job.build(place, force)


@dataclass(frozen=True)
class _Job:
    """One request for an engine of one file."""

    inspection: Inspection
    request: BuildRequest
    images: Sequence[Path]
    timing_cache: Path | None
    progress: Progress

    @property
    def inputs(self) -> list[Path]:
        """What is read, and so never replaced."""
        return [*self.inspection.files, *self.images]

    def dry_run(self, output: Path) -> BuildResult:
        """Parse and count, in a temporary folder."""
        with tempfile.TemporaryDirectory() as folder:
            task = BuildTask(self.request, str(self._source(Path(folder))), "", plugin=self._library(), dry_run=True)
            built, warnings = run_child(task, self.progress)
        return BuildResult(
            output,
            None,
            layers=built.layers,
            cached=False,
            seconds=0.0,
            warnings=warnings,
            builder=Builder(self.request.builder, built.version),
        )

    def build(self, output: Path, force: bool) -> BuildResult:
        """The engine that is there, when it is the one that is asked for, or a new one.

        Args:
            output: path of the engine.
            force: replace what is there.
        """
        version, source_sha256 = runtimes.installed_version(self.request.builder), sha256_of(*self.inspection.files)
        key = self.request.key(version, source_sha256)
        known = None if force else _cached(output, key)
        if known:
            return BuildResult(
                output,
                known,
                layers=known.layers,
                cached=True,
                seconds=0.0,
                warnings=known.warnings,
                builder=known.builder,
            )
        check_output(output, force, self.inputs, beside=(ENDING,))
        if self.timing_cache:
            check_output(self.timing_cache, True, [*self.inputs, output, sidecar(output)], beside=())
            if self.timing_cache.resolve() in (output.resolve(), sidecar(output).resolve()):
                raise UsageError(f"timing-cache {self.timing_cache} is where the engine goes: wanted another name")
        with aside(output, beside=(ENDING,)) as new, self._new_timing_cache() as new_cache:
            task = BuildTask(
                self.request,
                str(self._source(new.parent)),
                str(new),
                timing_cache=str(self.timing_cache) if self.timing_cache else None,
                new_timing_cache=str(new_cache) if new_cache else None,
                plugin=self._library(),
            )
            built, warnings = run_child(task, self.progress)
            engine = self._engine_file(new, built, warnings, key=key, source_sha256=source_sha256)
            write_sidecar(new, engine)
        return BuildResult(
            output,
            engine,
            layers=built.layers,
            cached=False,
            seconds=built.seconds,
            warnings=warnings,
            builder=engine.builder,
        )

    def _new_timing_cache(self) -> AbstractContextManager[Path | None]:
        return aside(self.timing_cache) if self.timing_cache else nullcontext()

    def _library(self) -> str | None:
        return str(find_library("tensorrt", needed=True).path) if self.request.plugin else None

    def _source(self, folder: Path) -> Path:
        """What the parser reads: nodes TokenReduce without their bodies, or their bodies in their place."""
        typed = self._typed(folder)
        native = self.request.plugin is not None
        model = nodes.prepared(typed, native=native, outputs=self.request.outputs, functions=False)
        return typed if model is None else nodes.write_copy(model, typed, folder)

    def _typed(self, folder: Path) -> Path:
        """The file itself, or a copy in a folder, in the precision of the request and the form that TensorRT likes."""
        source, own = self.inspection.path, self.inspection.provenance
        name = self.request.precision if precisions.get(self.request.precision).in_file else own.precision
        self.progress("typing the graph", 0.0)
        if name == own.precision and own.target == "tensorrt":
            return source.resolve()
        typed = folder / "typed.onnx"
        if self.images:
            from ..quantize import quantize

            report = lambda stage: self.progress(stage, 0.0)
            quantize(source, typed, calibration=self.images, target="tensorrt", progress=report)
        else:
            from ...export.graph.precision import write_as

            write_as(source, typed, name, target="tensorrt")
        return typed

    def _engine_file(
        self, new: Path, built: Built, warnings: tuple[str, ...], *, key: str, source_sha256: str
    ) -> EngineFile:
        """What the sidecar of the engine that was just built says."""
        request, inspection = self.request, self.inspection
        return EngineFile(
            provenance=inspection.provenance,
            builder=Builder(request.builder, built.version),
            compute_capability=(request.gpu.compute_capability,) if request.gpu else request.capabilities,
            gpu=request.gpu,
            precision=request.precision,
            layers=built.layers,
            inputs=built.inputs,
            outputs=built.outputs,
            profile=request.profile,
            batch=inspection.batch,
            size=new.stat().st_size,
            sha256=sha256_of(new),
            request=key,
            source=str(inspection.path),
            source_sha256=source_sha256,
            warnings=warnings,
            plugin=Plugin(request.plugin, request.embed_plugin) if request.plugin else None,
        )


def _check_target(inspection: Inspection) -> None:
    """Raises: UsageError for int8 in the form that runtimes on CPUs want, of which TensorRT would make something else."""
    own = inspection.provenance
    if own.target == "cpu" and precisions.get(own.precision).product_type == "INT8":
        raise UsageError(
            f"{inspection.path} is {own.precision} for CPUs (the rest of it is float32, biases stand behind the products): an engine "
            f"needs the {own.precision} file for tensorrt, or the fp32 file and calib"
        )


def _calibration_images(inspection: Inspection, options: BuildOptions) -> list[Path]:
    """The images to calibrate on; none when there is nothing to calibrate."""
    own, wanted = inspection.provenance.precision, resolve_precision(inspection, options.precision)
    if wanted == own or precisions.get(wanted).product_type != "INT8":
        if options.calibration:
            raise UsageError(f"calib goes with int8 and an fp32 file, this is {own} to {wanted}: leave it out")
        return []
    if not options.calibration:
        raise UsageError(
            f"{wanted} needs calib, images: a folder of some tens of images like those that the model will see"
        )
    from ..images import find_images

    return find_images(list(options.calibration))


def _cached(path: Path, key: str) -> EngineFile | None:
    """The engine that is there already, when it was asked for in the same words and is whole."""
    try:
        engine = read_sidecar(path)
    except UsageError:
        return None
    return engine if engine.request == key else None
