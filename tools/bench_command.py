"""`tokexport bench`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from ..export.errors import UsageError


@click.command("bench")
@click.argument("files", nargs=-1)
@click.option("--dense", metavar="FILE", help="What to compare with; default: the model without reduction, exported here as each file was "
              "(batch, opset, dtype).")
@click.option("--engines", default="ort,openvino", show_default=True, help="Comma-separated: ort, openvino.")
@click.option("--batch", "batches", default="1,8", show_default=True,
              help="Comma-separated batch sizes; a file of another fixed batch is left out.")
@click.option("--threads", default=1, show_default=True, help="Threads of the engine.")
@click.option("--seconds", default=20.0, show_default=True, help="Time for each engine and batch.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON on stdout.")
def command(files, dense, engines, batches, threads, seconds, as_json):
    """Time FILES against the dense model, all in one run, interleaved: medians, speedup, and speedup over the MACs ratio.

    Without FILES: DeiT-S with ToMe r=13, random weights.
    """
    from ..engines.runners import require
    from ..export.inspection import inspect
    from .terminal import console, print_json, stages

    engines, sizes = list(dict.fromkeys(engines.split(","))), _sizes(batches)
    for engine in engines:
        require(engine)
    if not 1 <= threads <= 1024 or not 0 < seconds < 86400:
        raise UsageError(f"--threads {threads}, --seconds {seconds:g}: wanted 1 to 1024 threads and more than 0 seconds, at most a day")
    found = [inspect(f) for f in files]
    for f in found:
        if f.batch not in (None, *sizes):
            raise UsageError(f"{f.path} is for batch {f.batch}: give --batch {f.batch}")
    _check_dense(dense and inspect(dense), found)
    out = console()
    with tempfile.TemporaryDirectory() as folder, stages(out) as progress:
        if not found:
            found = [inspect(_export(Path(folder), "deit_small_patch16_224", {}, "13", None, 20, "fp32", progress))]
        ways = list(dict.fromkeys(map(_way, found)))
        denses = {way: dense or _export(Path(folder), found[0].provenance.model, found[0].provenance.model_kwargs, None, *way, progress)
                  for way in ways}
        denses = {way: inspect(path) for way, path in denses.items()}
        rows = [row for engine in engines for size in sizes for row in _rows(found, denses, engine, size, threads, seconds, progress)]
    if as_json:
        print_json({"machine": _machine(), "threads": threads, "rows": rows})
    else:
        _print(out, rows, threads)


def _check_dense(dense, found) -> None:
    """Raises: UsageError when the files are not of one model, or --dense is of another or is reduced itself."""
    models = {(f.provenance.model, str(f.provenance.model_kwargs)) for f in [*found, *([dense] if dense else [])]}
    if len(models) > 1:
        raise UsageError(f"bench compares files of one model, these are of {', '.join(' '.join(m) for m in sorted(models))}")
    if dense and dense.path in [f.path for f in found]:
        raise UsageError(f"--dense {dense.path} is among the files that are compared with it: leave it out there")
    if dense and dense.provenance.schedule.steps:
        raise UsageError(f"--dense {dense.path} is reduced ({dense.provenance.schedule.method}): wanted one made with --method none")


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(b) for b in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UsageError(f"--batch {text!r}: wanted batch sizes, e.g. 1,8")
    return list(dict.fromkeys(sizes))


def _export(folder: Path, name: str, kwargs: dict, r: str | None, batch: int | None, opset: int, dtype: str, progress) -> Path:
    """A file with random weights: its speed is that of any weights."""
    progress(f"exporting {name}, {'dense' if r is None else 'ToMe r=' + r}, batch {batch or 'dynamic'}")
    from ..export import vit
    from ..export.load import load_model
    from ..export.onnx_export import export_onnx
    from ..export.schedule import Schedule

    loaded = load_model(name, kwargs)
    n, depth, prefix = vit.n_tokens(loaded.module), len(loaded.module.blocks), loaded.module.num_prefix_tokens
    schedule = Schedule.parse(r, method="tome" if r else "none", depth=depth, n_tokens=n, n_prefix=prefix)
    path = folder / f"{'tome' if r else 'dense'}.{batch or 'dynamic'}.{opset}.{dtype}.onnx"
    return export_onnx(loaded, schedule, path, batch=batch, opset=opset, dtype=dtype).path


def _way(found) -> tuple:
    """How a file was exported: what a dense one must share to be compared with it."""
    return found.batch, found.provenance.opset, found.provenance.precision


def _rows(found, denses: dict, engine: str, size: int, threads: int, seconds: float, progress) -> list[dict]:
    """One row per file: median milliseconds, speedup over its dense with 20 and 80 percentiles, MACs ratio and quotient.

    denses: `_way` of files -> the dense file they are compared with.
    """
    import contextlib
    import time

    import numpy as np

    from ..engines.runners import open_engine
    from .timing import interleaved, ratio

    fits = lambda f: f.batch in (None, size)
    dense_of = {str(f.path): denses[_way(f)] for f in found if fits(f)}
    files = {str(d.path): d for d in dense_of.values() if fits(d)}
    baselines = set(files)
    files |= {str(f.path): f for f in found if str(f.path) in dense_of and str(dense_of[str(f.path)].path) in baselines}
    if len(files) == len(baselines):
        return []
    progress(f"timing {engine}, batch {size}")
    h, w = found[0].provenance.preprocess.size
    shape = (size, found[0].provenance.dims["channels"], h, w)
    feeds = {"image": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    with contextlib.ExitStack() as stack:
        runners = {n: stack.enter_context(open_engine(f.path, engine, threads, batch=size)) for n, f in files.items()}
        calls = {n: (lambda r=r: r.run(feeds)) for n, r in runners.items()}
        for call in calls.values():
            call()
        start = time.perf_counter()
        for call in calls.values():
            call()
        rounds = max(5, int(seconds / (time.perf_counter() - start)))
        times = interleaved(calls, rounds)
    rows = []
    for name, f in files.items():
        baseline = name if name in baselines else str(dense_of[name].path)
        middle, low, high = ratio(times[baseline], times[name])
        macs = f.macs_dense / f.macs
        label = f"dense, batch {f.batch or 'dynamic'}, {f.provenance.precision}" if name in baselines else name
        rows.append({"engine": engine, "batch": size, "file": label, "ms": float(np.median(times[name]) * 1e3), "rounds": rounds,
                     "speedup": middle, "speedup_20": low, "speedup_80": high, "macs_ratio": macs, "quotient": middle / macs})
    return rows


def _machine() -> dict:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("onnxruntime", "openvino", "torch"):
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


def _print(out, rows, threads) -> None:
    from rich.table import Table

    said = ", ".join(f"{k} {v}" for k, v in _machine().items())
    title = f"{threads} thread{'s' * (threads > 1)}, interleaved in one run; {said}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for title in ("engine", "batch", "file", "median ms", "speedup", "20-80 %", "MACs ratio", "speedup / MACs ratio"):
        table.add_column(title, justify="left" if title in ("engine", "file") else "right")
    for r in rows:
        table.add_row(r["engine"], str(r["batch"]), Path(r["file"]).name, f"{r['ms']:.1f}", f"{r['speedup']:.3f}",
                      f"{r['speedup_20']:.3f}-{r['speedup_80']:.3f}", f"{r['macs_ratio']:.3f}", f"{r['quotient']:.3f}")
    out.print(table)
