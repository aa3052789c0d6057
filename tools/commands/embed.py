"""`tokexport embed`."""

from __future__ import annotations

import sys

import click

from ...export.errors import UsageError
from ..options import runtime_option


@click.command("embed")
@click.argument("file", metavar="FILE|BUNDLE")
@click.option(
    "--images",
    "data",
    required=True,
    metavar="DATA",
    help="A folder, parquet with encoded images, or a text file with a path a line.",
)
@click.option("-o", "--output", metavar="DIR", help="The folder of parquet parts; an unfinished one is gone on with.")
@click.option(
    "--columns", metavar="NAME[,NAME]", help="Outputs to keep, e.g. features,class.  [default: all but logits]"
)
@click.option("--top", type=int, default=1, show_default=True, metavar="K", help="Classes of each image.")
@click.option("--part-size", type=int, metavar="N", help="Images of a part.  [default: 4096, with --ray 512]")
@runtime_option()
@click.option("--threads", default=0, show_default=True, help="Threads of the runtime; 0 for its own choice.")
@click.option("--workers", type=int, metavar="N", help="Decoding processes.  [default: half the cores]")
@click.option("--ray", metavar="ADDRESS|local", help="Compute on a Ray cluster, or on one of this machine alone.")
@click.option("--actors", type=int, metavar="N", help="Engines on the cluster.  [default: as many as fit]")
@click.option("--estimate", "n_images", type=int, metavar="N", help="Only tell what N images would cost; no -o.")
@click.option("--machines", type=int, default=1, show_default=True, metavar="N", help="Of the cluster of --estimate.")
@click.option("--allow-host-code", is_flag=True, help="Load an engine that carries native code of a plugin.")
@click.option("--force", is_flag=True, help="Start anew where another run is.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON on stdout.")
def command(file, data, output, columns, n_images, machines, as_json, **choices):
    """Features, classes or tokens of many images, as a folder of parquet parts; run it again after a kill to go on.

    Images that cannot be read go to an errors table; exit 1 then, when all others are done.

    \b
    tokexport embed vit.onnx --images photos/ -o features
    tokexport embed vit.onnx --images photos/ --estimate 100000000 --machines 16
    """
    from ...engines.embed.options import EmbedOptions

    names = tuple(name.strip() for name in (columns or "").split(",") if name.strip())
    if columns is not None and not names:
        raise UsageError("--columns is empty: wanted names of outputs, e.g. features,class")
    options = EmbedOptions(columns=names, **choices)
    if n_images is not None:
        if output is not None:
            raise UsageError("--estimate only measures: leave out -o, or --estimate to run")
        _estimate(file, data, n_images, machines=machines, options=options, as_json=as_json)
    elif output is None:
        raise UsageError("wanted -o DIR for the parts, or --estimate N to know what it would cost")
    elif machines != 1:
        raise UsageError("--machines is of --estimate; --ray ADDRESS computes on a cluster")
    else:
        _embed(file, data, output, options=options, as_json=as_json)


def _embed(file, data, output, *, options, as_json: bool) -> None:
    from ...engines.embed.local import embed
    from ..show.counter import counter
    from ..show.terminal import console, print_json

    out = console()
    with counter(out, "images") as show:
        report = embed(file, data, output=output, options=options, progress=lambda state: show(*state))
    m = report.manifest
    earlier = m.images - report.computed
    if report.rate is None:
        out.print(f"all {m.n_parts} parts were there already", markup=False)
    else:
        words = f"{report.computed} images in {report.seconds:.1f} s, {report.rate:.1f} a second"
        if report.engine_seconds is not None:
            words += f", {1 - report.engine_seconds / report.seconds:.0%} of it waiting for images"
        out.print(words + (f"; {earlier} were there already" if earlier else ""), markup=False)
    columns = ", ".join(c.name for c in m.columns)
    out.print(f"{report.path}/parts: {m.images - m.broken} rows in {m.n_parts} parts, columns {columns}", markup=False)
    if as_json:
        print_json(report.to_json())
    if m.broken:
        click.echo(f"Error: {m.broken} of {m.images} images gave nothing; {report.path}/errors says why", err=True)
        sys.exit(1)


def _estimate(file, data, n_images: int, *, machines: int, options, as_json: bool) -> None:
    from ...engines.embed.estimate import estimate
    from ..show.terminal import console, print_json, size_words, stages

    out = console()
    with stages(out) as progress:
        if options.ray is not None:
            from ...engines.embed.cluster import count_machines

            progress("asking the cluster")
            machines = count_machines(options.ray)
        e = estimate(file, data, images=n_images, machines=machines, options=options, progress=progress)
    waiting = 1 - e.engine_seconds / e.seconds
    out.print(
        f"measured here: {e.measured} images in {e.seconds:.1f} s, {e.rate:.1f} a second, {waiting:.0%} of it waiting for "
        f"images (decoding in {e.workers} processes)",
        markup=False,
    )
    words = f"{e.images} images: {e.machine_hours:.3g} machine-hours, {size_words(int(e.bytes_a_row * e.images))}"
    words += f"; {e.hours:.3g} hours on {e.machines} such machines" if e.machines > 1 else ""
    out.print(words, markup=False)
    if as_json:
        print_json(e.to_json())
