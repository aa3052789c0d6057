"""`tokexport bench`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from ...export import reducers
from ...export.errors import UsageError



@click.command("bench")
@click.argument("files", nargs=-1)
@click.option(
    "--dense",
    metavar="FILE",
    help="What to compare with; default: the model without reduction, exported here as each file was "
    "(batch, opset, dtype).",
)
@click.option(
    "--sweep",
    metavar="r=0,8,13",
    help=f"Export FILE's model anew for each value of {' or '.join(reducers.swept())}; speed and agreement with the dense model.",
)
@click.option(
    "--images", multiple=True, metavar="DIR_OR_FILES", help="For --sweep: images to agree on; default: seeded noise."
)
@click.option(
    "--runtime",
    "runtimes",
    default="ort,openvino",
    show_default=True,
    help="Comma-separated: ort, openvino, torch (eager).",
)
@click.option(
    "--batch",
    "batches",
    default="1,8",
    show_default=True,
    help="Comma-separated batch sizes; a file of another fixed batch is left out.",
)
@click.option("--threads", default=1, show_default=True, help="Threads of the engine.")
@click.option(
    "--seconds",
    default=20.0,
    show_default=True,
    help="Most time for each engine and batch; less when the ratios are sure before.",
)
@click.option(
    "--profile",
    is_flag=True,
    help="Also the time in each part of the model, from the engine's profiler (ort, openvino).",
)
@click.option("--gate", is_flag=True, help="Exit 1 when a reduced file is slower than its dense one, or fails.")
@click.option("--plot", metavar="PNG", help="Draw the figures too.")
@click.option("--force", is_flag=True, help="Replace the picture.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON on stdout.")
def command(files, dense, sweep, images, runtimes, batches, threads, seconds, profile, gate, plot, force, as_json):
    """Time FILES against the dense model, all in one run, interleaved: medians, speedup, and speedup over the MACs ratio.

    Without FILES: DeiT-S with ToMe r=13, random weights. Engines (.plan) are compared with an engine, given with --dense.
    """
    from ...engines.files import inspect_file as inspect
    from ...engines.files import is_engine
    from ...engines.runners import require
    from ...engines.measure import bench
    from ..show import plot as plots
    from ..show.terminal import console, print_json, stages

    plans = [f for f in [*files, *([dense] if dense else [])] if is_engine(f)]
    if plans and (len(plans) <= len(files) or sweep):
        raise UsageError(f"{plans[0]} is an engine: engines are compared with each other, all FILES and --dense")
    runtimes, sizes = ["trt"] if plans else list(dict.fromkeys(runtimes.split(","))), _sizes(batches)
    for runtime in runtimes if not plans else ():
        require(runtime)
    if not 1 <= threads <= 1024 or not 0 < seconds < 86400:
        raise UsageError(
            f"--threads {threads}, --seconds {seconds:g}: wanted 1 to 1024 threads and more than 0 seconds, at most a day"
        )
    found, (name, values) = [inspect(f) for f in files], _swept(sweep)
    for f in found:
        if f.batch not in (None, *sizes):
            raise UsageError(f"{f.path} is for batch {f.batch}: give --batch {f.batch}")
    _check_dense(None if dense is None else inspect(dense), found)
    picture = _picture(plot, force, plots, [*files, dense, *images])
    if sweep and len(found) > 1:
        raise UsageError(f"--sweep changes one file's {name}: give one FILE, not {len(found)}")
    if images and not sweep:
        raise UsageError("--images goes with --sweep: speed does not depend on what is in an image")
    out = console()
    with tempfile.TemporaryDirectory() as folder, stages(out) as progress:
        make = _maker(Path(folder), found, progress)
        if sweep:
            found, said = _sweep_files(make, found, name, values)
        elif not found:
            found = [inspect(make("tome", {"r": "13"}, None))]
        ways = list(dict.fromkeys(map(bench.way, found)))
        denses = {w: inspect(dense or make("none", {}, *w)) for w in ways}
        rows = []
        for runtime in runtimes:
            for size in sizes:
                progress(f"timing {runtime}, batch {size}")
                rows += bench.rows(found, denses, runtime, size, threads, seconds)
        if sweep:
            progress("comparing with the dense model")
            agree = _agreement(found, denses, runtimes[0], images)
            rows = [{**r, "value": said.get(r["file"]), **agree.get(r["file"], {})} for r in rows]
        every = {str(f.path): f for f in [*denses.values(), *found]}
        profiles = _profiles(list(every.values()), runtimes, sizes, threads, progress) if profile else []
        if picture:
            plots.save(rows, picture, name)
    if as_json:
        print_json(
            {
                "machine": bench.machine(),
                "threads": threads,
                "rows": rows,
                **({"profiles": profiles} if profile else {}),
            }
        )
    else:
        _print(out, rows, threads, bench, name)
        _print_profiles(out, profiles)
        if picture:
            out.print(f"picture: {picture}", markup=False)
    bad = [r for r in rows if r["method"] != "none" and r.get("speedup", 0) <= 1]
    if gate and bad:
        out.print(
            f"--gate: {len(bad)} of {sum(r['method'] != 'none' for r in rows)} are no faster than dense, or failed",
            style="bold red",
        )
    sys.exit(1 if gate and bad else 0)


def _swept(text: str | None) -> tuple[str | None, list[str]]:
    """ "r=0,8:-1,13" -> ("r", ["0", "8:-1", "13"])."""
    if text is None:
        return None, []
    name, _, values = text.partition("=")
    name, swept = name.replace("-", "_"), reducers.swept()
    values = list(dict.fromkeys(v.strip() for v in values.split(",")))
    if name not in swept or not all(values):
        names = " or ".join(f"{o} ({', '.join(reducers.TABLE[m].title for m in ms)})" for o, ms in swept.items())
        raise UsageError(f"--sweep {text[:60]!r}: wanted an option and values, e.g. r=0,8,13; options are {names}")
    return name, values


def _picture(plot: str | None, force: bool, plots, inputs: list) -> Path | None:
    from ...export.files import check_output

    if plot is None:
        return None
    plots.require()
    path = check_output(plot, force, inputs)
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path}: wanted a name that ends in .png")
    return path


def _maker(folder: Path, found: list, progress):
    """A function that exports the files' model (DeiT-S without files) under a method: (method, options, batch, opset, dtype) -> path."""
    from ...engines.measure import bench

    loaded = []

    def make(method: str, options: dict, *how) -> Path:
        progress(f"exporting {method} {' '.join(f'{k}={v}' for k, v in options.items() if k in reducers.swept())}")
        if not loaded:
            from ...export.models.load import load_model

            loaded.append(_weights(found[0]) if found else load_model("deit_small_patch16_224"))
        return bench.export(folder, loaded[0], method, options, *how)

    return make


