"""`tokexport bench`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ...export import reducers
from ...export.errors import UsageError
from ..options import runtime_option


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
@runtime_option("ort,openvino", several=True)
@click.option(
    "--batch",
    "batches",
    default="1,8",
    show_default=True,
    help="Comma-separated batch sizes; a file of another fixed batch is left out.",
)
@click.option("--threads", default=1, show_default=True, help="Threads of the runtime; 0 for its own choice.")
@click.option(
    "--seconds",
    default=20.0,
    show_default=True,
    help="Most time for each runtime and batch in each process; less when the ratios are precise before.",
)
@click.option(
    "--processes", default=1, show_default=True, help="Fresh processes that measure, one after another; 1: here."
)
@click.option(
    "--bound",
    is_flag=True,
    help="Also time the free bound of each file: the same token counts, rows merely cut off; no matching can beat it.",
)
@click.option("--cuda-graph", is_flag=True, help="Of engines: capture the work once and replay it.")
@click.option(
    "--profile",
    is_flag=True,
    help="Also the time in each part of the model, of runtimes with a profiler (ort, openvino).",
)
@click.option("--gate", is_flag=True, help="Exit 1 when a reduced file is slower than its dense one, or fails.")
@click.option("--plot", metavar="PNG", help="Draw the figures too.")
@click.option("--force", is_flag=True, help="Replace the picture.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON on stdout.")
def command(files, dense, sweep, images, runtimes, batches, plot, force, gate, as_json, **options):
    """Time FILES against the dense model, all in one run, interleaved: medians, speedup, and how near it is to what
    is possible.

    The time is of the runtime alone; whole calls stand beside it. Of one process, medians and 20 to 80 percentiles;
    with --processes the mean, least and largest of their medians. Without FILES: DeiT-S with ToMe r=13, random
    weights. Engines (.plan) are compared with an engine, given with --dense.
    """
    from ...engines.measure.bench import bench
    from ..show.terminal import console, print_json, stages

    swept, sizes = _sweep(sweep), _sizes(batches)
    if images and not swept:
        raise UsageError("--images goes with --sweep: speed does not depend on what is in an image")
    picture = _picture(plot, force=force, inputs=[*files, dense, *images])
    pixels = _pixels(files, images) if images else None
    out = console()
    with stages(out) as progress:
        report = bench(
            list(files),
            dense=dense,
            runtimes=tuple(dict.fromkeys(runtimes.split(","))),
            batches=tuple(sizes),
            sweep=swept,
            images=pixels,
            progress=progress,
            **options,
        )
        if picture:
            from ..show import plot as plots

            plots.save(report.rows, picture, sweep=report.swept)
    if as_json:
        print_json(report.to_json())
    else:
        from ..show.latency import print_report

        print_report(out, report)
        if picture:
            out.print(f"picture: {picture}", markup=False)
    if gate and report.slow:
        reduced = sum(r.method != "none" for r in report.rows)
        out.print(f"--gate: {len(report.slow)} of {reduced} are no faster than dense, or failed", style="bold red")
    sys.exit(1 if (gate and report.slow) or any(row.error for row in report.rows) else 0)


def _sweep(text: str | None):
    """ "r=0,8:-1,13" -> Sweep("r", ("0", "8:-1", "13")); None for None."""
    from ...engines.measure.candidates import Sweep

    if text is None:
        return None
    name, _, values = text.partition("=")
    name, swept = name.replace("-", "_"), reducers.swept()
    values = tuple(dict.fromkeys(v.strip() for v in values.split(",")))
    if name not in swept or not all(values):
        names = " or ".join(f"{o} ({', '.join(reducers.TABLE[m].title for m in ms)})" for o, ms in swept.items())
        raise UsageError(f"--sweep {text[:60]!r}: wanted an option and values, e.g. r=0,8,13; options are {names}")
    return Sweep(name, values)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(b) for b in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UsageError(f"--batch {text!r}: wanted batch sizes, e.g. 1,8")
    return list(dict.fromkeys(sizes))


def _picture(plot: str | None, *, force: bool, inputs: list) -> Path | None:
    from ...export.files import check_output
    from ..show import plot as plots

    if plot is None:
        return None
    plots.require()
    path = check_output(plot, force, inputs)
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path}: wanted a name that ends in .png")
    return path


def _pixels(files, images):
    """The photos that a sweep's files are compared on, as the first file takes them."""
    from ...engines.files import inspect_file
    from ...engines.images import find_images, load_images

    if not files:
        raise UsageError("--images needs a FILE, which says how images are prepared")
    return load_images(find_images(list(images)), inspect_file(files[0]).provenance.preprocess)
