"""A `TuneReport` for people: on the terminal, and as one page."""

from __future__ import annotations

import math
from pathlib import Path

from ...export.files import aside
from .page import Markup, document, figure, section, table, text

COLOURS = ("#4a7fb5", "#b3261e", "#2e7d32", "#8e5bb5", "#c77700", "#00838f", "#6d4c41", "#ad1457", "#5f6368")
WIDTH, HEIGHT, LEFT, BOTTOM = 760, 380, 66, 46  # of the picture and its margins
STEPS = (1, 2, 5)  # of an axis, times powers of ten


def print_report(out, report) -> None:
    """The table and the words on a terminal.

    Args:
        out: rich console.
        report: a `TuneReport`.
    """
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    titles = _titles(report)
    for title in titles:
        shown.add_column(title, justify="left" if title in ("candidate", "") else "right")
    for row in report.rows:
        style = "bold green" if row.chosen else "dim" if row.further or not row.reaches else None
        shown.add_row(*map(escape, _cells(row, report)), style=style)
    out.print(shown)
    for note in report.notes:
        out.print(f"note: {note}", style="dim", markup=False)
    for words in report.words():
        out.print(words, style=None if report.passed else "bold red", markup=False)
    if report.path:
        out.print(str(report.path), style="bold", markup=False)


def _titles(report) -> list[str]:
    classes = [
        t
        for t, there in (("same class", report.measure == "KL"), ("accuracy", report.dense_accuracy is not None))
        if there
    ]
    return [
        "candidate",
        report.measure or "error",
        "over best",
        *classes,
        "predicted ms",
        "measured ms",
        "speedup",
        "MACs ratio",
        "",
    ]


def _cells(row, report) -> list[str]:
    """A row of the table, under `_titles`."""
    number = lambda value, form: "" if value is None else format(value, form)
    sure = "" if row.over_best_error is None else f" ± {row.over_best_error:.0%}"
    gap = "" if row.over_best is None or row.chosen else f"{row.over_best:+.0%}{sure}"
    classes = [number(row.same, ".1%")] if report.measure == "KL" else []
    classes += [] if report.dense_accuracy is None else [number(row.accuracy, ".1%")]
    missed = "cannot reach it" if row.measured_ms is None else "missed it"
    state = "chosen" if row.chosen else missed if not row.reaches else "for the picture" if row.further else ""
    speedup = f"{row.predicted_speedup:.3f} (predicted)" if row.speedup is None else f"{row.speedup:.3f}"
    times = [f"{row.predicted_ms:.2f}", number(row.measured_ms, ".2f"), speedup, f"{row.macs_ratio:.3f}"]
    return [row.name, number(row.error, ".3g"), gap, *classes, *times, state]


def write_page(report, path: Path, preprocess) -> None:
    """Write the report as a page, aside and renamed.

    Args:
        report: a `TuneReport`.
        path: of the page; replaced when it is there.
        preprocess: of the model's photos, for the pictures.
    """
    with aside(path) as new:
        new.write_text(page(report, preprocess), encoding="utf-8")


def page(report, preprocess) -> str:
    """The page as HTML.

    Args:
        report: a `TuneReport`.
        preprocess: of the model's photos.
    """
    title = f"{report.model}: {report.budget.words}"
    what = (
        f"{report.model}, {report.dtype}, batch {report.batch}, {report.threads or 'all'} threads, {report.runtime} on "
        f"{report.processor}; {report.images} images, seed {report.seed}"
    )
    words = "".join(f"<p class={'note' if i else 'verdict'}>{text(w)}</p>" for i, w in enumerate(report.words()))
    notes = "".join(f"<p class=note>{text(n)}</p>" for n in report.notes)
    parts = [
        f"<h1>{text(title)}</h1><p class=note>{text(what)}</p>{words}",
        *section("Error against time", picture(report)),
        *section("Candidates", table(_titles(report), [_bold(row, report) for row in report.rows]) + notes),
    ]
    if report.worst:
        parts += section(
            "The images on which the chosen file is farthest from the dense model", _worst(report, preprocess)
        )
    return document(title, parts)


def _bold(row, report) -> list:
    cells = _cells(row, report)
    return [Markup(f"<b>{text(c)}</b>") for c in cells] if row.chosen else cells


