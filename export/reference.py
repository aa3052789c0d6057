"""The oracle: the method as its paper writes it, on the model's own modules, eager, with argsort and scatter; on any device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reducers
from .apply import apply_eager, follow
from .constants import lift
from .errors import UsageError
from .lowering import LOWERINGS, TritonReductions
from .margins import RowMargins, nothing_decided
from .models import as_plain
from .models.plain_vit import BlockParts, PlainViT
from .models.score_head import head_scores
from .outputs import POOLED, Emission
from .plan import ATTENTION_SIGNALS, MergePlan, Signals
from .schedule import Schedule
from .step import Step
from .trail import Trail

if TYPE_CHECKING:
    from .pixels import Pixels


@dataclass
class ReferenceResult:
    """What the reference computed for a batch.

    Args:
        output: logits or features [B, classes or C].
        tokens: after the final norm [B, N, C].
        sources: [B, N0] where each input token ended up, -1 when it is gone.
        size: [B, N] input tokens per final token.
        plans: the merge plan of every step, in order.
        regrets: with replayed decisions, per step [B]: how far they are from the reference's own (see the reducer).
        departs: with observed tokens, per stage [B]: how far they are from what the reference makes of those before them.
        margins: when they were asked for, per step: how clear each row's part of the decision is.
        outputs: every output that the model emits, by name [B, ...].
    """

    output: Tensor
    tokens: Tensor
    sources: Tensor
    size: Tensor
    plans: list[MergePlan] = field(default_factory=list)
    regrets: list[Tensor] = field(default_factory=list)
    departs: dict[str, Tensor] = field(default_factory=dict)
    margins: list[RowMargins] | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)


class TokenState(NamedTuple):
    """Tokens on their way through the blocks.

    Args:
        x: [B, N, C].
        size: [B, N, 1] input tokens that each stands for.
        sources: [B, N0] rows at which the input tokens are, -1 for what is gone.
        place: [B, N] where each stands in the image, a row of the rotary table.
    """

    x: Tensor
    size: Tensor
    sources: Tensor
    place: Tensor


@dataclass(frozen=True)
class Observed:
    """Tokens observed behind stages.

    Args:
        tokens: by stage name.
        rounding: of the numbers they are kept in, relative.
        departs: takes how far each stage departs [B], by its name.
        tail: stages of which rows may be observed that stand first and no others (the last block's, see `tail`).
        n_prefix: how many.
    """

    tokens: dict[str, Tensor]
    rounding: float
    departs: dict[str, Tensor]
    tail: tuple[str, ...] = ()
    n_prefix: int = 0

    def replace(self, stage: str, x: Tensor, *, added_to: Tensor | None = None) -> Tensor:
        """The observed tokens of a stage instead of the reference's, when there are any, after noting how far they depart.

        Args:
            stage: its name.
            x: what the reference makes of the tokens before it [B, N, C].
            added_to: tokens that the stage added to; the difference, less two roundings of the tokens, is then over what it added,
                else it is over the tokens, the worst row.
        """
        if stage not in self.tokens:
            return x
        observed, whole = self.tokens[stage].to(x), x
        if stage in self.tail and observed.numel() == x[:, : self.n_prefix].numel():
            x, added_to = (t if t is None else t[:, : self.n_prefix] for t in (x, added_to))
        observed = observed.reshape(x.shape)
        length = lambda a, dims: a.square().sum(dims).sqrt()
        if added_to is None:
            error = (length(observed - x, 2) / length(x, 2).clamp(min=1e-30)).amax(1)
        else:
            apart = (length(observed - x, (1, 2)) - 2 * self.rounding * length(x, (1, 2))).clamp(min=0)
            error = apart / length(x - added_to, (1, 2)).clamp(min=1e-30)
        self.departs[stage] = error.nan_to_num(torch.inf, torch.inf)
        return torch.cat([observed, whole[:, observed.shape[1] :]], 1)


class Run(NamedTuple):
    """What one run of the reference carries along: decisions to replay, tokens observed, what is computed, the rotary table, where the
    tokens went.
    """

    replay: list[MergePlan] | None
    seen: Observed
    result: ReferenceResult
    rope: Tensor | None
    trail: Trail


class ReducedViT(nn.Module):
    """A ViT with a schedule applied, eager: the reference as a module. The model is used as it is, never changed.

    `forward(image [B, channels, H, W])` gives logits (features without classes); `run` gives everything.

    Args:
        model: a plain ViT (see `models.FAMILIES`), or a PlainViT.
        schedule: of the same model.
        heads: score heads, one a stage, of the methods that have them (see `score_heads`).
        emission: which outputs are given beside the pooled one (`ReferenceResult.outputs`).
        pixels: what images are made of, where they are not normalised already (see `pixels.Pixels`).
        lowering: see `reduce_model`.
    """

    def __init__(
        self,
        model: nn.Module | PlainViT,
        schedule: Schedule,
        heads: nn.ModuleList | None = None,
        *,
        emission: Emission = POOLED,
        pixels: Pixels | None = None,
        lowering: str = "eager",
    ):
        super().__init__()
        if lowering not in LOWERINGS:
            raise UsageError(f"lowering {lowering!r}: wanted {' or '.join(LOWERINGS)}")
        self.plain = as_plain(model)
        self.plain.check_schedule(schedule, heads)
        self.model, self.schedule, self.heads = self.plain.module.eval(), schedule, heads
        self.emission, self.pixels = emission.resolved(schedule.depth), pixels
        self.triton = TritonReductions.of(self.plain, schedule) if lowering == "triton" else None

    def forward(self, image: Tensor) -> Tensor:
        return self.run(image).output

    @torch.no_grad()
    def dense(self, image: Tensor) -> Tensor:
        """The pooled output of the model without a reduction, by its own code. image: as `run`."""
        return self.model(self._normalised(image))

    def _normalised(self, image: Tensor) -> Tensor:
        return image if self.pixels is None else self.pixels.normalised(image)

    @torch.no_grad()
    def run(
        self,
        image: Tensor,
        replay: list[MergePlan] | None = None,
        observed: dict[str, Tensor] | None = None,
        rounding: float = 0.0,
        margins: bool = False,
    ) -> ReferenceResult:
        """Compute, deciding itself or under given decisions.

        Args:
            image: [B, channels, H, W], on the model's device; or pixels.
            replay: plans to apply instead of its own, one per step; their regret is measured.
            observed: tokens behind stages, as somebody else has them, by stage name (see `stages`; any shape of B N C values). Each
                is compared with what the reference makes of the tokens before it, and goes on in its place: errors do not add up.
            rounding: of a number that the observed tokens are kept in, relative; what it explains is no departure (a stage may add
                less than that).
            margins: also measure how clear every decision is (see `margins`).
        """
        plain, steps = self.plain, self.schedule.by_site
        x = plain.embed(self._normalised(image))
        batch, n, _ = x.shape
        rows = torch.arange(n, device=x.device).expand(batch, n)
        state = TokenState(x, x.new_ones(batch, n, 1), rows, rows)
        result = ReferenceResult(x, x, rows, state.size[..., 0], margins=[] if margins else None)
        tail = tuple(f"block{self.schedule.depth - 1}.{part}" for part in ("attn", "mlp"))
        seen = Observed(observed or {}, rounding, result.departs, tail, plain.n_prefix)
        run = Run(replay, seen, result, plain.rotary(), self._trail(x))
        state = state._replace(x=seen.replace("embed", x))
        for i, block in enumerate(plain.blocks()):
            if (i, "pre_block") in steps:
                state = self._reduce(steps[i, "pre_block"], state, block=block, run=run)
            behind = steps.get((i, "post_attn"))
            weighed = behind is not None and behind.signal in ("class_attention", "mean_attention")
            attention = self._attend(i, state, block=block, run=run, fused=self.triton is not None and not weighed)
            state = state._replace(x=seen.replace(f"block{i}.attn", attention.x, added_to=state.x))
            if behind is not None:
                state = self._reduce(behind, state, block=block, run=run, attention=attention)
            x = state.x + _scaled(block.mlp(block.norm2(state.x)), block.gamma2)
            state = state._replace(x=seen.replace(f"block{i}.mlp", x, added_to=state.x))
            if i in self.emission.layers:
                result.outputs |= run.trail.outputs(state, i)
        result.tokens = plain.norm(state.x)
        result.output = self._head(result.tokens, state.size)
        result.sources, result.size = state.sources, state.size[..., 0]
        last = {} if self.emission.layers else run.trail.outputs(state, None)
        pooled = {plain.output_name: result.output} if "pooled" in self.emission.emit else {}
        result.outputs |= last | pooled
        return result

    def _trail(self, x: Tensor) -> Trail:
        plain = self.plain
        grid = plain.grid if self.emission.needs_grid else (0, 0)
        return Trail(self.emission, grid=grid, n_prefix=plain.n_prefix, norm=plain.norm, x=x)

    def _head(self, tokens: Tensor, size: Tensor) -> Tensor:
        pooling, p = self.plain.pooling, self.plain.n_prefix
        if not self.plain.pools_by_size(self.schedule):
            return pooling.forward(tokens)
        pooled = (tokens * size)[:, p:].sum(1) / size[:, p:].sum(1)
        return pooling.classifiers[0](pooling.norm(pooled))

    def _attend(self, i: int, state: TokenState, *, block: BlockParts, run: Run, fused: bool = False) -> Attended:
        size = state.size if run.result.plans and self.schedule.prop_attn else None
        rope = None if run.rope is None else run.rope[i % len(run.rope)][:, state.place].transpose(0, 1)
        return attend(block, state.x, size=size, rope=rope, fused=fused)

    def _signals(self, step: Step, state: TokenState, *, block: BlockParts, run: Run, attention) -> Signals:
        """What a step looks at: keys and attention are the block's own, or those that it would compute of the tokens before it."""
        x, p, metric, score = state.x, self.plain.n_prefix, None, None
        if step.signal in ATTENTION_SIGNALS and attention is None:
            attention = self._attend(step.block, state, block=block, run=run)
        if step.signal in ("keys", "metric_layer"):
            if step.signal == "keys":
                rows = attention.keys.mean(1)
            else:
                rows = self.heads[step.layer](block.norm1(x) if attention is None else attention.normed)
            metric = rows / rows.norm(dim=-1, keepdim=True)
        elif step.signal == "score_head":
            score = head_scores(self.heads[step.layer], x, n_prefix=p)
        elif step.signal is not None:
            score = received(attention.weights, n_prefix=p, of=step.signal)
        return Signals(x, p, self.plain.has_class_token, state.size, metric=metric, score=score)

    def _reduce(self, step: Step, state: TokenState, *, block: BlockParts, run: Run, attention=None) -> TokenState:
        """One reduction; attention: of the block, after it."""
        reducer, result = reducers.get(self.schedule.method), run.result
        signals = self._signals(step, state, block=block, run=run, attention=attention)
        if self._by_kernel(step, run):
            signal = attention.keys if step.signal == "keys" else signals.score
            plan, x, size = self.triton.reduce(step.block, state.x, signal=signal, size=state.size)
            result.plans.append(plan)
            return self._moved(step, state, plan=plan, x=x, size=size, run=run)
        given = None if run.replay is None else run.replay[len(result.plans)]
        plan = reducer.reference(signals, step, given)
        if given is not None:
            result.regrets.append(reducer.regret(signals, step, plan))
        if result.margins is not None:
            clear = nothing_decided(signals, step) if reducer.margins is None else reducer.margins(signals, step, plan)
            result.margins.append(clear)
        result.plans.append(plan)
        x, size = apply_eager(plan, state.x, state.size)
        return self._moved(step, state, plan=plan, x=x, size=size, run=run)

    def _by_kernel(self, step: Step, run: Run) -> bool:
        """Whether a kernel reduces: replayed decisions and margins are PyTorch's affair."""
        covered = self.triton is not None and step.block in self.triton.nodes
        return covered and run.replay is None and run.result.margins is None

    def _moved(self, step: Step, state: TokenState, *, plan: MergePlan, x: Tensor, size: Tensor, run: Run):
        """The state behind a reduction that gave x and size."""
        place = state.place.gather(1, plan.keep[..., 0])  # a token stands where it stood; one made of others nowhere
        place = torch.cat([place, place.new_full((len(place), plan.n_extra), self.schedule.n_tokens)], 1)
        squeezes = reducers.get(self.schedule.method).squeezes
        x = run.seen.replace(f"block{step.block}.merge", x)
        after = TokenState(x, size, follow(plan, state.sources, step.n_in, squeezes=squeezes), place)
        run.trail.step(state, after)
        return after


class Attended(NamedTuple):
    """What the attention half of a block computes.

    Args:
        x: tokens after the attention residual [B, N, C].
        keys: [B, heads, N, D], not rotated.
        weights: the attention [B, heads, N, N]; None behind fused attention.
        normed: norm1's output, of the tokens before it [B, N, C].
    """

    x: Tensor
    keys: Tensor
    weights: Tensor | None
    normed: Tensor


def attend(
    block: BlockParts, x: Tensor, *, size: Tensor | None = None, rope: Tensor | None = None, fused: bool = False
) -> Attended:
    """The attention half of a block.

    Args:
        block: its parts.
        x: tokens [B, N, C].
        size: [B, N, 1] for proportional attention (log(size) on the logits, after scaling), or None.
        rope: rotary embedding of these tokens [B, heads or 1, N, 2 D], or None.
        fused: by PyTorch's fused attention, which keeps no weights.
    """
    y = block.norm1(x)
    q, k, v = block.split_heads(y)
    turned_q, turned_k = (t if rope is None else rotated(t, rope, half=block.half) for t in (q, k))
    bias = None if size is None else size.log()[:, None, :, 0].unsqueeze(2).to(q.dtype)
    weights = None
    if fused:
        out = F.scaled_dot_product_attention(turned_q, turned_k, v, attn_mask=bias, scale=block.scale)
    else:
        logits = (turned_q * block.scale) @ turned_k.mT
        weights = (logits if bias is None else logits + bias).softmax(-1)
        out = weights @ v
    out = block.norm(out.transpose(1, 2).flatten(2))
    out = block.proj(out if block.gate is None else out * block.gate(y).sigmoid())
    return Attended(x + _scaled(out, block.gamma1), k, weights, y)


def rotated(x: Tensor, rope: Tensor, *, half: bool) -> Tensor:
    """Queries or keys turned by the rotary embedding of their tokens.

    Args:
        x: [B, heads, N, D].
        rope: [B, heads or 1, N, 2 D], sines then cosines.
        half: pairs of channels are (i, i + D/2), else (2i, 2i + 1).
    """
    sin, cos = rope.chunk(2, -1)
    if half:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape) * sin


