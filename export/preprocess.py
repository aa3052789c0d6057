"""Where a model's preprocessing comes from: what is stated, the checkpoint's folder, or timm's data configuration."""

from __future__ import annotations

import math
from dataclasses import replace

from .errors import UsageError
from .provenance import Preprocess

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
PIL_NUMBERS = dict(enumerate(("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")))
STATED = ("mean", "std", "interpolation", "crop_pct", "size")


def of_model(model) -> Preprocess:
    """timm's data configuration of a model, for the image size it was made with; a grey model gets one mean, that of
    the three."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model, verbose=False)
    channels = model.patch_embed.proj.in_channels
    return Preprocess(
        tuple(model.patch_embed.img_size),
        _per_channel(config["mean"], channels),
        std=_per_channel(config["std"], channels),
        interpolation=config["interpolation"],
        crop=float(config["crop_pct"]),
        crop_mode=config["crop_mode"],
    )


def _per_channel(values, channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(float(v) for v in values)
    return (round(sum(values) / len(values), 6),) * channels


def crop_of(size: int, resized: int) -> float:
    """The fraction that makes timm's transforms resize to `resized` pixels for a crop of `size`: floor(size /
    fraction) is exact.

    Args:
        size: pixels of the crop.
        resized: pixels before it, at least as many.
    """
    fraction = size / resized
    while math.floor(size / fraction) < resized:
        fraction = math.nextafter(fraction, 0)
    return fraction


def of_transformers(config: dict, size: tuple[int, int]) -> Preprocess:
    """The preprocessing of a Hugging Face preprocessor_config.json.

    Args:
        config: of the file.
        size: (height, width) of the model's images.
    Raises:
        UsageError: a step that these transforms have not.
    """
    scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    normal = config.get("do_normalize", True)
    mean = config.get("image_mean") or [0.5] * 3 if normal else [0.0] * 3
    std = config.get("image_std") or [0.5] * 3 if normal else [1.0] * 3
    factor = 255 * scale  # its mean is of values x scale, ours of values / 255
    resample = config.get("resample", 2)
    if resample not in PIL_NUMBERS:
        raise UsageError(f"preprocessor_config.json: resample {resample!r} is none of Pillow's: state interpolation")
    crop, mode = _crop(config, size)
    return Preprocess(
        tuple(size),
        tuple(float(m) / factor for m in mean),
        std=tuple(float(s) / factor for s in std),
        interpolation=PIL_NUMBERS[resample],
        crop=crop,
        crop_mode=mode,
    )


def _crop(config: dict, size: tuple[int, int]) -> tuple[float, str]:
    resize, cut = config.get("size"), config.get("crop_size")
    edges = lambda v: (
        (v, v) if isinstance(v, int) else (v.get("height"), v.get("width")) if isinstance(v, dict) else (None, None)
    )
    cut = edges(cut)[0] if config.get("do_center_crop", cut is not None) else None
    if not config.get("do_resize", True):
        raise UsageError(
            "preprocessor_config.json: do_resize is false, so photos must come in the model's size: state crop_pct"
        )
    if isinstance(resize, dict) and "shortest_edge" in resize:
        short = resize["shortest_edge"]
        return crop_of(cut or short, short) if cut and cut <= short else 1.0, "center"
    height = edges(resize)[0] if resize is not None else size[0]
    if not isinstance(height, int) or height < 1:
        raise UsageError("preprocessor_config.json: size is of no known form; state crop_pct, mean and std")
    return (crop_of(cut, height) if cut and cut < height else 1.0), "squash"


def of_timm(config: dict, preprocess: Preprocess) -> Preprocess:
    """The preprocessing of a timm folder's pretrained_cfg.

    Args:
        config: of the folder.
        preprocess: of the model, for what the folder does not say.
    """
    channels = len(preprocess.mean)
    return replace(
        preprocess,
        mean=_per_channel(config.get("mean") or preprocess.mean, channels),
        std=_per_channel(config.get("std") or preprocess.std, channels),
        interpolation=config.get("interpolation") or preprocess.interpolation,
        crop=float(config.get("crop_pct") or preprocess.crop),
        crop_mode=config.get("crop_mode") or preprocess.crop_mode,
    )


def with_stated(preprocess: Preprocess, stated: dict) -> Preprocess:
    """A preprocessing with what a user states in place of its own.

    Args:
        preprocess: of the model or its folder.
        stated: of mean, std (one number for all channels, or one a channel, for values in [0, 1]), interpolation,
        crop_pct; size is
            the model's own affair.
    Raises:
        UsageError: another name or a value out of range.
    """
    strange = [k for k in stated if k not in STATED]
    if strange:
        raise UsageError(f"preprocess: {strange[0]!r} is unknown; wanted {', '.join(STATED)}")
    values = {k: v for k, v in stated.items() if v is not None and k != "size"}
    out, channels = {}, len(preprocess.mean)
    for key in ("mean", "std"):
        if key in values:
            given = values[key] if isinstance(values[key], (tuple, list)) else (values[key],)
            fits = len(given) in (1, channels) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in given)
            if not fits or (key == "std" and min(given) <= 0):
                raise UsageError(
                    f"{key} {values[key]!r}: wanted one number or {channels}, for values in [0, 1]{', above 0' * (key == 'std')}"
                )
            out[key] = tuple(float(v) for v in given) * (channels if len(given) == 1 else 1)
    if "interpolation" in values:
        if values["interpolation"] not in INTERPOLATIONS:
            raise UsageError(f"interpolation {values['interpolation']!r}: wanted one of {', '.join(INTERPOLATIONS)}")
        out["interpolation"] = values["interpolation"]
    if "crop_pct" in values:
        crop = values["crop_pct"]
        if not isinstance(crop, (int, float)) or not 0 < crop <= 1:
            raise UsageError(f"crop_pct {crop!r}: wanted the fraction of the resized image that is kept, above 0 to 1")
        out["crop"] = float(crop)
    return replace(preprocess, **out)


def words(preprocess: Preprocess) -> str:
    """A preprocessing in one line: "224x224, center crop of 0.9, bicubic, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"."""
    numbers = lambda values: " ".join(f"{v:.4g}" for v in (values if len(set(values)) > 1 else values[:1]))
    p, grey = preprocess, ", in grey" if len(preprocess.mean) == 1 else ""
    how = {"center": "center crop", "squash": "squashed, crop", "border": "padded, crop"}.get(p.crop_mode, p.crop_mode)
    return f"{p.size[0]}x{p.size[1]}{grey}, {how} {p.crop:.4g}, {p.interpolation}, mean {numbers(p.mean)}, std {numbers(p.std)}"
