"""Dense features under ToMe on real weights: how like the dense model's they are, whether the honesty map says where not, what they cost.

    python -m tokexport.tools.demo.features PHOTOS... [--r 8,13,16] [--seconds 60]

DINOv2 ViT-S/14 at 224 pixels (see `samples`). For each r the mean cosine of the patches to the dense model's, and the mean over photos
of the Spearman correlation between the honesty map and 1 - that cosine. With --seconds also, at r=13 and one image a run, the time of
files that give tokens, patches, or take pixels, over that of the pooled file; all in turn.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from ...export.errors import UsageError
from . import samples

TIMED_R = 13
FILES = {  # name -> what is asked for
    "pooled": {},
    "tokens": {"emit": "pooled,tokens"},
    "patches": {"emit": "pooled,patches"},
    "pixels": {"input": "uint8"},
}


@click.command()
@click.argument("photos", nargs=-1, required=True)
@click.option("--r", "values", default="8,13,16", show_default=True, help="Tokens merged in a block.")
@click.option("--seconds", default=0.0, help="Also time the outputs, for so long.")
def main(photos, values, seconds):
    """Print the figures of the dense features for each r."""
    from ...engines.images import find_images
    from ...export.models.load import load_model

    paths = find_images(list(photos))
    with tempfile.TemporaryDirectory(prefix="tokexport-") as folder:
        checkpoint = samples.dinov2_checkpoint(Path(folder))
        loaded = load_model(samples.MODEL, samples.KWARGS, checkpoint=checkpoint)
        for r in values.split(","):
            print(_likeness(loaded, r, paths, Path(folder)), flush=True)
        if seconds > 0:
            for line in _cost(loaded, paths[0], Path(folder), seconds):
                print(line, flush=True)


def _likeness(loaded, r: str, photos: list[Path], folder: Path) -> str:
    import numpy as np

    from ...engines.measure.dense_features import patch_features
    from ...engines.onnx_export import export_onnx

    path = folder / f"tome_{r}.onnx"
    export_onnx(loaded, loaded.schedule("tome", r=r), path, emit="patches", simplify=False)
    records = patch_features(path, photos)
    ranks = [record.spearman for record in records if record.spearman is not None]
    if not ranks:
        raise UsageError(f"r {r}: nothing is merged, so there is nothing to rank")
    cosine = np.mean([record.cosine for record in records])
    return f"r={r}: {len(records)} photos, mean cosine {cosine:.4f}, Spearman {np.mean(ranks):.3f}"


def _cost(loaded, photo: Path, folder: Path, seconds: float) -> list[str]:
    """Times over the pooled file's: of a run, and of pixels from a cropped photo to the output."""
    import numpy as np

    from ...engines.images import crop, normalise
    from ...engines.measure.jobs import Job, measure
    from ...engines.measure.timing import interleaved_until_precise, ratio
    from ...engines.onnx_export import export_onnx
    from ...engines.runners import open_runner
    from ...engines.runners.base import stopwatch

    schedule, files = loaded.schedule("tome", r=TIMED_R), {}
    for name, asked in FILES.items():
        files[name] = str(export_onnx(loaded, schedule, folder / f"{name}.onnx", batch=1, **asked).path)
    pairs = tuple((files[name], files["pooled"]) for name in FILES if name != "pooled")
    image = (3, *loaded.preprocess.size)
    times = measure(
        Job("ort", 1, threads=1, seconds=seconds, image=image, files=tuple(files.values()), pairs=pairs)
    ).seconds
    lines = []
    for (path, pooled), name in zip(pairs, [name for name in FILES if name != "pooled"]):
        cost = ratio(times[path], times[pooled])
        lines.append(f"{name}: {cost.middle:.3f} of the pooled file's time ({cost.low:.3f} to {cost.high:.3f})")
    cropped = crop(photo, loaded.preprocess)
    with open_runner(files["pooled"], threads=1) as plain, open_runner(files["pixels"], threads=1) as pixels:
        calls = {
            "float": stopwatch(lambda: plain.run({"image": normalise(cropped, loaded.preprocess)[None]})),
            "pixels": stopwatch(lambda: pixels.run({"image": np.asarray(cropped)[None]})),
        }
        whole = interleaved_until_precise(calls, [("pixels", "float")], seconds=seconds / 4)
    cost = ratio(whole["pixels"], whole["float"])
    return [
        *lines,
        f"pixels end to end: {cost.middle:.3f} of the time with preprocessing outside ({cost.low:.3f} to {cost.high:.3f})",
    ]


if __name__ == "__main__":
    main()
