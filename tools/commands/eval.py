"""`tokexport eval`."""

from __future__ import annotations

from pathlib import Path

import click

from ...export.errors import UsageError


@click.command("eval")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--images", "data", required=True, metavar="FOLDER", help="Images in a folder for each class.")
@click.option("--limit", type=int, metavar="N", help="At most N images, spread evenly over the classes.")
@click.option("--runtime", default="ort", show_default=True, metavar="ort|openvino|torch")
@click.option(
    "--reference/--no-reference",
    default=True,
    show_default=True,
    help="Also the PyTorch reference of each, and the dense model.",
)
@click.option("--checkpoint", metavar="FILE", help="Where the weights are now; they are checked by hash.")
@click.option("--predictor", metavar="FILE", help="Where the score heads are now (dTPS, DynamicViT).")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON on stdout.")
def command(files, data, limit, runtime, reference, checkpoint, predictor, as_json):
    """Top-1 and top-5 accuracy of FILES on labelled images, beside the PyTorch reference's and the dense model's.

    A class folder is named by its index or its label; otherwise there must be one for each class, in alphabetical order.
    """
    from ...engines.files import inspect_file
    from ...engines.measure.evaluate import evaluate, labelled
    from ...engines.runners import require
    from ..show.terminal import console, print_json, stages

    require(runtime)
    found = [inspect_file(f) for f in files]
    for f in found:
        if f.provenance.outputs[0] != "logits":
            raise UsageError(
                f"{f.path} has no classes (its output is {f.provenance.outputs[0]}): eval needs a classifier"
            )
        if (f.provenance.dims["classes"], f.provenance.labels) != (
            found[0].provenance.dims["classes"],
            found[0].provenance.labels,
        ):
            raise UsageError(f"{f.path} has other classes than {found[0].path}: evaluate them one by one")
    if not data.strip():
        raise UsageError("--images is empty: wanted a folder with a folder for each class (. for this one)")
    images = labelled(Path(data), found[0].provenance, limit)
    out = console()
    rows = []
    with stages(out) as progress:
        for f in found:
            rows += evaluate(f, images, runtime, reference, checkpoint, predictor, progress, dense=f is found[-1])
    if as_json:
        print_json({"data": str(data), "images": len(images), "rows": rows})
    else:
        _print(out, rows, len(images))


def _print(out, rows, n: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{n} images", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for title in ("", "tokens left", "top-1", "top-5"):
        table.add_column(title, justify="right" if title else "left")
    for r in rows:
        table.add_row(
            escape(r["what"]), "" if r["tokens"] is None else str(r["tokens"]), f"{r['top1']:.2%}", f"{r['top5']:.2%}"
        )
    out.print(table)
