"""From a config.json of Hugging Face transformers to the timm model that computes the same: one row a model type."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UsageError

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "image_size": 224, "patch_size": 16, "num_channels": 3, "hidden_act": "gelu", "qkv_bias": True}  # fmt: skip
ACTIVATIONS = {
    "gelu": None,
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


@dataclass(frozen=True)
class ModelConfig:
    """The timm model of a config. name, kwargs: for `timm.create_model`. labels: class names. activation: of the
    classifier, or None."""

    name: str
    kwargs: dict
    labels: tuple[str, ...] = ()
    activation: str | None = None


@dataclass(frozen=True)
class Family:
    """One model type. defaults: what transformers leaves out of a config. make: (config with defaults, architecture)
    -> (name, kwargs)."""

    defaults: dict
    make: Callable[[dict, str], tuple[str, dict]]


def model_of(config: dict, file: str) -> ModelConfig:
    """The timm model of a config.

    Args:
        config: of a config.json.
        file: its name, for errors.
    Raises:
        UsageError: a model type, an activation or a size that is not known.
    """
    kind = str(config.get("model_type"))
    if kind in ("siglip2", "siglip2_vision_model"):
        raise UsageError(
            f"{file}: SigLIP 2 of the NaFlex form takes patches of any grid: give a fixed-size SigLIP 2 (model_type siglip)"
        )
    if kind not in FAMILIES:
        raise UsageError(
            f"{file}: model type {kind[:40]!r} is not known; wanted one of {', '.join(FAMILIES)}, or timm's own folder"
        )
    family, vision = FAMILIES[kind], config.get("vision_config")
    inner = vision if isinstance(vision, dict) else {}
    full = {**BASE, **family.defaults, **{k: v for k, v in {**config, **inner}.items() if v is not None}}
    if isinstance(config.get("projection_dim"), int):
        full["projection_dim"] = config["projection_dim"]
    architecture = str((config.get("architectures") or [""])[0])
    try:
        name, kwargs = family.make(full, architecture)
    except UsageError:
        raise
    except (TypeError, ValueError, KeyError, ZeroDivisionError, AttributeError) as e:
        raise UsageError(f"{file}: a size is missing or no number ({type(e).__name__}: {str(e)[:60]})") from None
    labels, activation = _labels(full), None
    if "ForImageClassification" not in architecture:
        labels = ()
        if kwargs["num_classes"]:  # a projection into the space of texts
            activation = "none"
    elif config.get("problem_type") == "multi_label_classification":
        activation = "sigmoid"
    elif config.get("problem_type") == "regression":
        activation = "none"
    return ModelConfig(name, kwargs, labels, activation)


def _labels(config: dict) -> tuple[str, ...]:
    names = config.get("id2label")
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
        return ()
    labels = tuple(str(names[str(i)]) for i in range(len(names)))
    return () if all(re.fullmatch(r"LABEL_\d+", name) for name in labels) else labels


def _classes(config: dict, architecture: str) -> int:
    if "ForImageClassification" not in architecture:
        return 0
    names = config.get("id2label")
    return len(names) if isinstance(names, dict) and names else int(config.get("num_labels", 2))


def _size(value):
    """An image or patch size: one number, or (height, width)."""
    if isinstance(value, dict):
        value = (value["height"], value["width"])
    return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else int(value)


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio of which timm makes exactly `hidden` units: int(width * ratio).

    Args:
        hidden: units of the MLP.
        width: of the tokens.
    """
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else ratio + 1e-9


def _common(c: dict, architecture: str) -> dict:
    if c["hidden_act"] not in ACTIVATIONS:
        raise UsageError(
            f"config.json: hidden_act {c['hidden_act']!r} is not known; wanted one of {', '.join(ACTIVATIONS)}"
        )
    kwargs = {
        "img_size": _size(c["image_size"]),
        "patch_size": _size(c["patch_size"]),
        "embed_dim": int(c["hidden_size"]),
        "depth": int(c["num_hidden_layers"]),
        "num_heads": int(c["num_attention_heads"]),
        "mlp_ratio": mlp_ratio(int(c.get("intermediate_size", 0)), int(c["hidden_size"])),
        "num_classes": _classes(c, architecture),
        "norm_eps": float(c["layer_norm_eps"]),
    }
    if int(c["num_channels"]) != 3:
        kwargs["in_chans"] = int(c["num_channels"])
    if ACTIVATIONS[c["hidden_act"]]:
        kwargs["act_layer"] = ACTIVATIONS[c["hidden_act"]]
    if not c["qkv_bias"]:
        kwargs["qkv_bias"] = False
    return kwargs


