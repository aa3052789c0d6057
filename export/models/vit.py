"""What tokexport knows of timm's Vision Transformers, and the refusal, by name, of what it does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UsageError
from ..schedule import Schedule


def check_plain_vit(model: nn.Module) -> None:
    """Make sure every part of the model is one the exporter reproduces.

    Raises: UsageError that lists all parts that are not (a windowed or hierarchical model, another block, attention or pooling).
    """
    from timm.layers import Attention, AttentionPoolLatent, AttentionRope, GluMlp, Mlp, PatchEmbed, SwiGLU
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva, EvaAttention, EvaBlock
    from timm.models.vision_transformer import Block, VisionTransformer

    name = type(model).__name__
    if type(model) not in (VisionTransformer, VisionTransformerDistilled, Eva):
        raise UsageError(
            f"{name} is no plain Vision Transformer: wanted timm's VisionTransformer, VisionTransformerDistilled or Eva "
            f"(vit_*, deit_*, deit3_*, *_dinov2, eva02_*, ...); its tokens cannot be reduced by this exporter"
        )
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
    wrong += [
        f"blocks are {p.__name__}, wanted Block or EvaBlock" for p in {type(b) for b in model.blocks} if p not in known
    ]
    attentions = {type(b.attn) for b in model.blocks if type(b) in known and type(b.attn) not in known[type(b)]}
    wrong += [f"attention is {p.__name__}, wanted Attention, EvaAttention or AttentionRope" for p in attentions]
    mlps = {type(b.mlp) for b in model.blocks if type(b) in known} - {Mlp, GluMlp, SwiGLU}
    wrong += [f"MLP is {p.__name__}, wanted Mlp, GluMlp or SwiGLU" for p in mlps]
    pool = getattr(model, "attn_pool", None)
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        wrong.append(
            f"attention pooling is {type(pool).__name__}, wanted AttentionPoolLatent without position embedding"
        )
    if not isinstance(model, VisionTransformerDistilled) and model.global_pool == "":
        wrong.append("global_pool is '', wanted a pooling (token, avg, map, ...)")
    if wrong:
        raise UsageError(f"{name} has parts this exporter does not reproduce: {'; '.join(wrong)}")


@dataclass(frozen=True)
class BlockParts:
    """The parts of a block of timm's ViT or EVA, in one form.

    qkv: one Linear, C -> 3 heads D, queries first (EVA's separate ones joined, shared key and value heads repeated). scale: of the
    logits. q_norm, k_norm: of each head. norm, gate: of the attention's output, before proj. gamma1, gamma2: LayerScale [C] or None.
    half: rotary halves are [0..D/2), [D/2..D), not even and odd channels.
    """

    norm1: nn.Module
    qkv: nn.Linear
    heads: int
    scale: float
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Linear | None
    proj: nn.Linear
    gamma1: torch.Tensor | None
    norm2: nn.Module
    mlp: nn.Module
    gamma2: torch.Tensor | None
    half: bool


def parts(block: nn.Module) -> BlockParts:
    """The parts of one block; its own modules wherever nothing had to be joined."""
    attn = block.attn
    if hasattr(block, "gamma_1"):  # EVA
        gammas, qkv = (block.gamma_1, block.gamma_2), _joined(attn)
    else:
        gammas, qkv = (getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)), attn.qkv
    gammas = [None if g is None else g.detach() for g in gammas]
    return BlockParts(
        block.norm1,
        qkv,
        attn.num_heads,
        attn.scale,
        attn.q_norm,
        attn.k_norm,
        getattr(attn, "norm", nn.Identity()),
        getattr(attn, "gate", None),
        attn.proj,
        gammas[0],
        block.norm2,
        block.mlp,
        gammas[1],
        getattr(attn, "rotate_half", False),
    )


@torch.no_grad()
def _joined(attn: nn.Module) -> nn.Linear:
    """One Linear of EVA's queries, keys and values."""
    if attn.qkv is not None:
        if getattr(attn, "q_bias", None) is None:
            return attn.qkv
        weight, bias = attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    else:
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)
        biases = [torch.zeros_like(m.weight[:, 0]) if m.bias is None else m.bias for m in layers]
        groups = getattr(attn, "num_kv_groups", 1)
        d = attn.q_proj.out_features // attn.num_heads
        spread = lambda t: t.unflatten(0, (-1, d)).repeat_interleave(groups, 0).flatten(0, 1)
        weight = torch.cat([layers[0].weight, *(spread(m.weight) for m in layers[1:])])
        bias = torch.cat([biases[0], *map(spread, biases[1:])])
        bias = None if all(m.bias is None for m in layers) else bias
    return linear(weight, bias)


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A layer of these very tensors, without a gradient."""
    out = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    out.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        out.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return out


@torch.no_grad()
def embed(model: nn.Module, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens entering the first block (before norm_pre), and EVA's rotary embedding as timm has it, or None."""
    found = model._pos_embed(patches)
    return found if isinstance(found, tuple) else (found, None)


