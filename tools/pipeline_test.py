"""What reduction is worth end to end, photo files in and classes out, measured.

    python -m tokexport.tools.pipeline_test photos/ --limit 256

Three ways to the same job, one after the other and round again, on two cores: one process decodes, one thread computes. A plain loop of PyTorch and
torchvision with the dense model; `tokexport embed` of the dense file; `tokexport embed` of the file with ToMe. Images a second of each, medians of
the rounds. Where decoding takes longer than the model, no reduction gains anything: `waiting` is the share of the time that the model waits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

BATCH = 16


def torch_rate(loaded, photos: list[Path]) -> float:
    """Images a second of a plain loop: torchvision's transforms in a DataLoader's one process, the model in one thread.

    Args:
        loaded: from `load_model`.
        photos: image files.
    """
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    p = loaded.preprocess
    steps = [
        transforms.Resize(round(p.size[0] / p.crop), transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(p.size),
        transforms.ToTensor(),
        transforms.Normalize(p.mean, p.std),
    ]
    transform = transforms.Compose(steps)

    class Photos(Dataset):
        def __len__(self):
            return len(photos)

        def __getitem__(self, i):
            return transform(Image.open(photos[i]).convert("RGB"))

    torch.set_num_threads(1)
    start, loader = time.perf_counter(), DataLoader(Photos(), batch_size=BATCH, num_workers=1)
    with torch.inference_mode():
        for images in loader:
            loaded.module(images).argmax(-1)
    return len(photos) / (time.perf_counter() - start)


def embed_rate(file: Path, photos: list[Path], folder: Path, runtime: str) -> tuple[float, float]:
    """Images a second of `embed`, and the share of the time that the engine waits for images.

    Args:
        file: an ONNX file.
        photos: image files.
        folder: for the list of photos and the parts.
        runtime: what runs the file.
    """
    from ..engines.embed.local import embed
    from ..engines.embed.options import EmbedOptions

    names = folder / "photos.txt"
    names.write_text("".join(f"{path.resolve()}\n" for path in photos))
    options = EmbedOptions(runtime=runtime, threads=1, workers=1, force=True)
    report = embed(file, names, output=folder / "out", options=options)
    return report.rate, 1 - report.engine_seconds / report.seconds


def main() -> None:
    """Measure and print, as JSON."""
    from .. import export_onnx, load_model
    from ..engines.images import find_images

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images")
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runtime", default="ort")
    args = parser.parse_args()
    photos = find_images(args.images)[: args.limit]
    loaded = load_model("deit_small_patch16_224")
    with tempfile.TemporaryDirectory(prefix="tokexport-") as name:
        folder, rates, waiting = Path(name), {}, {}
        files = {"dense": loaded.schedule("none"), "tome r=13": loaded.schedule("tome", r=13)}
        for label, schedule in files.items():
            export_onnx(loaded, schedule, folder / f"{label}.onnx")
        for _ in range(args.rounds):
            rates.setdefault("PyTorch and torchvision, dense", []).append(torch_rate(loaded, photos))
            for label in files:
                rate, waits = embed_rate(folder / f"{label}.onnx", photos, folder, args.runtime)
                rates.setdefault(f"embed, {label}", []).append(rate)
                waiting.setdefault(f"embed, {label}", []).append(waits)
    middles = {label: round(median(values), 2) for label, values in rates.items()}
    shares = {label: round(median(values), 3) for label, values in waiting.items()}
    print(json.dumps({"images": len(photos), "images_per_second": middles, "waiting": shares}, indent=1))


if __name__ == "__main__":
    main()
