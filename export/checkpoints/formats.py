"""Checkpoints as their authors wrote them, to timm's names: one row of a table per format, recognised from the keys alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from ..errors import UsageError

HEAD = "score_predictor."
LAYERS = {"in_conv.0": "norm", "in_conv.1": (1, 1), "out_conv.0": (2, 1), "out_conv.2": (4, 2), "out_conv.4": (None, 4)}


@dataclass(frozen=True)
class Format:
    """One way to write a tensor's name or shape that is not timm's.

    name: in words, for the summary. known: whether a file is of this format, from (its tensors, the model's, the model's patches).
    convert: (its tensors, the model's) -> its tensors by timm's names and shapes.
    """

    name: str
    known: Callable[[dict, dict, int], bool]
    convert: Callable[[dict, dict], dict]


@dataclass(frozen=True)
class Converted:
    """state: by timm's names. heads: score heads, {"0.in_conv.0.weight": ...}, or empty. notes: what was done, in words."""

    state: dict[str, Tensor]
    heads: dict[str, Tensor]
    notes: list[str]


def _renamed(*pairs: tuple[str, str], drop: str = "^$") -> Callable[[dict, dict], dict]:
    """Keys with each pattern replaced; those that match `drop` left out."""

    def convert(state, own):
        out = {}
        for key, value in state.items():
            if re.search(drop, key):
                continue
            new = key
            for pattern, text in pairs:
                new = re.sub(pattern, text, new)
            if new in out or (new != key and new in state):
                raise UsageError(f"the checkpoint holds {new} twice, as {key} too: wanted one of them")
            out[new] = value
        return out

    return convert


def _has(pattern: str) -> Callable[[dict, dict, int], bool]:
    """Whether the file has a key like this and the model has none."""
    return lambda state, own, n_patches: (
        any(re.search(pattern, k) for k in state) and not any(re.search(pattern, k) for k in own)
    )


def _rows(state: dict, own: dict, n_patches: int) -> tuple[int, int]:
    """Rows of the file's position embedding, and those of the model's that are for prefix tokens; (0, 0) where either has none."""
    pos, wanted = state.get("pos_embed"), own.get("pos_embed")
    if pos is None or wanted is None or pos.ndim != 3 or pos.shape[::2] != wanted.shape[::2]:
        return 0, 0
    return pos.shape[1], wanted.shape[1] - n_patches


def _square(n: int) -> bool:
    return n > 0 and round(n**0.5) ** 2 == n


def _lacks_class_slot(state: dict, own: dict, n_patches: int) -> bool:
    """The model adds positions to prefix tokens too, the file's position embedding has rows for a grid of patches alone."""
    rows, prefix = _rows(state, own, n_patches)
    return (
        prefix > 0
        and rows != n_patches + prefix
        and not _square(rows - prefix)
        and (rows == n_patches or _square(rows))
    )


def _add_class_slot(state: dict, own: dict) -> dict:
    """Rows of zeros for the prefix tokens, which then get no position: the same numbers."""
    pos, prefix = state["pos_embed"], sum(own[k].shape[1] for k in ("cls_token", "dist_token", "reg_token") if k in own)
    return {**state, "pos_embed": torch.cat([pos.new_zeros(1, prefix, pos.shape[-1]), pos], 1)}


def _has_class_slot(state: dict, own: dict, n_patches: int) -> bool:
    """The model adds positions to patches alone, the file's position embedding has a row for the class token too."""
    rows, prefix = _rows(state, own, n_patches)
    same = "cls_token" in state and "cls_token" in own and state["cls_token"].shape == own["cls_token"].shape
    return (
        same
        and prefix == 0
        and rows > 1
        and rows != n_patches
        and not _square(rows)
        and (rows == n_patches + 1 or _square(rows - 1))
    )


def _fold_class_slot(state: dict, own: dict) -> dict:
    """The class token's position goes into the class token: the same numbers."""
    pos = state["pos_embed"]
    return {**state, "cls_token": state["cls_token"].float() + pos[:, :1].float(), "pos_embed": pos[:, 1:]}


FORMATS = (
    Format(
        "LayerScale as gamma_1, gamma_2 (DeiT III, dTPS)",
        _has(r"^blocks\.\d+\.gamma_[12]$"),
        _renamed((r"\.gamma_([12])$", r".ls\1.gamma")),
    ),
    Format(
        "DINOv2 (its mask token left out)",
        _has(r"^(mask_token|register_tokens)$|\.mlp\.w12\."),
        _renamed(
            (r"^register_tokens$", "reg_token"),
            (r"\.mlp\.w12\.", ".mlp.fc1."),
            (r"\.mlp\.w3\.", ".mlp.fc2."),
            drop=r"^mask_token$",
        ),
    ),
    Format(
        "DiffRate (learned rates left out: give them with --rates)",
        _has(r"\.(prune|merge)_ddp\."),
        _renamed(drop=r"\.(prune|merge)_ddp\."),
    ),
    Format("position embedding without a row for the class token (zeros added)", _lacks_class_slot, _add_class_slot),
    Format(
        "position embedding with a row for the class token (added to the class token)",
        _has_class_slot,
        _fold_class_slot,
    ),
)


def convert(state: dict[str, Tensor], own: dict[str, Tensor], n_patches: int) -> Converted:
    """A checkpoint by timm's names.

    state: as in the file. own: the timm model's state dict, for its keys and shapes. n_patches: of the model's image. A file by timm's
    own names (DeiT, EViT, ToMe, MAE fine-tuned) is left as it is.
    Raises: UsageError for a checkpoint of MAE's pretraining, with its decoder; for a tensor that is there by two names.
    """
    if any(k.startswith("decoder_") for k in state):
        raise UsageError(
            "the checkpoint is of MAE's pretraining (decoder_...), which rebuilds images and has no classifier: "
            "give the file of a fine-tuned model"
        )
    heads = {k.removeprefix(HEAD): v for k, v in state.items() if k.startswith(HEAD)}
    state = {k: v for k, v in state.items() if not k.startswith(HEAD)}
    notes = (
        [f"checkpoint format: DynamicViT or dTPS (score heads for {len({k.split('.')[0] for k in heads})} stages)"]
        if heads
        else []
    )
    for row in FORMATS:
        if row.known(state, own, n_patches):
            state = row.convert(state, own)
            notes.append(f"checkpoint format: {row.name}")
    return Converted(state, heads, notes)


def read_heads(state: dict[str, Tensor], said: str) -> dict[str, Tensor]:
    """Score heads out of a file of their own ("0.in_conv...") or a whole checkpoint ("score_predictor.0.in_conv..."); said: its name.

    Raises: UsageError when there are none.
    """
    heads = {k.removeprefix(HEAD): v for k, v in state.items() if k.startswith(HEAD)} or state
    if not any(re.match(r"\d+\.(in|out)_conv\.", k) for k in heads):
        raise UsageError(
            f"predictor {said}: holds no score heads; wanted keys such as 0.in_conv.0.weight or {HEAD}0.in_conv.0.weight"
        )
    return heads


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
    """Raises: UsageError that lists what is missing, unexpected, of another shape or not finite; heads are for width and n_stages."""
    if width % 4:
        raise UsageError(f"score heads need a model whose width is a multiple of 4, this one has {width}")
    given = heads.get("0.in_conv.0.weight")
    if given is not None and given.ndim == 1 and len(given) != width:
        raise UsageError(
            f"score heads are for width {len(given)}, the model has {width}: give the heads that were trained with it"
        )
    stages = {k.split(".")[0] for k in heads}
    if len(stages) != n_stages:
        raise UsageError(f"there are score heads for {len(stages)} stages, --at names {n_stages} blocks: give as many")
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
    """Score heads with random weights: norms neutral, linear layers normal with 1 / sqrt(inputs), biases zero."""
    random, out = torch.Generator().manual_seed(seed), {}
    for s in range(n_stages):
        for key, shape in head_shapes(width).items():
            if len(shape) == 2:
                out[f"{s}.{key}"] = torch.randn(shape, generator=random) / shape[1] ** 0.5
            else:
                out[f"{s}.{key}"] = torch.ones(shape) if key == "in_conv.0.weight" else torch.zeros(shape)
    return out
