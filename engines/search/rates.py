"""Learning DiffRate's keep counts on a deployer's own images, under a budget of multiply-accumulates.

The model is frozen. Two selectors a block are trained by gradient on two terms: how far the reduced model's output is from the dense
model's (or from labels), and how far the counts are from the budget. Settings follow what converges in some 90 steps on DINOv2.

Source: DiffRate (Chen et al. 2023); departures from it, all of them to make a short search on few images converge: logits start
round a straight line of counts that meets the budget instead of at zero; the budget is relative; the dense model teaches; the rate
is higher and falls along a cosine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...export import macs
from ...export.errors import UsageError
from ...export.models import as_plain
from ...export.models.plain_vit import PlainViT
from ...export.schedule import Schedule
from .cost import BlockCost, expected_macs
from .masked_vit import MaskedViT
from .state import SearchState

SPREAD = 20.0  # of the first distribution over 256 patches, in patches
BUDGET_WEIGHT = 5.0  # of the squared relative distance from the budget
RATE, LAST_RATE = 0.15, 0.015
MOST_STEPS = 1_000_000  # of a search; more are a slip of the hand


@dataclass(frozen=True)
class SearchSettings:
    """How long and on what the search runs.

    Attributes:
        steps: of the optimizer.
        batch: images a step.
        granularity: patches between two candidate counts.
        seed: of the order of the images; the same seed gives the same counts on one machine.
    """

    steps: int = 90
    batch: int = 6
    granularity: int = 4
    seed: int = 0


@dataclass(frozen=True)
class LearnedRates:
    """Counts as `--rates FILE` takes them, and how they came about.

    Attributes:
        prune_kept, merge_kept: tokens after pruning and after merging, one a block, prefix tokens included.
        n_tokens: into the first block.
        macs, macs_dense, target: multiply-accumulates of one image under these counts, without a reduction, and as asked.
        loss: mean distance to the teacher over the last tenth of the steps.
        images, steps, seed: what it was learned on.
    """

    prune_kept: list[int]
    merge_kept: list[int]
    n_tokens: int
    macs: int
    macs_dense: int
    target: int
    loss: float
    images: int
    steps: int
    seed: int

    def to_json(self) -> str:
        """The rates file: the counts, and under "learned" the rest."""
        values = asdict(self)
        counts = {k: values.pop(k) for k in ("prune_kept", "merge_kept", "n_tokens")}
        return json.dumps({**counts, "learned": values}, indent=1)


def learn_rates(
    loaded,
    images: Callable[[Sequence[int]], np.ndarray],
    *,
    n_images: int,
    target: int,
    labels: Sequence[int] | None = None,
    settings: SearchSettings = SearchSettings(),
    resume: str | Path | None = None,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> LearnedRates:
    """Learn how many tokens every block keeps.

    Args:
        loaded: from `load_model`: a ViT with a class token (or one that pools over patches), with trained weights.
        images: positions -> preprocessed images [B, C, H, W] float32; called for each batch, so that nothing is held.
        n_images: how many there are; some hundreds are enough.
        target: multiply-accumulates of one image to reach, below the dense model's.
        labels: class of every image; None: the dense model teaches.
        settings: length, batch, granularity and seed.
        resume: a file that holds the state after every tenth step, is taken up when it is there, and goes when the search ends.
        progress: called with a line (cost and counts) and the share done.
    Returns:
        The counts, scaled by one factor so that their exact cost is at most the target.
    Raises:
        UsageError: the target cannot be reached or is no reduction, there are too few images, or the model cannot be searched.
    """
    model = loaded.module
    plain = as_plain(model)
    _check_model(plain)
    masked = MaskedViT(model, granularity=settings.granularity, fixed_last=plain.pooling.average)
    budget = _Budget.of_model(plain, target)
    _check(loaded, n_images, labels=labels, settings=settings)
    _start_on_a_line(masked, budget)
    parameters = [p for p in masked.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    losses: list[float] = []
    state = SearchState(resume, _request(loaded, n_images, target, settings))
    first = state.read(parameters, optimizer, losses)
    for step in range(first, settings.steps):
        rows = _rows(step, n_images, settings)
        pixels = torch.from_numpy(np.ascontiguousarray(images(rows)))
        _set_rate(optimizer, step / settings.steps)
        chosen = None if labels is None else [labels[i] for i in rows]
        distance, over = _descend(model, masked, optimizer, budget, pixels=pixels, labels=chosen)
        losses.append(distance)
        progress(_line(masked, over, losses), (step + 1) / settings.steps)
        if (step + 1) % 10 == 0:
            state.write(step + 1, parameters, optimizer, losses)
    result = _result(masked, budget, losses, n_images=n_images, settings=settings)
    state.remove()
    return result


def _descend(model, masked: MaskedViT, optimizer, budget: _Budget, *, pixels, labels) -> tuple[float, torch.Tensor]:
    """One step of the optimizer. Returns: the distance to the teacher, and by what share the expected cost is over the budget."""
    distance = _distance(model, masked(pixels), pixels, labels=labels)
    over = expected_macs(masked.kept(), masked.n_tokens, cost=budget.cost) / budget.target - 1
    optimizer.zero_grad()
    (distance + BUDGET_WEIGHT * over.square()).backward()
    optimizer.step()
    return float(distance.detach()), over


def _set_rate(optimizer, share: float) -> None:
    """The learning rate falls along a cosine. share: of the steps that are done."""
    for group in optimizer.param_groups:
        group["lr"] = LAST_RATE + (RATE - LAST_RATE) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class _Budget:
    """What the search may spend, and how counts are priced."""

    cost: BlockCost
    dims: dict
    target: int
    dense: int
    n_tokens: int
    n_prefix: int
    depth: int

    @classmethod
    def of_model(cls, plain: PlainViT, target: int) -> _Budget:
        dims, (n, prefix, depth) = plain.dims, plain.size
        dense = macs.count(dims, Schedule("none", n, prefix, depth))
        budget = cls(
            BlockCost.of_dims(dims), dims, target=target, dense=dense, n_tokens=n, n_prefix=prefix, depth=depth
        )
        least = budget.macs_of([n] + [prefix + 1] * (depth - 1), [n] + [prefix + 1] * (depth - 1))
        if not least <= target < dense:
            raise UsageError(
                f"target {target / 1e9:.3f} G multiply-accumulates: the dense model has {dense / 1e9:.3f} G, and with one patch left "
                f"behind block 0 {least / 1e9:.3f} G: wanted a number between them"
            )
        return budget

    def macs_of(self, prune: list[int], merge: list[int]) -> int:
        """Of one image under these counts, as files are counted."""
        return macs.count(self.dims, self.schedule(prune, merge))

    def schedule(self, prune: list[int], merge: list[int]) -> Schedule:
        """DiffRate's schedule with these counts."""
        return Schedule.parse(
            "diffrate",
            n_tokens=self.n_tokens,
            depth=self.depth,
            n_prefix=self.n_prefix,
            rates={"prune_kept": prune, "merge_kept": merge},
            score="class",
        )