def picture(report) -> str:
    """Error against time as SVG: a hollow mark where the time is predicted, a filled one where it was measured.

    Args:
        report: a `TuneReport`.
    """
    points = [row for row in report.rows if row.error]
    if not points:
        return "<p class=note>no candidate was run on the images</p>"
    times = [t for row in points for t in (row.predicted_ms, row.measured_ms) if t] + [report.dense_ms]
    x = _axis(min(times) * 0.97, max(times) * 1.03, LEFT, WIDTH - 20)
    low, high = math.log10(min(row.error for row in points)), math.log10(max(row.error for row in points))
    y = _axis(low - 0.1, high + 0.1, HEIGHT - BOTTOM, 16)
    methods = list(dict.fromkeys(row.method for row in points))
    colour = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(methods)}
    marks = [_mark(row, x, y, colour[row.method]) for row in points]
    line = sorted((row for row in points if row.chosen or row.further), key=lambda row: row.predicted_ms)
    path = " ".join(f"{x(row.predicted_ms):.1f},{y(math.log10(row.error)):.1f}" for row in line)
    marks.insert(0, f"<polyline points='{path}' fill=none stroke='#999' stroke-dasharray='4 3' />")
    size = f"viewBox='0 0 {WIDTH} {HEIGHT}' width={WIDTH} style='max-width:100%'"
    legend = "".join(f"<span style='color:{colour[m]}'>&#9679; {text(m)}</span> &nbsp; " for m in methods)
    note = (
        f"<p class=note>{legend}<br>Filled: measured; hollow: predicted. The ring is the chosen one, the dashed line the same at other "
        f"strengths. The error is {text(report.measure)} on a logarithmic axis.</p>"
    )
    return f"<svg {size}>{_grid(report, x, y, (low, high), times)}{''.join(marks)}</svg>{note}"


def _axis(low: float, high: float, start: float, end: float):
    """value -> place on the picture."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _mark(row, x, y, colour: str) -> str:
    """A candidate: its predicted time hollow, its measured one filled, a line between the two."""
    height = f"{y(math.log10(row.error)):.1f}"
    title = f"<title>{text(row.name)}: error {row.error:.3g}, predicted {row.predicted_ms:.2f} ms"
    title += f", measured {row.measured_ms:.2f} ms</title>" if row.measured_ms else "</title>"
    place = x(row.predicted_ms)
    out = f"<circle cx={place:.1f} cy={height} r=4.5 fill=white stroke='{colour}' stroke-width=2>{title}</circle>"
    if row.measured_ms:
        real = x(row.measured_ms)
        out += f"<line x1={place:.1f} x2={real:.1f} y1={height} y2={height} stroke='{colour}' />"
        out += f"<circle cx={real:.1f} cy={height} r=5 fill='{colour}'>{title}</circle>"
        if row.chosen:
            out += f"<circle cx={real:.1f} cy={height} r=10 fill=none stroke=black stroke-width=1.5 />"
    return out


def _grid(report, x, y, errors: tuple[float, float], times: list[float]) -> str:
    """Both axes, and a line at the budget and at the dense model."""
    out, bottom = "", HEIGHT - BOTTOM
    for tick in _ticks(min(times), max(times)):
        out += f"<line x1={x(tick):.1f} x2={x(tick):.1f} y1=16 y2={bottom} stroke='#eee' />"
        out += f"<text x={x(tick) - 8:.1f} y={bottom + 16}>{tick:g}</text>"
    for power in range(math.floor(errors[0]) - 1, math.ceil(errors[1]) + 1):
        for step in STEPS:
            place = math.log10(step) + power
            if errors[0] - 0.1 <= place <= errors[1] + 0.1:
                out += f"<line x1={LEFT} x2={WIDTH - 20} y1={y(place):.1f} y2={y(place):.1f} stroke='#eee' />"
                out += f"<text x=6 y={y(place) + 4:.1f}>{step * 10.0**power:.3g}</text>"
    most = report.budget.most_ms(report.dense_ms)
    for value, words in ((report.dense_ms, "dense"), (most, "budget")):
        if math.isfinite(value) and LEFT <= x(value) <= WIDTH:
            out += (
                f"<line x1={x(value):.1f} x2={x(value):.1f} y1=16 y2={bottom} stroke='#333' stroke-dasharray='2 3' />"
            )
            out += f"<text x={x(value) + 3:.1f} y=12>{words}</text>"
    return out + f"<text x={WIDTH / 2 - 60} y={HEIGHT - 8}>milliseconds a run, batch {report.batch}</text>"


def _ticks(low: float, high: float) -> list[float]:
    """Some six round numbers between two."""
    raw = (high - low) / 6 or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (*STEPS, 10) if s * power >= raw)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _worst(report, preprocess) -> str:
    """Photos beside which patches share a token."""
    import numpy as np

    from ...engines.images import crop
    from .draw import draw_sources, side_by_side

    figures = []
    for image in report.worst:
        photo = crop(Path(image.path), preprocess)
        n = len(image.sources)
        rows = round((n * photo.height / photo.width) ** 0.5)
        tokens = draw_sources(photo, (rows, n // rows), np.array(image.sources))
        left = len(set(image.sources) - {-1})
        captions = ["input", f"{left} of {n} tokens"]
        pictures = side_by_side([photo.resize(tokens.size), tokens], captions)
        figures.append(figure(pictures, f"{Path(image.path).name}: {report.measure} {image.error:.3g}"))
    return "".join(figures)
