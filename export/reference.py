"""The oracle: the method as its paper writes it, on timm's own modules, eager, with argsort and scatter."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from . import reducers
from .models import vit
from .apply import apply_eager, follow
from .margins import RowMargins, row_margins
from .plan import MergePlan, Signals, lift
from .schedule import Schedule


@dataclass
class ReferenceResult:
    """What the reference computed for a batch.

    output: logits or features [B, classes or C]. tokens: after the final norm [B, N, C].
    sources: [B, N0] where each input token ended up, -1 when it is gone.
    plans: the merge plan of every step, in order. size: [B, N] input tokens per final token.
    regrets: with replayed decisions, per step [B]: how far they are from the reference's own (see the reducer).
    departs: with observed tokens, per stage [B]: how far they are from what the reference makes of those before them.
    margins: when they are asked for, per step: how clear each row's part of the decision is.
    """

    output: torch.Tensor
    tokens: torch.Tensor
    sources: torch.Tensor
    size: torch.Tensor
    plans: list[MergePlan] = field(default_factory=list)
    regrets: list[torch.Tensor] = field(default_factory=list)
    departs: dict[str, torch.Tensor] = field(default_factory=dict)
    margins: list[RowMargins] | None = None


class ReducedViT(nn.Module):
    """A timm ViT with a schedule applied, eager: the reference as a module.

    model: a plain timm ViT, used as it is (never changed). schedule: of the same model. heads: score heads, one a stage, of the
    methods that have them (see `load.score_heads`).
    `forward(image [B, 3, H, W])` gives logits (features without classes); `run` gives everything.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, heads: nn.ModuleList | None = None):
        super().__init__()
        vit.check_plain_vit(model)
        vit.check_schedule(model, schedule, heads)
        self.model, self.schedule, self.heads = model.eval(), schedule, heads

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.run(image).output

    @torch.no_grad()
    def run(
        self,
        image: torch.Tensor,
        replay: list[MergePlan] | None = None,
        observed: dict[str, torch.Tensor] | None = None,
        rounding: float = 0.0,
        margins: bool = False,
    ) -> ReferenceResult:
        """Compute, deciding itself or, with `replay`, under the given plans (one per step), whose regret is then measured.

        observed: tokens behind stages, as somebody else has them, by stage name (see `stages`; any shape of B N C values). Each is
        compared with what the reference makes of the tokens before it, and goes on in its place: errors do not add up.
        rounding: of a number they are kept in, relative; what it explains is no departure (a stage may add less than that).
        margins: also measure how clear every decision is.
        """
        m = self.model
        x, _ = vit.embed(m, m.patch_embed(image))
        x = m.norm_pre(x)
        seen = _Seen(observed or {}, rounding)
        batch, n, _ = x.shape
        size, at = torch.ones(batch, n, 1, dtype=x.dtype), torch.arange(n).expand(batch, n)
        rope, place = vit.rotary_table(m), at
        out = ReferenceResult(x, x, at, size[..., 0], margins=[] if margins else None)
        x = _compare("embed", x, None, seen, out)
        steps, options = self.schedule.by_site, self.schedule.options
        for i, block in enumerate(m.blocks):
            if (i, "pre_block") in steps:
                x, size, at, place = self._reduce(
                    steps[i, "pre_block"], x, size, at, place, self._head_score(i, x), None, replay, out
                )
                x = _compare(f"block{i}.merge", x, None, seen, out)
            p, before = vit.parts(block), x
            turn = None if rope is None else rope[i % len(rope)][:, place].transpose(0, 1)
            x, k, attention = attend(p, x, size if out.plans and options.get("prop_attn") else None, turn)
            x = _compare(f"block{i}.attn", x, before, seen, out)
            if (i, "post_attn") in steps:
                score = received(attention, self.n_prefix, options.get("score", "class"))
                x, size, at, place = self._reduce(
                    steps[i, "post_attn"], x, size, at, place, score, k.mean(1), replay, out
                )
                x = _compare(f"block{i}.merge", x, None, seen, out)
            before, x = x, x + _scaled(p.mlp(p.norm2(x)), p.gamma2)
            x = _compare(f"block{i}.mlp", x, before, seen, out)
        out.tokens = m.norm(x)
        out.output, out.sources, out.size = self._head(out.tokens, size), at, size[..., 0]
        return out

    def _head(self, tokens, size):
        m, p = self.model, self.n_prefix
        if not vit.pools_by_size(m, self.schedule):
            return m.forward_head(tokens)
        pooled = (tokens * size)[:, p:].sum(1) / size[:, p:].sum(1)
        return m.head(m.head_drop(m.fc_norm(pooled)))

    @property
    def n_prefix(self) -> int:
        return self.model.num_prefix_tokens

    def _head_score(self, block, x):
        """The head's log-probability to keep less that to drop, prefix tokens lifted, [B, N, 1].

        The authors sort by the first alone: the same order, until it is so near 0 that float32 cannot tell tokens apart.
        """
        stage = self.schedule.options["at"].index(block)
        keep, drop = self.heads[stage](x[:, self.n_prefix :]).split(1, -1)
        score = keep - drop
        return _lifted(torch.cat([score.new_zeros(len(x), self.n_prefix, 1), score], 1), self.n_prefix)

    def _reduce(self, step, x, size, at, place, score, metric, replay, out):
        """One reduction of tokens x, their sizes, where input tokens are (at) and where tokens stand in the image (place)."""
        reducer = reducers.get(self.schedule.method)
        unit = None if metric is None else metric / metric.norm(dim=-1, keepdim=True)
        signals = Signals(x, self.n_prefix, vit.has_class_token(self.model), size, unit, score)
        given = None if replay is None else replay[len(out.plans)]
        plan = reducer.reference(signals, step, given)
        if given is not None:
            out.regrets.append(reducer.regret(signals, step, plan))
        if out.margins is not None:
            out.margins.append(row_margins(signals, step, plan=plan, signal=signal_of(self.schedule, step)))
        out.plans.append(plan)
        place = place.gather(1, plan.keep[..., 0])  # a token stands where it stood; one made of others stands nowhere
        place = torch.cat([place, place.new_full((len(x), plan.n_extra), self.schedule.n_tokens)], 1)
        return (*apply_eager(plan, x, size), follow(plan, at, step.n_in), place)


