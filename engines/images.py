"""Photos to input tensors, by a file's own preprocessing, as timm does it."""

from __future__ import annotations

import math
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
    return fit(open_image(path), preprocess)


def open_image(path: Path):
    """A photo as it is to be looked at: PIL image, RGB, turned as its EXIF says. Raises: UsageError when it is no image."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UsageError(f"images: {path} cannot be read as an image ({type(e).__name__}: {e})") from None


def fit(image, preprocess: Preprocess):
    """The part of an RGB image that the model sees, resized, cropped and padded as timm does it: PIL image of the input's size.

    Args:
        image: PIL image.
        preprocess: of the file.
    """
    from PIL import Image, ImageOps

    filters = {f.name.lower(): f for f in Image.Resampling}
    height, width = preprocess.size
    scaled_h, scaled_w = (math.floor(n / preprocess.crop) for n in preprocess.size)
    w, h = image.size
    if preprocess.crop_mode == "squash":
        target = scaled_w, scaled_h
    elif preprocess.crop_mode == "center" and scaled_h == scaled_w:
        target = (scaled_w, int(scaled_w * h / w)) if w <= h else (int(scaled_w * w / h), scaled_w)
    else:
        ratio = (max if preprocess.crop_mode == "border" else min)(h / scaled_h, w / scaled_w)
        target = round(w / ratio), round(h / ratio)
    image = image.resize(target, filters[preprocess.interpolation])
    w, h = image.size
    if w < width or h < height:
        fill = tuple(round(255 * m) for m in preprocess.mean) if preprocess.crop_mode == "border" else 0
        more_w, more_h = max(width - w, 0), max(height - h, 0)
        image = ImageOps.expand(image, (more_w // 2, more_h // 2, more_w - more_w // 2, more_h - more_h // 2), fill)
        w, h = image.size
    left, top = round((w - width) / 2), round((h - height) / 2)
    return image.crop((left, top, left + width, top + height))


def normalise(image, preprocess: Preprocess) -> np.ndarray:
    """A cropped RGB image -> [3, H, W] float32."""
    values = np.asarray(image, dtype=np.float32) / 255
    return ((values - np.float32(preprocess.mean)) / np.float32(preprocess.std)).transpose(2, 0, 1)


def load_images(paths: list[Path], preprocess: Preprocess) -> np.ndarray:
    """Photos -> [B, 3, H, W] float32. Raises: UsageError for a file that is no image."""
    return np.stack([normalise(crop(p, preprocess), preprocess) for p in paths])
