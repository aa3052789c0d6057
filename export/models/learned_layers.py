"""Layers that were trained for a method, beside the model's own weights: score heads (DynamicViT, dTPS), metric layers (DTEM)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..checkpoints import metric_layers
from ..checkpoints import score_heads as heads
from ..errors import UsageError
from ..schedule import Schedule
from . import as_plain
from .plain_vit import PlainViT, linear
from .score_head import make_heads

if TYPE_CHECKING:
    from .load import LoadedModel


@dataclass(frozen=True)
class LayerKind:
    """One kind of trained layer.

    Args:
        title: in words, plural.
        owns: whether a tensor of this name is of such a layer.
        check: (tensors, model, how many are needed) -> None; raises UsageError that lists what does not fit.
        random: (model, how many, seed) -> tensors with random weights.
        make: (tensors, model) -> the layers.
    """

    title: str
    owns: Callable[[str], bool]
    check: Callable[[dict[str, Tensor], PlainViT, int], None]
    random: Callable[[PlainViT, int, int], dict[str, Tensor]]
    make: Callable[[dict[str, Tensor], PlainViT], nn.ModuleList]


def _metric_width(plain: PlainViT) -> int:
    """Features of a metric layer whose width nobody said: as published, those of a head, twice as many from 1024 channels on."""
    head = plain.dims["attn_width"] // plain.blocks()[0].heads
    return head * (2 if plain.width >= 1024 else 1)


def _make_metric_layers(state: dict[str, Tensor], plain: PlainViT) -> nn.ModuleList:
    n = len({key.split(".")[0] for key in state})
    return nn.ModuleList(linear(state[f"{i}.metric_layer.weight"], state[f"{i}.metric_layer.bias"]) for i in range(n))


KINDS = {  # by the signal that reads them
    "score_head": LayerKind(
        "score heads",
        lambda key: "metric_layer" not in key,
        lambda state, plain, n: heads.check_heads(state, plain.width, n),
        lambda plain, n, seed: heads.random_heads(plain.width, n, seed),
        lambda state, plain: make_heads(state, plain.width),
    ),
    "metric_layer": LayerKind(
        "metric layers",
        lambda key: "metric_layer" in key,
        lambda state, plain, n: metric_layers.check_layers(state, plain.width, n_blocks=n),
        lambda plain, n, seed: metric_layers.random_layers(plain.width, _metric_width(plain), n_blocks=n, seed=seed),
        _make_metric_layers,
    ),
}


def learned_layers(loaded: LoadedModel, schedule: Schedule) -> nn.ModuleList | None:
    """The trained layers that a schedule's steps read; None where none does.

    Args:
        loaded: from `load_model`: layers of its checkpoint or predictor file, random ones where its weights are random too.
        schedule: whose steps name the signal.
    Raises:
        UsageError: trained weights come without such layers, or they are for another model.
    """
    signals = [s.signal for s in schedule.steps if s.layer is not None]
    if not signals:
        return None
    kind, plain, n = KINDS[signals[0]], as_plain(loaded.module), schedule.n_layers
    state = {key: value for key, value in loaded.heads.items() if kind.owns(key)}
    if not state and loaded.weights["source"] != "random":
        raise UsageError(
            f"{schedule.method} needs {n} trained {kind.title}, these weights have none: give "
            f'them with predictor="FILE", or the checkpoint of the authors that has them'
        )
    state = state or kind.random(plain, n, loaded.weights["seed"])
    kind.check(state, plain, n)
    return kind.make(state, plain).eval().requires_grad_(False)


def keys_as_metric(plain: PlainViT) -> dict[str, Tensor]:
    """Metric layers that give the mean of the keys over heads, with which DTEM decides as ToMe does: where nobody trained any.

    Args:
        plain: a model whose keys are not normed by head.
    Raises:
        UsageError: they are.
    """
    state = {}
    for i, block in enumerate(plain.blocks()):
        if not isinstance(block.k_norm, nn.Identity):
            raise UsageError("the model norms its keys by head: no linear layer gives their mean")
        for part in ("weight", "bias"):
            joined = getattr(block.qkv, part)
            keys = block.qkv.weight[:, 0] * 0 if joined is None else joined
            state[f"{i}.metric_layer.{part}"] = keys.chunk(3)[1].unflatten(0, (block.heads, -1)).mean(0).contiguous()
    return state
