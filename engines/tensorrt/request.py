"""What is asked of a builder: one record, checked against file, builder and machine before anything is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...export import precisions
from ...export.errors import UsageError
from ...export.files import sha256_of
from ...export.inspection import Inspection
from ...export.records import encode
from ..plugin import NativeLibrary, find_library
from . import runtime as runtimes

PROFILE = (1, 8, 32)  # smallest, best and largest batch when nothing is said
LEVELS = range(6)  # of the builder's optimisation
PTX_FROM = 80  # compute capability from which the plugin's portable kernels run


@dataclass(frozen=True)
class BuildOptions:
    """What a person may ask of a builder.

    Attributes:
        precision: a name of `precisions.TABLE`, default the file's own; a float32 file is typed or quantised first.
        builder: "rtx", "tensorrt", or "auto": TensorRT where it and a GPU are there, else TensorRT-RTX.
        capabilities: compute capabilities of the GPUs it is for, e.g. ("86", "89"), of TensorRT-RTX; () for the GPU
            that is here.
        profile: smallest, best and largest batch of a free one, default PROFILE.
        calibration: images or folders that int8 is calibrated on.
        decisions: the engine gives the merge decisions too, by which `verify` judges it.
        opt_level: one of LEVELS, how long the builder may search; None for its own choice.
        workspace: most bytes of GPU memory for scratch, 0 for the builder's own choice.
        timing_cache: a file of TensorRT's measurements, read where it is there and written anew; None: none is kept.
        version_compatible: it runs on later versions of TensorRT too.
        plugin: the file's nodes TokenReduce run as the plugin that `tokexport plugin build` made, not as plain operators.
        embed_plugin: the engine carries that library in itself.
    """

    precision: str | None = None
    builder: str = "auto"
    capabilities: Sequence[str] = ()
    profile: tuple[int, int, int] | None = None
    calibration: Sequence[str | Path] = ()
    decisions: bool = False
    opt_level: int | None = None
    workspace: int = 0
    timing_cache: str | Path | None = None
    version_compatible: bool = False
    plugin: bool = False
    embed_plugin: bool = False


@dataclass(frozen=True)
class BuildRequest:
    """All that decides what engine comes out of an ONNX file.

    Attributes:
        builder: a key of `runtime.PACKAGES`.
        precision: a name of `precisions.TABLE`.
        outputs: names of the engine's outputs.
        capabilities: compute capabilities it is for; () for the GPU that is here.
        gpu: that GPU; None when capabilities are named, or for a dry run without one.
        profile: smallest, best and largest batch of a free one, else None.
        opt_level: one of LEVELS; None for the builder's own.
        workspace: bytes of GPU memory for scratch, 0 for the builder's own choice.
        version_compatible: whether it is to run on later versions of TensorRT too.
        calibration: SHA-256 of each image that int8 is calibrated on.
        plugin: SHA-256 of the library that runs the nodes TokenReduce; None: they are plain operators.
        embed_plugin: the engine carries it in itself.
    """

    builder: str
    precision: str
    outputs: tuple[str, ...]
    capabilities: tuple[str, ...] = ()
    gpu: runtimes.Gpu | None = None
    profile: tuple[int, int, int] | None = None
    opt_level: int | None = None
    workspace: int = 0
    version_compatible: bool = False
    calibration: tuple[str, ...] = ()
    plugin: str | None = None
    embed_plugin: bool = False

    def key(self, builder_version: str, source_sha256: str) -> str:
        """By what an engine is known again: SHA-256 of the request, the builder's version and the ONNX file's bytes.

        Args:
            builder_version: of the builder.
            source_sha256: of the ONNX file and its weights.
        """
        return hashlib.sha256(
            json.dumps([encode(self), builder_version, source_sha256], sort_keys=True).encode()
        ).hexdigest()


@dataclass(frozen=True)
class BuildTask:
    """What the building process is told.

    Attributes:
        request: what the engine is to be.
        onnx: path of the typed ONNX file.
        plugin: path of the library to load; None for none.
        engine: path it is written to.
        timing_cache: path of measurements of builds before; None for none. It need not be there.
        new_timing_cache: path they are written to, with this build's.
        dry_run: parse and count only.
    """

    request: BuildRequest
    onnx: str
    engine: str
    timing_cache: str | None = None
    new_timing_cache: str | None = None
    plugin: str | None = None
    dry_run: bool = False


def make_request(
    inspection: Inspection, options: BuildOptions, *, images: Sequence[Path] = (), dry_run: bool = False
) -> BuildRequest:
    """The request for an engine of a file.

    Args:
        inspection: of the ONNX file.
        options: what is asked of the builder.
        images: photos that int8 is calibrated on, each a file.
        dry_run: nothing will be built, so no GPU is needed.
    Raises:
        UsageError: something contradicts the file, or this builder or this machine cannot do it.
    """
    name = runtimes.choose(options.builder)
    if options.workspace < 0:
        raise UsageError(f"workspace {options.workspace}: wanted bytes, 0 for the builder's own choice")
    if options.opt_level is not None and options.opt_level not in LEVELS:
        raise UsageError(f"opt-level {options.opt_level}: wanted {LEVELS[0]} to {LEVELS[-1]}")
    provenance, precision = inspection.provenance, resolve_precision(inspection, options.precision)
    _check_machine(name, options, dry_run)
    library = _library(options)
    return BuildRequest(
        builder=name,
        precision=precision,
        outputs=(*provenance.outputs, *(provenance.decisions if options.decisions else ())),
        capabilities=tuple(options.capabilities),
        gpu=None if options.capabilities else runtimes.current_gpu(),
        profile=_profile(inspection, options.profile),
        opt_level=options.opt_level,
        workspace=options.workspace,
        version_compatible=options.version_compatible,
        calibration=tuple(sha256_of(image) for image in images),
        plugin=None if library is None else sha256_of(library.path),
        embed_plugin=options.embed_plugin,
    )


def _library(options: BuildOptions) -> NativeLibrary | None:
    """The plugin that is asked for. Raises: UsageError when it is not built, or has no kernels for a GPU."""
    if not options.plugin:
        if options.embed_plugin:
            raise UsageError("embed-plugin goes with plugin")
        return None
    library = find_library("tensorrt", needed=True)
    old = [c for c in options.capabilities if c.isdigit() and int(c) < PTX_FROM and int(c) not in library.chips]
    if old:
        raise UsageError(
            f"compute-capability {','.join(old)}: the plugin has no kernels for it: build it with arch {old[0]}"
        )
    return library


def resolve_precision(inspection: Inspection, precision: str | None) -> str:
    """The precision an engine of a file is built in.

    Args:
        inspection: of the file.
        precision: what was asked for; None for the file's own.
    Raises:
        UsageError: there is no such precision, or the file is typed already and cannot be brought to it.
    """
    own = inspection.provenance.precision
    if precision is None or precision == own:
        return own
    precisions.get(precision)
    if own != "fp32":
        raise UsageError(
            f"{inspection.path} is {own} already: {precision} needs the fp32 file it could be made from "
            f"(tokexport onnx --dtype fp32)"
        )
    return precision


def _profile(inspection: Inspection, profile: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
    if inspection.batch:
        if profile is not None and set(profile) != {inspection.batch}:
            raise UsageError(
                f"{inspection.path} is for batch {inspection.batch}: batch {':'.join(map(str, profile))} needs a file "
                f"with a dynamic batch"
            )
        return None
    low, best, high = sizes = tuple(profile or PROFILE) if len(profile or PROFILE) == 3 else (0, 0, 0)
    if not all(type(n) is int for n in sizes) or not 1 <= low <= best <= high:
        raise UsageError(
            f"batch {':'.join(map(str, profile))}: wanted smallest:best:largest, 1 or more, none below the one before"
        )
    return sizes


def _check_machine(name: str, options: BuildOptions, dry_run: bool) -> None:
    """Raises: UsageError for what this builder or this machine cannot do."""
    words, capabilities = runtimes.PACKAGES[name].words, list(options.capabilities)
    has_gpu = dry_run or runtimes.gpus() > 0
    if name == "tensorrt":
        if capabilities:
            raise UsageError(
                "compute-capability: TensorRT builds for the GPU it runs on only; TensorRT-RTX (builder rtx) for others"
            )
        if not has_gpu:
            raise UsageError(
                "TensorRT builds engines on the GPU they are for, and there is none here: use builder rtx with "
                "a compute-capability, or a dry-run"
            )
        return
    if options.timing_cache is not None:
        raise UsageError("timing-cache: TensorRT-RTX times nothing while it builds and has no such cache; leave it out")
    if options.version_compatible:
        raise UsageError("version-compatible is TensorRT's: an engine of TensorRT-RTX runs on its own version")
    if not capabilities and has_gpu:
        return
    known = runtimes.load(name).capabilities
    if not capabilities:
        raise UsageError(
            f"there is no GPU here: say which ones the engine is for, with compute-capability {','.join(known)} "
            f"or some of them"
        )
    if set(capabilities) - set(known) or len(set(capabilities)) < len(capabilities):
        raise UsageError(f"compute-capability {','.join(capabilities)}: {words} knows {', '.join(known)}, each once")
