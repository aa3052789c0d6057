"""Photos to input tensors, by a file's own preprocessing and with timm's own transforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..export.errors import UsageError
from ..export.provenance import Preprocess

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def find_images(said: str | Path | list[str | Path]) -> list[Path]:
    """Image files among files and folders, folders in order of name. Raises: UsageError for a missing path, or when there is none."""
    found: list[Path] = []
    said = [said] if isinstance(said, (str, Path)) else list(said)
    if not all(str(s).strip() for s in said):
        raise UsageError("images: an empty name was given: wanted files or folders (. for this one)")
    for path in map(Path, said):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise UsageError(f"images: folder {path} has no image ({', '.join(SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UsageError(f"images: {path}: no such file or folder")
    if not found:
        raise UsageError("images: none were given: wanted files or folders")
    return found


def crop(path: Path, preprocess: Preprocess):
    """The part of a photo that the model sees: PIL image of the input's size, RGB. Raises: UsageError when it is no image."""
    from PIL import Image
    from timm.data.transforms_factory import transforms_imagenet_eval

    shape = transforms_imagenet_eval(
        preprocess.size,
        preprocess.crop,
        preprocess.crop_mode,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        normalize=False,
    ).transforms[:-1]
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UsageError(f"images: {path} cannot be read as an image ({type(e).__name__}: {e})") from None
    for step in shape:
        image = step(image)
    return image


def normalise(image, preprocess: Preprocess) -> np.ndarray:
    """A cropped RGB image -> [3, H, W] float32."""
    values = np.asarray(image, dtype=np.float32) / 255
    return ((values - np.float32(preprocess.mean)) / np.float32(preprocess.std)).transpose(2, 0, 1)


def load_images(paths: list[Path], preprocess: Preprocess) -> np.ndarray:
    """Photos -> [B, 3, H, W] float32. Raises: UsageError for a file that is no image."""
    return np.stack([normalise(crop(p, preprocess), preprocess) for p in paths])
