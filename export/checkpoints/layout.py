"""What a layout of checkpoints is: how its keys are told, and how its tensors become timm's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

# A classifier beside the backbone, as people name it.
CLASSIFIERS = tuple(
    (f"{name}.{part}", f"head.{part}") for name in ("head", "classifier", "fc", "linear") for part in ("weight", "bias")
)


@dataclass(frozen=True)
class Converted:
    """Tensors by timm's names, and what was done, in words."""

    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """One way to name and shape a Vision Transformer's tensors.

    name: in words, for the summary; "" for timm's own.
    anchors: keys that all of its files have; the first is the patch embedding's weight, [C, ...]. What stands before
    them is the prefix.
    convert: (tensors without the prefix, the timm model) -> Converted; keys it does not know it leaves.
    beside: (their key, ours) of parts that may stand outside the prefix: classifiers.
    """

    name: str
    anchors: tuple[str, ...]
    convert: Callable[[dict[str, Tensor], nn.Module], Converted]
    beside: tuple[tuple[str, str], ...] = CLASSIFIERS


def fuse_qkv(state: dict[str, Tensor], names: tuple[str, str, str], fused: str) -> dict[str, Tensor]:
    """Queries, keys and values of every block in one tensor, queries first; a bias that one of them lacks is zeros.

    Args:
        state: tensors by name.
        names: endings of the three, e.g. ("attn.q", "attn.k", "attn.v").
        fused: ending of the one, e.g. "attn.qkv".
    """
    import torch

    out = dict(state)
    for key in [k for k in state if k.endswith(f"{names[0]}.weight")]:
        block = key.removesuffix(f"{names[0]}.weight")
        keys = [f"{block}{n}" for n in names]
        if not all(f"{k}.weight" in out for k in keys):
            continue
        weights = [out.pop(f"{k}.weight") for k in keys]
        biases = [out.pop(f"{k}.bias", None) for k in keys]
        out[f"{block}{fused}.weight"] = torch.cat(weights)
        if any(b is not None for b in biases):
            zeros = lambda b, w: torch.zeros_like(w[:, 0]) if b is None else b
            out[f"{block}{fused}.bias"] = torch.cat([zeros(b, w) for b, w in zip(biases, weights)])
    return out