@dataclass(frozen=True)
class _Seen:
    """Tokens observed behind stages, and the relative rounding of the numbers they are kept in."""

    tokens: dict[str, torch.Tensor]
    rounding: float


def _compare(name: str, x: torch.Tensor, before: torch.Tensor | None, seen: _Seen, out: ReferenceResult):
    """The observed tokens of a stage in place of x, when there are any, after noting how far they depart.

    before: tokens the stage added to; the difference, less two roundings of the tokens, is then over what it added, else it is over the
    tokens, the worst row.
    """
    if name not in seen.tokens:
        return x
    found = seen.tokens[name].to(x.dtype).reshape(x.shape)
    length = lambda a, dims: a.square().sum(dims).sqrt()
    if before is None:
        error = (length(found - x, 2) / length(x, 2).clamp(min=1e-30)).amax(1)
    else:
        apart = (length(found - x, (1, 2)) - 2 * seen.rounding * length(x, (1, 2))).clamp(min=0)
        error = apart / length(x - before, (1, 2)).clamp(min=1e-30)
    out.departs[name] = error.nan_to_num(torch.inf, torch.inf)
    return found


def received(attention: torch.Tensor, n_prefix: int, of: str) -> torch.Tensor:
    """Attention every token receives, mean over heads, prefix tokens lifted: [B, heads, N, N] -> [B, N, 1].

    of: "class", from the class token; "mean", the mean over all tokens.
    """
    rows = attention[:, :, 0] if of == "class" else attention.mean(2)
    return _lifted(rows.mean(1)[..., None], n_prefix)


def signal_of(schedule: Schedule, step) -> str | None:
    """What a step looks at, as `Precision.near_tie` names it. Args: schedule, and a step of it."""
    need = next(iter(getattr(reducers.get(schedule.method), "NEEDS", ())), None)
    attention = "mean_attention" if schedule.options.get("score") == "mean" else "class_attention"
    return {"metric": "keys", "attention": attention, "head": "score_head", None: None}[need]


def _lifted(score, n_prefix):
    return score + torch.tensor(lift(score.shape[1], n_prefix), dtype=score.dtype)[:, None]


def attend(p: vit.BlockParts, x: torch.Tensor, size: torch.Tensor | None, rope: torch.Tensor | None = None):
    """Attention half of a block, x [B, N, C] -> x after its residual, the keys [B, heads, N, D] and the attention [B, heads, N, N].

    size: [B, N, 1] for proportional attention (log(size) on the logits, after scaling), or None. rope: rotary embedding of these
    tokens [B, heads or 1, N, 2 D], or None; the keys that are returned are not rotated.
    """
    from timm.layers import apply_rot_embed_cat

    y = p.norm1(x)
    q, k, v = vit.split_heads(p, y)
    turn = lambda t: t if rope is None else apply_rot_embed_cat(t, rope, half=p.half)
    logits = (turn(q) * p.scale) @ turn(k).mT
    if size is not None:
        logits = logits + size.log()[:, None, :, 0].unsqueeze(2)
    attention = logits.softmax(-1)
    out = p.norm((attention @ v).transpose(1, 2).flatten(2))
    out = p.proj(out if p.gate is None else out * p.gate(y).sigmoid())
    return x + _scaled(out, p.gamma1), k, attention


def _scaled(x, gamma):
    return x if gamma is None else x * gamma


def reduce_model(model: nn.Module, schedule: Schedule, heads: nn.ModuleList | None = None) -> ReducedViT:
    """The eager reference of a model under a schedule.

    model: a plain timm ViT. schedule: from `Schedule.parse` with the model's own token counts. heads: the score heads of dTPS and
    DynamicViT, from `score_heads(loaded, schedule)`.
    Raises: UsageError when the model is no plain ViT, or the schedule or the heads are for another one.
    """
    return ReducedViT(model, schedule, heads)