def _weights(found):
    """The file's model, with its weights when they can be found (they decide nothing about speed)."""
    from ...export.rebuild import rebuild
    from ...export.models.load import load_model

    p = found.provenance
    try:
        return rebuild(p, found.path)
    except UsageError:
        return load_model(p.model, p.model_kwargs)


def _sweep_files(make, found: list, name: str, values: list[str]) -> tuple[list, dict[str, str]]:
    """A file for each value, and what value each has."""
    from ...export.inspection import inspect
    from ...engines.measure import bench

    base = found[0].provenance.schedule if found else None
    method, options, how = (
        (base.method, dict(base.options), bench.way(found[0])) if base else (reducers.takers(name)[0], {}, (None, 20, "fp32"))
    )
    if method not in reducers.takers(name):
        raise UsageError(
            f"--sweep {name}=...: {found[0].path} is {method}, which has no {name}; it goes with {', '.join(reducers.takers(name))}"
        )
    files = {v: inspect(make(method, {**options, name: v}, *how)) for v in values}
    return list(files.values()), {str(f.path): v for v, f in files.items()}


def _agreement(found: list, denses: dict, runtime: str, images) -> dict[str, dict]:
    from ...engines.images import find_images, load_images
    from ...engines.measure import bench

    first = found[0]
    pixels = load_images(find_images(list(images)), first.provenance.preprocess) if images else bench.noise(first, 8)
    return {
        str(f.path): bench.agreement(
            f.path, denses[bench.way(f)].path, runtime if runtime != "torch" else "ort", pixels
        )
        for f in found
    }


