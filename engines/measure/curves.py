"""Measuring the curves of `latency_model`, and keeping them: in the user's cache, a file for each processor, runtime and shape."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...export.errors import EngineError, StorageError, UsageError
from ...export.files import aside
from ...export.records import decode, encode
from ...export.schedule import Schedule
from ..files import is_engine
from ..runners import Runner, open_runner, require
from .candidates import model_of
from .environment import gpu_driver, processor
from .latency_model import CurveKey, LatencyCurves, token_counts
from .timing import Timer, interleaved

if TYPE_CHECKING:
    from ...export.inspection import Inspection
    from ...export.models.plain_vit import PlainViT

SECONDS = 6.0  # for all rounds, roughly
ROUNDS = (9, 51)  # fewest and most
PACKAGES = {"ort": "onnxruntime", "openvino": "openvino"}  # by the first word of a runtime's name
Progress = Callable[[str, float], None]


def curves_of(
    plain: PlainViT,
    runtime: str,
    *,
    dtype: str = "fp32",
    batch: int = 1,
    threads: int = 1,
    fresh: bool = False,
    points: int | None = None,
    progress: Progress = lambda text, share: None,
) -> LatencyCurves:
    """The curves of a model's blocks: from the cache, else measured and put there.

    Args:
        plain: the model; its own first blocks are timed.
        runtime: what will run the file.
        dtype: of the trunk, a graph precision.
        batch: images in a run.
        threads: of the processor, 0 for the runtime's own choice.
        fresh: measure again what is in the cache.
        points: multiples of 8 that are measured, roughly; None for the usual number.
        progress: told what is measured and the share done.
    Raises:
        UsageError: the runtime cannot be timed half a block at a time, is not here, or has no operators in this type.
        EngineError: it failed.
    """
    from ...export.graph.export import check_batch

    check_batch(plain, Schedule("none", *plain.size), batch)
    key = curve_key(plain, runtime, dtype=dtype, batch=batch, threads=threads)
    counts = token_counts(plain.n_tokens, **({} if points is None else {"points": points}))
    kept = None if fresh else read_curves(key)
    if kept is not None and set(counts) <= set(kept.tokens):
        return kept
    with tempfile.TemporaryDirectory(prefix="tokexport-") as folder:
        measured = _measure(plain, key, counts, folder=Path(folder), progress=progress)
    write_curves(measured)
    return measured


def file_curves(
    file: Inspection | None,
    *,
    runtimes: Sequence[str],
    batches: Sequence[int],
    threads: int = 1,
    fresh: bool = False,
    progress: Progress = lambda text, share: None,
) -> list[LatencyCurves]:
    """The curves of a file's model, in every runtime at every batch size.

    Args:
        file: whose model and type are taken; None for DeiT-S in fp32.
        runtimes: names.
        batches: images in a run.
        threads, fresh: see `curves_of`.
        progress: told what is measured and the share done.
    Raises:
        UsageError: as `curves_of`; the file is an engine, or int8.
    """
    from ...export.graph.precision import graph_precisions
    from ...export.models import as_plain

    dtype = "fp32" if file is None else file.provenance.precision
    if dtype not in graph_precisions() or (file is not None and is_engine(file.path)):
        raise UsageError(f"{file.path}: curves are of ONNX files in {', '.join(graph_precisions())}")
    progress("loading torch", 0.0)
    plain, out, work = as_plain(model_of(file).module), [], [(r, b) for r in runtimes for b in batches]
    for i, (runtime, batch) in enumerate(work):
        tell = lambda text, share, i=i: progress(f"{work[i][0]}, batch {work[i][1]}: {text}", (i + share) / len(work))
        out.append(curves_of(plain, runtime, dtype=dtype, batch=batch, threads=threads, fresh=fresh, progress=tell))
    return out


def curve_key(plain: PlainViT, runtime: str, *, dtype: str, batch: int, threads: int) -> CurveKey:
    """What the curves of a model depend on here.

    Args:
        plain: the model.
        runtime, dtype, batch, threads: see `curves_of`.
    Raises:
        UsageError: as `curves_of`.
    """
    row = require(runtime)
    if runtime == "torch":
        raise UsageError("runtime torch is the eager reference, which nobody serves: wanted what will run the file")
    if batch < 1 or not 0 <= threads <= 1024:
        raise UsageError(f"batch {batch}, threads {threads}: wanted 1 image or more, 0 to 1024 threads")
    if row.device == "gpu":
        where = ", ".join(gpu.name for gpu in gpu_driver().gpus[:1]) or "a GPU"
    else:
        here = processor()
        where = f"{here.name}, {' '.join(here.instructions)}"
    packages = (PACKAGES[runtime.partition("-")[0]], f"{row.package}-gpu")
    versions = [v for v in map(_version, packages) if v]
    return CurveKey(
        processor=where,
        runtime=runtime,
        runtime_version=versions[0] if versions else "",
        version=_version("tokexport"),
        dtype=dtype,
        batch=batch,
        threads=threads,
        shape=shape_words(plain),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def shape_words(plain: PlainViT) -> str:
    """The shape of a model's first block, e.g. "384 wide, 6 heads, MLP 384-1536-384, LayerNorm, Mlp"; alike for blocks that take as
    long."""
    block = plain.blocks()[0]
    widths = [plain.width, *(outputs for _, outputs in plain.dims["mlp"])]
    kinds = [type(m).__name__ for m in (block.norm1, block.q_norm, block.norm, block.mlp)]
    extra = [
        word for word, there in (("gate", block.gate is not None), ("rotary", plain.rotary() is not None)) if there
    ]
    width, parts = plain.dims["attn_width"], "-".join(map(str, widths))
    return ", ".join(
        [f"{plain.width} wide, {block.heads} heads of {width // block.heads}, MLP {parts}", *kinds, *extra]
    )


def _measure(plain: PlainViT, key: CurveKey, counts: list[int], *, folder: Path, progress: Progress) -> LatencyCurves:
    """Every half block at every count, interleaved, so that a change of the machine's speed meets all alike."""
    from ...export.graph.half_blocks import HALVES, write_half_blocks

    noise, work, timers = np.random.default_rng(0), [(h, n) for n in counts for h in HALVES], {}
    with contextlib.ExitStack() as stack:
        for i, (half, n) in enumerate(work):
            progress(f"exporting half blocks: {half}, {n} tokens", 0.8 * i / len(work))
            path = folder / f"{half}.{n}.onnx"
            n_blocks = write_half_blocks(plain, half, path, n_tokens=n, batch=key.batch, dtype=key.dtype)
            runner = stack.enter_context(_opened(path, key))
            rows = noise.standard_normal((key.batch * n, plain.width)).astype(np.float32)
            timers[f"{half}.{n}"] = runner.timer({"image": rows})
            path.unlink()  # the runtime holds what it needs
        progress("timing half blocks", 0.8)
        times = _rounds(timers)
    ms = lambda half: tuple(float(np.median(times[f"{half}.{n}"])) * 1e3 / n_blocks for n in counts)
    return LatencyCurves(key, tuple(counts), *map(ms, HALVES))


