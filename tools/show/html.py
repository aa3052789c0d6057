"""A report of verify as one page that needs nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...export import precisions
from ...export.files import aside
from ...export.inspection import inspect
from .page import Markup, document, figure, section, table, text

WORST = 6  # images shown with their token maps
ROWS = 40  # images in the table


def write_report(report, path: Path) -> None:
    """Write the page of a `ParityReport`, aside and renamed.

    Args:
        report: what `verify` returned.
        path: of the page; replaced when it is there.
    """
    provenance = inspect(report.path).provenance
    with aside(path) as new:
        new.write_text(page(report, provenance), encoding="utf-8")


def page(report, provenance) -> str:
    """The page as HTML.

    Args:
        report: a `ParityReport`.
        provenance: of its file.
    """
    word = "passed" if report.passed else "failed"
    side = f"file {report.against}" if report.against else "PyTorch reference"
    what = f"{provenance.model}, {provenance.schedule.method}, {provenance.precision}, run by {report.runtime}, against the {side}"
    parts = [
        f"<h1>{text(report.path)}</h1><p class=note>{text(what)}</p>",
        f"<p class='verdict {word}'>{text(report.summary())}</p>",
        *_faults(report),
        *section("Outputs, on equal decisions", _outputs(report)),
        *section("What it costs", _costs(report)),
        *section("Tokens and decisions by block", _blocks(report, provenance)),
        *section("Error of every stage, computed from the file's own tokens before it", _stages(report)),
        *section("Images", _images(report, provenance)),
        *section("Limits", _limits(report.precision)),
    ]
    title = f"{report.path}: {word}"
    return document(title, parts)


def _outputs(report) -> str:
    titles = ["output", "max abs", "max rel", "allowed", "lowest cosine", "KL", "top-1", "top-5", "images failed", ""]
    rows = [
        [
            o.name,
            f"{o.max_abs:.2e}",
            f"{o.max_rel:.2e}",
            f"{o.limit:.0e}" if o.limit else "0",
            f"{o.cosine:.7f}",
            *(["", "", ""] if o.top1 is None else [f"{o.kl:.1e}", f"{o.top1:.1%}", f"{o.top5:.1%}"]),
            str(o.n_failed),
            _word(o.passed),
        ]
        for o in report.outputs
    ]
    return table(titles, rows)


def _costs(report) -> str:
    names = {"reference": "the reference deciding itself", "dense": "the dense model"}
    rows = [
        [names[name], f"{c.cosine:.5f}", f"{c.worst:.5f}", "" if c.top1 is None else f"{c.top1:.1%}"]
        for name, c in report.cost.items()
    ]
    return table(["compared with", "mean cosine", "lowest", "top-1 agreement"], rows)


def _word(passed: bool) -> str:
    return Markup(f"<span class={'passed' if passed else 'failed'}>{'passed' if passed else 'FAILED'}</span>")


def _faults(report) -> list[str]:
    faults = [*report.faults, *([report.departs] if report.departs else [])]
    return [f"<p class=failed>{text(f)}</p>" for f in faults] + [f"<p class=note>{text(n)}</p>" for n in report.notes]


def _blocks(report, provenance) -> str:
    decided, rows, step = {b.block: b for b in report.by_block}, [], provenance.step_left_out
    for i, (attention, mlp) in enumerate(provenance.schedule.tokens_per_block()):
        b = decided.get(i)
        more = (
            ["" if step is None or i != step.block else "not in the file", "", ""]
            if b is None
            else [f"{b.equal:.1%}", f"{b.margin:.1e}" if b.margin else "0", f"{b.limit:.0e}"]
        )
        rows.append([str(i), str(attention), str(mlp), *more])
    titles = ["block", "tokens in attention", "in MLP", "decided alike", "most given away", "a near-tie: at most"]
    note = (
        f"<p class=note>{report.verdicts['flipped']} of {report.n_images} images flipped near-ties: tokens that "
        f"are almost equal in {text(report.precision)}, which is no fault.</p>"
    )
    return table(titles, rows) + (note if decided else "")


def _stages(report) -> str:
    """A bar a stage, on a logarithmic axis, its limit as a line."""
    if not report.stages:
        return "<p class=note>none compared</p>"
    lowest, height, step = 1e-9, 130, 15

    def y(value: float) -> float:  # what is no number is as high as can be
        shown = np.clip(np.nan_to_num(value, nan=10.0), lowest, 10)
        return height * (1 - np.log10(shown / lowest) / np.log10(10 / lowest))

    bars, labels, last = [], [], None
    for i, s in enumerate(report.stages):
        x, top = i * step + 34, y(s.error)
        title = f"<title>{text(s.words)}: {s.error:.1e}, at most {s.limit:.0e}</title>"
        kind, size = "bar" if s.passed else "bar failed", f"width={step - 3} height={height - top:.1f}"
        bars.append(
            f"<rect class='{kind}' x={x} y={top:.1f} {size}>{title}</rect>"
            f"<line x1={x - 1} x2={x + step - 2} y1={y(s.limit):.1f} y2={y(s.limit):.1f} stroke=#333 stroke-width=1 />"
        )
        block = s.stage.rpartition(".")[0].removeprefix("block")
        if block != last:
            labels.append(f"<text x={x} y={height + 14}>{text(block or 'in')}</text>")
            last = block
    axis = "".join(f"<text x=0 y={y(10.0**e) + 4:.1f}>1e{e}</text>" for e in (-9, -6, -3, 0))
    width = len(report.stages) * step + 60
    wrong = [[s.words, f"{s.error:.1e}", f"{s.limit:.0e}"] for s in report.stages if not s.passed]
    size = f"viewBox='0 0 {width} {height + 22}' width={width} style='max-width:100%'"
    chart = f"<svg {size}>{axis}{''.join(bars)}{''.join(labels)}</svg>"
    note = (
        "<p class=note>The embedding, then by block attention, matching, merging and MLP. The line is the limit; what "
        "is below 1e-9 has no bar.</p>"
    )
    return chart + note + (table(["departs", "error", "at most"], wrong) if wrong else "")


def _images(report, provenance) -> str:
    """The worst images, as the report has them, and pictures of the first few."""
    rows = [
        [
            r.image,
            _word(False) if r.verdict == "failed" else r.verdict,
            f"{r.max_rel:.1e}",
            f"{r.cosine:.7f}",
            str(r.flips),
        ]
        for r in report.by_image[:ROWS]
    ]
    left = report.n_images - len(rows)
    more = f"<p class=note>... and {left} more, none of them worse</p>" if left > 0 else ""
    images = table(["image", "verdict", "max rel", "cosine", "reductions decided otherwise"], rows)
    shown = [r for r in report.by_image[:WORST] if Path(r.image).is_file() and r.index in report.maps]
    return images + more + "".join(_figure(r, report, provenance) for r in shown)


def _figure(row, report, provenance) -> str:
    """An image as the model saw it, and both sides' tokens on it."""
    from ...engines.images import crop
    from .draw import draw_sources, grid_of, side_by_side

    photo = crop(Path(row.image), provenance.preprocess)
    maps = [draw_sources(photo, grid_of(provenance), m[provenance.schedule.n_prefix :]) for m in report.maps[row.index]]
    captions = ["input", "this file", "the other file" if report.against else "reference"]
    return figure(side_by_side([photo.resize(maps[0].size), *maps], captions), row.image)


def _limits(precision: str) -> str:
    """The limits of all precisions, this one's in bold."""
    rows = [
        [
            Markup(f"<b>{name}</b>") if name == precision else name,
            f"{row.output_limit:.0e}",
            *(f"{row.near_tie[kind]:.0e}" for kind in ("metric", "score")),
            f"{row.stage_limit:.0e}",
        ]
        for name, row in precisions.TABLE.items()
    ]
    titles = [
        "precision",
        "output, of the image's own largest value",
        "near-tie: cosine of keys",
        "log attention",
        "head's log-odds",
        "one stage",
    ]
    return table(titles, rows)
