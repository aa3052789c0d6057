"""Checkpoints as the training scripts of several authors write them, for a model of two blocks."""

import argparse
import pathlib

import numpy as np
import torch
from tokexport.export.checkpoints import score_heads
from torch import nn

NAME = "vit_tiny_patch16_224"


KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model_of(name=NAME, **kwargs):
    """A timm model in which every tensor is random, so that no two states give the same numbers."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, **{**KWARGS, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def heads_state(n_stages=3, width=32):
    """Score heads by the names of the authors' models."""
    return {f"score_predictor.{k}": v for k, v in score_heads.random_heads(width, n_stages, seed=5).items()}


def _optimizer(lr=1e-3):
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    weight.sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr
    return optimizer.state_dict()


SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 7}


ARGS = argparse.Namespace(
    model="deit_small_patch16_224", lr=5e-4, clip_grad=None, drop_loc=(3, 6, 9), output_dir="out", distributed=True
)


SUBMITTED = argparse.Namespace(
    output_dir=pathlib.Path("checkpoints/%j"), args=argparse.Namespace(gpu=0)
)  # trained on a cluster


SCRIPTS = {
    "DeiT's release": lambda s: {"model": s},
    "DeiT, EViT": lambda s: {
        "model": s,
        "optimizer": _optimizer(),
        "lr_scheduler": {"base_values": [5e-4], "t_in_epochs": True},
        "epoch": 29,
        "model_ema": {k: torch.zeros_like(v) for k, v in s.items()},
        "scaler": SCALER,
        "args": ARGS,
    },
    "MAE": lambda s: {"model": s, "optimizer": _optimizer(), "epoch": 99, "scaler": SCALER, "args": SUBMITTED},
    "DynamicViT": lambda s: {
        "model": s,
        "optimizer": _optimizer(np.float64(1e-3) * 0.01),
        "epoch": "best",
        "scaler": SCALER,
        "args": ARGS,
        "best": 79.3,
        "best_ema": 0.0,
        "model_ema": {k: torch.zeros_like(v) for k, v in s.items()},
    },
    "TPS": lambda s: {
        "net": s,
        "optimizer": _optimizer(),
        "epoch": 29,
        "metrics": {"acc1": 79.7},
        "scheduler": {"base_values": [5e-4]},
        "scaler": SCALER,
    },
    "DiffRate": lambda s: {
        "model": s,
        "optimizer": _optimizer(),
        "lr_scheduler": {},
        "epoch": 2,
        "scaler": SCALER,
        "args": ARGS,
    },
}
