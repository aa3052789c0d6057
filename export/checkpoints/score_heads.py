"""Score heads of DynamicViT and dTPS: their tensors' names and shapes, out of a file or from a seed."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..errors import UsageError
from .metric_layers import split_layers

HEAD = "score_predictor."  # how the authors' models name them
LAYERS = {"in_conv.0": "norm", "in_conv.1": (1, 1), "out_conv.0": (2, 1), "out_conv.2": (4, 2), "out_conv.4": (None, 4)}


def split_heads(state: dict) -> tuple[dict, dict]:
    """Score heads by their own names ("0.in_conv.0.weight"), whatever prefix the file has, and all the rest of a
    state dict."""
    heads, rest = {}, {}
    for key, value in state.items():
        _, inside, name = f".{key}".rpartition(f".{HEAD}")
        (heads if inside else rest)[name] = value
    return heads, {k.removeprefix("."): v for k, v in rest.items()}


def read_heads(state: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    """Score heads, or DTEM's metric layers, out of a file of their own ("0.in_conv...") or a whole checkpoint
    ("score_predictor.0.in_conv...").

    Args:
        state: tensors of the file by name.
        file: its name, for errors.
    Raises:
        UsageError: there are none.
    """
    layers, rest = split_layers(state, file)
    plain = any(re.match(r"\d+\.(in|out)_conv\.", k) for k in rest)
    heads = split_heads(rest)[0] or (rest if plain else {})
    if not heads and not layers:
        raise UsageError(
            f"predictor {file}: holds no score heads and no metric layers; wanted keys such as 0.in_conv.0.weight, "
            f"{HEAD}0.in_conv.0.weight or blocks.0.attn.qkv.metric_layer.weight"
        )
    return heads | layers


def head_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one score head's tensors."""
    out = {}
    for layer, kind in LAYERS.items():
        if kind == "norm":
            out |= {f"{layer}.weight": (width,), f"{layer}.bias": (width,)}
        else:
            rows = 2 if kind[0] is None else width // kind[0]
            out |= {f"{layer}.weight": (rows, width // kind[1]), f"{layer}.bias": (rows,)}
    return out


def check_heads(heads: dict[str, Tensor], width: int, n_stages: int) -> None:
    """Make sure that score heads fit a model and its stages.

    Args:
        heads: tensors by name, {"0.in_conv.0.weight": ...}.
        width: of the model's tokens.
        n_stages: heads that are needed, one a stage.
    Raises:
        UsageError: lists what is missing, unexpected, of another shape or not finite.
    """
    if width % 4:
        raise UsageError(f"score heads need a model whose width is a multiple of 4, this one has {width}")
    given = heads.get("0.in_conv.0.weight")
    if given is not None and given.ndim == 1 and len(given) != width:
        raise UsageError(
            f"score heads are for width {len(given)}, the model has {width}: give the heads that were trained with it"
        )
    stages = {k.split(".")[0] for k in heads}
    if len(stages) != n_stages:
        raise UsageError(f"there are score heads for {len(stages)} stages, at names {n_stages} blocks: give as many")
    wanted = {f"{s}.{k}": shape for s in range(n_stages) for k, shape in head_shapes(width).items()}
    wrong = [f"missing {k}" for k in wanted if k not in heads] + [f"unexpected {k}" for k in heads if k not in wanted]
    wrong += [
        f"{k} is {tuple(heads[k].shape)}, wanted {s}"
        for k, s in wanted.items()
        if k in heads and tuple(heads[k].shape) != s
    ]
    here = {k: heads[k] for k in wanted if k in heads}
    wrong += [
        f"{k} is {str(t.dtype).removeprefix('torch.')}, wanted floats"
        for k, t in here.items()
        if not t.is_floating_point()
    ]
    wrong += [f"{k} is not finite" for k, t in here.items() if t.is_floating_point() and not t.isfinite().all()]
    if wrong:
        more = [f"... and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise UsageError("score heads do not fit:\n  " + "\n  ".join([*wrong[:8], *more]))


def random_heads(width: int, n_stages: int, seed: int) -> dict[str, Tensor]:
    """Score heads with random weights: norms neutral, linear layers normal with 1 / sqrt(inputs), biases zero.

    Args:
        width: of the model's tokens.
        n_stages: heads to make.
        seed: of the random numbers.
    """
    random, out = torch.Generator().manual_seed(seed), {}
    for s in range(n_stages):
        for key, shape in head_shapes(width).items():
            if len(shape) == 2:
                out[f"{s}.{key}"] = torch.randn(shape, generator=random) / shape[1] ** 0.5
            else:
                out[f"{s}.{key}"] = torch.ones(shape) if key == "in_conv.0.weight" else torch.zeros(shape)
    return out
