"""Train the digits model and its score heads: python -m tokexport.tools.demo.train_digits -o FOLDER (half an hour on
one core).

The model is trained on labels with small rotations, shifts and scalings. The heads are trained as DynamicViT trains
them (Rao et al. 2021): tokens are kept by a Gumbel softmax over the heads' log-probabilities and masked out of the
attention; the loss is the label's, the distance to the dense model's own answer and the distance of the share kept
from the rate's. The trunk stays as it is.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ...engines.images import crop, normalise
from ...export.models import as_plain
from ...export.models.load import load_model
from ...export.models.score_head import ScoreHead
from ...export.provenance import Preprocess
from . import digits

AT, RATE = (3, 6, 9), 0.7


def tensors(preprocess: Preprocess, folder: Path):
    """All digits as the model will see them [1797, 3, 32, 32] and their labels, through the very files and transforms
    of `eval`.
    """
    images, labels = digits.arrays()
    path, out = folder / "digit.png", []
    for image in images:
        digits.picture(image).save(path)
        out.append(normalise(crop(path, preprocess), preprocess))
    path.unlink()
    return torch.from_numpy(np.stack(out)), torch.from_numpy(labels)


def jitter(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Each image turned by up to 15 degrees, scaled by up to 12 % and shifted by up to 3 pixels."""
    u = lambda scale: (torch.rand(len(x), generator=g) * 2 - 1) * scale
    angle, size, dx, dy = u(math.radians(15)), 1 + u(0.12), u(3 / 16), u(3 / 16)
    cos, sin = angle.cos() * size, angle.sin() * size
    theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def batches(n: int, size: int, g: torch.Generator):
    """Random index batches of one epoch."""
    return torch.randperm(n, generator=g).split(size)


def accuracy(model, x, y) -> float:
    with torch.no_grad():
        return float(torch.cat([model(part).argmax(1) for part in x.split(150)]).eq(y).float().mean())


def train_model(model: nn.Module, x, y, epochs: int, g: torch.Generator) -> None:
    """AdamW with a warm-up and a cosine, labels smoothed."""
    model.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * math.ceil(len(x) / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        for i in batches(len(x), 64, g):
            loss = F.cross_entropy(model(jitter(x[i], g)), y[i], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        print(f"model, epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}", flush=True)
    model.eval().requires_grad_(False)


def masked(model: nn.Module, heads, x, temperature: float, g: torch.Generator):
    """Logits with tokens masked as the heads say, and the share of patches kept behind each head [stages, B]."""
    plain = as_plain(model)
    x, shares = plain.embed(x), []
    keep = x.new_ones(x.shape[:2])
    for i, p in enumerate(plain.blocks()):
        if i in AT:
            scores = heads[AT.index(i)](x[:, 1:])
            noise = -(-torch.rand(scores.shape, generator=g).clamp(1e-9, 1 - 1e-7).log()).log()
            soft = ((scores + noise) / temperature).softmax(-1)[..., 0]
            hard = (soft > 0.5).float()
            keep = torch.cat([keep[:, :1], keep[:, 1:] * (hard + soft - soft.detach())], 1)
            shares.append(keep[:, 1:].mean(1))
        q, k, v = p.split_heads(p.norm1(x))
        logits = (q * p.scale) @ k.mT
        mask = keep[:, None, None, :].expand_as(logits)
        eye = torch.eye(logits.shape[-1])
        mask = mask * (1 - eye) + eye  # a token that is gone still sees itself
        weight = (logits - logits.amax(-1, keepdim=True)).exp() * mask
        y = (weight / weight.sum(-1, keepdim=True)) @ v
        x = x + p.proj(p.norm(y.transpose(1, 2).flatten(2)))
        x = x + p.mlp(p.norm2(x))
    return plain.pooling.forward(plain.norm(x)), torch.stack(shares)


def train_heads(model: nn.Module, x, y, epochs: int, g: torch.Generator) -> nn.ModuleList:
    """One head for each of AT, of a frozen model."""
    heads = nn.ModuleList(ScoreHead(model.embed_dim) for _ in AT)
    optimiser = torch.optim.AdamW(heads.parameters(), lr=1e-3, weight_decay=0.01)
    wanted = torch.tensor([RATE ** (s + 1) for s in range(len(AT))])[:, None]
    steps = epochs * math.ceil(len(x) / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        for i in batches(len(x), 64, g):
            image = jitter(x[i], g)
            with torch.no_grad():
                dense = model(image).log_softmax(-1)
            logits, shares = masked(model, heads, image, 1.0, g)
            apart = F.kl_div(logits.log_softmax(-1), dense, log_target=True, reduction="batchmean")
            loss = F.cross_entropy(logits, y[i]) + 0.5 * apart + 4 * (shares - wanted).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(
            f"heads, epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}, kept {shares.mean(1).tolist()}", flush=True
        )
    return heads.eval().requires_grad_(False)


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", dest="out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--head-epochs", type=int, default=30)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(0)
    loaded = load_model(digits.MODEL, digits.KWARGS, seed=0)
    model = loaded.module
    x, y = tensors(loaded.preprocess, args.out)
    n = digits.N_TRAIN
    train_model(model, x[:n], y[:n], args.epochs, g)
    print(f"held-out accuracy {accuracy(model, x[n:], y[n:]):.2%}")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, args.out / digits.WEIGHTS.name)
    heads = train_heads(model, x[:n], y[:n], args.head_epochs, g)
    save_file(dict(heads.state_dict()), args.out / digits.HEADS.name)


if __name__ == "__main__":
    main()
