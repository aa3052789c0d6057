"""Tensors into a model, strictly: what was asked away is left out and said, all else must fit, and a misfit is told
in one line."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UsageError
from .score_heads import HEAD

# What training leaves beside a Vision Transformer: no part of the model that computes features or classes.
PRETRAINING = (
    "decoder_pos_embed",
    "mask_token",
    "logit_scale",
    "logit_bias",
    "lm_head",
    "projectors",
    "local_cls_norm",
)
# First words of the names of a Vision Transformer's own parts: one that the model has not would change its numbers.
PARTS = [
    "blocks",
    "cls_token",
    "dist_token",
    "reg_token",
    "register_tokens",
    "storage_tokens",
    "pos_embed",
    "patch_embed",
    "norm",
    "norm_pre",
    "fc_norm",
    "head",
    "head_dist",
    "attn_pool",
    "rope",
    "rope_embed",
    "embeddings",
    "encoder",
    "layers",
    "layer",
    "layernorm",
]
MOST_KEYS = 12


@dataclass(frozen=True)
class Difference:
    """Something that sets a file apart from the model.

    fact: in words. advice: what to do. keys: the pattern of the keys it explains.
    """

    fact: str
    advice: str
    keys: str


def fill(
    model: nn.Module, state: dict[str, torch.Tensor], file: str, pos_grid: tuple[int, int] | None = None
) -> list[str]:
    """Load a state dict strictly.

    Args:
        model: of timm.
        state: tensors by timm's names.
        file: its name, for errors.
        pos_grid: rows and columns of the position embedding in the file; None to guess them.
    Returns:
        Notes on what was left out and on resized position embeddings, in words.
    Raises:
        UsageError: something is missing, foreign, of another shape or not finite.
    """
    own = model.state_dict()
    state, notes = left_out(model, state, own)
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if "pos_embed" in state and "pos_embed" in own:
        state["pos_embed"], note = resized_positions(model, state["pos_embed"], pos_grid)
        notes += note
    elif pos_grid is not None:
        raise UsageError("pos_grid: the model or the checkpoint has no position embedding: leave it out")
    shapes = [k for k in own if k in state and state[k].shape != own[k].shape]
    if missing or unexpected or shapes:
        raise UsageError(_misfit(file, state, own=own, missing=missing, unexpected=unexpected, shapes=shapes))
    broken = [k for k, v in state.items() if not v.is_floating_point() or not v.isfinite().all()]
    if broken:
        raise UsageError(
            f"checkpoint {file}: tensors that are not finite floating-point numbers: {', '.join(broken[:5])}"
            + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
        )
    model.load_state_dict(state)
    return notes


def left_out(model: nn.Module, state: dict, own: dict) -> tuple[dict, list[str]]:
    """Tensors without those that were asked away or are no part of a Vision Transformer, and notes on them.

    Args:
        model: of timm.
        state: tensors of the file.
        own: the model's.
    """
    head = [
        k for k in state if model.num_classes == 0 and k not in own and re.match(r"(head|head_dist|pre_logits)\.", k)
    ]
    foreign = [k for k in state if k not in own and k not in head and _is_foreign(k)]
    notes = [f"the classifier is left out (num_classes=0): {_words(head)}"] if head else []
    if foreign:
        decoder = " (the decoder of MAE's pretraining)" if any(k.startswith("decoder_") for k in foreign) else ""
        notes.append(f"left out, for they are no part of the model: {_words(foreign)}{decoder}")
    return {k: v for k, v in state.items() if k not in head and k not in foreign}, notes


def _is_foreign(key: str) -> bool:
    first = key.split(".")[0]
    return first in PRETRAINING or first.startswith("decoder_") or ("." in key and first not in PARTS)


def _words(keys: list[str]) -> str:
    """Keys by their first words: "head (2 tensors), criterion"."""
    counts: dict[str, int] = {}
    for key in keys:
        counts[key.split(".")[0]] = counts.get(key.split(".")[0], 0) + 1
    names = [f"{name} ({n} tensors)" if n > 1 else name for name, n in counts.items()]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def beside_note(others: dict) -> list[str]:
    """What stands in the file beside the model's prefix and is left out, in words."""
    keys = [k for k in others if HEAD not in f"{k}."]
    return [f"other parts of the file are left out: {_words(keys)}"] if keys else []


def _misfit(file: str, state: dict, own: dict, missing: list, unexpected: list, shapes: list) -> str:
    """The message for a file that does not fit: one line, then the keys that no difference explains in few words."""
    apart = differences(state, own)
    fits = len(own) - len(missing) - len(shapes)
    first = f"checkpoint {file} does not fit this model: {fits} of its {len(own)} tensors match"
    for d in apart:
        first += f"; {d.fact}"
    wrong = [f"missing {k}" for k in missing] + [f"unexpected {k}" for k in unexpected]
    wrong += [f"{k} is {tuple(state[k].shape)}, wanted {tuple(own[k].shape)}" for k in shapes]
    keys = [*missing, *unexpected, *shapes]
    open_keys = [w for w, k in zip(wrong, keys) if not any(re.search(d.keys, k) for d in apart)]
    advice = "; ".join(dict.fromkeys(d.advice for d in apart)) or (
        "give the model and the options it was trained with (e.g. num_classes, img_size)"
    )
    if apart and not open_keys and len(keys) <= 2:
        return f"{first}: {advice}"
    listed = [*open_keys, *(w for w in wrong if w not in open_keys)]
    more = [f"and {len(listed) - MOST_KEYS} more"] if len(listed) > MOST_KEYS else []
    return "\n  ".join([first, *listed[:MOST_KEYS], *more]) + f"\n{advice}"


