"""A file's decisions: read from its outputs, checked to be a plan, compared with another side's, and followed to a
map of tokens.

A decision is judged by what it gives away. A reducer says so itself (`regret`: how far given decisions are from the
best ones by the reference's own scores); what is within the near-tie limit of the signal that the step looks at is a
flip that rounding explains. For a method whose tokens are nearly alike as a rule, flips are the rule too: they are
counted, and do not fail.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from ...export import precisions
from ...export.errors import UsageError
from ...export.provenance import Provenance
from ...export.schedule import Schedule, Step


class DecisionError(UsageError):
    """What a file gives as its decisions is no plan: a row is kept twice, lost, not there, or has no host."""


def near_tie_limit(precision: str, step: Step) -> float:
    """What a flipped near-tie of one step may give away.

    Args:
        precision: of the looser side.
        step: whose signal decides.
    Returns:
        The limit of the signal's kind; 0 for a step that decides nothing.
    """
    from ...export.plan import SIGNALS

    return 0.0 if step.signal is None else precisions.get(precision).near_tie[SIGNALS[step.signal].kind]


def check_parts(path, provenance: Provenance) -> None:
    """Make sure that a file gives all that its merge plans are read from.

    Args:
        path: of the file, for the message.
        provenance: of the file.
    Raises:
        UsageError: a part of a decision is missing.
    """
    for step in provenance.file_schedule.steps:
        parts = {d.partition(".")[2] for d in provenance.decisions if d.startswith(f"block{step.block}.")}
        if step.n_in == 1 and not parts:  # nothing to decide: the graph has it as a constant
            continue
        missing = [] if "order" in parts else ["keep", "src"][: 2 if step.n_folded else 1]
        missing = [part for part in missing if part not in parts]
        if step.n_folded and step.n_out == step.n_kept and not parts & {"dst", "target"}:
            missing.append("dst")
        if missing:
            raise UsageError(
                f"{path}: the decision of block {step.block} lacks {' and '.join(missing)}: the file was changed, or "
                f"made by another version; make it again with `tokexport onnx`"
            )


def read_plans(values: dict[str, np.ndarray], provenance: Provenance, *, n_images: int) -> list:
    """A file's merge plans for a chunk of images.

    Args:
        values: what the file gave, by name; decisions are columns [B, .., 1].
        provenance: of the file.
        n_images: B.
    Returns:
        A `MergePlan` of row numbers for every step that is in the file.
    Raises:
        DecisionError: a decision is no plan.
    """
    import torch

    plans = []
    for step in provenance.file_schedule.steps:
        prefix = f"block{step.block}."
        columns = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in values.items() if k.startswith(prefix)}
        if step.n_in == 1 and not columns:
            columns = {"keep": torch.zeros(n_images, 1, 1, dtype=torch.int64)}
        plan = _plan(columns, step, provenance.schedule)
        if plan is None:
            raise DecisionError(
                f"block {step.block}: the decisions of the file are no plan (a row is kept twice, lost, or has no host)"
            )
        plans.append(plan)
    return plans


def _plan(columns: dict, step: Step, schedule: Schedule):
    """Columns of a static plan [B, .., 1], by name, as a `MergePlan` of row numbers; None when they are none."""
    import torch

    from ...export import reducers
    from ...export.plan import MergePlan

    if "order" in columns:
        order = columns["order"]
    else:
        order = torch.cat([columns[part] for part in ("keep", "src") if part in columns], 1)
    rows = order[..., 0].sort(-1).values
    n_used = step.n_kept + step.n_folded
    if rows.shape[1] != n_used or rows.min() < 0 or rows.max() >= step.n_in or not (rows.diff() > 0).all():
        return None
    keep, src = order[:, : step.n_kept], order[:, step.n_kept :]
    if not step.n_folded:
        return MergePlan(keep)
    if step.n_out > step.n_kept:  # all are folded into an extra row
        return MergePlan(keep, src, torch.full_like(src, step.n_kept), combine="sum")
    label = columns["dst"] if "dst" in columns else columns["target"].gather(1, src)
    hit = label == torch.tensor(reducers.get(schedule.method).row_labels(step, schedule.n_prefix))
    return MergePlan(keep, src, hit.to(torch.int8).argmax(-1, keepdim=True)) if hit.any(-1).all() else None


def decided_alike(plans: list, others: list):
    """Whether two sides keep, fold and host alike; the order in which rows are folded is no decision.

    Args:
        plans, others: a `MergePlan` for every step, of B images each.
    Returns:
        [B, steps] bool tensor.
    """
    import torch

    return torch.stack([_same(a, b) for a, b in zip(plans, others, strict=True)], 1)


def _same(a, b):
    import torch

    alike = (a.keep == b.keep).flatten(1).all(1)
    n_a, n_b = (0 if p.src is None else p.src.shape[1] for p in (a, b))
    if n_a != n_b:
        return torch.zeros_like(alike)
    for x, y in zip(_by_row(a), _by_row(b)) if n_a else ():
        alike = alike & (x == y).all(1)
    return alike


def _by_row(plan):
    """Folded rows in ascending order, and where each goes: [B, R] twice."""
    src, order = plan.src[..., 0].sort(1)
    return src, plan.dst[..., 0].gather(1, order)


def of_images(plans: list, rows) -> list:
    """Merge plans of some images of a chunk.

    Args:
        plans: a `MergePlan` for every step, of B images.
        rows: [K] integer tensor, which images.
    Returns:
        The plans with K images.
    """
    import torch

    def chosen(plan):
        tensors = {f.name: v for f in fields(plan) if isinstance(v := getattr(plan, f.name), torch.Tensor)}
        return replace(plan, **{name: v[rows] for name, v in tensors.items()})

    return [chosen(plan) for plan in plans]


def token_maps(plans: list, schedule: Schedule) -> list[np.ndarray]:
    """Where every input token is after each step.

    Args:
        plans: a `MergePlan` of row numbers for every step, of B images.
        schedule: whose steps they are.
    Returns:
        One [B, N0] a step: the row of each input token, -1 when it is gone.
    """
    import torch

    from ...export import reducers
    from ...export.apply import follow

    squeezes, maps = reducers.get(schedule.method).squeezes, []
    rows = torch.arange(schedule.n_tokens).expand(len(plans[0].keep), -1) if plans else None
    for step, plan in zip(schedule.steps, plans, strict=True):
        rows = follow(plan, rows, step.n_in, squeezes=squeezes)
        maps.append(rows.numpy())
    return maps
