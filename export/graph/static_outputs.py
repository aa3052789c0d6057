"""What a static graph gives beside its pooled output: tokens, patches, and where detail was lost.

All but the final norm is counting and moving: it stays in float32 (stage outputs.merge) and follows one map, the row at which every
input token is. Row n of n tokens stands for gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...kernels import ops
from ..constants import column, constant, row
from ..outputs import Emission
from ..plan import MergePlan
from ..schedule import Schedule
from ..step import Step
from .static_block import Stage

FAR = 2.0**22  # farther than any patch of a grid of 1448 x 1448
TINY = 1e-30  # the least product of two tokens' lengths


@dataclass
class StaticTrail:
    """What is noted of the steps of a run.

    Args:
        honesty: [.., N0, 1]; None while it is 0.
        bank: tokens in front of the steps that drop some [.., n, C].
        at: [.., N0, 1] rows of the bank, one after another, at which the tokens were when they were dropped; None while none is.
    """

    honesty: Tensor | None = None
    bank: list[Tensor] = field(default_factory=list)
    at: Tensor | None = None


class StaticOutputs(nn.Module):
    """The outputs of one block, and what must be noted of the steps for them.

    Args:
        emission: which outputs are asked for, layers resolved.
        schedule: of the model.
        grid: rows and columns of patches; read where tokens or patches are asked for.
        single: one image, whose tokens have no batch axis.
        any_batch: the batch is free.
        squeezes: folded tokens count as gone.
    """

    def __init__(
        self,
        emission: Emission,
        schedule: Schedule,
        *,
        grid: tuple[int, int],
        single: bool,
        any_batch: bool,
        squeezes: bool,
    ):
        super().__init__()
        self.emission, self.grid, self.single, self.any_batch, self.squeezes = (
            emission,
            grid,
            single,
            any_batch,
            squeezes,
        )
        self.n_tokens, self.n_prefix = schedule.n_tokens, schedule.n_prefix
        self.drops = [s for s in schedule.steps if s.n_kept + (0 if squeezes else s.n_folded) < s.n_in]
        self.lost, self.kept = Stage(self._lost), Stage(self._kept)
        self.geometry, self.gathered, self.filled = Stage(self._geometry), Stage(self._gathered), Stage(self._filled)
        self.shaped, self.rows_of, self.known = Stage(self._shaped), Stage(self._source_rows), Stage(self._known)
        self.zeros, self.patch_rows = Stage(self._zeros), Stage(self._of_patches)
        if emission.dropped == "nearest" and "patches" in emission.emit:
            at = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid))
            nearness = -(at[:, None] - at).square().sum(-1)
            self.nearness = nn.Parameter(nearness if single else nearness[None], requires_grad=False)

    @property
    def follows(self) -> bool:
        """Whether the map of input tokens is needed."""
        return bool(self.emission.kinds)

    def note(
        self, trail: StaticTrail, plan: MergePlan, step: Step, *, x: Tensor, x_out: Tensor, before: Tensor | None
    ) -> None:
        """Note what a step did.

        Args:
            trail: changed in place.
            plan: laid out.
            step: whose plan it is.
            x, x_out: tokens before and behind it [.., n, C].
            before: [.., N0, 1] rows of x at which the input tokens are, None for each at its own.
        """
        if "patches" not in self.emission.emit:
            return
        if plan.src is not None:
            lost = self.lost(plan, step, x, x_out)
            if before is not None:
                lost = ops.take_rows(lost, before)
            elif self.drops:
                lost = ops.fixed_rows(lost, list(range(step.n_in)))
            trail.honesty = lost if trail.honesty is None else trail.honesty + lost
        if self.emission.dropped == "last" and step in self.drops:
            trail.at = self.kept(trail, plan, step, before)
            trail.bank.append(x)

    def _kept(self, trail, plan, step, before):
        """Where every input token is in the bank when these tokens are put there."""
        offset = sum(x.shape[-2] for x in trail.bank)
        if before is None:
            return constant(range(self.n_tokens), plan.keep, any_batch=self.any_batch)
        now = before + column([offset], before)
        return now if trail.at is None else torch.where(before == column([step.n_in], before), trail.at, now)

    def _lost(self, plan, step, x, x_out):
        """1 - cosine of every token before and behind a step [.., n_in, 1]; where tokens may be gone one row more, for those."""
        zeros = lambda n: ops.to_float(constant([0] * n, plan.keep, any_batch=self.any_batch))
        n_in = step.n_in + bool(self.drops)
        if plan.n_extra:
            host = ops.fixed_rows(x_out, [step.n_kept])
            return ops.put_rows(zeros(n_in), plan.src, self._apart(ops.take_rows(x, plan.src), host))
        labels = plan.layout.labels if plan.layout else None
        shift = labels.index(0) if labels else 0  # labels of hosts count up from 0 at this row
        host = plan.dst + column([shift], plan.dst) if shift else plan.dst
        pairs = torch.cat([plan.src, ops.take_rows(plan.keep, host)], -2)
        apart = self._apart(ops.take_rows(x, pairs), ops.take_rows(x_out, torch.cat([host, host], -2)))
        folded, hosts = apart.split(step.n_folded, -2)
        hit = ops.to_float(host == row(range(step.n_kept), host))
        hosts = (hit * hosts).amax(-2, keepdim=True).transpose(-1, -2)
        folded = folded * 0 if self.squeezes else folded
        return ops.put_rows(zeros(n_in), torch.cat([plan.keep, plan.src], -2), torch.cat([hosts, folded], -2))

    def _apart(self, a, b):
        lengths = torch.linalg.vector_norm(a, dim=-1, keepdim=True) * torch.linalg.vector_norm(b, dim=-1, keepdim=True)
        cosine = (a * b).sum(-1, keepdim=True) / torch.maximum(lengths, row([TINY], lengths))
        return torch.relu(row([1.0], cosine) - cosine)

    def forward(
        self, rows: Tensor, sources: Tensor | None, trail: StaticTrail, norm: nn.Module, block: int | None
    ) -> dict:
        """The outputs of a block, by name.

        Args:
            rows: tokens behind it [.., n, C].
            sources: [.., N0, 1] at which row each input token is, n for gone; None for each at its own.
            trail: of the steps up to here.
            norm: the final one.
            block: its index; None for the last, whose outputs go through the final norm and have no number.
        """
        kinds, n, known = self.emission.kinds, rows.shape[-2], self.known(sources, rows)
        normed = norm if block is None or self.emission.norm_layers else lambda x: x
        values = {}
        if "tokens" in kinds:
            values["tokens"] = self.shaped(normed(rows), [n, rows.shape[-1]])
            values["sizes"], values["positions"] = self.geometry(known, rows)
        if "patches" in kinds:
            patches = normed(self.gathered(rows, sources, trail))
            values["patches"], values["mask"] = self.filled(patches, known, n)
            values["honesty"] = self.shaped(
                self.patch_rows(self.zeros(rows) if trail.honesty is None else trail.honesty), [-1]
            )
        if "sources" in kinds:
            values["sources"] = self.rows_of(known, n)
        return {kind if block is None else f"{kind}_{block}": values[kind] for kind in kinds}

    def _known(self, sources, rows):
        """The map itself where every token is still at its own row."""
        if sources is not None:
            return sources
        return constant(range(self.n_tokens), (rows[..., :1] * 0).to(torch.int64), any_batch=self.any_batch)

    def _of_patches(self, values):
        """[.., N, 1] of [.., N0, 1]."""
        return ops.fixed_rows(values, list(range(self.n_prefix, self.n_tokens))) if self.n_prefix else values

    def _shaped(self, x, axes):
        """[B, *axes]."""
        return ops.reshape(x, [1 if self.single else -1, *(axes if axes != [-1] else [x.shape[-2]])])

    def _source_rows(self, sources, n):
        sources = ops.reshape(sources, [1 if self.single else -1, self.n_tokens])
        return torch.where(sources == n, -1, sources) if self.drops else sources

    def _geometry(self, sources, rows):
        """Sizes [B, n] and positions [B, n, 2]."""
        (n_rows, n_columns), n = self.grid, rows.shape[-2]
        places = [(-1, -1)] * self.n_prefix + [(i, j) for i in range(n_rows) for j in range(n_columns)]
        hit = ops.to_float(sources == row(range(n), sources))
        values = [float(v) for place in places for v in (*place, 1)]
        places = ops.floats(values, [*[1] * (rows.ndim - 2), self.n_tokens, 3])
        sums, sizes = ops.matmul(hit, places, True, False).split([2, 1], -1)
        return self._shaped(sizes, [n]), self._shaped(sums / sizes, [n, 2])

    def _gathered(self, rows, sources, trail):
        """What every patch ended up in, or was, in front of the final norm [.., N, C]."""
        if sources is None:
            return self._of_patches(rows)
        if not trail.bank:
            at = self._of_patches(sources)
            return ops.take_rows(rows, self._inside(at, rows.shape[-2]))
        offset, at = sum(x.shape[-2] for x in trail.bank), self._of_patches(sources)
        at = torch.where(at == column([rows.shape[-2]], at), self._of_patches(trail.at), at + column([offset], at))
        return ops.take_rows(torch.cat([*trail.bank, rows], -2), at)

    def _inside(self, at, n):
        """Rows that are there: those of what is gone, which are filled later, are any."""
        return torch.minimum(at, column([n - 1], at)) if self.drops else at

    def _filled(self, patches, sources, n):
        """Patches in their layout, with what stands for those that are gone; and 1 for each that is not [B, N]."""
        sources, c = self._of_patches(sources), patches.shape[-1]
        there = ops.to_float(sources != column([n], sources))
        if self.drops and self.emission.dropped == "zero":
            patches = patches * there
        elif self.drops and self.emission.dropped == "nearest":
            far = (there - column([1.0], there)) * column([FAR], there)
            patches = ops.take_rows(patches, ops.best_column(self.nearness + far.transpose(-1, -2))[1])
        if self.emission.layout == "nchw":
            return self._shaped(patches.transpose(-1, -2), [c, *self.grid]), self._shaped(there, [-1])
        return self._shaped(patches, [self.grid[0] * self.grid[1], c]), self._shaped(there, [-1])

    def _zeros(self, rows):
        zero = (rows[..., :1] * 0).to(torch.int64)
        return ops.to_float(constant([0] * self.n_tokens, zero, any_batch=self.any_batch))
