"""An ONNX file of tokexport to a TensorRT engine, with a sidecar that says what it is."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable

from ...export.errors import UsageError
from ...export.inspection import inspect
from ...export.files import check_output
from . import runtime as runtimes
from .sidecar import PRECISIONS, EngineFile, read_sidecar, sha256_of, sidecar

PROFILE = (1, 8, 32)


@dataclass(frozen=True)
class BuildResult:
    """engine: what was built, None for a dry run. layers: of the network. cached: an identical engine was there. seconds: of building."""

    path: Path
    engine: EngineFile | None
    layers: dict
    cached: bool
    seconds: float
    warnings: list[str]
    runtime: str


def build_engine(
    onnx_path: str | Path,
    path: str | Path | None = None,
    precision: str | None = None,
    builder: str = "auto",
    capabilities: tuple[str, ...] = (),
    profile: tuple[int, int, int] | None = None,
    timing_cache: str | Path | None = None,
    opt_level: int | None = None,
    workspace: int = 0,
    version_compatible: bool = False,
    dry_run: bool = False,
    force: bool = False,
    progress: Callable[[str, float], None] = lambda stage, share: None,
    calibration: list[str | Path] = (),
    decisions: bool = False,
) -> BuildResult:
    """Build a TensorRT engine in a process of its own.

    onnx_path: a file made by `export_onnx`. path: of the engine, default the file's name with .plan; PATH.json lies beside it.
    precision: one of PRECISIONS, default the file's own; a float32 file is typed first (see `precision`). runtime: "auto", "rtx" or
    "tensorrt". capabilities: for TensorRT-RTX, e.g. ("86", "89"); without them a GPU must be there. profile: smallest, best and
    largest batch of a dynamic one, default 1, 8, 32. timing_cache: a file, default beside the engine; TensorRT-RTX has none.
    opt_level: 0 to 5. workspace: bytes, 0 for the builder's own choice. version_compatible: runs on later versions too.
    dry_run: parse and report only. force: replace the engine. calibration: images or folders that "int8" is calibrated on.
    decisions: the engine also gives the merge decisions, by which `verify` judges it.
    progress: called with a stage and the share that is done.
    Raises: UsageError, and nothing is written, for wrong options, a file that TensorRT refuses, or when the builder fails or crashes.
    """
    onnx_path = Path(onnx_path)
    found = inspect(onnx_path)
    if found.refusals:
        raise UsageError(f"{onnx_path}: TensorRT would refuse it: " + "; ".join(found.refusals[:5]))
    name = runtimes.choose(builder)
    request = {
        "runtime": name,
        "precision": _precision(precision, found),
        "capabilities": list(capabilities),
        "profile": _profile(profile, found),
        "opt_level": opt_level,
        "workspace": workspace,
        "version_compatible": version_compatible,
        "outputs": [*found.provenance.outputs, *(found.provenance.decisions if decisions else ())],
    }
    calibration = _calibration(calibration, request["precision"], found)
    request["calibration"] = [sha256_of(p) for p in calibration]
    _check(request, name, timing_cache, dry_run)
    path = Path(onnx_path.with_suffix(".plan") if path is None else path)
    version = _version(name)
    key = hashlib.sha256(json.dumps([request, version, sha256_of(onnx_path)], sort_keys=True).encode()).hexdigest()
    if not dry_run:
        if path.suffix == ".onnx":
            raise UsageError(
                f"output {path}: an engine is no ONNX file: wanted another suffix, e.g. {path.with_suffix('.plan')}"
            )
        same = None if force else _cached(path, key)
        if same:
            return BuildResult(
                path, same, same.layers, True, 0.0, same.warnings, f"{runtimes.PACKAGES[name][2]} {version}"
            )
        check_output(path, force, [onnx_path, *calibration])
        check_output(sidecar(path), force, [onnx_path, *calibration])
    cache = timing_cache or (path.with_suffix(".timing") if name == "tensorrt" else None)
    folder = path.parent if not dry_run else None
    with tempfile.TemporaryDirectory(prefix=".tokexport-", dir=folder) as aside:
        progress("typing the graph", 0.0)
        source = _typed(onnx_path, found, request["precision"], Path(aside), calibration)
        plan = Path(aside) / path.name
        out, warnings = _child(
            {
                **request,
                "onnx": str(source),
                "plan": str(plan),
                "timing_cache": str(cache) if cache else None,
                "dry_run": dry_run,
            },
            progress,
        )
        words = f"{runtimes.PACKAGES[name][2]} {out['version']}"
        if dry_run:
            return BuildResult(path, None, out["layers"], False, 0.0, warnings, words)
        made = EngineFile(
            json.loads(found.provenance.to_json()),
            {"name": name, "version": out["version"]},
            list(capabilities),
            request["precision"],
            out["layers"],
            request["profile"],
            found.batch,
            request["outputs"],
            out["size"],
            sha256_of(plan),
            key,
            str(onnx_path),
            warnings,
        )
        beside = Path(aside) / sidecar(path).name
        beside.write_text(json.dumps(asdict(made), indent=1))
        os.replace(beside, sidecar(path))
        os.replace(plan, path)
    return BuildResult(path, made, out["layers"], False, out["seconds"], warnings, words)


def _precision(said: str | None, found) -> str:
    own = found.provenance.precision
    if said is None or said == own:
        return own
    if said not in PRECISIONS:
        raise UsageError(f"precision {said!r}: wanted one of {', '.join(PRECISIONS)}")
    if own != "fp32":
        raise UsageError(
            f"{found.path} is {own} already: --{said} needs the fp32 file it could be made from (tokexport onnx --dtype fp32)"
        )
    return said


def _calibration(said, precision: str, found) -> list[Path]:
    """The images to calibrate on; none when there is nothing to calibrate."""
    if precision != "int8" or found.provenance.precision == "int8":
        if said:
            raise UsageError(
                f"--calib goes with --int8 and an fp32 file, this is {found.provenance.precision} to {precision}: leave it out"
            )
        return []
    if not said:
        raise UsageError("--int8 needs --calib IMAGES: a folder of some tens of images like those the model will see")
    from ..images import find_images

    return find_images(said)


def _profile(said, found) -> list[int] | None:
    if found.batch:
        if said not in (None, (found.batch,) * 3):
            raise UsageError(
                f"{found.path} is for batch {found.batch}: --batch {':'.join(map(str, said))} needs a file with a dynamic batch"
            )
        return None
    low, best, high = said or PROFILE
    if not 1 <= low <= best <= high:
        raise UsageError(
            f"--batch {low}:{best}:{high}: wanted smallest:best:largest, each 1 or more and none below the one before"
        )
    return [low, best, high]


def _check(request: dict, name: str, timing_cache, dry_run: bool) -> None:
    """Raises: UsageError for what this runtime or this machine cannot do."""
    words = runtimes.PACKAGES[name][2]
    level = request["opt_level"]
    if level is not None and not 0 <= level <= 5:
        raise UsageError(f"--opt-level {level}: wanted 0 to 5")
    if name == "tensorrt":
        if request["capabilities"]:
            raise UsageError(
                "--compute-capability: TensorRT builds for the GPU it runs on only; TensorRT-RTX (--builder rtx) builds for others"
            )
        if not runtimes.gpus() and not dry_run:
            raise UsageError(
                "TensorRT builds engines on the GPU they are for, and there is none here: use --builder rtx with "
                "--compute-capability, or --dry-run"
            )
        return
    if timing_cache:
        raise UsageError(
            "--timing-cache: TensorRT-RTX times nothing while it builds and has no such cache; leave it out"
        )
    if request["version_compatible"]:
        raise UsageError("--version-compatible is TensorRT's: an engine of TensorRT-RTX runs on its own version")
    if request["capabilities"]:
        known = runtimes.load(name).capabilities
        wrong = [c for c in request["capabilities"] if c not in known]
        if wrong or len(set(request["capabilities"])) < len(request["capabilities"]):
            raise UsageError(
                f"--compute-capability {','.join(request['capabilities'])}: {words} knows {', '.join(known)}, each once"
            )
    elif not runtimes.gpus() and not dry_run:
        known = ",".join(runtimes.load(name).capabilities)
        raise UsageError(
            f"there is no GPU here: say which ones the engine is for, with --compute-capability {known} or some of them"
        )


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    for package in ("tensorrt-rtx-cu13", "tensorrt_rtx") if name == "rtx" else ("tensorrt",):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return runtimes.load(name).version


def _cached(path: Path, key: str) -> EngineFile | None:
    """The engine that is there already, when it was asked for in the same words and is whole."""
    try:
        found = read_sidecar(path)
    except UsageError:
        return None
    return found if found.request == key else None


def _typed(path: Path, found, precision: str, folder: Path, calibration: list[Path]) -> Path:
    """The file itself, or a copy in another precision in folder."""
    if precision in ("tf32", found.provenance.precision):
        return path.resolve()
    if precision == "int8":
        from ..quantize import quantize

        quantize(path, calibration, folder / "typed.onnx")
        return folder / "typed.onnx"
    from ...export.graph.precision import write_as

    write_as(path, folder / "typed.onnx", precision)
    return folder / "typed.onnx"


def _child(request: dict, progress) -> tuple[dict, list[str]]:
    """Run `child`; its result and the warnings, each once. Raises: UsageError with its error, or when it crashed."""
    read, write = os.pipe()
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as chatter:
        json.dump(request, asked)
        asked.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", f"{__package__}.child", str(write)],
            stdin=asked,
            stdout=chatter,
            stderr=chatter,
            pass_fds=(write,),
        )
        os.close(write)
        try:
            with os.fdopen(read) as channel:
                result, error, logs = _listen(channel, progress)
            code = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        chatter.seek(0)
        last = chatter.read().strip().splitlines()[-1:]
    warnings = list(dict.fromkeys(text for severity, text in logs if severity == "WARNING"))
    errors = list(dict.fromkeys(text for severity, text in logs if severity != "WARNING"))
    if result is None:
        why = (
            error
            or f"the builder {f'crashed (signal {-code})' if code < 0 else f'ended with {code}'}{': ' + last[0] if last else ''}"
        )
        raise UsageError("\n  ".join([f"no engine was built: {why}", *(e[:500] for e in errors[:5])]))
    return result, warnings


def _listen(channel, progress) -> tuple[dict | None, str | None, list]:
    """The child's messages until it ends."""
    result, error, logs, open_phases = None, None, [], {}
    for line in channel:
        message = json.loads(line)
        if "phase" in message:
            name, parent, steps = message["phase"]
            open_phases[name] = [0, max(steps, 1)]
        elif "step" in message:
            open_phases.setdefault(message["step"][0], [0, 1])[0] = message["step"][1]
        elif "done" in message:
            open_phases.pop(message["done"], None)
        elif "log" in message:
            logs.append(message["log"])
        result, error = message.get("result", result), message.get("error", error)
        if open_phases:
            done, steps = next(iter(open_phases.values()))
            progress(f"building: {next(reversed(open_phases)).lower()}", done / steps)
    return result, error, logs
