"""Figures of a benchmark as a picture, drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path

from ...export.errors import MissingPackageError
from ...export.files import aside

BLUE, RED, BLACK = "#4a7fb5", "#b3261e", "#222222"


def require() -> None:
    """Raises: MissingPackageError when matplotlib is not installed."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError("matplotlib", "plot", "--plot")


def save(rows: list, path: Path, *, sweep: str | None) -> None:
    """A PNG, written aside and renamed: bars of speedup beside the free bound and the MACs ratio; of a sweep, speedup
    and agreement over its values.

    Args:
        rows: `LatencyRow`s.
        path: of the picture.
        sweep: the option that was swept, None without.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row.speedup is not None and row.method != "none"]
    figure, (axes,) = plt.subplots(
        1,
        2 if sweep else 1,
        figsize=(11 if sweep else max(6, 1.2 * len(shown) + 3), 4.5),
        layout="constrained",
        squeeze=False,
    )
    if sweep:
        _draw_sweep(axes, shown, sweep)
    else:
        _draw_bars(axes[0], shown)
    with aside(path) as new:
        figure.savefig(new, dpi=130, format="png")
    plt.close(figure)


def _draw_bars(ax, rows: list) -> None:
    places = range(len(rows))
    spread = [[r.speedup - r.speedup_low for r in rows], [r.speedup_high - r.speedup for r in rows]]
    ax.bar(places, [r.speedup for r in rows], 0.6, color=BLUE, yerr=spread, capsize=3, label="measured, and its range")
    if any(r.bound for r in rows):
        limits = [(place, r.bound) for place, r in zip(places, rows) if r.bound]
        ax.scatter(*zip(*limits), marker="_", s=500, color=RED, label="free bound")
    ax.scatter(places, [r.macs_ratio for r in rows], marker="_", s=500, color=BLACK, label="MACs ratio")
    ax.axhline(1, color=BLACK, linewidth=1)
    labels = [f"{Path(r.file).stem}\n{r.runtime}, batch {r.batch}" for r in rows]
    ax.set_xticks(list(places), labels, fontsize=8)
    ax.set_ylabel("speedup over the dense model")
    ax.legend(frameon=False)


def _draw_sweep(axes, rows: list, option: str) -> None:
    speed, agreement = axes
    series: dict[tuple, list] = {}
    for row in rows:
        series.setdefault((row.runtime, row.batch), []).append(row)
    for (runtime, batch), some in series.items():
        speed.plot([r.value for r in some], [r.speedup for r in some], marker="o", label=f"{runtime}, batch {batch}")
    some = next(iter(series.values()), [])  # agreement and MACs are the same in every series
    values = [r.value for r in some]
    speed.plot(values, [r.macs_ratio for r in some], color=BLACK, linestyle=":", label="MACs ratio")
    agreement.plot(values, [r.cosine for r in some], marker="o", color=BLUE, label="mean cosine")
    if some and some[0].top1 is not None:
        agreement.plot(values, [r.top1 for r in some], marker="o", color=RED, label="top-1 agreement")
    for ax, title in ((speed, "speedup over the dense model"), (agreement, "agreement with the dense model")):
        ax.set_xlabel(option)
        ax.set_ylabel(title)
        ax.legend(frameon=False)
