"""`tokexport verify`."""

from __future__ import annotations

import sys

import click


@click.command("verify")
@click.argument("file")
@click.option("--images", multiple=True, metavar="DIR_OR_FILES", help="Photos to compare on; default: four images of seeded noise.")
@click.option("--checkpoint", metavar="FILE", help="Where the weights are now; they are checked by hash.")
@click.option("--predictor", metavar="FILE", help="Where the score heads are now (dTPS, DynamicViT).")
@click.option("--engine", default="ort", show_default=True, help="What runs the file: ort or openvino.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
@click.argument("more_images", nargs=-1)
def command(file, images, checkpoint, predictor, engine, as_json, more_images):
    """Compare FILE with the PyTorch reference it was made from. Exit 0: passed, 1: failed.

    The reference is rebuilt from the provenance in the file and runs with the file's own merge decisions, so numbers are compared
    like with like; each decision is judged by itself: a flipped near-tie passes, anything else fails.

    tokexport verify vit.onnx --images photos/
    """
    from ..engines.runners import require
    from ..export.inspection import inspect
    from .terminal import console, print_json, stages

    inspect(file)  # wrong files are known before torch is loaded
    require(engine)
    out = console()
    with stages(out) as progress:
        progress("loading torch")
        from ..engines.verify import verify

        report = verify(file, [*images, *more_images] or None, checkpoint, engine, predictor, progress)
    if as_json:
        print_json(report.to_json())
    else:
        _print(out, report)
    sys.exit(0 if report.passed else 1)


def _print(out, report) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("output", "max abs", "max rel", "cosine", "top-1 agreement", ""):
        table.add_column(title, justify="left" if title == "output" else "right")
    for o in report.outputs:
        verdict = "[green]passed[/green]" if o.passed else "[red]FAILED[/red]"
        if o.name == "sources":
            table.add_row(o.name, f"{o.max_abs:.1%} differ", "", "", "", verdict)
        else:
            table.add_row(o.name, f"{o.max_abs:.2e}", f"{o.max_rel:.2e}", f"{o.cosine:.7f}", "" if o.top1 is None else f"{o.top1:.1%}", verdict)
    out.print(table)
    if report.decisions is not None:
        out.print(f"merge decisions equal to the reference's: {report.decisions:.1%} of image x reduction pairs")
    for f in report.flips[:10]:
        word = "[yellow]flipped near-tie[/yellow]" if f.passed else "[red]wrong decision[/red]"
        gives = f"gives away {f.margin:.1e} (a near-tie in {report.precision}: at most {report.near_tie:.0e})"
        out.print(f"  {word}: {escape(f.image)}, block {f.block}, " + ("impossible" if f.margin == float("inf") else gives))
    if len(report.flips) > 10:
        out.print(f"  ... and {len(report.flips) - 10} more")
    colour = "green" if report.passed else "red"
    out.print(f"{report.path} on {report.engine}: {report.summary()}", style=f"bold {colour}", markup=False)
