"""`tokexport verify`."""

from __future__ import annotations

import sys

import click

from ...export.errors import UsageError


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
@click.option("--checkpoint", metavar="FILE", help="Where the weights are now; they are checked by hash.")
@click.option("--predictor", metavar="FILE", help="Where the score heads are now (dTPS, DynamicViT).")
@click.option("--runtime", default="ort", show_default=True, help="What runs the file: ort or openvino.")
@click.option("--force", is_flag=True, help="Replace the report.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
def command(files, images, against, bisect, report, checkpoint, predictor, runtime, force, as_json):
    """Compare FILE with the PyTorch reference it was made from. Exit 0: passed, 1: failed.

    The reference is rebuilt from the provenance in the file and runs with the file's own merge decisions, so numbers are compared
    like with like; each decision is judged by itself: a flipped near-tie passes, anything else fails. Engines
    (.plan) are verified too where there is a GPU. Arguments that are images or folders are what they are compared on.

    tokexport verify vit.onnx --images photos/
    """
    from pathlib import Path

    from ...engines.images import SUFFIXES
    from ...engines.files import inspect_file
    from ...engines.runners import require
    from ...export.files import check_output
    from ..show.terminal import console, print_json, stages

    pictures = [f for f in files if Path(f).is_dir() or Path(f).suffix.lower() in SUFFIXES]
    files, images = [f for f in files if f not in pictures], [*images, *pictures]
    if not files:
        raise UsageError(
            f"verify: no file to verify among {', '.join(images)}: wanted one made with `tokexport onnx` (.onnx)"
        )
    if report is not None and len(files) > 1:
        raise UsageError("--report is of one FILE: verify them one by one")
    page = None if report is None else check_output(report, force, [*files, *images, against, checkpoint, predictor])
    require(runtime)
    for file in [*files, *([against] if against is not None else [])]:  # wrong files are known before torch is loaded
        inspect_file(file)
    out = console()
    reports = []
    with stages(out) as progress:
        progress("loading torch")
        from ...engines.parity.verify import verify

        for file in files:
            reports.append(
                verify(
                    file, images or None, checkpoint, runtime, predictor, progress, against, bisect or page is not None
                )
            )
        if page:
            from ..show.html import write_report

            progress("writing the report")
            write_report(reports[0], page)
    passed = all(r.passed for r in reports)
    if as_json:
        print_json(
            reports[0].to_json() if len(reports) == 1 else {"passed": passed, "files": [r.to_json() for r in reports]}
        )
    else:
        for r in reports:
            _print(out, r)
        if page:
            out.print(f"report: {page}", markup=False)
    sys.exit(0 if passed else 1)


def _print(out, report) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    classes = any(o.top1 is not None for o in report.outputs)
    for title in (
        "output",
        "max abs",
        "max rel",
        "cosine",
        *(("KL", "top-1 agreement", "top-5") if classes else ()),
        "",
    ):
        table.add_column(title, justify="left" if title == "output" else "right")
    for o in report.outputs:
        verdict = "[green]passed[/green]" if o.passed else "[red]FAILED[/red]"
        more = ["", "", ""] if o.top1 is None else [f"{o.kl:.1e}", f"{o.top1:.1%}", f"{o.top5:.1%}"]
        figures = (
            [f"{o.max_abs:.1%} differ", "", ""]
            if o.name == "sources"
            else [f"{o.max_abs:.2e}", f"{o.max_rel:.2e}", f"{o.cosine:.7f}"]
        )
        table.add_row(o.name, *figures, *(more if classes else ()), verdict)
    out.print(table)
    if report.decisions is not None:
        side = "the other file's" if report.against else "the reference's"
        out.print(f"merge decisions equal to {side}: {report.decisions:.1%} of image x reduction pairs")
    for f in report.flips[:10]:
        word = "[yellow]flipped near-tie[/yellow]" if f.passed else "[red]wrong decision[/red]"
        gives = f"gives away {f.margin:.1e} (a near-tie in {report.precision}: at most {report.near_tie:.0e})"
        out.print(
            f"  {word}: {escape(f.image)}, block {f.block}, " + ("impossible" if f.margin == float("inf") else gives)
        )
    if len(report.flips) > 10:
        out.print(f"  ... and {len(report.flips) - 10} more")
    for name, c in report.cost.items():
        agree = "" if c.top1 is None else f", top-1 agreement {c.top1:.1%}"
        out.print(
            f"{'reference deciding itself' if name == 'reference' else 'dense model'}: cosine {c.cosine:.6f} (lowest {c.worst:.6f}){agree}"
        )
    if report.stages:
        wrong = [s for s in report.stages if not s.passed]
        worst = max(report.stages, key=lambda s: s.error / s.limit)
        out.print(
            f"{len(report.stages)} stages compared, each on its own: "
            + (f"{len(wrong)} depart" if wrong else "none departs")
            + f"; nearest to its limit: {worst.words}, {worst.error:.1e} of {worst.limit:.0e}"
        )
        for s in wrong[:10]:
            out.print(f"  [red]departs[/red]: {s.words}, {s.error:.1e} (at most {s.limit:.0e})")
    colour = "green" if report.passed else "red"
    against = f" against {report.against}" if report.against else ""
    out.print(f"{report.path} on {report.runtime}{against}: {report.summary()}", style=f"bold {colour}", markup=False)
