"""`tokexport ladder`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ...export import reducers
from ...export.errors import UsageError
from ..options import parse_sweep, runtime_option
from .method_options import as_flags, method_options
from .model_options import load, model_options, split
from .tune import DTYPES

ARGUMENTS = ("batch", "threads", "seconds", "dtype", "images", "force")


@click.command("ladder")
@model_options
@click.option(
    "--method",
    type=click.Choice(list(reducers.TABLE)),
    default=reducers.DEFAULT,
    show_default=True,
    help="How tokens are reduced in all rungs.",
)
@method_options
@click.option("--sweep", metavar="r=0,8,13", help=f"The rungs: one for each value of {' or '.join(reducers.swept())}.")
@click.option(
    "--from", "tuned", metavar="FILE", help="Or the rungs of `tokexport tune`: a file that it wrote, or its --json."
)
@click.option("--images", multiple=True, metavar="IMAGES", help="Photos that errors are measured on; default: noise.")
@runtime_option()
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="Of the trunk.")
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Images in a run; 0 for any number.")
@click.option("--threads", default=1, show_default=True, help="Threads of the runtime; 0 for its own choice.")
@click.option("--seconds", default=20.0, show_default=True, help="Most time for timing the rungs.")
@click.option("-o", "--output", default="ladder", show_default=True, metavar="DIR", help="A new folder.")
@click.option("--force", is_flag=True, help="Replace a ladder that is there.")
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON on stdout.")
def command(method, sweep, tuned, images, output, force, as_json, **options):
    """Write one file of weights and a small graph for each of several schedules, for a server that picks by load.

    tokexport ladder --method tome --sweep r=0,8,13,16 -o ladder
    """
    from ...engines.bundle.folder import check_place
    from ...engines.ladder_manifest import NAME
    from ..show.terminal import bar, console, print_json

    model, options = split(options)
    how = {name: options.pop(name) for name in ("runtime", "dtype", "batch", "threads", "seconds")}
    given = {name: value for name, value in options.items() if value is not None}
    swept = _swept(method, sweep, tuned, given)
    with as_flags(ARGUMENTS):
        folder, settings = check_place(output, force=force, manifest=NAME, kind="ladder"), _settings(how)
    out = console()
    with bar(out) as progress, as_flags((*ARGUMENTS, *given)):
        progress("loading torch", 0.0)
        from ...engines.ladder_write import write_ladder

        if swept is None:
            loaded, schedules = _tuned(Path(tuned), model)
        else:
            loaded = load(model)
            make = lambda value: loaded.schedule(method, **{**given, swept.option: value})
            schedules = [(f"{swept.option}={value}", make(value)) for value in swept.values]
        pixels = _pixels(list(images), loaded) if images else None
        ladder = write_ladder(
            loaded, schedules, folder, settings=settings, pixels=pixels, force=force, progress=progress
        )
    if as_json:
        from ...export.records import to_document

        print_json({"path": str(folder), **to_document(ladder)})
        return
    from ..show.ladder import print_ladder

    print_ladder(out, folder, ladder)


def _swept(method: str, sweep: str | None, tuned: str | None, given: dict):
    """What is swept; None for rungs out of a file. Raises: UsageError unless there is one of the two, and it fits the method."""
    if (sweep is None) == (tuned is None):
        raise UsageError("--sweep and --from: wanted one of them, which says what the rungs are")
    if tuned is not None:
        if given:
            raise UsageError(f"--from FILE brings its rungs' options: leave out {', '.join(given)}")
        return None
    swept = parse_sweep(sweep)
    if method not in reducers.takers(swept.option):
        takers = ", ".join(reducers.takers(swept.option))
        raise UsageError(f"--sweep {swept.option}: goes with --method {takers}, not with {method}")
    if swept.option in given:
        raise UsageError(f"--sweep {swept.option}: {swept.option} is given beside it: leave one out")
    with as_flags(given):
        reducers.check_names(method, {**given, swept.option: swept.values[0]})
    return swept


def _settings(how: dict):
    from ...engines.ladder_write import LadderSettings
    from ...engines.runners import require

    require(how["runtime"])
    if how["batch"] < 0 or not 0 <= how["threads"] <= 1024 or not 0 < how["seconds"] < 86400:
        raise UsageError(
            f"batch {how['batch']}, threads {how['threads']}, seconds {how['seconds']:g}: wanted 0 images (any number) or more, "
            "0 to 1024 threads, more than 0 seconds"
        )
    return LadderSettings(**{**how, "batch": how["batch"] or None})


def _tuned(path: Path, model: dict):
    """The model and the rungs of what `tune` wrote: the dense model, the chosen schedule, and it more and less strongly."""
    from ...engines.files import inspect_file
    from ...export.rebuild import rebuild

    if path.suffix == ".onnx":
        provenance = inspect_file(path).provenance
        table = provenance.tuning
        loaded = rebuild(provenance, path, checkpoint=model["checkpoint"], predictor=model["predictor"])
    else:
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UsageError(f"--from {path}: wanted a file that `tokexport tune` wrote, or its --json") from None
        loaded = load(model)
    rows = table.get("rows") if isinstance(table, dict) else None
    try:
        chosen = [row for row in rows or () if row["chosen"] or row["further"]]
        schedules = [(_label(row), loaded.schedule(row["method"], **row["options"])) for row in chosen]
    except (KeyError, TypeError, AttributeError):
        chosen = []
    if not chosen:
        raise UsageError(f"--from {path}: has no candidates of `tokexport tune` in it, of which one was chosen")
    if all(schedule.steps for _, schedule in schedules):
        schedules.append(("dense", loaded.schedule("none")))
    return loaded, schedules


def _label(row: dict) -> str:
    return f"{row['method']} x{row['macs_ratio']:.2f}"


def _pixels(images: list[str], loaded):
    from ...engines.images import find_images, load_images

    return load_images(find_images(images), loaded.preprocess)
