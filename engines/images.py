"""Photos to input tensors, by a file's own preprocessing: with Pillow and numpy alone, so that a host that only
serves can do it.

Resizing and cropping are those of timm's evaluation transforms, pixel for pixel. Reading is ours, for photos as they
are: turned as
their EXIF data says, what is transparent on white, 16 bits a channel scaled to 8, CMYK and palettes as colours; a
damaged photo or one of
unknown range is refused.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ..export.errors import UsageError
from ..export.provenance import Preprocess

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
BACKGROUND = 255  # what is transparent lies on white


def find_images(names: str | Path | list[str | Path]) -> list[Path]:
    """Image files among files and folders, folders in order of name. Raises: UsageError for a missing path, or when
    there is none."""
    paths: list[Path] = []
    names = [names] if isinstance(names, (str, Path)) else list(names)
    if not all(str(n).strip() for n in names):
        raise UsageError("images: an empty name was given: wanted files or folders (. for this one)")
    for path in map(Path, names):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise UsageError(f"images: folder {path} has no image{_below(path)}")
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            raise UsageError(f"images: {path}: no such file or folder")
    if not paths:
        raise UsageError("images: none were given: wanted files or folders")
    return paths


def _below(folder: Path) -> str:
    """Where the images of a folder without any are, in words."""
    below = [
        p.name
        for p in sorted(folder.iterdir())
        if p.is_dir() and any(q.suffix.lower() in SUFFIXES for q in p.iterdir())
    ]
    if not below:
        return f" ({', '.join(SUFFIXES)})"
    names = ", ".join(below[:3]) + (", ..." if len(below) > 3 else "")
    return f" itself, only in its folders {names}: name those, e.g. {folder / below[0]}"


def read_image(path: str | Path, channels: int = 3):
    """A photo upright, as a PIL image in RGB or grey, 8 bits a channel.

    Args:
        path: of the photo.
        channels: of the model: 3 for RGB, 1 for grey.
    Raises:
        UsageError: it is no image, cut short, of a range that is not known, or the model takes neither colours nor
        grey.
    """
    if channels not in (1, 3):
        raise UsageError(
            f"images: the model takes {channels} channels, a photo has 3 or 1: give arrays of your own to open_runner(...).run"
        )
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            image = _eight_bits(image, path)
            if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (BACKGROUND,) * 3 + (255,)), image)
            return image.convert("L" if channels == 1 else "RGB")
    except UsageError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        raise UsageError(f"images: {path} cannot be read as an image ({type(e).__name__}: {str(e)[:200]})") from None


def _eight_bits(image, path):
    """16 bits a channel scaled to 8. Raises: UsageError for values of an unknown range."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.uint32)
    elif image.mode == "I" and image.format == "PNG":  # of 16 bits, as older Pillows open it
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
    elif image.mode in ("I", "F"):
        raise UsageError(
            f"images: {path} has {'32-bit numbers' if image.mode == 'I' else 'floating-point numbers'} of a range that is not "
            "known: save it with 8 or 16 bits a channel"
        )
    else:
        return image
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8), "L")


def crop(path: str | Path, preprocess: Preprocess):
    """The part of a photo that the model sees.

    Args:
        path: of the photo.
        preprocess: of the model.
    Returns:
        PIL image of the input's size, RGB, or grey for a model of one channel.
    Raises:
        UsageError: it is no image that can be read.
    """
    return fit(read_image(path, len(preprocess.mean)), preprocess)


def fit(image, preprocess: Preprocess):
    """An image resized and cropped to the input's size, as timm's evaluation transforms do.

    Args:
        image: PIL image in RGB or grey.
        preprocess: of the model.
    """
    from PIL import Image

    (height, width), fraction, mode = preprocess.size, preprocess.crop, preprocess.crop_mode
    scaled = math.floor(height / fraction), math.floor(width / fraction)
    if mode == "squash":
        target = scaled
    elif mode != "border" and scaled[0] == scaled[1]:
        short, long = sorted(image.size)
        size = scaled[0], int(scaled[0] * long / short)
        target = size if image.height <= image.width else size[::-1]
    else:
        ratios = image.height / scaled[0], image.width / scaled[1]
        ratio = max(ratios) if mode == "border" else min(ratios)
        target = round(image.height / ratio), round(image.width / ratio)
    if target != (image.height, image.width):
        resample = getattr(Image.Resampling, preprocess.interpolation.upper(), None)
        if resample is None:
            raise UsageError(f"preprocess: interpolation {preprocess.interpolation!r} is none of Pillow's")
        image = image.resize((max(target[1], 1), max(target[0], 1)), resample)
    fill = tuple(round(255 * v) for v in preprocess.mean) if mode == "border" else (0,) * len(preprocess.mean)
    return _center(image, height, width, fill)


def _center(image, height: int, width: int, fill: tuple[int, ...]):
    """The middle of an image; what is smaller lies on a field of `fill`."""
    from PIL import Image

    if image.width < width or image.height < height:
        field = Image.new(
            image.mode, (max(image.width, width), max(image.height, height)), fill if len(fill) > 1 else fill[0]
        )
        field.paste(image, (max(width - image.width, 0) // 2, max(height - image.height, 0) // 2))
        image = field
    top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))


def normalise(image, preprocess: Preprocess) -> np.ndarray:
    """A cropped image as the model's input.

    Args:
        image: PIL image of the input's size, RGB or grey.
        preprocess: of the model.
    Returns:
        [channels, H, W] float32.
    """
    values = np.asarray(image, dtype=np.float32) / 255
    values = values if values.ndim == 3 else values[..., None]
    return ((values - np.float32(preprocess.mean)) / np.float32(preprocess.std)).transpose(2, 0, 1)


def load_images(paths: list[Path], preprocess: Preprocess) -> np.ndarray:
    """Photos as the model's input.

    Args:
        paths: of the photos.
        preprocess: of the model.
    Returns:
        [B, channels, H, W] float32.
    Raises:
        UsageError: one of them is no image that can be read.
    """
    return np.stack([normalise(crop(p, preprocess), preprocess) for p in paths])
