"""Dense features as pictures: their first three principal components as colours."""

from __future__ import annotations

import numpy as np

from .draw import CAPTION, side_by_side

SIDE = 448  # pixels of the shorter side, at least


def feature_rows(records: list, grid: tuple[int, int], *, preprocess) -> list:
    """For each photo a PIL image: the photo, the dense model's features, the file's, and the honesty map.

    Colours are the components of all dense features together, so they can be compared within and between rows.

    Args:
        records: `PatchFeatures`, one a photo.
        grid: patches (rows, columns).
        preprocess: of the file.
    """
    from ...engines.images import crop

    colour = components(np.concatenate([r.dense for r in records]))
    most = max(float(r.honesty.max()) for r in records)
    rows = []
    for record in records:
        photo = crop(record.photo, preprocess).convert("RGB")
        size = _size(photo)
        pictures = [_picture(colour(values), grid, size) for values in (record.dense, record.reduced)]
        pictures.append(_picture(_heat(record.honesty / max(most, 1e-30)), grid, size))
        match = "" if record.spearman is None else f", Spearman {record.spearman:.2f}"
        share = "" if record.kept is None else f" of {int(record.kept.sum())} of {len(record.kept)} patches"
        captions = [record.photo.stem[:CAPTION], "dense features", f"reduced: cosine {record.cosine:.3f}{share}"]
        rows.append(side_by_side([photo.resize(size), *pictures], [*captions, f"honesty map{match}"]))
    return rows


def components(features: np.ndarray):
    """A function: features [N, C] -> colours [N, 3] from 0 to 1, by the first three principal components of these.

    Args:
        features: [M, C], M above 3.
    """
    features = features.astype(np.float64)
    mean = features.mean(0)
    axes = np.linalg.svd(features - mean, full_matrices=False)[2][:3].T
    axes = axes * np.where(axes[np.abs(axes).argmax(0), range(axes.shape[1])] < 0, -1, 1)  # a sign of its own choice
    values = (features - mean) @ axes
    low, high = np.percentile(values, [2, 98], axis=0)

    def colours(some: np.ndarray) -> np.ndarray:
        return (((some.astype(np.float64) - mean) @ axes - low) / np.maximum(high - low, 1e-30)).clip(0, 1)

    return colours


def _heat(share: np.ndarray) -> np.ndarray:
    """Dark to light [N, 3] for shares [N] from 0 to 1."""
    share = share.clip(0, 1)[:, None]
    return np.concatenate([share.clip(0, 0.5) * 2, share**2, (share - 0.7).clip(0) * 3], 1).clip(0, 1)


def _size(photo) -> tuple[int, int]:
    scale = max(1, -(-SIDE // min(photo.size)))
    return photo.width * scale, photo.height * scale


def _picture(colours: np.ndarray, grid: tuple[int, int], size: tuple[int, int]):
    from PIL import Image

    pixels = (colours.reshape(*grid, 3) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