def _depth(keys) -> int:
    return 1 + max((int(m[1]) for k in keys if (m := re.match(r"blocks\.(\d+)\.", k))), default=-1)


def differences(state: dict, own: dict) -> list[Difference]:
    """What sets a file apart from a model, the weightiest first.

    Args:
        state: tensors of the file by timm's names.
        own: the model's.
    """
    out = []
    add = lambda fact, advice, keys: out.append(Difference(fact, advice, keys))
    if not any(k in state for k in own):
        add("nothing in the file is named like a Vision Transformer of timm", "give the file of such a model", "")
        return out
    if _depth(state) != _depth(own):
        keys = rf"^blocks\.({'|'.join(map(str, range(min(_depth(state), _depth(own)), max(_depth(state), _depth(own)))))})\."
        add(
            f"the file has {_depth(state)} blocks, the model {_depth(own)}",
            f"give depth={_depth(state)}, or its model",
            keys,
        )
    out += _embedding(state, own) + _tokens(state, own) + _blocks(state, own) + _heads(state, own)
    return out


def _embedding(state: dict, own: dict) -> list[Difference]:
    given, wanted = state.get("patch_embed.proj.weight"), own["patch_embed.proj.weight"]
    if given is None or given.ndim != 4:
        return []
    if given.shape[0] != wanted.shape[0]:
        fact = f"the file is for width {given.shape[0]}, the model has {wanted.shape[0]}"
        return [Difference(fact, f"give its model, or embed_dim={given.shape[0]}", "")]
    out = []
    if given.shape[1] != wanted.shape[1]:
        n = given.shape[1]
        fact = f"the file is for images of {n} channel{'s' if n > 1 else ''}, the model for {wanted.shape[1]}"
        out.append(Difference(fact, f"give in_chans={n}", r"^patch_embed\.proj\.weight$"))
    if given.shape[2:] != wanted.shape[2:]:
        size = lambda s: f"{s[2]}" if s[2] == s[3] else f"{s[2]}x{s[3]}"
        fact = f"the file is for patches of {size(given.shape)} pixels, the model for {size(wanted.shape)}"
        out.append(Difference(fact, f"give patch_size={size(given.shape)}", r"^(patch_embed\.proj\.weight|pos_embed)$"))
    return out


def _tokens(state: dict, own: dict) -> list[Difference]:
    out = []
    for key, word, advice in (
        ("dist_token", "a distillation token", "give its model, e.g. deit_small_distilled_patch16_224"),
        ("cls_token", "a class token", "give class_token=true"),
    ):
        if key in state and key not in own:
            out.append(Difference(f"the file has {word}, the model none", advice, rf"^({key}$|head_dist\.|pos_embed$)"))
        elif key in own and key not in state:
            advice = (
                "give the model it was trained as" if key == "dist_token" else "give class_token=false global_pool=avg"
            )
            out.append(Difference(f"the model has {word}, the file none", advice, rf"^({key}$|head_dist\.|pos_embed$)"))
    n = [t["reg_token"].shape[1] if "reg_token" in t else 0 for t in (state, own)]
    if n[0] != n[1]:
        fact = f"the file has {n[0] or 'no'} register tokens, the model {n[1] or 'none'}"
        out.append(Difference(fact, f"give reg_tokens={n[0]}, or its model", r"^(reg_token|pos_embed)$"))
    if "norm_pre.weight" in state and "norm_pre.weight" not in own:
        keys = r"^(norm_pre\.|patch_embed\.proj\.bias$)"
        out.append(Difference("the file has a norm before the blocks (CLIP)", "give pre_norm=true, or its model", keys))
    pos = [t["pos_embed"].shape if "pos_embed" in t else None for t in (state, own)]
    if pos[0] and pos[1] and len(pos[0]) == 3 and pos[0][::2] == pos[1][::2] and pos[0] != pos[1] and not out:
        fact = f"the file has {pos[0][1]} positions, the model {pos[1][1]}, and no square grid gives them"
        out.append(
            Difference(fact, "say their grid with pos_grid=(rows, columns), or give its img_size", "^pos_embed$")
        )
    return out


