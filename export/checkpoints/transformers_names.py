"""Vision Transformers of Hugging Face transformers, as its files name them (4.x, 5.x in memory and on disk), to
timm's names."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .layout import Converted, Layout, fuse_qkv

BLOCK = r"^(?:encoder\.layers?|layers?|model\.layer)\.(\d+)\."
VIT = (
    (BLOCK, r"blocks.\1."),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"\.attention\.(?:attention\.(query|key|value)|([qkv])_proj)\.", lambda m: f".attn.{(m[1] or m[2])[0]}."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.fc2."),
)
CLIP = (
    (BLOCK, r"blocks.\1."),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)
UNUSED = r"^pooler\.|^decoder\.|position_ids$|^mask_token$"


def renamed(state: dict[str, Tensor], pairs: tuple) -> dict[str, Tensor]:
    """Tensors by new names.

    Args:
        state: tensors by name.
        pairs: (pattern, replacement), used one after the other.
    Raises:
        UsageError: two tensors have one name then.
    """
    out = {}
    for key, value in state.items():
        new = key
        for pattern, text in pairs:
            new = re.sub(pattern, text, new)
        if new in out or (new != key and new in state):
            raise UsageError(f"the checkpoint holds {new} twice, as {key} too: wanted one of them")
        out[new] = value
    return out


def _without(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    unused = [k for k in state if re.search(UNUSED, k)]
    names = sorted({k.split(".")[0] for k in unused})
    note = (f"left out, for the model does not use it: {', '.join(names)}",) if names else ()
    return {k: v for k, v in state.items() if k not in unused}, note


def _vit(state: dict[str, Tensor], model: nn.Module) -> Converted:
    own = model.state_dict()
    state, notes = _without(renamed(state, VIT))
    state = _gated(fuse_qkv(state, ("attn.q", "attn.k", "attn.v"), "attn.qkv"))
    distilled = state.pop("embeddings.distillation_token", None)
    if distilled is not None:
        state["dist_token" if "dist_token" in own else "reg_token"] = distilled
    elif "reg_token" in state and state["pos_embed"].ndim == 3:  # positions are added before registers are put in
        pos, n = state["pos_embed"], state["reg_token"].shape[1]
        if model.no_embed_class:
            state["cls_token"], state["pos_embed"] = state["cls_token"].float() + pos[:, :1].float(), pos[:, 1:]
        else:
            state["pos_embed"] = torch.cat([pos[:, :1], pos.new_zeros(1, n, pos.shape[-1]), pos[:, 1:]], 1)
    head = state.get("head.weight")
    width = state["patch_embed.proj.weight"].shape[0]
    if head is not None and head.ndim == 2 and head.shape[1] == 2 * width and model.num_classes:
        raise UsageError(
            "the checkpoint's classifier reads the class token and the mean of the patches together (DINOv2's), which no "
            "timm model does: give num_classes=0 for its features"
        )
    return Converted(state, notes)


def _gated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """SwiGLU's two halves in one layer, the gate first."""
    out = dict(state)
    for key in [k for k in state if ".mlp.gate_proj." in k]:
        halves = out.pop(key), out.pop(key.replace("gate_proj", "up_proj"))
        out[key.replace("gate_proj", "fc1")] = torch.cat(halves)
    return out