def _check(loaded, n_images: int, *, labels, settings: SearchSettings) -> None:
    if n_images < settings.batch:
        raise UsageError(
            f"{n_images} images: wanted at least {settings.batch}, better some hundreds like those the model will see"
        )
    if min(settings.steps, settings.batch, settings.granularity) < 1 or settings.steps > MOST_STEPS:
        raise UsageError(
            f"steps {settings.steps}, batch {settings.batch}, granularity {settings.granularity}: wanted 1 or more of each, "
            f"at most {MOST_STEPS} steps"
        )
    if labels is not None:
        n = loaded.module.num_classes
        wrong = [c for c in labels if not 0 <= c < n]
        if len(labels) != n_images or wrong or n < 2:
            raise UsageError(
                f"labels: {len(labels)} for {n_images} images"
                + (f", among them {wrong[0]}" if wrong else "")
                + f"; wanted one for each image, 0 to {n - 1}"
            )


def _check_model(plain: PlainViT) -> None:
    if not plain.has_class_token or plain.pooling.attention is not None:
        raise UsageError(
            "DiffRate sorts tokens by the attention of a class token and the search reads it at the end (or pools over patches): "
            "this model has no class token, or pools by attention; take ToMe, which needs neither"
        )


def _start_on_a_line(masked: MaskedViT, budget: _Budget) -> None:
    """Logits -(c - c0)^2 / (2 SPREAD^2), c0 on a straight line from every token in block 0 to `last` in the last block, so that the
    expected cost meets the target: the first steps then search instead of falling. What is left after pruning starts at the count of
    the block before, so that all that goes is merged at first: what is worth pruning is learned."""
    depth, n_patches = budget.depth, budget.n_tokens - budget.n_prefix

    def centre(last: float) -> list[float]:
        return [n_patches + (last - n_patches) * b / max(depth - 1, 1) for b in range(depth)]

    def put(last: float) -> float:
        line = centre(last)
        for b in range(depth):
            for selector, c0 in ((masked.prune[b], line[max(b - 1, 0)]), (masked.merge[b], line[b])):
                spread = SPREAD * n_patches / 256
                with torch.no_grad():
                    selector.logits.copy_(-((selector.candidates - c0) ** 2) / (2 * spread**2))
        return float(expected_macs(masked.kept(), masked.n_tokens, cost=budget.cost).detach())

    low, high = -float(n_patches) * depth, float(n_patches)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if put(middle) > budget.target else (middle, high)
    put(low)