def _blocks(state: dict, own: dict) -> list[Difference]:
    rows = (
        (r"\.(ls[12]\.gamma|gamma_[12])$", "LayerScale", "give its model, e.g. deit3_small_patch16_224, or init_values=1e-5", "give a model without it, or init_values=none"),
        (r"\.attn\.(qkv\.bias|[qv]_bias)$", "biases of queries and values", "give qkv_bias=true", "give qkv_bias=false"),
        (r"\.attn\.[qk]_norm\.", "norms of queries and keys", "give qk_norm=true", "give qk_norm=false"),
        (r"\.mlp\.(fc1_g|fc1_x|w12|w[123])\.", "a SwiGLU MLP", "give its model, e.g. vit_giant_patch14_dinov2", "give a model with a plain MLP"),
    )  # fmt: skip
    out = []
    for pattern, word, add, leave in rows:
        has = [any(re.search(pattern, k) for k in keys) for keys in (state, own)]
        if has[0] != has[1]:
            fact = f"the file has {word}, the model none" if has[0] else f"the model has {word}, the file none"
            out.append(Difference(fact, add if has[0] else leave, pattern))
    return out


def _heads(state: dict, own: dict) -> list[Difference]:
    out = []
    if "fc_norm.weight" in state and "norm.weight" in own and "norm.weight" not in state:
        fact = "the file was trained with average pooling (MAE fine-tuned)"
        out.append(Difference(fact, "give global_pool=avg", r"^(fc_norm|norm)\."))
    elif "norm.weight" in state and "norm.weight" not in own:
        fact = "the file's last norm is before its pooling, the model's after it"
        out.append(Difference(fact, "give global_pool=token, or fc_norm=false", r"^(fc_norm|norm)\."))
    if any(k.startswith("attn_pool.") for k in state) != any(k.startswith("attn_pool.") for k in own):
        has = "file" if any(k.startswith("attn_pool.") for k in state) else "model"
        advice = "give global_pool=map, or its model (vit_*_siglip_*)" if has == "file" else "give its own global_pool"
        out.append(Difference(f"only the {has} pools by attention", advice, r"^attn_pool\."))
    layers = sorted({k.rsplit(".", 1)[0] for k in state if re.match(r"head\.[^.]+\.", k)})
    given, wanted = state.get("head.weight"), own.get("head.weight")
    if layers:
        fact = f"the file's classifier has layers of its own ({', '.join(layers[:4])})"
        out.append(Difference(fact, "give num_classes=0 for the features without it", r"^head\."))
    elif wanted is not None and given is None:
        out.append(Difference("the file has no classifier", "give num_classes=0", r"^head\."))
    elif wanted is not None and given.ndim == 2 and given.shape[0] != wanted.shape[0]:
        n = given.shape[0]
        fact = f"the file has {n} class{'es' if n > 1 else ''}, the model {wanted.shape[0]}"
        out.append(Difference(fact, f"give num_classes={n}", r"^head(_dist)?\."))
    return out


def resized_positions(
    model: nn.Module, pos: torch.Tensor, pos_grid: tuple[int, int] | None = None
) -> tuple[torch.Tensor, list[str]]:
    """A position embedding for the model's grid of patches, resized as timm does, and notes.

    Args:
        model: of timm, with a position embedding.
        pos: [1, prefix tokens + patches, C] of the file.
        pos_grid: rows and columns in the file. None guesses: the model's own grid for as many patches, else a square,
        else the
            model's shape; what is no such grid stays as it is.
    Raises:
        UsageError: pos_grid is not the number of patches in the file.
    """
    own, prefix = model.pos_embed, 0 if model.no_embed_class else model.num_prefix_tokens
    grid = tuple(model.patch_embed.grid_size)
    if pos.ndim != 3 or pos.shape[0] != 1 or pos.shape[-1] != own.shape[-1] or pos.shape[1] <= prefix:
        return pos, []
    n, notes = pos.shape[1] - prefix, []
    if pos_grid is not None:
        if pos_grid[0] * pos_grid[1] != n or min(pos_grid) < 1:
            raise UsageError(
                f"pos_grid {pos_grid[0]}x{pos_grid[1]}: the file has {n} positions of patches; wanted rows x columns of them"
            )
        source = tuple(pos_grid)
    else:
        source = _guessed_grid(n, grid)
    if source is None:
        return pos, []
    side = round(n**0.5)
    if source == grid:
        if pos_grid is None and grid[0] != grid[1] and side * side == n:
            notes.append(f"the {n} positions of the file are taken for {grid[0]}x{grid[1]}, as in the model: if they are "
                         f"another grid ({side}x{side}?), say it with pos_grid")  # fmt: skip
        return pos, notes
    from timm.layers import resample_abs_pos_embed

    pos = resample_abs_pos_embed(pos.float(), new_size=list(grid), old_size=list(source), num_prefix_tokens=prefix)
    guess = (
        "" if pos_grid is not None else f" ({source[0]}x{source[1]} is a guess from {n} positions; pos_grid states it)"
    )
    return pos, [
        f"position embedding resized from {source[0]}x{source[1]} to {grid[0]}x{grid[1]} patches, as timm does{guess}"
    ]


def _guessed_grid(n: int, grid: tuple[int, int]) -> tuple[int, int] | None:
    side = round(n**0.5)
    if n == grid[0] * grid[1]:
        return grid
    if side * side == n:
        return side, side
    factor = (n / (grid[0] * grid[1])) ** 0.5
    rows, columns = round(grid[0] * factor), round(grid[1] * factor)
    return (rows, columns) if rows * columns == n and rows * grid[1] == columns * grid[0] else None
