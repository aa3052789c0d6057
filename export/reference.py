"""The oracle: the method as its paper writes it, on timm's own modules, eager, with argsort and scatter."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from . import reducers, vit
from .apply import apply_eager, follow
from .plan import MergePlan, Signals
from .schedule import Schedule


@dataclass
class ReferenceResult:
    """What the reference computed for a batch.

    output: logits or features [B, classes or C]. tokens: after the final norm [B, N, C].
    sources: [B, N0] where each input token ended up, -1 when it is gone.
    plans: the merge plan of every step, in order. size: [B, N] input tokens per final token.
    regrets: with replayed decisions, per step [B]: how far they are from the reference's own (see the reducer).
    """

    output: torch.Tensor
    tokens: torch.Tensor
    sources: torch.Tensor
    size: torch.Tensor
    plans: list[MergePlan] = field(default_factory=list)
    regrets: list[torch.Tensor] = field(default_factory=list)


class ReducedViT(nn.Module):
    """A timm ViT with a schedule applied, eager: the reference as a module.

    model: a plain timm ViT, used as it is (never changed). schedule: of the same model.
    `forward(image [B, 3, H, W])` gives logits (features without classes); `run` gives everything.
    """

    def __init__(self, model: nn.Module, schedule: Schedule):
        super().__init__()
        vit.check_plain_vit(model)
        vit.check_schedule(model, schedule)
        self.model, self.schedule = model.eval(), schedule

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.run(image).output

    @torch.no_grad()
    def run(self, image: torch.Tensor, replay: list[MergePlan] | None = None) -> ReferenceResult:
        """Compute, deciding itself or, with `replay`, under the given plans (one per step), whose regret is then measured."""
        m = self.model
        x = m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed(image))))
        batch, n, _ = x.shape
        size, merged = torch.ones(batch, n, 1, dtype=x.dtype), False
        at = torch.arange(n).expand(batch, n)
        out = ReferenceResult(x, x, at, size[..., 0])
        steps, reducer = self.schedule.by_site, reducers.get(self.schedule.method)
        for i, block in enumerate(m.blocks):
            x, k = attend(block, x, size if merged and self.schedule.options.get("prop_attn") else None)
            step = steps.get((i, "post_attn"))
            if step is not None:
                metric = k.mean(1)
                signals = Signals(x, size, metric / metric.norm(dim=-1, keepdim=True), m.num_prefix_tokens, vit.has_class_token(m))
                if replay is None:
                    plan = reducer.reference(signals, step)
                else:
                    plan = replay[len(out.plans)]
                    out.regrets.append(reducer.regret(signals, step, plan))
                x, size = apply_eager(plan, x, size)
                at, merged = follow(plan, at), True
                out.plans.append(plan)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        out.tokens = m.norm(x)
        out.output, out.sources, out.size = m.forward_head(out.tokens), at, size[..., 0]
        return out


def attend(block: nn.Module, x: torch.Tensor, size: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention half of a block, x [B, N, C] -> x after its residual, and the keys [B, heads, N, D].

    size: [B, N, 1] for proportional attention (log(size) on the logits, after scaling), or None.
    """
    attn = block.attn
    q, k, v = vit.split_heads(attn, block.norm1(x))
    logits = (q * attn.scale) @ k.mT
    if size is not None:
        logits = logits + size.log()[:, None, :, 0].unsqueeze(2)
    y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = attn.proj(attn.norm(y)) if hasattr(attn, "norm") else attn.proj(y)
    return x + block.drop_path1(block.ls1(y)), k


def reduce_model(model: nn.Module, schedule: Schedule) -> ReducedViT:
    """The eager reference of a model under a schedule.

    model: a plain timm ViT. schedule: from `Schedule.parse` with the model's own token counts.
    Raises: UsageError when the model is no plain ViT or the schedule is for another one.
    """
    return ReducedViT(model, schedule)
