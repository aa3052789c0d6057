"""A benchmark's figures as tables for a terminal."""

from __future__ import annotations

from pathlib import Path


def print_report(out, report) -> None:
    """Everything a `LatencyReport` says.

    Args:
        out: rich console.
        report: the report.
    """
    machine = report.machine
    hardware = ", ".join([machine["cpu"], *machine.get("gpus", ())])
    driver = f", driver {machine['driver']}, CUDA {machine['cuda']}" if machine.get("gpus") else ""
    threads = f"{report.threads} thread{'s' * (report.threads != 1)}" if report.threads else "the runtime's own threads"
    timed = [row for row in report.rows if not row.error]
    processes = max((row.processes for row in timed), default=1)
    how = (
        f"{processes} processes: mean (least-largest) of medians" if processes > 1 else "one process: medians (20-80 %)"
    )
    out.print(f"{hardware}{driver}, {threads}; interleaved, {how}", style="bold", markup=False)
    runtimes = {
        name: text
        for name, text in machine["versions"].items()
        if name.startswith(("onnxruntime", "openvino", "torch", "tensorrt"))
    }
    out.print(", ".join(f"{name} {number}" for name, number in runtimes.items()), markup=False)
    for words in dict.fromkeys(f"{row.runtime}: {row.timed}" for row in timed):
        out.print(f"timed in {words}", markup=False)
    _print_rows(out, report)
    _print_break_even(out, report.rows)
    _print_profiles(out, report.profiles)


def _print_rows(out, report) -> None:
    """The figures in two tables: what a file gains, and how long it takes."""
    from rich.markup import escape
    from rich.table import Table

    bound, swept = any(row.bound for row in report.rows), report.swept
    identity = ["runtime", "batch", swept or "file"]
    gain = ["ms", "range", "speedup", "range", *(["free bound", "/ bound", "range"] if bound else [])]
    gain += ["MACs ratio", "/ MACs"] + (["cosine to dense", "top-1"] if swept else [])
    tables = Table(box=None, padding=(0, 2, 0, 0)), Table(box=None, padding=(0, 2, 0, 0))
    details = ["p50 ms", "p90", "p95", "p99", "whole call ms", "images/s", "rounds"]
    for table, titles in zip(tables, (gain, details)):
        for title in (*identity, *titles):
            table.add_column(
                title, justify="left" if title in ("runtime", "file") else "right", no_wrap=title != "file"
            )
    for row in report.rows:
        name = escape(row.value or Path(row.file).name if row.method != "none" else row.file)
        first = [row.runtime, str(row.batch), name]
        if row.error:
            tables[0].add_row(*first, "[red]failed[/red]")
            continue
        tables[0].add_row(*first, *_gain(row, bound=bound, swept=swept is not None))
        latency = [f"{row.percentiles[p]:.2f}" for p in ("50", "90", "95", "99")]
        tables[1].add_row(*first, *latency, f"{row.end_to_end_ms:.2f}", f"{row.images_per_second:.1f}", str(row.rounds))
    for table in tables:
        out.print(table)
    for row in report.rows:
        if row.error:
            out.print(f"{row.runtime}, batch {row.batch}, {row.file}: failed: {row.error}", style="red", markup=False)


def _gain(row, *, bound: bool, swept: bool) -> list[str]:
    """Cells of a row behind its name; a dense file is compared with nothing."""
    cells = [f"{row.ms:.2f}", f"{row.ms_low:.2f}-{row.ms_high:.2f}"]
    if row.method == "none":
        return cells
    colour = "green" if row.speedup > 1 else "red"
    cells += [f"[{colour}]{row.speedup:.3f}[/{colour}]", f"{row.speedup_low:.3f}-{row.speedup_high:.3f}"]
    if bound and row.bound:
        near = f"{row.of_bound_low:.3f}-{row.of_bound_high:.3f}"
        cells += [f"{row.bound:.3f}", f"[bold]{row.of_bound:.3f}[/bold]", near]
    elif bound:
        cells += ["", "", ""]
    cells += [f"{row.macs_ratio:.3f}", f"{row.quotient:.3f}"]
    if swept:
        cells += [f"{row.cosine:.4f}", "" if row.top1 is None else f"{row.top1:.1%}"]
    return cells


def _print_break_even(out, rows) -> None:
    from ...engines.measure.latency import break_even

    least = min((row.batch for row in rows), default=0)
    for (runtime, file), batch in break_even(rows).items():
        if batch != least:
            words = (
                f"faster than dense from batch {batch} on" if batch else "no faster than dense at any batch measured"
            )
            out.print(f"{Path(file).name} in {runtime}: {words}", style=None if batch else "red", markup=False)


def _print_profiles(out, profiles) -> None:
    from rich.markup import escape
    from rich.table import Table

    if not profiles:
        return
    parts = list(dict.fromkeys(part for p in profiles for part in p.parts))
    table = Table(
        title="milliseconds by part, from the runtime's profiler, which takes time itself",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for title in ("runtime", "batch", "file", *parts):
        table.add_column(title, justify="left" if title in ("runtime", "file") else "right")
    for p in profiles:
        figures = (f"{p.parts.get(part, 0.0):.2f}" for part in parts)
        table.add_row(p.runtime, str(p.batch), escape(Path(p.file).name), *figures)
    out.print(table)
