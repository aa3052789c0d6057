"""The main job for every method, on this project's own small model: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from ...export.errors import UsageError
from ..show import draw
from ..show.terminal import print_json, stages
from . import digits

# Of methods that need some.
OPTIONS = {"tome": {"r": 4}, "tofu": {"r": 4}, "dtem": {"r": 4}, "diffrate": {"rates": "deit_small@2.9"}}
BATCH = 32
SECONDS = 8.0  # of timing, for all files
SHOWN = (0, 3, 8)  # held-out digits in the pictures


def chosen_methods(names: str | None) -> tuple[str, ...]:
    """The methods that are shown, the dense model first.

    Args:
        names: with commas between them; None for all.
    Raises:
        UsageError: one is unknown.
    """
    from ...export.reducers import TABLE

    wanted = list(TABLE) if names is None else [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in TABLE]
    if unknown:
        raise UsageError(f"--methods {names!r}: no method {unknown[0]!r}; wanted some of {', '.join(TABLE)}")
    return tuple(dict.fromkeys(("none", *wanted)))


def run(folder: Path, as_json: bool, out, *, methods: tuple[str, ...]) -> None:
    """Export the digits model with some methods; verify, evaluate on held-out images, time and draw each.

    Args:
        folder: there already; files of an earlier run are replaced.
        as_json: print the figures as JSON.
        out: rich console.
        methods: of `chosen_methods`.
    Raises:
        SystemExit: with 1, a file does not verify.
    """
    from ...engines.runners import require

    require("ort")
    images = digits.write_held_out(folder / "held-out")
    n, rows = len(images), []
    with stages(out) as progress:
        progress("loading torch")
        out.print(
            f"A ViT of 12 blocks, 65 tokens, trained by this project on handwritten digits; {n} held-out images of other writers"
        )
        layers = digits.write_layers(folder / "digits_layers.safetensors")
        files = {m: _export(folder, m, layers, progress) for m in methods}
        speedups = _time(files, progress)
        for method, result in files.items():
            rows.append(_row(folder, method, result=result, images=images, speedup=speedups[method], progress=progress))
    if as_json:
        print_json({"images": n, "batch": BATCH, "rows": rows})
    else:
        _print(out, rows, n)
    if not all(r["passed"] for r in rows):
        raise SystemExit(1)


def _export(folder: Path, method: str, layers: Path, progress):
    from ... import export_onnx, load_model

    progress(f"exporting {method}")
    loaded = load_model(digits.MODEL, digits.KWARGS, checkpoint=digits.WEIGHTS, predictor=layers)
    schedule = loaded.schedule(method, **OPTIONS.get(method, {}))
    return export_onnx(loaded, schedule, folder / f"digits_{method}.onnx", force=True)


def _time(files: dict, progress) -> dict[str, float]:
    """Speedup by method over the dense file, one thread."""
    from ... import bench

    progress("timing")
    dense = files["none"].path
    reduced = {str(result.path): method for method, result in files.items() if result.path != dense}
    if not reduced:
        return {"none": 1.0}
    report = bench(list(reduced), dense=dense, batches=(BATCH,), seconds=SECONDS)
    return {"none": 1.0} | {reduced[row.file]: row.speedup for row in report.rows if row.file in reduced}


def _row(folder: Path, method: str, result, images, speedup: float, progress) -> dict:
    from ... import evaluate, verify
    from ...engines.measure.labels import LabelledImage

    progress(f"verifying {method}")
    report = verify(result.path, images[:16])
    labels = [LabelledImage(path, int(path.parent.name)) for path in images]
    (accuracy,) = evaluate(result.path, labels, progress=progress)
    row = {
        "method": method,
        "file": str(result.path),
        "tokens": result.provenance.schedule.n_final,
        "macs_ratio": result.macs_dense / result.macs,
        "speedup": speedup,
        "top1": accuracy.top1,
        "passed": report.passed,
        "verify": report.summary(),
        "max_rel": report.outputs[0].max_rel,
        "decisions": report.decisions,
    }
    if result.provenance.schedule.steps:
        progress(f"drawing {method}")
        row["picture"] = str(_draw(folder, method, result, images))
    return row


def _draw(folder: Path, method: str, result, images) -> Path:
    import numpy as np

    from ...engines.images import crop, normalise
    from ...engines.parity.decisions import token_maps
    from ...engines.parity.sides import open_side

    p, shown, captions = result.provenance, [], []
    with open_side(result.path) as run:
        for i in SHOWN:
            image = crop(images[i], p.preprocess)
            last = token_maps(run(normalise(image, p.preprocess)[None]).plans, p.file_schedule)[-1][0, 1:]
            merged = draw.draw_sources(image, draw.grid_of(p), last)
            shown += [image.resize(merged.size), merged]
            captions += [f"a {images[i].parent.name}: 64 patches", f"{method}: {len(np.setdiff1d(last, [-1]))} left"]
    path = folder / f"digits_{method}.png"
    draw.side_by_side(shown, captions).save(path)
    return path


def _print(out, rows, n: int) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in (
        "method",
        "tokens left",
        "MACs ratio",
        f"speedup, batch {BATCH}",
        f"accuracy on {n}",
        "decisions equal",
        "max rel",
        "picture",
    ):
        table.add_column(title, justify="left" if title in ("method", "picture") else "right")
    for r in rows:
        decisions = "" if r["decisions"] is None else f"{r['decisions']:.1%}"
        table.add_row(
            r["method"],
            str(r["tokens"]),
            f"{r['macs_ratio']:.2f}",
            f"{r['speedup']:.2f}",
            f"{r['top1']:.2%}",
            decisions,
            f"{r['max_rel']:.1e}" + ("" if r["passed"] else " [red]FAILED[/red]"),
            Path(r.get("picture", "")).name,
        )
    out.print(table)
    out.print("All files agree with PyTorch." if all(r["passed"] for r in rows) else "Some files FAILED.", style="bold")