def received(weights: Tensor, *, n_prefix: int, of: str) -> Tensor:
    """Attention that every token receives, mean over heads, prefix tokens lifted.

    Args:
        weights: [B, heads, N, N].
        n_prefix: prefix tokens at the head of the sequence.
        of: "class_attention", from the class token; "mean_attention", the mean over all tokens.
    Returns:
        [B, N, 1].
    """
    rows = weights[:, :, 0] if of == "class_attention" else weights.mean(2)
    return rows.mean(1)[..., None] + weights.new_tensor(lift(weights.shape[-1], n_prefix))[:, None]


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


def reduce_model(
    model: nn.Module | PlainViT,
    schedule: Schedule,
    heads: nn.ModuleList | None = None,
    *,
    emission: Emission = POOLED,
    lowering: str = "eager",
) -> ReducedViT:
    """The eager reference of a model under a schedule.

    Args:
        model: a plain ViT, on any device.
        schedule: from `loaded.schedule`, or `Schedule.parse` with the model's own token counts.
        heads: the score heads of dTPS and DynamicViT, from `learned_layers(loaded, schedule)`.
        emission: which outputs are given beside the pooled one, from `outputs.parse_emission`.
        lowering: "eager", PyTorch's operators, which is what files are proven against; or "triton", the same reductions by kernels
            on an NVIDIA GPU, and fused attention where its weights decide nothing. A reduction that no kernel takes stays in
            PyTorch's operators, and a warning says so.
    Raises:
        UsageError: the model is no plain ViT, or the schedule or the heads are for another one; an unknown lowering.
        MissingPackageError: lowering "triton" without Triton.
    """
    return ReducedViT(model, schedule, heads, emission=emission, lowering=lowering)
