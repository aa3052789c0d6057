"""timm's Vision Transformers (VisionTransformer, VisionTransformerDistilled, Eva) as PlainViT: all that is known of timm's modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..preprocess import of_model
from .plain_vit import AttentionPool, BlockParts, PlainViT, Pooling, linear, rotary_table

WANTED = "timm's VisionTransformer, VisionTransformerDistilled or Eva (vit_*, deit_*, deit3_*, *_dinov2, *_dinov3, eva02_*, ...)"


def adapt(model: nn.Module) -> PlainViT | None:
    """A timm model as a PlainViT; None for a model of another family.

    Raises: UsageError that lists every part that the exporter does not reproduce (another block, attention or pooling).
    """
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    if type(model) not in (VisionTransformer, VisionTransformerDistilled, Eva):
        return None
    wrong = _not_reproduced(model)
    if wrong:
        raise UsageError(f"{type(model).__name__} has parts this exporter does not reproduce: {'; '.join(wrong)}")
    return PlainViT(
        module=model,
        n_tokens=model.patch_embed.num_patches + model.num_prefix_tokens,
        n_prefix=model.num_prefix_tokens,
        has_class_token=model.cls_token is not None,
        patch=model.patch_embed.proj,
        patch_norm=model.patch_embed.norm,
        norm_pre=model.norm_pre,
        norm=model.norm,
        pooling=_pooling(model),
        embed=lambda image: model.norm_pre(_add_positions(model, model.patch_embed(image))[0]),
        positions=lambda: _add_positions(model, _empty_patches(model))[0][0].clone(),
        blocks=lambda: [_parts(block) for block in model.blocks],
        n_blocks=len(model.blocks),
        dims=_dims(model),
        preprocess=of_model(model),
        rotary=lambda: _rotary(model),
        labels=lambda: _labels(model),
    )


def _not_reproduced(model: nn.Module) -> list[str]:
    """Every part that is not one the exporter reproduces, in words."""
    from timm.layers import Attention, AttentionPoolLatent, AttentionRope, GluMlp, Mlp, PatchEmbed, SwiGLU
    from timm.models.eva import EvaAttention, EvaBlock
    from timm.models.vision_transformer import Block

    wrong = []
    if not len(model.blocks):
        wrong.append("there are no blocks, wanted depth of 1 or more")
    if type(model.patch_embed) is not PatchEmbed:
        wrong.append(f"patch_embed is {type(model.patch_embed).__name__}, wanted PatchEmbed")
    elif model.patch_embed.dynamic_img_pad or model.patch_embed.img_size is None:
        wrong.append("patch_embed pads or has no fixed image size, wanted a fixed img_size")
    if not isinstance(model.patch_drop, (nn.Identity, type(None))):
        wrong.append(f"patch_drop is {type(model.patch_drop).__name__}, wanted none (patch_drop_rate=0)")
    known = {Block: (Attention,), EvaBlock: (EvaAttention, AttentionRope)}
    blocks = [b for b in model.blocks if type(b) in known]
    others = {type(b) for b in model.blocks} - set(known)
    wrong += [f"blocks are {kind.__name__}, wanted Block or EvaBlock" for kind in others]
    attentions = {type(b.attn) for b in blocks if type(b.attn) not in known[type(b)]}
    wrong += [f"attention is {kind.__name__}, wanted Attention, EvaAttention or AttentionRope" for kind in attentions]
    mlps = {type(b.mlp) for b in blocks} - {Mlp, GluMlp, SwiGLU}
    wrong += [f"MLP is {kind.__name__}, wanted Mlp, GluMlp or SwiGLU" for kind in mlps]
    pool = getattr(model, "attn_pool", None)
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        wrong.append(
            f"attention pooling is {type(pool).__name__}, wanted AttentionPoolLatent without position embedding"
        )
    if not hasattr(model, "head_dist") and model.global_pool == "":
        wrong.append("global_pool is '', wanted a pooling (token, avg, map, ...)")
    return wrong


def _parts(block: nn.Module) -> BlockParts:
    """The parts of one block; its own modules wherever nothing had to be joined."""
    attn = block.attn
    if hasattr(block, "gamma_1"):  # EVA
        gammas, qkv = (block.gamma_1, block.gamma_2), _joined(attn)
    else:
        gammas, qkv = (getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)), attn.qkv
    gamma1, gamma2 = (None if g is None else g.detach() for g in gammas)
    return BlockParts(
        norm1=block.norm1,
        qkv=qkv,
        heads=attn.num_heads,
        scale=attn.scale,
        q_norm=attn.q_norm,
        k_norm=attn.k_norm,
        norm=getattr(attn, "norm", nn.Identity()),
        gate=getattr(attn, "gate", None),
        proj=attn.proj,
        gamma1=gamma1,
        norm2=block.norm2,
        mlp=block.mlp,
        gamma2=gamma2,
        mlp_last="fc2",
        half=getattr(attn, "rotate_half", False),
    )


@torch.no_grad()
def _joined(attn: nn.Module) -> nn.Linear:
    """One Linear of EVA's queries, keys and values; shared key and value heads are repeated."""
    if attn.qkv is not None:
        if getattr(attn, "q_bias", None) is None:
            return attn.qkv
        return linear(attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))
    layers = (attn.q_proj, attn.k_proj, attn.v_proj)
    biases = [torch.zeros_like(m.weight[:, 0]) if m.bias is None else m.bias for m in layers]
    groups = getattr(attn, "num_kv_groups", 1)
    d = attn.q_proj.out_features // attn.num_heads
    spread = lambda t: t.unflatten(0, (-1, d)).repeat_interleave(groups, 0).flatten(0, 1)
    weight = torch.cat([layers[0].weight, *(spread(m.weight) for m in layers[1:])])
    bias = torch.cat([biases[0], *map(spread, biases[1:])])
    return linear(weight, None if all(m.bias is None for m in layers) else bias)


