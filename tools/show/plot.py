"""Figures of a benchmark as a picture, drawn by matplotlib."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ...export.errors import MissingPackageError


def require() -> None:
    """Raises: MissingPackageError when matplotlib is not installed."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError("matplotlib", "plot", "--plot")


def save(rows: list[dict], path: Path, sweep: str | None) -> None:
    """A PNG, written aside and renamed: bars of speedup beside the MACs ratio; of a sweep, speedup and agreement over its values."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [r for r in rows if "speedup" in r and r["method"] != "none"]
    figure, axes = plt.subplots(
        1,
        2 if sweep else 1,
        figsize=(11 if sweep else max(6, 1.2 * len(shown) + 3), 4.5),
        layout="constrained",
        squeeze=False,
    )
    (_sweep if sweep else _bars)(axes[0], shown, sweep)
    with tempfile.TemporaryDirectory(prefix=".tokexport-", dir=path.parent) as folder:
        figure.savefig(Path(folder) / path.name, dpi=130, format="png")
        os.replace(Path(folder) / path.name, path)
    plt.close(figure)


def _bars(axes, rows: list[dict], _) -> None:
    (ax,) = axes
    places = range(len(rows))
    spread = [[r["speedup"] - r["speedup_20"] for r in rows], [r["speedup_80"] - r["speedup"] for r in rows]]
    ax.bar(
        places, [r["speedup"] for r in rows], 0.6, color="#4a7fb5", yerr=spread, capsize=3, label="measured, 20 to 80 %"
    )
    ax.scatter(places, [r["macs_ratio"] for r in rows], marker="_", s=500, color="#222222", label="MACs ratio")
    ax.axhline(1, color="#b3261e", linewidth=1)
    ax.set_xticks(
        list(places), [f"{Path(r['file']).stem}\n{r['runtime']}, batch {r['batch']}" for r in rows], fontsize=8
    )
    ax.set_ylabel("speedup over the dense model")
    ax.legend(frameon=False)


def _sweep(axes, rows: list[dict], name: str) -> None:
    speed, agree = axes
    for runtime, batch in dict.fromkeys((r["runtime"], r["batch"]) for r in rows):
        mine = [r for r in rows if (r["runtime"], r["batch"]) == (runtime, batch)]
        x = [str(r["value"]) for r in mine]
        speed.plot(x, [r["speedup"] for r in mine], marker="o", label=f"{runtime}, batch {batch}")
    speed.plot(x, [r["macs_ratio"] for r in mine], color="#222222", linestyle=":", label="MACs ratio")
    agree.plot(x, [r["cosine"] for r in mine], marker="o", color="#4a7fb5", label="mean cosine")
    if mine[0]["top1"] is not None:
        agree.plot(x, [r["top1"] for r in mine], marker="o", color="#b3261e", label="top-1 agreement")
    for ax, title in ((speed, "speedup over the dense model"), (agree, "agreement with the dense model")):
        ax.set_xlabel(name)
        ax.set_ylabel(title)
        ax.legend(frameon=False)
