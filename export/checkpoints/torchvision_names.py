"""torchvision's Vision Transformers, to timm's names."""

from __future__ import annotations

from torch import Tensor, nn

from .layout import Converted, Layout
from .transformers_names import renamed

NAMES = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^encoder\.ln\.", "norm."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"^heads\.head\.", "head."),
)


def _convert(state: dict[str, Tensor], model: nn.Module) -> Converted:
    return Converted(renamed(state, NAMES))


LAYOUTS = (Layout("torchvision's ViT", ("conv_proj.weight", "encoder.pos_embedding", "encoder.ln.weight"), _convert),)
