"""The main job from end to end, on real weights and real photos."""

from __future__ import annotations

from pathlib import Path

from ..show import draw
from ..show.terminal import macs_words, print_json, stages, tokens_words
from . import samples

R = 13
SECONDS = 4.0  # for each runtime and batch


def run(folder: Path, as_json: bool, out) -> None:
    """Export DINOv2 ViT-S/14 dense and with ToMe r=13, verify both on photos, time them, draw what was merged.

    folder: there already; files of an earlier run are replaced. out: rich console. Exits with 1 when a file does not
        verify.
    """
    from ...engines.runners import require

    require("ort")  # what verify needs: known before a minute is spent
    photos = samples.sample_photos()
    with stages(out) as progress:
        progress("loading torch, reading the weights of DINOv2 ViT-S/14")
        checkpoint = samples.dinov2_checkpoint(folder)
        out.print(
            "[bold]1. Export[/bold]  DINOv2 ViT-S/14, 224 x 224 pixels: a photo becomes 257 tokens: 256 patches, a class token.\n"
            "           MACs are multiply-accumulates: the arithmetic of one image"
        )
        results = {
            name: _export(folder, checkpoint, name=name, method=method, progress=progress, out=out)
            for name, method in (("dense", "none"), (f"tome r={R}", "tome"))
        }
        out.print(
            "[bold]2. Verify[/bold]  each file against PyTorch, on two photos; decisions are which tokens merge with which"
        )
        reports = {name: _verify(result.path, photos, progress, out) for name, result in results.items()}
        out.print(
            "[bold]3. Time[/bold]    one thread, both files in turn; medians, and the speedup round by round (20 to 80 percentile)"
        )
        speed = _time(results, progress, out)
        out.print(
            "[bold]4. Draw[/bold]    merged patches share their mean colour; a patch that stayed alone keeps its texture"
        )
        pictures = _draw(folder, results[f"tome r={R}"], photos, progress, out)
    if as_json:
        print_json(
            {
                "files": {n: str(r.path) for n, r in results.items()},
                "macs": {n: r.macs for n, r in results.items()},
                "verify": {n: r.to_json() for n, r in reports.items()},
                "speed": speed,
                "pictures": pictures,
            }
        )
    if not all(r.passed for r in reports.values()):
        raise SystemExit(1)


def _export(folder: Path, checkpoint: Path, name: str, method: str, progress, out):
    from ... import export_onnx, load_model

    progress(f"exporting {name}")
    loaded = load_model(samples.MODEL, samples.KWARGS, checkpoint=checkpoint)
    schedule = loaded.schedule(method, **({"r": R} if method == "tome" else {}))
    asked = {"sources": method != "none", "tail": "full"}  # both files are timed: alike in their last block
    result = export_onnx(loaded, schedule, folder / f"dinov2_{method}.onnx", **asked, force=True)
    out.print(
        f"   {result.path}: tokens {tokens_words(schedule.n_tokens, result.tokens) if schedule.steps else '257 throughout'}"
    )
    out.print(f"   {'':{len(str(result.path))}}  MACs {macs_words(result.macs, result.macs_dense)}")
    return result


def _verify(path: Path, photos, progress, out):
    from ... import verify

    progress(f"verifying {path.name}")
    report = verify(path, photos)
    out.print(f"   {path}: {report.summary()}", style="green" if report.passed else "red")
    return report


def _time(results: dict, progress, out) -> list[dict]:
    """Figures per runtime and batch, for the runtimes that are installed."""
    from ... import bench
    from ...engines.runners import require
    from ...export.errors import MissingPackageError

    dense, reduced = (result.path for result in results.values())
    rows = []
    for runtime in ("ort", "openvino"):
        try:
            words = require(runtime).words
        except MissingPackageError as e:
            out.print(f"   {e}", style="yellow")
            continue
        for batch in (1, 8):
            progress(f"timing in {words}, batch {batch}")
            report = bench([reduced], dense=dense, runtimes=(runtime,), batches=(batch,), seconds=SECONDS)
            base, row = report.rows
            rows.append({**row.to_json(), "dense_ms": base.ms})
            out.print(
                f"   {words:<12} batch {batch}: dense {base.ms:7.1f} ms, ToMe {row.ms:7.1f} ms, "
                f"{row.speedup:.2f} times as fast ({row.speedup_low:.2f} to {row.speedup_high:.2f}; MACs say "
                f"{row.macs_ratio:.2f})"
            )
    return rows


def _draw(folder: Path, result, photos, progress, out) -> list[str]:
    """One picture per photo: as the model sees it, and with merged patches in one colour."""
    import numpy as np

    from ... import open_runner
    from ...engines.images import crop, normalise

    progress("drawing")
    p, names = result.provenance, []
    with open_runner(result.path) as runner:
        for photo in photos:
            image = crop(photo, p.preprocess)
            sources = runner.run({"image": normalise(image, p.preprocess)[None]})["sources"][0, p.schedule.n_prefix :]
            merged = draw.draw_sources(image, (16, 16), sources)
            n = len(np.unique(sources))
            path = folder / f"merged_{photo.stem}.png"
            captions = [f"{photo.stem}: 256 patches", f"ToMe r={R}: merged into {n} tokens"]
            draw.side_by_side([image.resize(merged.size), merged], captions).save(path)
            names.append(str(path))
            out.print(f"   {path}")
    return names
