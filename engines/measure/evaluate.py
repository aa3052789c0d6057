"""Accuracy of files on labelled images, beside the reference's and the dense model's."""

from __future__ import annotations

from pathlib import Path

from ...export.errors import UsageError

BATCH = 16


def labelled(folder: Path, provenance, limit: int | None) -> list[tuple[Path, int]]:
    """Images and their classes. Raises: UsageError for a folder without class folders, or whose names say no class."""
    from ..images import SUFFIXES

    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: wanted 1 or more images")
    if not folder.is_dir():
        raise UsageError(f"--images {folder}: wanted a folder with a folder for each class")
    names = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not names:
        raise UsageError(f"--images {folder} has no folders: wanted one for each class, with its images")
    index = _classes(names, provenance, folder)
    inside = {
        n: sorted(p for p in (folder / n).iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()) for n in names
    }
    images = [(p, index[n]) for n in names for p in inside[n]]
    if not images:
        raise UsageError(f"--images {folder}: its folders have no images ({', '.join(SUFFIXES)})")
    if limit is None or limit >= len(images):
        return images
    return [images[i * len(images) // limit] for i in range(limit)]


def _classes(names: list[str], provenance, folder: Path) -> dict[str, int]:
    """Class folder -> class index: by number, by label, or in order."""
    n = provenance.dims["classes"]
    if all(name.isascii() and name.isdigit() and len(name) < 9 and int(name) < n for name in names):
        return {name: int(name) for name in names}
    labels = {label: i for i, label in enumerate(provenance.labels)}
    if all(name in labels for name in names):
        return {name: labels[name] for name in names}
    if len(names) == n:
        return {name: i for i, name in enumerate(names)}
    raise UsageError(
        f"--images {folder} has {len(names)} folders ({', '.join(names[:3])}, ...), the model {n} classes: name them by index "
        f"(0 to {n - 1}) or by label, or have one for each class"
    )


def evaluate(
    found,
    images: list[tuple[Path, int]],
    runtime: str,
    reference: bool,
    checkpoint,
    predictor,
    progress,
    dense: bool = True,
) -> list[dict]:
    """Rows of figures: the file's, and with `reference` its reference's and (with `dense`) the dense model's."""
    import numpy as np

    from ..images import load_images
    from ..runners import in_batches, open_runner

    p, wanted = found.provenance, np.array([label for _, label in images])
    runs = {}
    with open_runner(found.path, runtime, batch=found.batch or BATCH if runtime == "openvino" else None) as runner:
        size = runner.inputs["image"][0] or BATCH
        runs[str(found.path)] = lambda image: in_batches(runner, image)[p.outputs[0]]
        if reference:
            progress("loading torch")
            import torch

            from ...export.rebuild import rebuild
            from ...export.reference import ReducedViT
            from ...export.models.score_head import score_heads

            loaded = rebuild(p, found.path, checkpoint=checkpoint, predictor=predictor)
            eager = ReducedViT(loaded.module, p.schedule, score_heads(loaded, p.schedule))
            if p.schedule.steps:
                runs[f"reference, {p.schedule.method}"] = lambda image: eager(torch.from_numpy(image)).numpy()
            if dense or not p.schedule.steps:
                runs["reference, dense"] = lambda image: loaded.module(torch.from_numpy(image)).numpy()
        logits: dict[str, list] = {name: [] for name in runs}
        for start in range(0, len(images), size):
            progress(f"{found.path.name}: image {start + 1} of {len(images)}")
            pixels = load_images([path for path, _ in images[start : start + size]], p.preprocess)
            for name, call in runs.items():
                logits[name].append(call(pixels))
    return [
        _row(name, np.concatenate(v), wanted, p.schedule if name == str(found.path) else None)
        for name, v in logits.items()
    ]


def _row(name: str, logits, wanted, schedule) -> dict:
    import numpy as np

    if not np.isfinite(logits).all():
        raise UsageError(f"{name} gives values that are not finite on these images")
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    hits = best == wanted[:, None]
    return {
        "what": name,
        "tokens": schedule.n_final if schedule else None,
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits.any(1).mean()),
    }
