"""`tokexport tune`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ...export import precisions
from ...export.errors import UsageError
from ..options import parse_macs, runtime_option
from .method_options import as_flags
from .model_options import load, model_options, split

DTYPES = [name for name, row in precisions.TABLE.items() if row.in_file and row.product_type != "INT8"]
ARGUMENTS = (
    "speedup",
    "latency_ms",
    "macs",
    "methods",
    "rates",
    "labels",
    "limit",
    "seconds",
    "batch",
    "threads",
    "dtype",
    "images",
)


@click.command("tune")
@model_options
@click.option(
    "--images",
    multiple=True,
    required=True,
    metavar="IMAGES",
    help="Photos like those the model will see; files or folders.",
)
@click.option(
    "--labels", is_flag=True, help="The one folder of --images has a folder for each class: accuracies are told too."
)
@click.option("--speedup", type=float, metavar="TIMES", help="Budget: so many times the dense model's speed.")
@click.option("--latency-ms", type=float, metavar="MS", help="Budget: so many milliseconds a run.")
@click.option("--macs", metavar="2.9G", help="Budget: multiply-accumulates of one image.")
@runtime_option()
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="Of the trunk.")
@click.option(
    "--batch",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Images in a run; the file takes no other number.",
)
@click.option("--threads", default=1, show_default=True, help="Threads of the runtime; 0 for its own choice.")
@click.option("--methods", metavar="NAME[,NAME]", help="Only these methods; default: all that fit the model.")
@click.option(
    "--rates",
    metavar="NAME|FILE",
    help="DiffRate counts to try too, e.g. those of `tokexport rates learn`; several with commas.",
)
@click.option("--limit", type=int, metavar="N", help="At most N images, drawn by --seed; default: 64.")
@click.option("--seconds", default=20.0, show_default=True, help="Most time for timing the best files.")
@click.option("--fresh", is_flag=True, help="Measure latency curves again that are in the cache.")
@click.option(
    "-o", "--output", default="tuned.onnx", show_default=True, metavar="FILE", help="The file that is chosen."
)
@click.option("--report", metavar="HTML", help="Write a page: error against time, the table, the worst images.")
@click.option("--force", is_flag=True, help="Replace the output and the report.")
@click.option("--json", "as_json", is_flag=True, help="The table as JSON on stdout.")
def command(images, labels, output, report, force, as_json, **options):
    """Choose a method and its settings for a budget: the least harm on your images, timed on the runtime that will serve.

    Exit 1, and no file, when nothing reaches the budget. --seed also draws the images.

    tokexport tune --checkpoint vit.safetensors --images photos/ --speedup 1.5 -o vit.onnx
    """
    from ...export.files import check_output
    from ..show.terminal import bar, console, print_json

    model, options = split(options)
    budget, out = _budget(options), console()
    inputs = [model["checkpoint"], model["predictor"], *images]
    path = check_output(output, force, inputs)
    if report is not None and Path(report).resolve() == path.resolve():
        raise UsageError(f"--report {report} is the --output: wanted another name")
    page = None if report is None else check_output(report, force, [*inputs, path], beside=())
    with bar(out) as progress, as_flags(ARGUMENTS):
        progress("loading torch", 0.0)
        from ...engines.runners import require
        from ...engines.search.photos import find_photos
        from ...engines.search.tune import tune

        require(options["runtime"])
        loaded = load(model)
        if labels and loaded.module.num_classes < 2:
            raise UsageError("--labels: the model has no classes to compare them with: leave it out")
        n_classes = loaded.module.num_classes if labels else None
        photos = find_photos(list(images), n_classes=n_classes, class_names=loaded.labels)
        settings = _settings(options, model["seed"])
        result = tune(loaded, photos, path, budget, settings=settings, force=force, progress=progress)
        if page:
            from ..show.tune import write_page

            progress("writing the report", 1.0)
            write_page(result, page, loaded.preprocess)
    if as_json:
        print_json(result.to_json())
    else:
        from ..show.tune import print_report

        for note in loaded.notes:
            out.print(f"note: {note}", style="dim", markup=False)
        print_report(out, result)
        if page:
            out.print(f"report: {page}", markup=False)
    sys.exit(0 if result.passed else 1)


def _budget(options: dict):
    """The one budget that is given; it is taken out of the options."""
    from ...engines.search.budget import UNITS, Budget

    given = {kind: value for kind in UNITS if (value := options.pop(kind)) is not None}
    if len(given) != 1:
        names = " and ".join("--" + kind.replace("_", "-") for kind in given)
        raise UsageError(f"{names or 'no budget'} given: wanted one of --speedup 1.5, --latency-ms 20 or --macs 2.9G")
    (kind, value), *_ = given.items()
    with as_flags(ARGUMENTS):
        return Budget(kind, parse_macs(value) if kind == "macs" else value)


def _settings(options: dict, seed: int):
    from ...engines.search.tune import TuneSettings

    names = lambda text: tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    options = dict(options)
    methods, rates, limit = (options.pop(name) for name in ("methods", "rates", "limit"))
    return TuneSettings(
        methods=None if methods is None else names(methods),
        rates=() if rates is None else names(rates),
        limit=64 if limit is None else limit,
        seed=seed,
        **options,
    )
