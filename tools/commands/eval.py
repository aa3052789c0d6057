"""`tokexport eval`."""

from __future__ import annotations

import click

from ...export.errors import UsageError
from ..options import runtime_option


@click.command("eval")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--images", "data", required=True, metavar="DATA", help="Class folders, parquet with labels, or a list of paths."
)
@click.option("--limit", type=int, metavar="N", help="At most N images, spread evenly over the classes.")
@runtime_option()
@click.option(
    "--reference/--no-reference",
    default=True,
    show_default=True,
    help="Also the PyTorch reference of each, and the dense model.",
)
@click.option("--checkpoint", metavar="FILE|DIR", help="Where the weights are now; they are checked by hash.")
@click.option(
    "--predictor",
    "--metric",
    "predictor",
    metavar="FILE",
    help="Where the trained layers are now: score heads (dTPS, DynamicViT) or metric layers (DTEM).",
)
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON on stdout.")
def command(files, data, limit, runtime, reference, checkpoint, predictor, as_json):
    """Top-1 and top-5 accuracy of FILES on labelled images, beside the PyTorch reference's and the dense model's.

    DATA is a folder with a folder for each class (named by index or label; otherwise one for each, in alphabetical
    order), parquet with encoded images and a column `label`, or a text file with a path, a tab and a class a line.
    """
    from ...engines.files import inspect_file
    from ...engines.measure.evaluate import check_same_classes, evaluate
    from ...engines.measure.labels import open_labelled
    from ...engines.runners import runtime_for
    from ..show.terminal import console, print_json, stages

    for file in files:
        runtime_for(file, runtime)
    inspections = [inspect_file(f) for f in files]
    check_same_classes(inspections)
    if not data.strip():
        raise UsageError("--images is empty: wanted a folder with a folder for each class (. for this one)")
    provenance = inspections[0].provenance
    out, rows = console(), []
    with (
        stages(out) as progress,
        open_labelled(data, provenance.dims["classes"], labels=provenance.labels, limit=limit) as images,
    ):
        for file in files:
            rows += evaluate(
                file,
                images,
                runtime=runtime,
                reference=reference,
                dense=reference and file is files[-1],
                checkpoint=checkpoint,
                predictor=predictor,
                progress=progress,
            )
    if as_json:
        print_json({"images": str(data), "rows": [row.to_json() for row in rows]})
    else:
        _print(out, rows, rows[0].hits.images)


def _print(out, rows, n_images: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{n_images} images", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for title in ("", "tokens left", "top-1", "top-5"):
        table.add_column(title, justify="right" if title else "left")
    for row in rows:
        tokens = "" if row.tokens is None else str(row.tokens)
        table.add_row(escape(row.name), tokens, f"{row.top1:.2%}", f"{row.top5:.2%}")
    out.print(table)
