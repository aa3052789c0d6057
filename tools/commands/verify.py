"""`tokexport verify`."""

from __future__ import annotations

import sys

import click

from ...export.errors import UsageError
from .bundle import is_bundle, prove

SHOWN = 10  # images, flips and stages shown one by one


@click.command("verify")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--images",
    multiple=True,
    metavar="DIR_OR_FILES",
    help="Photos to compare on; default: four images of seeded noise.",
)
@click.option(
    "--against",
    metavar="FILE",
    help="Compare with this file of the same model and schedule instead of with the reference.",
)
@click.option("--bisect", is_flag=True, help="Compare every stage on its own too and name the first that is wrong.")
@click.option("--report", metavar="HTML", help="Write a page with everything, of one FILE; bisects too.")
@click.option("--checkpoint", metavar="FILE|DIR", help="Where the weights are now; they are checked by hash.")
@click.option(
    "--predictor",
    "--metric",
    "predictor",
    metavar="FILE",
    help="Where the trained layers are now: score heads (dTPS, DynamicViT) or metric layers (DTEM).",
)
@click.option(
    "--runtime",
    help="What runs the file: ort or openvino; default: ort, or what a bundle was made with.",
)
@click.option("--allow-host-code", is_flag=True, help="Load a bundle's engine that carries native code of a plugin.")
@click.option("--force", is_flag=True, help="Replace the report.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
def command(files, images, against, bisect, report, checkpoint, predictor, runtime, allow_host_code, force, as_json):
    """Compare FILE with the PyTorch reference it was made from, or run the proof of a bundle. Exit 0: passed, 1:
    failed.

    The reference is rebuilt from the provenance in the file and runs with the file's own merge decisions, so numbers
    are compared like with like; each decision is judged by itself: a flipped near-tie passes, anything else fails.
    Engines (.plan) are verified too where there is a GPU. Arguments that are images or folders are what they are
    compared on; of a ladder every rung is verified. A bundle (`tokexport bundle`) brings its own proof, which needs neither PyTorch nor the weights.

    tokexport verify vit.onnx --images photos/
    """
    from ...engines.files import inspect_file, is_engine
    from ...engines.runners import require
    from ...export.files import check_output
    from ..show.terminal import bar, console

    bundles = [file for file in files if is_bundle(file)]
    if bundles:
        others = (len(bundles) < len(files), images, against, bisect, report, checkpoint, predictor)
        sys.exit(0 if prove(bundles, runtime, others=others, allow_host_code=allow_host_code, as_json=as_json) else 1)
    runtime = runtime or "ort"
    files, images = _sorted(_rungs(files), images)
    if report is not None and len(files) > 1:
        raise UsageError("--report is of one FILE: verify them one by one")
    page = None if report is None else check_output(report, force, [*files, *images, against, checkpoint, predictor])
    every = [*files, *([against] if against is not None else [])]
    if not all(is_engine(file) for file in every):  # an engine is run by TensorRT alone
        require(runtime)
    for file in every:  # wrong files are known before torch is loaded
        inspect_file(file)
    out = console()
    with bar(out) as progress:
        progress("loading torch", 0.0)
        reports = _verify(
            files,
            images,
            progress,
            runtime=runtime,
            against=against,
            bisect=bisect or page is not None,
            checkpoint=checkpoint,
            predictor=predictor,
        )
        if page:
            from ..show.html import write_report

            progress("writing the report", 1.0)
            write_report(reports[0], page)
    sys.exit(0 if _tell(out, reports, page, as_json=as_json) else 1)


def _rungs(files) -> list[str]:
    """The files, each ladder in the place of its rungs, after a look at the bytes that it speaks of."""
    from ...engines.ladder_manifest import check_bytes, folder_of, is_ladder, read_ladder

    out = []
    for file in files:
        if not is_ladder(file):
            out.append(file)
            continue
        ladder = read_ladder(file)
        check_bytes(file, ladder)
        out += [str(folder_of(file) / rung.file.name) for rung in ladder.rungs]
    return out


def _sorted(arguments, images) -> tuple[list[str], list[str]]:
    """What was typed as FILE, told apart: files to verify, and images or folders beside those of --images."""
    from pathlib import Path

    from ...engines.images import SUFFIXES

    photos = [a for a in arguments if Path(a).is_dir() or Path(a).suffix.lower() in SUFFIXES]
    files = [a for a in arguments if a not in photos]
    if not files:
        raise UsageError(
            f"verify: no file to verify among {', '.join(photos)}: wanted one made with `tokexport onnx` (.onnx)"
        )
    return files, [*images, *photos]


def _verify(files: list[str], images: list[str], progress, **options) -> list:
    """A report of every file, one after another. progress: (text, share of all files that is done)."""
    from ...engines.parity.verify import verify

    reports = []
    for i, file in enumerate(files):

        def tell(text: str, share: float, done: int = i) -> None:
            progress(text, (done + share) / len(files))

        reports.append(verify(file, images or None, progress=tell, **options))
    return reports


def _tell(out, reports: list, page, *, as_json: bool) -> bool:
    """Print the reports. Returns: whether all passed."""
    from ..show.terminal import print_json

    passed = all(r.passed for r in reports)
    if as_json:
        several = {"passed": passed, "files": [r.to_json() for r in reports]}
        print_json(several if len(reports) > 1 else reports[0].to_json())
    else:
        for r in reports:
            _print(out, r)
        if page:
            out.print(f"report: {page}", markup=False)
    return passed


def _print(out, report) -> None:
    """A report for people."""
    _print_outputs(out, report)
    _print_decisions(out, report)
    for name, c in report.cost.items():
        model = "reference deciding itself" if name == "reference" else "dense model"
        agree = "" if c.top1 is None else f", top-1 agreement {c.top1:.1%}"
        out.print(f"{model}: cosine {c.cosine:.6f} (lowest {c.worst:.6f}){agree}")
    _print_stages(out, report)
    for note in report.notes:
        out.print(note, markup=False)
    colour = "green" if report.passed else "red"
    against = f" against {report.against}" if report.against else ""
    out.print(f"{report.path} on {report.runtime}{against}: {report.summary()}", style=f"bold {colour}", markup=False)


def _print_outputs(out, report) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    classes = any(o.top1 is not None for o in report.outputs)
    titles = ["output", "max abs", "max rel", "cosine", *(("KL", "top-1 agreement", "top-5") if classes else ()), ""]
    for title in titles:
        table.add_column(title, justify="left" if title == "output" else "right")
    for o in report.outputs:
        verdict = "[green]passed[/green]" if o.passed else f"[red]FAILED on {o.n_failed}[/red]"
        more = ["", "", ""] if o.top1 is None else [f"{o.kl:.1e}", f"{o.top1:.1%}", f"{o.top5:.1%}"]
        figures = [f"{o.max_abs:.2e}", f"{o.max_rel:.2e}", f"{o.cosine:.7f}"]
        if o.exact:
            figures = [f"{o.max_abs:.1%} differ", "", ""]
        table.add_row(o.name, *figures, *(more if classes else ()), verdict)
    out.print(table)
    for image in [i for i in report.by_image if i.verdict == "failed"][:SHOWN]:
        out.print(f"  [red]failed[/red]: {escape(image.image)}, max rel {image.max_rel:.1e}, cosine {image.cosine:.7f}")


def _print_decisions(out, report) -> None:
    from rich.markup import escape

    if report.decisions is None:
        return
    side = "the other file's" if report.against else "the reference's"
    out.print(f"merge decisions equal to {side}: {report.decisions:.1%} of image x reduction pairs")
    if report.verdicts["flipped"]:
        out.print(f"{report.verdicts['flipped']} of {report.n_images} images flipped near-ties, which is no fault")
    for f in report.flips[:SHOWN]:
        word = "[yellow]flipped near-tie[/yellow]" if f.passed else "[red]wrong decision[/red]"
        gives = f"gives away {f.margin:.1e} (a near-tie in {report.precision}: at most {f.limit:.0e})"
        if f.margin == float("inf"):
            gives = "impossible"
        elif f.margin != f.margin:
            gives = "which the reference cannot judge: its own scores are no numbers"
        out.print(f"  {word}: {escape(f.image)}, block {f.block}, {gives}")
    if report.n_flips > SHOWN:
        out.print(f"  ... and {report.n_flips - min(SHOWN, len(report.flips))} that give away less")


def _print_stages(out, report) -> None:
    if not report.stages:
        return
    wrong = [s for s in report.stages if not s.passed]
    worst = max(report.stages, key=lambda s: s.error / s.limit)
    out.print(
        f"{len(report.stages)} stages compared, each on its own: "
        + (f"{len(wrong)} depart" if wrong else "none departs")
        + f"; nearest to its limit: {worst.words}, {worst.error:.1e} of {worst.limit:.0e}"
    )
    for s in wrong[:SHOWN]:
        out.print(f"  [red]departs[/red]: {s.words}, {s.error:.1e} (at most {s.limit:.0e})")