@torch.no_grad()
def empty_patches(model: nn.Module) -> torch.Tensor:
    """Patches of zeros for one image, in the form `embed` takes."""
    grid = model.patch_embed.grid_size
    like = model.patch_embed.proj.weight
    return like.new_zeros(1, *(grid if model.dynamic_img_size else [grid[0] * grid[1]]), model.embed_dim)


def rotary_table(model: nn.Module) -> torch.Tensor | None:
    """Rotary embedding of every token: [depth or 1, heads or 1, N + 1, 2 D], sines then cosines; None when the model has none.

    Prefix tokens are not rotated, nor is what has no place in the image: the last row.
    """
    rope = embed(model, empty_patches(model))[1]
    if rope is None:
        return None
    rope = rope.reshape(*[1] * (4 - rope.ndim), *rope.shape)
    still = torch.cat(
        [
            torch.zeros_like(rope[:, :, :1, : rope.shape[-1] // 2]),
            torch.ones_like(rope[:, :, :1, : rope.shape[-1] // 2]),
        ],
        -1,
    )
    return torch.cat([still.expand(-1, -1, model.num_prefix_tokens, -1), rope, still], 2)


def n_tokens(model: nn.Module) -> int:
    """Tokens entering block 0, prefix tokens included."""
    return model.patch_embed.num_patches + model.num_prefix_tokens


def check_schedule(model: nn.Module, schedule: Schedule, heads: nn.ModuleList | None = None) -> None:
    """Raises: UsageError when the schedule is for another number of tokens, prefix tokens or blocks than the model has, or a class token
    or score heads it needs are missing."""
    own = (n_tokens(model), model.num_prefix_tokens, len(model.blocks))
    made = (schedule.n_tokens, schedule.n_prefix, schedule.depth)
    if own != made:
        words = "{} tokens ({} of them prefix tokens) and {} blocks"
        raise UsageError(f"the schedule is for {words.format(*made)}, the model has {words.format(*own)}")
    if schedule.options.get("score") == "class" and schedule.steps and not has_class_token(model):
        raise UsageError(
            f"{schedule.method} sorts tokens by the attention of the class token, which this model does not have: give "
            f"--score mean (the mean attention a token receives, a substitute) or --method tome"
        )
    pools_by_size(model, schedule)
    stages = len(schedule.options["at"]) if any(s.site == "pre_block" for s in schedule.steps) else 0
    if stages > len(heads or ()):
        raise UsageError(
            f"{schedule.method} needs {stages} score heads, {len(heads or ())} were given: see score_heads(loaded, schedule)"
        )


def pools_by_size(model: nn.Module, schedule: Schedule) -> bool:
    """Whether the average pool at the end weighs tokens by their size (option `pool` of ToMe and DiffRate).

    "size", "mean" (timm's plain mean), or "auto": by size for a model that pools as MAE's fine-tuned ones do, over the patches beside
    a class token and before the norm, as both authors' MAE code does; plain for others, as their code for timm's models.
    Raises: UsageError for "size" where there is no average pool, or another word.
    """
    said = schedule.options.get("pool", "mean")
    if said not in ("auto", "size", "mean"):
        raise UsageError(f"--pool {said!r}: wanted size or mean")
    average = (
        getattr(model, "attn_pool", None) is None and model.global_pool == "avg" and not hasattr(model, "head_dist")
    )
    if said == "size" and not average:
        raise UsageError(
            "--pool size weighs the tokens of an average pool, which this model does not have: leave it out"
        )
    like_mae = (
        has_class_token(model)
        and isinstance(model.norm, nn.Identity)
        and not getattr(model, "pool_include_prefix", False)
    )
    return bool(schedule.steps) and average and (said == "size" or (said == "auto" and like_mae))


def output_name(model: nn.Module) -> str:
    """ "logits", or "features" when the model has no classes."""
    return "logits" if model.num_classes > 0 else "features"


def has_class_token(model: nn.Module) -> bool:
    """Whether position 0 is a class token."""
    return model.cls_token is not None


def dims(model: nn.Module) -> dict:
    """The sizes the MACs are counted from, as plain integers."""
    block = model.blocks[0]
    mlp = [(m.in_features, m.out_features) for m in block.mlp.modules() if isinstance(m, nn.Linear)]
    proj = model.patch_embed.proj
    return {
        "width": model.embed_dim,
        "attn_width": block.attn.proj.in_features,
        "mlp": mlp,
        "classes": model.num_classes,
        "channels": proj.in_channels,
        "gate": int(getattr(block.attn, "gate", None) is not None),
        "heads": 2 if hasattr(model, "head_dist") else 1,
        "patches": model.patch_embed.num_patches,
        "patch_values": proj.in_channels * proj.kernel_size[0] * proj.kernel_size[1],
        "pool": model.global_pool,
    }


def split_heads(p: BlockParts, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (unscaled), keys and values [B, heads, N, D] of a block for its normalised input y [B, N, C], q/k norms applied."""
    b, n, _ = y.shape
    qkv = p.qkv(y).reshape(b, n, 3, p.heads, -1).permute(2, 0, 3, 1, 4)
    return p.q_norm(qkv[0]), p.k_norm(qkv[1]), qkv[2]