def _rows(step: int, n_images: int, settings: SearchSettings) -> list[int]:
    """Positions of the images of a step: every epoch another order, told by the seed and the step alone, so that a resumed search
    sees what an uninterrupted one would."""
    per_epoch = n_images // settings.batch
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([settings.seed, epoch]).permutation(n_images)
    return [int(i) for i in order[place * settings.batch : (place + 1) * settings.batch]]


def _distance(model, output: Tensor, pixels: Tensor, *, labels: list[int] | None) -> Tensor:
    """Mean distance of the reduced outputs [B, D]: cross entropy to labels or to the dense model's classes; of features 1 - cosine."""
    if labels is not None:
        return F.cross_entropy(output, torch.tensor(labels, device=output.device))
    with torch.no_grad():
        teacher = model(pixels)
    if model.num_classes > 1:
        return F.kl_div(output.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
    return (1 - F.cosine_similarity(output, teacher, dim=-1)).mean()


def _line(masked: MaskedViT, over: Tensor, losses: list[float]) -> str:
    merge = " ".join(str(m) for m in masked.counts()[1])
    recent = losses[-10:]
    return f"distance {sum(recent) / len(recent):.4f}, cost {1 + float(over.detach()):.3f} of the target, kept {merge}"


def _result(
    masked: MaskedViT, budget: _Budget, losses: list[float], *, n_images: int, settings: SearchSettings
) -> LearnedRates:
    """The counts that were learned, scaled by one factor to the target exactly."""
    prune, merge = masked.counts()
    n, prefix = budget.n_tokens, budget.n_prefix

    def scaled(factor: float) -> tuple[list[int], list[int]]:
        rows = []
        for counts in (prune, merge):
            values = [n, *(max(prefix + 1, min(n, prefix + round((c - prefix) * factor))) for c in counts[1:])]
            rows.append([min(values[: b + 1]) for b in range(len(values))])
        return rows[0], [min(p, m) for p, m in zip(*rows)]

    low, high = 0.0, float(n)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if budget.macs_of(*scaled(middle)) <= budget.target else (low, middle)
    final_prune, final_merge = scaled(low)
    tail = losses[-max(len(losses) // 10, 1) :]
    return LearnedRates(
        prune_kept=final_prune,
        merge_kept=final_merge,
        n_tokens=n,
        macs=budget.macs_of(final_prune, final_merge),
        macs_dense=budget.dense,
        target=budget.target,
        loss=sum(tail) / len(tail),
        images=n_images,
        steps=settings.steps,
        seed=settings.seed,
    )


def _request(loaded, n_images: int, target: int, settings: SearchSettings) -> str:
    """What was asked, as a hash: a state of another search is not taken up."""
    asked = [loaded.weights["sha256"], n_images, target, asdict(settings)]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
