"""DTEM's metric layers: one linear layer a block on norm1's output, out of a checkpoint, a file of their own, or from a seed.

The authors' checkpoints hold a block's attention as `attn.qkv.qkv_layer`, the layer as `attn.qkv.metric_layer`, and both in one as
`attn.qkv`: rows of queries, keys and values first, then those of the metric. Ours are named "0.metric_layer.weight" [F, C] and
"0.metric_layer.bias" [F].
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..errors import UsageError

KEY = re.compile(r"(?:.*\.)?(?:blocks\.)?(\d+)\.(?:attn\.qkv\.)?metric_layer\.(weight|bias)$")


def split_layers(state: dict[str, Tensor], file: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Metric layers by our names, and the rest of a checkpoint with the plain qkv of every block.

    Args:
        state: tensors by timm's names, as DTEM's training leaves them.
        file: its name, for errors.
    Raises:
        UsageError: a block's joined copy is not made of its two layers: one of them is stale.
    """
    layers = {f"{m[1]}.metric_layer.{m[2]}": v for k, v in state.items() if (m := KEY.match(k))}
    rest = {k: v for k, v in state.items() if not KEY.match(k)}
    for key in [k for k in rest if ".attn.qkv.qkv_layer." in k]:
        joined, block = key.replace(".qkv_layer", ""), re.search(r"blocks\.(\d+)\.", key)
        own = rest.pop(key)
        metric = layers.get(f"{block[1]}.metric_layer.{key.rpartition('.')[2]}") if block else None
        copy = rest.get(joined)
        if copy is not None and metric is not None and not torch.equal(copy, torch.cat([own, metric]).to(copy.dtype)):
            raise UsageError(
                f"checkpoint {file}: {joined} is not made of qkv_layer and metric_layer beside it: one of them is stale; "
                f"save the model again in eval mode"
            )
        rest[joined] = own
    return layers, rest


def check_layers(layers: dict[str, Tensor], width: int, *, n_blocks: int) -> None:
    """Make sure that metric layers fit a model.

    Args:
        layers: tensors by name, {"0.metric_layer.weight": ...}.
        width: of the model's tokens.
        n_blocks: of the model: one layer each.
    Raises:
        UsageError: lists what is missing, of another shape or not finite.
    """
    blocks = {int(key.split(".")[0]) for key in layers}
    if blocks != set(range(n_blocks)):
        raise UsageError(
            f"there are metric layers for {len(blocks)} blocks, the model has {n_blocks}: one is needed for each"
        )
    features = layers["0.metric_layer.weight"].shape[0] if "0.metric_layer.weight" in layers else 0
    shapes = {"weight": (features, width), "bias": (features,)}
    wanted = {f"{i}.metric_layer.{part}": shape for i in range(n_blocks) for part, shape in shapes.items()}
    wrong = [f"missing {key}" for key in wanted if key not in layers]
    wrong += [f"unexpected {key}" for key in layers if key not in wanted]
    for key, shape in wanted.items():
        value = layers.get(key)
        if value is not None and tuple(value.shape) != shape:
            wrong.append(f"{key} is {tuple(value.shape)}, wanted {shape}")
        elif value is not None and not (value.is_floating_point() and value.isfinite().all()):
            wrong.append(f"{key} is not of finite floating-point numbers")
    if wrong:
        more = [f"... and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise UsageError("metric layers do not fit:\n  " + "\n  ".join([*wrong[:8], *more]))


def random_layers(width: int, features: int, *, n_blocks: int, seed: int) -> dict[str, Tensor]:
    """Metric layers with random weights: normal with 1 / sqrt(inputs), biases zero.

    Args:
        width: of the model's tokens.
        features: that are compared.
        n_blocks: layers to make.
        seed: of the random numbers.
    """
    random, layers = torch.Generator().manual_seed(seed), {}
    for i in range(n_blocks):
        layers[f"{i}.metric_layer.weight"] = torch.randn(features, width, generator=random) / width**0.5
        layers[f"{i}.metric_layer.bias"] = torch.zeros(features)
    return layers