def _vit(c: dict, architecture: str) -> tuple[str, dict]:
    return "vit_base_patch16_224", _common(c, architecture)


def _deit(c: dict, architecture: str) -> tuple[str, dict]:
    if architecture.endswith("WithTeacher"):
        return "deit_base_distilled_patch16_224", _common(c, architecture)
    return "vit_base_patch16_224", {**_common(c, architecture), "reg_tokens": 1}  # its second token has no classifier


def _dinov2(c: dict, architecture: str) -> tuple[str, dict]:
    width, ratio = int(c["hidden_size"]), c["mlp_ratio"]
    kwargs, registers = _common(c, architecture), int(c.get("num_register_tokens", 0))
    kwargs["mlp_ratio"] = mlp_ratio(int(width * ratio), width)
    size = "base"
    if c.get("use_swiglu_ffn"):
        size = "giant"
        kwargs["mlp_ratio"] = mlp_ratio(2 * ((int(int(width * ratio) * 2 / 3) + 7) // 8 * 8), width)
        kwargs.pop("act_layer", None)
    if not registers:
        return f"vit_{size}_patch14_dinov2", kwargs
    return f"vit_{size}_patch14_reg4_dinov2", {**kwargs, "reg_tokens": registers}


def _dinov3(c: dict, architecture: str) -> tuple[str, dict]:
    kwargs = _common(c, architecture)
    for key in ("qkv_bias", "act_layer"):
        kwargs.pop(key, None)
    gated = bool(c["use_gated_mlp"])
    act = "silu" if gated else "gelu"
    if c["hidden_act"] != act:
        raise UsageError(
            f"config.json: hidden_act is {c['hidden_act']}, timm's DINOv3 of this form computes {act}: not the same numbers"
        )
    if not c["mlp_bias"] or not c["proj_bias"] or c["key_bias"]:
        raise UsageError(
            "config.json: a DINOv3 without biases of its MLP or projection, or with one of keys, is none of timm's"
        )
    biased = "_qkvb" if c["query_bias"] or c["value_bias"] else ""
    kwargs |= {
        "num_reg_tokens": int(c["num_register_tokens"]),
        "rope_temperature": float(c["rope_theta"]),
        "global_pool": "token",
    }
    return f"vit_small{'_plus' if gated else ''}_patch16_dinov3{biased}", kwargs


def _clip(c: dict, architecture: str) -> tuple[str, dict]:
    kwargs = _common(c, architecture)
    if architecture in ("CLIPModel", "CLIPVisionModelWithProjection"):
        kwargs["num_classes"] = int(c["projection_dim"])
    if kwargs["num_classes"] and "ForImageClassification" in architecture:  # mean of patches, without the last norm
        kwargs |= {"global_pool": "avg", "final_norm": False, "fc_norm": False}
    return "vit_base_patch16_clip_224", kwargs


def _siglip(c: dict, architecture: str) -> tuple[str, dict]:
    kwargs = _common(c, architecture)
    if "ForImageClassification" in architecture or not c.get("vision_use_head", True):
        return "vit_base_patch16_siglip_gap_224", kwargs
    return "vit_base_patch16_siglip_224", kwargs


CLIP = {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 512}
SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
DINOV2 = {"patch_size": 14, "layer_norm_eps": 1e-6, "mlp_ratio": 4}
FAMILIES = {
    "vit": Family({"layer_norm_eps": 1e-12}, _vit),
    "deit": Family({"layer_norm_eps": 1e-12}, _deit),
    "vit_mae": Family({"layer_norm_eps": 1e-12}, _vit),
    "dinov2": Family(DINOV2, _dinov2),
    "dinov2_with_registers": Family({**DINOV2, "num_register_tokens": 4}, _dinov2),
    "dinov3_vit": Family(
        {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "layer_norm_eps": 1e-5, "rope_theta": 100.0,
         "query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True,
         "use_gated_mlp": False, "num_register_tokens": 0},
        _dinov3,
    ),
    "clip": Family(CLIP, _clip),
    "clip_vision_model": Family(CLIP, _clip),
    "siglip": Family(SIGLIP, _siglip),
    "siglip_vision_model": Family(SIGLIP, _siglip),
}  # fmt: skip