def _dinov3(state: dict[str, Tensor], model: nn.Module) -> Converted:
    own = model.state_dict()
    state, notes = _without(renamed(state, VIT))
    keys = lambda end: [k for k in state if k.endswith(end)]
    if any(state[k].abs().max() > 0 for k in keys("attn.k.bias")):
        raise UsageError("the checkpoint has biases of keys, which timm's DINOv3 does not have")
    biases = {k: state.pop(k) for k in [*keys("attn.q.bias"), *keys("attn.k.bias"), *keys("attn.v.bias")]}
    out = fuse_qkv(state, ("attn.q", "attn.k", "attn.v"), "attn.qkv")
    for key, value in biases.items():
        new = key.replace("attn.q.bias", "attn.q_bias").replace("attn.v.bias", "attn.v_bias")
        if new in own:
            out[new] = value
        elif value.abs().max() > 0:
            raise UsageError(f"the checkpoint has biases ({key}) that this model has not: give its _qkvb variant, "
                             "e.g. vit_small_patch16_dinov3_qkvb")  # fmt: skip
    for key in [k for k in own if k.endswith(("attn.q_bias", "attn.v_bias")) and k not in out]:
        out[key] = torch.zeros_like(own[key])
    if out.get("reg_token") is not None and not out["reg_token"].shape[1]:
        del out["reg_token"]
    pairs = ((r"\.ls([12])\.gamma$", r".gamma_\1"), (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."), (r"\.mlp\.up_proj\.",
             ".mlp.fc1_x." if any("fc1_x" in k for k in own) else ".mlp.fc1."))  # fmt: skip
    return Converted(renamed(out, pairs), notes)


def _clip(state: dict[str, Tensor], model: nn.Module) -> Converted:
    own = model.state_dict()
    state, notes = _without(renamed(state, CLIP))
    state = fuse_qkv(state, ("attn.q", "attn.k", "attn.v"), "attn.qkv")
    if state["patch_embed.proj.weight"].ndim == 2:
        raise UsageError(
            "the checkpoint is of SigLIP 2's NaFlex form (patches of any grid): give a fixed-size SigLIP 2"
        )
    if state["pos_embed"].ndim == 2:
        state["pos_embed"] = state["pos_embed"][None]
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
    for part in ("weight", "bias"):
        joined = state.pop(f"head.attention.in_proj_{part}", None)
        if joined is not None:
            width = joined.shape[0] // 3
            state[f"attn_pool.q.{part}"], state[f"attn_pool.kv.{part}"] = joined[:width], joined[width:]
    if "head.bias" in own and "head.weight" in state and "head.bias" not in state:  # a projection has none
        state["head.bias"] = torch.zeros_like(own["head.bias"])
    parts = [("attn_pool.", "attention pooling")] + (
        [] if isinstance(model.norm, nn.LayerNorm) else [("norm.", "last norm")]
    )
    for start, words in parts:
        if any(k.startswith(start) for k in state) and not any(k.startswith(start) for k in own):
            state = {k: v for k, v in state.items() if not k.startswith(start)}
            notes = (*notes, f"the {words} is left out, for the model has none")
    return Converted(state, notes)


VIT_KEY = "embeddings.patch_embeddings.projection.weight"
HEADS = (
    *((f"classifier.{p}", f"head.{p}") for p in ("weight", "bias")),
    *((f"cls_classifier.{p}", f"head.{p}") for p in ("weight", "bias")),
    *((f"distillation_classifier.{p}", f"head_dist.{p}") for p in ("weight", "bias")),
)
PROJECTIONS = (("visual_projection.weight", "head.weight"), *HEADS)
LAYOUTS = (
    Layout("Hugging Face DINOv2 with registers", (VIT_KEY, "embeddings.register_tokens"), _vit, HEADS),
    Layout("Hugging Face DINOv2", (VIT_KEY, "embeddings.mask_token"), _vit, HEADS),
    Layout("Hugging Face DeiT, distilled", (VIT_KEY, "embeddings.distillation_token"), _vit, HEADS),
    Layout("Hugging Face ViT", (VIT_KEY, "embeddings.cls_token", "layernorm.weight"), _vit, HEADS),
    Layout("Hugging Face DINOv3", ("embeddings.patch_embeddings.weight", "embeddings.cls_token"), _dinov3, HEADS),
    Layout(
        "Hugging Face CLIP", ("embeddings.patch_embedding.weight", "embeddings.class_embedding"), _clip, PROJECTIONS
    ),
    Layout(
        "Hugging Face SigLIP",
        ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"),
        _clip,
        HEADS,
    ),
)
