"""Latency curves of half a block, on the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path

from ...export.files import aside

BAR = 40  # letters of the longest bar


def print_curves(out, curves: list) -> None:
    """Every measured count with its times, and a bar for their sum.

    Args:
        out: rich console.
        curves: `LatencyCurves`.
    """
    from rich.table import Table

    for c in curves:
        key = c.key
        out.print(
            f"{key.runtime} {key.runtime_version}, {key.dtype}, batch {key.batch}, {key.threads or 'all'} threads: {key.shape}",
            style="bold",
            markup=False,
        )
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in ("tokens", "attention ms", "MLP ms", "both", ""):
            table.add_column(title, justify="left" if not title else "right")
        longest = max(a + m for a, m in zip(c.attention, c.mlp))
        for n, a, m in zip(c.tokens, c.attention, c.mlp):
            table.add_row(str(n), f"{a:.3f}", f"{m:.3f}", f"{a + m:.3f}", "█" * round(BAR * (a + m) / longest))
        out.print(table)
        for method, ms in sorted(c.steps.items()):
            out.print(f"one reduction of {method}: {ms:.3f} ms", markup=False)


def draw_curves(curves: list, path: Path) -> None:
    """A PNG, written aside and renamed: what was measured as points, what is read between them as the staircase.

    Args:
        curves: `LatencyCurves`.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from ...engines.measure.latency_model import staircase

    figure, axes = plt.subplots(1, len(curves), figsize=(5.5 * len(curves), 4.2), layout="constrained", squeeze=False)
    for ax, c in zip(axes[0], curves):
        every = range(min(c.tokens), max(c.tokens) + 1)
        for name, times in (("attention", c.attention), ("MLP", c.mlp)):
            line = ax.plot(every, [staircase(c.tokens, times, n=n) for n in every], linewidth=1)
            ax.scatter(c.tokens, times, s=14, color=line[0].get_color(), label=name)
        ax.set_xlabel("tokens")
        ax.set_ylabel("milliseconds of half a block")
        ax.set_title(f"{c.key.runtime}, {c.key.dtype}, batch {c.key.batch}", fontsize=10)
        ax.legend(frameon=False)
    with aside(path) as new:
        figure.savefig(new, dpi=130, format="png")
    plt.close(figure)
