"""What the benchmark measures: files of one model, each beside a dense one exported the same way, all in one run."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

import numpy as np

from ..runners import open_runner
from ...export import reducers
from ...export.errors import UsageError
from ...export.inspection import Inspection, inspect
from .timing import ratio, until_sure


def way(found: Inspection) -> tuple:
    """How a file was exported: what a dense one must share to be compared with it."""
    return found.batch, found.provenance.opset, found.provenance.precision


def export(
    folder: Path, loaded, method: str, options: dict, batch: int | None, opset: int = 20, dtype: str = "fp32"
) -> Path:
    """A file in folder of a loaded model under a method."""
    from ...export.graph.export import export_onnx

    if dtype == "int8":
        raise UsageError(
            "an int8 file is compared with a dense int8 file that was calibrated on the same images: give it with --dense"
        )
    schedule = loaded.schedule(method, **options)
    said = ".".join(f"{k}={v}" for k, v in options.items() if k in reducers.swept()).replace("/", "_")
    path = folder / ".".join(filter(None, [method, said, str(batch or "dynamic"), str(opset), dtype, "onnx"]))
    return path if path.exists() else export_onnx(loaded, schedule, path, batch=batch, opset=opset, dtype=dtype).path


def dense_label(found: Inspection) -> str:
    """What a dense file made here is called."""
    return f"dense, batch {found.batch or 'dynamic'}, {found.provenance.precision}"


def noise(found: Inspection, size: int) -> np.ndarray:
    """Images [size, C, H, W] of seeded noise, as large as a file takes them."""
    p = found.provenance
    return np.random.default_rng(0).standard_normal((size, p.dims["channels"], *p.preprocess.size)).astype(np.float32)


def rows(
    files: list[Inspection], denses: dict[tuple, Inspection], runtime: str, size: int, threads: int, seconds: float
) -> list[dict]:
    """One row per file and per dense file they need, for one engine and batch size; files of another fixed batch are left out.

    denses: `way` of files -> the dense file they are compared with. A file that fails is a row with its error.
    A row: engine, batch, file, ms (median), ms_20, ms_80, images_per_second, rounds, and against its dense file speedup, speedup_20,
    speedup_80, macs_ratio, quotient (speedup over the MACs ratio).
    """
    fits = [f for f in files if f.batch in (None, size) and denses[way(f)].batch in (None, size)]
    if not fits:
        return []
    pairs = [(f, denses[way(f)]) for f in fits]
    every = list({str(f.path): f for f in [*(d for _, d in pairs), *fits]}.values())
    dense_of, feeds = {str(f.path): str(d.path) for f, d in pairs}, {"image": noise(fits[0], size)}
    errors: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        calls = {}
        for f in every:
            try:
                runner = stack.enter_context(open_runner(f.path, runtime, threads, batch=size))
                runner.run(feeds)
                calls[str(f.path)] = lambda r=runner: r.run(feeds)
            except UsageError as e:
                errors[str(f.path)] = str(e)
        sure = [(dense_of[n], n) for n in calls if n in dense_of and dense_of[n] in calls]
        times = until_sure(calls, sure, seconds) if calls else {}
    out = []
    for f in every:
        name = str(f.path)
        reduced = name in dense_of
        label = name if reduced else dense_label(f)
        row = {
            "runtime": runtime,
            "batch": size,
            "file": label,
            "method": f.provenance.schedule.method,
            "macs_ratio": f.macs_dense / f.macs,
        }
        dense = dense_of.get(name, name)
        if name in errors or dense in errors:
            out.append({**row, "error": errors.get(name) or f"the dense file failed: {errors[dense]}"})
            continue
        ms, (middle, low, high) = np.array(times[name]) * 1e3, ratio(times[dense], times[name])
        low_ms, mid_ms, high_ms = np.percentile(ms, [20, 50, 80])
        out.append(
            {
                **row,
                "ms": float(mid_ms),
                "ms_20": float(low_ms),
                "ms_80": float(high_ms),
                "images_per_second": float(size / mid_ms * 1e3),
                "rounds": len(ms),
                "speedup": middle,
                "speedup_20": low,
                "speedup_80": high,
                "quotient": middle / row["macs_ratio"],
            }
        )
    return out


def break_even(measured: list[dict]) -> dict[tuple[str, str], int | None]:
    """(engine, file) -> the smallest measured batch from which on the file is faster than its dense one; None when there is none."""
    out = {}
    for row in measured:
        key = row["runtime"], row["file"]
        mine = sorted(
            (r for r in measured if (r["runtime"], r["file"]) == key and "speedup" in r), key=lambda r: r["batch"]
        )
        slow = [r["batch"] for r in mine if r["speedup"] <= 1]
        fast = [r["batch"] for r in mine if r["speedup"] > 1 and r["batch"] > max(slow, default=0)]
        if row["method"] != "none":
            out[key] = min(fast, default=None)
    return out


def agreement(path: Path, dense: Path, runtime: str, image: np.ndarray) -> dict:
    """A file's outputs against the dense model's on images: mean cosine, and top1 (None without classes)."""
    from ..parity.outputs import cosines, top
    from ..runners import in_batches

    outputs = []
    for p in (path, dense):
        with open_runner(p, runtime) as runner:
            name = inspect(p).provenance.outputs[0]
            outputs.append(in_batches(runner, image)[name].astype(np.float64))
    return {"cosine": float(cosines(*outputs).mean()), "top1": float(top(*outputs, 1).mean()) if name == "logits" else None}


def machine() -> dict:
    """Processor and versions, for the record."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("onnxruntime", "openvino", "torch", "tokexport"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    except OSError:
        pass
    return {"cpu": cpu, "python": platform.python_version(), **versions}