def _profiles(found: list, runtimes: list[str], sizes: list[int], threads: int, progress) -> list[dict]:
    from ...engines.measure import stage_profile as profile
    from ...engines.measure import bench

    out = []
    for f in found:
        for runtime in runtimes:
            for size in sizes:
                if runtime in profile.RUNTIMES and f.batch in (None, size):
                    progress(f"profiling {f.path.name} in {runtime}, batch {size}")
                    times = profile.stage_times(f.path, runtime, bench.noise(f, size), threads=threads)
                    name = str(f.path) if f.provenance.schedule.steps else bench.dense_label(f)
                    out.append(
                        {
                            "runtime": runtime,
                            "batch": size,
                            "file": name,
                            "parts": profile.by_part(times),
                            "stages": times,
                        }
                    )
    return out


def _check_dense(dense, found) -> None:
    """Raises: UsageError when the files are not of one model, or --dense is of another or is reduced itself."""
    models = {(f.provenance.model, str(f.provenance.model_kwargs)) for f in [*found, *([dense] if dense else [])]}
    if len(models) > 1:
        raise UsageError(
            f"bench compares files of one model, these are of {', '.join(' '.join(m) for m in sorted(models))}"
        )
    if dense and dense.path in [f.path for f in found]:
        raise UsageError(f"--dense {dense.path} is among the files that are compared with it: leave it out there")
    if dense and dense.provenance.schedule.steps:
        raise UsageError(
            f"--dense {dense.path} is reduced ({dense.provenance.schedule.method}): wanted one made with --method none"
        )


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(b) for b in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UsageError(f"--batch {text!r}: wanted batch sizes, e.g. 1,8")
    return list(dict.fromkeys(sizes))


def _print(out, rows, threads, bench, sweep: str | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    said = ", ".join(f"{k} {v}" for k, v in bench.machine().items())
    table = Table(
        title=f"{threads} thread{'s' * (threads > 1)}, interleaved in one run; {said}",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    titles = [
        "runtime",
        "batch",
        sweep or "file",
        "median ms",
        "20-80 %",
        "images/s",
        "speedup",
        "20-80 %",
        "MACs ratio",
        "speedup / MACs ratio",
    ]
    for title in [*titles, *(["cosine to dense", "top-1"] if sweep else [])]:
        table.add_column(title, justify="left" if title in ("runtime", "file") else "right")
    for r in rows:
        name = (
            str(r["value"])
            if r.get("value") is not None
            else Path(r["file"]).name
            if r["method"] != "none"
            else r["file"]
        )
        if "error" in r:
            table.add_row(r["runtime"], str(r["batch"]), escape(name), f"[red]failed: {escape(r['error'])}[/red]")
            continue
        colour = "[red]" if r["method"] != "none" and r["speedup"] <= 1 else ""
        more = [f"{r['cosine']:.4f}", "" if r["top1"] is None else f"{r['top1']:.1%}"] if "cosine" in r else []
        table.add_row(
            r["runtime"],
            str(r["batch"]),
            escape(name),
            f"{r['ms']:.1f}",
            f"{r['ms_20']:.1f}-{r['ms_80']:.1f}",
            f"{r['images_per_second']:.1f}",
            f"{colour}{r['speedup']:.3f}",
            f"{r['speedup_20']:.3f}-{r['speedup_80']:.3f}",
            f"{r['macs_ratio']:.3f}",
            f"{r['quotient']:.3f}",
            *more,
        )
    out.print(table)
    slow = {key: at for key, at in bench.break_even(rows).items() if at != min(r["batch"] for r in rows)}
    for (runtime, file), at in slow.items():
        words = f"faster than dense from batch {at} on" if at else "no faster than dense at any batch measured"
        out.print(f"{Path(file).name} in {runtime}: {words}", style=None if at else "red", markup=False)


def _print_profiles(out, profiles: list[dict]) -> None:
    from rich.markup import escape
    from rich.table import Table

    if not profiles:
        return
    parts = list(dict.fromkeys(k for p in profiles for k in p["parts"]))
    table = Table(
        title="milliseconds by part, from the engine's profiler, which takes time itself",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for title in ("runtime", "batch", "file", *parts):
        table.add_column(title, justify="left" if title in ("runtime", "file") else "right")
    for p in profiles:
        table.add_row(
            p["runtime"],
            str(p["batch"]),
            escape(Path(p["file"]).name),
            *(f"{p['parts'].get(k, 0.0):.2f}" for k in parts),
        )
    out.print(table)
