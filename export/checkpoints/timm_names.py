"""Checkpoints by timm's names and their kin: what authors name otherwise (DeiT III, DINOv2, DiffRate), then timm's
own filters."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .layout import CLASSIFIERS, Converted, Layout
from .transformers_names import renamed


@dataclass(frozen=True)
class Dialect:
    """One thing that a file writes otherwise than timm.

    name: in words, for the summary. known: whether a file has it, from (its tensors, the model's, the model's patches).
    convert: (its tensors, the model's) -> its tensors by timm's names and shapes.
    """

    name: str
    known: Callable[[dict, dict, int], bool]
    convert: Callable[[dict, dict], dict]


def _renames(*pairs: tuple[str, str], drop: str = "^$") -> Callable[[dict, dict], dict]:
    return lambda state, own: renamed({k: v for k, v in state.items() if not re.search(drop, k)}, pairs)


def _has(pattern: str) -> Callable[[dict, dict, int], bool]:
    """Whether the file has a key like this and the model has none."""
    return lambda state, own, n_patches: (
        any(re.search(pattern, k) for k in state) and not any(re.search(pattern, k) for k in own)
    )


def _rows(state: dict, own: dict, n_patches: int) -> tuple[int, int]:
    """Rows of the file's position embedding, and those of the model's that are for prefix tokens; (0, 0) where either
    has none."""
    pos, wanted = state.get("pos_embed"), own.get("pos_embed")
    if pos is None or wanted is None or pos.ndim != 3 or pos.shape[::2] != wanted.shape[::2]:
        return 0, 0
    return pos.shape[1], wanted.shape[1] - n_patches


def _square(n: int) -> bool:
    return n > 0 and round(n**0.5) ** 2 == n


def _lacks_class_slot(state: dict, own: dict, n_patches: int) -> bool:
    """The model adds positions to prefix tokens too, the file's position embedding has rows for a grid of patches
    alone."""
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


DIALECTS = (
    Dialect(
        "LayerScale as gamma_1, gamma_2 (DeiT III, dTPS)",
        lambda state, own, n: _has(r"^blocks\.\d+\.gamma_[12]$")(state, own, n) and "storage_tokens" not in state,
        _renames((r"\.gamma_([12])$", r".ls\1.gamma")),
    ),
    Dialect(
        "DINOv2 (its mask token left out)",
        lambda state, own, n: (
            _has(r"^(mask_token|register_tokens)$|\.mlp\.w12\.")(state, own, n)
            and any(k.endswith("attn.qkv.bias") for k in own)
            and not any(k.startswith("decoder_") for k in state)
        ),
        _renames(
            (r"^register_tokens$", "reg_token"),
            (r"\.mlp\.w12\.", ".mlp.fc1."),
            (r"\.mlp\.w3\.", ".mlp.fc2."),
            drop=r"^mask_token$",
        ),
    ),
    Dialect(
        "DiffRate (its learned rates are read with rates=checkpoint)",
        _has(r"\.(prune|merge)_ddp\."),
        _renames(drop=r"\.(prune|merge)_ddp\."),
    ),
    Dialect("position embedding without a row for the class token (zeros added)", _lacks_class_slot, _add_class_slot),
    Dialect(
        "position embedding with a row for the class token (added to the class token)",
        _has_class_slot,
        _fold_class_slot,
    ),
)


def _plain(state: dict[str, Tensor], model: nn.Module) -> Converted:
    """timm's names, but for dialects and what timm's own filter knows."""
    own, notes = model.state_dict(), []
    for row in DIALECTS[:3]:
        if row.known(state, own, model.patch_embed.num_patches):
            state = row.convert(state, own)
            notes.append(f"checkpoint format: {row.name}")
    if "storage_tokens" in state:
        state = _masked(state, own)
        notes.append("checkpoint format: DINOv3 (the bias of keys is masked, as in the original)")
    if not set(state) <= set(own):
        before, state = state, filtered(state, model)
        kept = {id(t) for t in state.values()}
        dropped = [k for k, t in before.items() if k not in state and id(t) not in kept and "qkv" not in k]
        if dropped:
            names = ", ".join(dict.fromkeys(k.split(".")[-1] if k.startswith("blocks.") else k for k in dropped))
            notes.append(f"timm's own filter of checkpoints leaves out: {names}")
    for row in DIALECTS[3:]:
        if row.known(state, own, model.patch_embed.num_patches):
            state = row.convert(state, own)
            notes.append(f"checkpoint format: {row.name}")
    return Converted(state, tuple(notes))


def _masked(state: dict[str, Tensor], own: dict) -> dict[str, Tensor]:
    """DINOv3's biases under their mask. Raises: UsageError when the model has none and the file's are not zero."""
    out = dict(state)
    for key in [k for k in state if k.endswith("attn.qkv.bias")]:
        mask = state.get(f"{key}_mask")
        if mask is not None and mask.shape == state[key].shape:
            out[key] = torch.where(mask == 0, torch.zeros_like(state[key]), state[key])
        if key.replace("qkv.bias", "q_bias") not in own and out[key].abs().max() > 0:
            raise UsageError(
                f"the checkpoint has biases ({key}) that this model has not: give its _qkvb variant, "
                "e.g. vit_small_patch16_dinov3_qkvb"
            )
    return out


def filtered(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors out of timm's own filter of checkpoints, without its resizing, which is done and said in `fill`.

    Args:
        state: by the names that the filter knows.
        model: a VisionTransformer or Eva of timm.
    """
    from timm.models import eva, vision_transformer

    weight = state.get("patch_embed.proj.weight")
    proj = SimpleNamespace(weight=weight if weight is not None and weight.ndim == 4 else model.patch_embed.proj.weight)
    stand_in = SimpleNamespace(
        pos_embed=None,
        patch_embed=SimpleNamespace(proj=proj, grid_size=model.patch_embed.grid_size),
        head=getattr(model, "head", None),
        get_parameter=model.get_parameter,
    )
    convert = (eva if type(model) is eva.Eva else vision_transformer).checkpoint_filter_fn
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it leaves out
            out = convert(dict(state), stand_in)
    except Exception as e:  # keys that only look like a layout
        raise UsageError(f"timm's filter refuses the checkpoint ({type(e).__name__}: {str(e)[:80]})") from None
    finally:
        logging.disable(level)
    own = model.state_dict()
    return {**{k: v for k, v in state.items() if k in own}, **out}


def _tower(start: str, state: dict[str, Tensor], model: nn.Module) -> Converted:
    """A layout that timm's filter knows under a prefix of its own."""
    out = filtered({start + k: v for k, v in state.items() if not k.startswith("head.")}, model)
    own = model.state_dict()
    out |= {k: v for k, v in state.items() if k.startswith("head.")}
    if "norm_pre.weight" in out and "patch_embed.proj.bias" in own and "patch_embed.proj.bias" not in out:
        out["patch_embed.proj.bias"] = torch.zeros_like(own["patch_embed.proj.bias"])
    return Converted({k: v for k, v in out.items() if not k.startswith(start)})


def _trunk(state: dict[str, Tensor], model: nn.Module) -> Converted:
    """timm's names under `trunk.`; the projection beside it has no bias."""
    own = model.state_dict()
    head = state.get("head.proj.weight", state.get("head.weight"))
    done = _plain({k.removeprefix("trunk."): v for k, v in state.items() if not k.startswith("head.")}, model)
    if head is not None:
        done.state["head.weight"] = head
        if "head.bias" in own:
            done.state["head.bias"] = state.get("head.bias", torch.zeros_like(own["head.bias"]))
    return done


HEADS = (*CLASSIFIERS, *((f"head_dist.{p}", f"head_dist.{p}") for p in ("weight", "bias")),
         *((f"fc_norm.{p}", f"fc_norm.{p}") for p in ("weight", "bias")))  # fmt: skip
LAYOUTS = (
    Layout("OpenCLIP with a timm tower", ("trunk.patch_embed.proj.weight",), _trunk),
    Layout("", ("patch_embed.proj.weight",), _plain, HEADS),
    Layout(
        "OpenAI's or OpenCLIP's CLIP",
        ("conv1.weight", "class_embedding", "positional_embedding"),
        lambda state, model: _tower("visual.", state, model),
    ),
    Layout(
        "AIMv2",
        ("preprocessor.patchifier.proj.weight",),
        lambda state, model: Converted(filtered(state, model)),
    ),
)
