"""An ONNX file of tokexport to a TensorRT engine, with a sidecar that says what it is."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable

from ..export.errors import UsageError
from ..export.inspection import inspect
from ..export.provenance import Provenance
from ..export.writing import check_output
from . import trt as runtimes

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")
PROFILE = (1, 8, 32)


@dataclass(frozen=True)
class EngineFile:
    """What the sidecar PLAN.json says of an engine.

    provenance: of the ONNX file. runtime: {"name", "version"}. compute_capability: GPUs it is for, [] for the one it was built on.
    precision: one of PRECISIONS. layers: of the typed network, by kind and type. profile: smallest, best and largest
    batch, null for a fixed one. batch: the fixed one, or null. outputs: names, decisions among them when they were asked for. size:
    bytes. sha256: of the engine. request: hash of what was asked, by which an engine is known again. source: the ONNX file.
    """

    provenance: dict
    runtime: dict
    compute_capability: list[str]
    precision: str
    layers: dict
    profile: list[int] | None
    batch: int | None
    outputs: list[str]
    size: int
    sha256: str
    request: str
    source: str
    warnings: list[str] = field(default_factory=list)


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


def sidecar(path: Path) -> Path:
    """Where the sidecar of an engine lies."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: str | Path) -> EngineFile:
    """The sidecar of an engine. Raises: UsageError when either is missing, damaged, or they do not belong together."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if not sidecar(path).is_file():
        raise UsageError(f"{path} has no {sidecar(path).name} beside it: it was not built by `tokexport trt`, or was moved without it")
    try:
        found = EngineFile(**json.loads(sidecar(path).read_text()))
        wrong = _misfits(found)
        if wrong:
            raise ValueError(f"{', '.join(wrong)} of the wrong kind")
        Provenance.from_json(json.dumps(found.provenance))
    except (ValueError, TypeError) as e:
        raise UsageError(f"{sidecar(path)} cannot be read ({type(e).__name__}: {e}): build the engine again") from None
    if _sha256(path) != found.sha256:
        raise UsageError(f"{path} is not the engine that {sidecar(path).name} speaks of (truncated or replaced): build it again")
    return found


def _misfits(e: EngineFile) -> list[str]:
    """Fields of a sidecar whose values are not of the kind they should be."""
    texts = lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v)
    whole = lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0
    counts = lambda v: isinstance(v, dict) and all(isinstance(t, dict) and all(map(whole, t.values())) for t in v.values())
    fits = {
        "runtime": isinstance(e.runtime, dict) and e.runtime.get("name") in runtimes.PACKAGES and isinstance(e.runtime.get("version"), str),
        "compute_capability": texts(e.compute_capability), "precision": e.precision in PRECISIONS, "layers": counts(e.layers),
        "profile": e.profile is None or isinstance(e.profile, list) and len(e.profile) == 3 and all(map(whole, e.profile)),
        "batch": e.batch is None or whole(e.batch), "outputs": texts(e.outputs), "size": whole(e.size), "warnings": texts(e.warnings),
        "batch and profile": bool(e.batch) != bool(e.profile), "source": isinstance(e.source, str),
    }
    return [name for name, ok in fits.items() if not ok]


def build_engine(onnx_path: str | Path, path: str | Path | None = None, precision: str | None = None, runtime: str = "auto",
                 capabilities: tuple[str, ...] = (), profile: tuple[int, int, int] | None = None, timing_cache: str | Path | None = None,
                 opt_level: int | None = None, workspace: int = 0, version_compatible: bool = False, dry_run: bool = False,
                 force: bool = False, progress: Callable[[str, float], None] = lambda stage, share: None,
                 calibration: list[str | Path] = (), decisions: bool = False) -> BuildResult:
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
    name = runtimes.choose(runtime)
    request = {
        "runtime": name, "precision": _precision(precision, found), "capabilities": list(capabilities),
        "profile": _profile(profile, found), "opt_level": opt_level, "workspace": workspace, "version_compatible": version_compatible,
        "outputs": [*found.provenance.outputs, *(found.provenance.decisions if decisions else ())],
    }
    calibration = _calibration(calibration, request["precision"], found)
    request["calibration"] = [_sha256(p) for p in calibration]
    _check(request, name, timing_cache, dry_run)
    path = Path(onnx_path.with_suffix(".plan") if path is None else path)
    version = _version(name)
    key = hashlib.sha256(json.dumps([request, version, _sha256(onnx_path)], sort_keys=True).encode()).hexdigest()
    if not dry_run:
        if path.suffix == ".onnx":
            raise UsageError(f"output {path}: an engine is no ONNX file: wanted another suffix, e.g. {path.with_suffix('.plan')}")
        same = None if force else _cached(path, key)
        if same:
            return BuildResult(path, same, same.layers, True, 0.0, same.warnings, f"{runtimes.PACKAGES[name][2]} {version}")
        check_output(path, force, [onnx_path, *calibration])
        check_output(sidecar(path), force, [onnx_path, *calibration])
    cache = timing_cache or (path.with_suffix(".timing") if name == "tensorrt" else None)
    folder = path.parent if not dry_run else None
    with tempfile.TemporaryDirectory(prefix=".tokexport-", dir=folder) as aside:
        progress("typing the graph", 0.0)
        source = _typed(onnx_path, found, request["precision"], Path(aside), calibration)
        plan = Path(aside) / path.name
        out, warnings = _child({**request, "onnx": str(source), "plan": str(plan), "timing_cache": str(cache) if cache else None,
                                "dry_run": dry_run}, progress)
        words = f"{runtimes.PACKAGES[name][2]} {out['version']}"
        if dry_run:
            return BuildResult(path, None, out["layers"], False, 0.0, warnings, words)
        made = EngineFile(json.loads(found.provenance.to_json()), {"name": name, "version": out["version"]}, list(capabilities),
                          request["precision"], out["layers"], request["profile"], found.batch, request["outputs"], out["size"], _sha256(plan), key,
                          str(onnx_path), warnings)
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
        raise UsageError(f"{found.path} is {own} already: --{said} needs the fp32 file it could be made from (tokexport onnx --dtype fp32)")
    return said


def _calibration(said, precision: str, found) -> list[Path]:
    """The images to calibrate on; none when there is nothing to calibrate."""
    if precision != "int8" or found.provenance.precision == "int8":
        if said:
            raise UsageError(f"--calib goes with --int8 and an fp32 file, this is {found.provenance.precision} to {precision}: leave it out")
        return []
    if not said:
        raise UsageError("--int8 needs --calib IMAGES: a folder of some tens of images like those the model will see")
    from .images import find_images

    return find_images(said)


def _profile(said, found) -> list[int] | None:
    if found.batch:
        if said not in (None, (found.batch,) * 3):
            raise UsageError(f"{found.path} is for batch {found.batch}: --batch {':'.join(map(str, said))} needs a file with a dynamic batch")
        return None
    low, best, high = said or PROFILE
    if not 1 <= low <= best <= high:
        raise UsageError(f"--batch {low}:{best}:{high}: wanted smallest:best:largest, each 1 or more and none below the one before")
    return [low, best, high]


def _check(request: dict, name: str, timing_cache, dry_run: bool) -> None:
    """Raises: UsageError for what this runtime or this machine cannot do."""
    words = runtimes.PACKAGES[name][2]
    level = request["opt_level"]
    if level is not None and not 0 <= level <= 5:
        raise UsageError(f"--opt-level {level}: wanted 0 to 5")
    if name == "tensorrt":
        if request["capabilities"]:
            raise UsageError("--compute-capability: TensorRT builds for the GPU it runs on only; TensorRT-RTX (--runtime rtx) builds for others")
        if not runtimes.gpus() and not dry_run:
            raise UsageError("TensorRT builds engines on the GPU they are for, and there is none here: use --runtime rtx with "
                             "--compute-capability, or --dry-run")
        return
    if timing_cache:
        raise UsageError("--timing-cache: TensorRT-RTX times nothing while it builds and has no such cache; leave it out")
    if request["version_compatible"]:
        raise UsageError("--version-compatible is TensorRT's: an engine of TensorRT-RTX runs on its own version")
    if request["capabilities"]:
        known = runtimes.load(name).capabilities
        wrong = [c for c in request["capabilities"] if c not in known]
        if wrong or len(set(request["capabilities"])) < len(request["capabilities"]):
            raise UsageError(f"--compute-capability {','.join(request['capabilities'])}: {words} knows {', '.join(known)}, each once")
    elif not runtimes.gpus() and not dry_run:
        known = ",".join(runtimes.load(name).capabilities)
        raise UsageError(f"there is no GPU here: say which ones the engine is for, with --compute-capability {known} or some of them")


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
        from .quantize import quantize

        quantize(path, calibration, folder / "typed.onnx")
        return folder / "typed.onnx"
    from ..export.precision import write_as

    write_as(path, folder / "typed.onnx", precision)
    return folder / "typed.onnx"


def _child(request: dict, progress) -> tuple[dict, list[str]]:
    """Run `build_child`; its result and the warnings, each once. Raises: UsageError with its error, or when it crashed."""
    read, write = os.pipe()
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as chatter:
        json.dump(request, asked)
        asked.seek(0)
        child = subprocess.Popen([sys.executable, "-W", "ignore", "-m", f"{__package__}.build_child", str(write)], stdin=asked,
                                 stdout=chatter, stderr=chatter, pass_fds=(write,))
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
        why = error or f"the builder {f'crashed (signal {-code})' if code < 0 else f'ended with {code}'}{': ' + last[0] if last else ''}"
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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
