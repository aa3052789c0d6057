"""A ladder for people."""

from __future__ import annotations

from pathlib import Path


def print_ladder(out, folder: Path, ladder) -> None:
    """What a ladder is, a line a rung.

    Args:
        out: rich console.
        folder: of the ladder.
        ladder: its manifest.
    """
    from rich.markup import escape
    from rich.table import Table

    from .terminal import size_words

    model, total = ladder.provenance.get("model", ""), sum(file.size for file in ladder.files)
    share = total / (ladder.weights.size + ladder.rungs[0].file.size)
    out.print(str(folder), style="bold", end="", markup=False)
    out.print(f"  {model}, {ladder.dtype}, batch {ladder.batch or 'dynamic'}, {len(ladder.rungs)} rungs", markup=False)
    out.print(
        f"  size     {size_words(total)}, of which weights {size_words(ladder.weights.size)}; {share:.3f} of the first rung alone",
        markup=False,
    )
    threads = f"{ladder.threads or 'all'} thread{'s' * (ladder.threads != 1)}"
    on = f"{ladder.images} images" if ladder.images else "noise, which says little: give --images"
    out.print(f"  times    {ladder.runtime}, {threads}, {ladder.processor}; errors on {on}", markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("rung", "ms", "speedup", "MACs ratio", ladder.measure, "last tokens", "file"):
        table.add_column(title, justify="left" if title in ("rung", "file") else "right")
    for rung in ladder.rungs:
        figures = (f"{rung.ms:.2f}", f"{rung.speedup:.3f}", f"{rung.macs_ratio:.3f}", f"{rung.error:.3g}")
        table.add_row(escape(rung.label), *figures, str(rung.tokens[-1]), rung.file.name)
    out.print(table)