def _opened(path: Path, key: CurveKey) -> Runner:
    """A file of half blocks, opened. Raises: UsageError where the runtime has no operators in the type."""
    try:
        return open_runner(path, key.runtime, threads=key.threads)
    except EngineError as e:
        if key.dtype == "fp32":
            raise
        reason = str(e).partition("cannot load it: ")[2][:160] or str(e)[:160]
        raise UsageError(
            f"dtype {key.dtype}: runtime {key.runtime} cannot run it here ({reason}): take another dtype or another runtime"
        ) from None


def _rounds(timers: dict[str, Timer]) -> dict[str, list[float]]:
    """As many rounds as SECONDS allow."""
    once = sum(timer() for timer in timers.values())
    fewest, most = ROUNDS
    return interleaved(timers, int(min(max(SECONDS / max(once, 1e-6), fewest), most)))


def cache_folder() -> Path:
    """Where curves are kept: $XDG_CACHE_HOME/tokexport, else ~/.cache/tokexport."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokexport"


def _place(key: CurveKey) -> Path:
    digest = hashlib.sha256(json.dumps(encode(key), sort_keys=True).encode()).hexdigest()
    return cache_folder() / "curves" / f"{digest[:16]}.json"


def read_curves(key: CurveKey) -> LatencyCurves | None:
    """What the cache has; None when there is nothing, or nothing that can be read."""
    path = _place(key)
    try:
        curves = decode(LatencyCurves, json.loads(path.read_text(encoding="utf-8")), name=str(path))
    except (OSError, ValueError):  # UsageError is a ValueError: what is damaged is measured again
        return None
    return curves if curves.key == key else None


def write_curves(curves: LatencyCurves) -> None:
    """Put curves into the cache; where nothing can be written, none are kept."""
    path = _place(curves.key)
    with contextlib.suppress(OSError, StorageError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as new:
            new.write_text(json.dumps(encode(curves), indent=1), encoding="utf-8")


def keep_steps(curves: LatencyCurves, steps: dict[str, float]) -> LatencyCurves:
    """The curves with the cost of reductions, in the cache too.

    Args:
        curves: measured.
        steps: method -> milliseconds of one reduction, see `LatencyModel.steps`.
    """
    full = replace(curves, steps={**curves.steps, **steps})
    write_curves(full)
    return full
