"""What a file takes: photos or noise, in the form of its input."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..export.pixels import input_shape
from ..export.provenance import Provenance
from .images import crop, load_images


def load_inputs(paths: list[Path], provenance: Provenance) -> np.ndarray:
    """Photos as a file's input.

    Args:
        paths: of the photos.
        provenance: of the file.
    Returns:
        [B, channels, H, W] float32, or the pixels themselves, [B, H, W, channels] or [B, channels, H, W] uint8.
    Raises:
        UsageError: one of them is no image that can be read.
    """
    if provenance.input == "float32":
        return load_images(paths, provenance.preprocess)
    shape = (*provenance.preprocess.size, provenance.dims["channels"])
    images = np.stack([np.asarray(crop(path, provenance.preprocess), np.uint8).reshape(shape) for path in paths])
    return images if provenance.input == "uint8-nhwc" else np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def noise(size: int, image: tuple[int, int, int], kind: str = "float32") -> np.ndarray:
    """Images [size, *image] of seeded noise.

    Args:
        size: how many.
        image: axes of one, e.g. channels, height, width.
        kind: "float32", normally distributed, or "uint8", any pixel alike.
    """
    random, shape = np.random.default_rng(0), (size, *image)
    return (
        random.integers(0, 256, shape, np.uint8)
        if kind == "uint8"
        else random.standard_normal(shape).astype(np.float32)
    )


def noise_inputs(n: int, provenance: Provenance) -> np.ndarray:
    """Seeded noise as a file's input.

    Args:
        n: images.
        provenance: of the file.
    """
    shape = input_shape(provenance.input, provenance.preprocess, provenance.dims["channels"])
    return noise(n, shape, provenance.input.partition("-")[0])