@torch.no_grad()
def _add_positions(model: nn.Module, patches: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens entering the first block (before norm_pre), and EVA's rotary embedding as timm has it, or None."""
    tokens = model._pos_embed(patches)
    return tokens if isinstance(tokens, tuple) else (tokens, None)


def _empty_patches(model: nn.Module) -> Tensor:
    """Patches of zeros for one image, in the form `_add_positions` takes."""
    grid = model.patch_embed.grid_size
    shape = grid if model.dynamic_img_size else [grid[0] * grid[1]]
    return model.patch_embed.proj.weight.new_zeros(1, *shape, model.embed_dim)


def _rotary(model: nn.Module) -> Tensor | None:
    rope = _add_positions(model, _empty_patches(model))[1]
    return None if rope is None else rotary_table(rope, model.num_prefix_tokens)


def _pooling(model: nn.Module) -> Pooling:
    if hasattr(model, "head_dist"):  # distilled: the mean of two heads
        return Pooling(model.forward_head, (model.head, model.head_dist), nn.Identity(), rows=(0, 1))
    attention, include = model.attn_pool, getattr(model, "pool_include_prefix", None)
    average = attention is None and model.global_pool == "avg"
    # MAE's fine-tuned models pool over the patches beside a class token, before the norm
    like_mae = model.cls_token is not None and isinstance(model.norm, nn.Identity) and not include
    return Pooling(
        model.forward_head,
        (model.head,),
        model.fc_norm,
        rows=(0,) if attention is None and model.global_pool == "token" else (),
        pool=model.pool,
        # EVA pools all tokens
        attention=None
        if attention is None
        else _attention_pool(attention, model.num_prefix_tokens * (include is False)),
        average=average,
        by_size=average and like_mae,
    )


@torch.no_grad()
def _attention_pool(pool: nn.Module, skip: int) -> AttentionPool:
    query = pool.q(pool.latent).reshape(1, pool.latent_len, pool.num_heads, -1).transpose(1, 2)
    query = (pool.q_norm(query) * pool.scale).contiguous()
    layers = {name: getattr(pool, name) for name in ("kv", "k_norm", "proj", "norm", "mlp")}
    return AttentionPool(query, **layers, kind=pool.pool, skip=skip)


def _dims(model: nn.Module) -> dict:
    block, proj = model.blocks[0], model.patch_embed.proj
    return {
        "width": model.embed_dim,
        "attn_width": block.attn.proj.in_features,
        "mlp": [(m.in_features, m.out_features) for m in block.mlp.modules() if isinstance(m, nn.Linear)],
        "classes": model.num_classes,
        "channels": proj.in_channels,
        "gate": int(getattr(block.attn, "gate", None) is not None),
        "heads": 2 if hasattr(model, "head_dist") else 1,
        "patches": model.patch_embed.num_patches,
        "patch_values": proj.in_channels * proj.kernel_size[0] * proj.kernel_size[1],
        "pool": model.global_pool,
    }


def _labels(model: nn.Module) -> tuple[str, ...]:
    """ImageNet class names, when timm knows which."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if model.num_classes not in (1000, 21841, 21843, 11821, 12000):
        return ()
    subset = infer_imagenet_subset(model)
    if not subset:
        return ()
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(info.num_classes()))
