"""What tokexport knows of timm's Vision Transformers, and the refusal, by name, of what it does not."""

from __future__ import annotations

import torch
from torch import nn

from .errors import UsageError
from .schedule import Schedule


def check_plain_vit(model: nn.Module) -> None:
    """Make sure every part of the model is one the exporter reproduces.

    Raises: UsageError that lists all parts that are not (a windowed or hierarchical model, another block, attention or pooling).
    """
    from timm.layers import Attention, PatchEmbed
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import Block, VisionTransformer

    name = type(model).__name__
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise UsageError(f"{name} is no plain Vision Transformer: wanted timm's VisionTransformer or VisionTransformerDistilled "
                         f"(vit_*, deit_*, deit3_*, *_dinov2, ...); its tokens cannot be reduced by this exporter")
    wrong = []
    if not len(model.blocks):
        wrong.append("there are no blocks, wanted depth of 1 or more")
    if type(model.patch_embed) is not PatchEmbed:
        wrong.append(f"patch_embed is {type(model.patch_embed).__name__}, wanted PatchEmbed")
    elif model.patch_embed.dynamic_img_pad or model.patch_embed.img_size is None:
        wrong.append("patch_embed pads or has no fixed image size, wanted a fixed img_size")
    if not isinstance(model.patch_drop, nn.Identity):
        wrong.append(f"patch_drop is {type(model.patch_drop).__name__}, wanted none (patch_drop_rate=0)")
    blocks = {type(b) for b in model.blocks}
    attentions = {type(b.attn) for b in model.blocks if type(b) is Block}
    wrong += [f"blocks are {p.__name__}, wanted Block" for p in blocks if p is not Block]
    wrong += [f"attention is {p.__name__}, wanted Attention" for p in attentions if p is not Attention]
    if not wrong and any(getattr(b.attn, "gate", None) is not None for b in model.blocks):
        wrong.append("attention is gated, wanted plain attention")
    if not isinstance(model, VisionTransformerDistilled) and model.global_pool == "":
        wrong.append("global_pool is '', wanted a pooling (token, avg, map, ...)")
    if wrong:
        raise UsageError(f"{name} has parts this exporter does not reproduce: {'; '.join(wrong)}")


def n_tokens(model: nn.Module) -> int:
    """Tokens entering block 0, prefix tokens included."""
    return model.patch_embed.num_patches + model.num_prefix_tokens


def check_schedule(model: nn.Module, schedule: Schedule) -> None:
    """Raises: UsageError when the schedule is for another number of tokens, prefix tokens or blocks than the model has."""
    own = (n_tokens(model), model.num_prefix_tokens, len(model.blocks))
    made = (schedule.n_tokens, schedule.n_prefix, schedule.depth)
    if own != made:
        words = "{} tokens ({} of them prefix tokens) and {} blocks"
        raise UsageError(f"the schedule is for {words.format(*made)}, the model has {words.format(*own)}")


def output_name(model: nn.Module) -> str:
    """"logits", or "features" when the model has no classes."""
    return "logits" if model.num_classes > 0 else "features"


def has_class_token(model: nn.Module) -> bool:
    """Whether position 0 is a class token."""
    return model.cls_token is not None


def dims(model: nn.Module) -> dict:
    """The sizes the MACs are counted from, as plain integers."""
    block = model.blocks[0]
    mlp = [(m.in_features, m.out_features) for m in block.mlp.modules() if isinstance(m, nn.Linear)]
    proj = model.patch_embed.proj
    return {"width": model.embed_dim, "attn_width": block.attn.proj.in_features, "mlp": mlp, "classes": model.num_classes,
            "channels": proj.in_channels, "heads": 2 if hasattr(model, "head_dist") else 1, "patches": model.patch_embed.num_patches,
            "patch_values": proj.in_channels * proj.kernel_size[0] * proj.kernel_size[1], "pool": model.global_pool}


def split_heads(attn: nn.Module, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (unscaled), keys and values [B, heads, N, D] of timm's Attention for its input y [B, N, C], q/k norms applied."""
    b, n, _ = y.shape
    qkv = attn.qkv(y).reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    return attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
