"""Weights of big_vision (.npz) into a model: timm's own loader for them, held to fill every parameter."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path

import torch
from torch import nn

from ..errors import UsageError
from .torch_file import StoredTensor

KERNEL = "embedding/kernel"
STARTS = ("", "opt/target/", "params/", "params/img/")


def fill_from_npz(model: nn.Module, path: Path, arrays: dict[str, StoredTensor]) -> list[str]:
    """Load big_vision's or JAX ViT's arrays; notes on what was resized.

    Args:
        model: a VisionTransformer of timm.
        path: of the .npz, already known to hold no Python objects.
        arrays: its arrays by name, not read.
    Raises:
        UsageError: the arrays are of another model, or do not fill this one.
    """
    start = next((s for s in STARTS if s + KERNEL in arrays), None)
    if start is None or not hasattr(model, "load_pretrained"):
        raise UsageError(
            f"checkpoint {path}: wanted the arrays of big_vision's or JAX's Vision Transformer ({KERNEL}), and a plain "
            f"VisionTransformer for them; the file has {', '.join(list(arrays)[:6])}"
        )
    depth = _depth(start, arrays)
    if depth and depth != len(model.blocks):
        raise UsageError(
            f"checkpoint {path} does not fit this model: the file has {depth} blocks, the model {len(model.blocks)}: give depth={depth}"
        )
    head = arrays.get(f"{start}head/kernel")
    if model.num_classes and head is not None and head.shape[-1] != model.num_classes:
        raise UsageError(
            f"checkpoint {path} does not fit this model: the file has {head.shape[-1]} classes, the model {model.num_classes}: "
            f"give num_classes={head.shape[-1]}"
        )
    own = model.state_dict()
    with torch.no_grad():
        for value in own.values():  # a parameter that is not loaded shows
            value.fill_(torch.nan)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model.load_pretrained(str(path))
    except Exception as e:
        raise UsageError(
            f"checkpoint {path} does not fit this model ({type(e).__name__}: {str(e).splitlines()[0][:120]})"
        ) from None
    finally:
        logging.disable(level)
    empty = [k for k, v in model.state_dict().items() if not v.isfinite().all()]
    if empty:
        raise UsageError(
            f"checkpoint {path} does not fill this model: {len(empty)} of its {len(own)} tensors are missing: {', '.join(empty[:12])}"
        )
    return _notes(model, start, arrays)


def _notes(model: nn.Module, start: str, arrays: dict[str, StoredTensor]) -> list[str]:
    notes = ["checkpoint format: big_vision or JAX ViT (.npz), by timm's own loader"]
    kernel = arrays[start + KERNEL].shape
    if len(kernel) == 4 and tuple(kernel[:2]) != tuple(model.patch_embed.patch_size):
        notes.append(f"patch embedding resized from {kernel[0]}x{kernel[1]} pixels, as timm does")
    positions = [a for n, a in arrays.items() if n.startswith(start) and n.split("/")[-1] == "pos_embedding"]
    if positions and model.pos_embed is not None and positions[0].shape[-2] != model.pos_embed.shape[1]:
        notes.append(
            f"position embedding resized from {positions[0].shape[-2]} to {model.pos_embed.shape[1]} rows, as timm does"
        )
    return notes


def _depth(start: str, arrays: dict) -> int:
    stacked = [
        a.shape[0] for n, a in arrays.items() if n.startswith(f"{start}Transformer/encoderblock/LayerNorm_0/scale")
    ]
    blocks = {
        n.split("encoderblock_")[1].split("/")[0] for n in arrays if n.startswith(f"{start}Transformer/encoderblock_")
    }
    return stacked[0] if stacked else len(blocks)
