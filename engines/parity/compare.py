"""Two sides of one model on the same images: decisions first, then numbers under the same decisions.

Token reduction decides between tokens; of two almost equal ones, another order of additions may choose the other, and
outputs then differ by far more than rounding. So the reference is replayed with the decisions of the file: numbers
are compared like with like, and each decision is judged by what it gives away in the reference's own scores. A little
is a flipped near-tie, more is a fault.

A comparison is a running sum: images are added in chunks, and only sums and the worst of them stay.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...export.outputs import is_pooled
from ...export.schedule import Schedule
from .decisions import decided_alike, near_tie_limit, token_maps
from .outputs import kind_of
from .report import BlockParity, Cost, Flip, ImageParity, OutputParity
from .sides import Side, replay
from .sums import BlockSum, CostSum, OutputSum
from .worst import Worst

KEPT = 64  # images and flips that are told one by one
NAMED = 3  # images named in one fault


class Chunk(NamedTuple):
    """Images that are compared at once.

    Attributes:
        start: index of the first of them.
        names: B of them.
        images: [B, 3, H, W].
    """

    start: int
    names: list[str]
    images: np.ndarray


class WorstChunk(NamedTuple):
    """A chunk's images [B, 3, H, W] and what the file made of them."""

    images: np.ndarray
    side: Side


@dataclass(frozen=True)
class Judged:
    """A chunk with its decisions judged.

    Attributes:
        alike: [B, steps] decided like the other side.
        differs: [B, steps] decided otherwise, or given something away.
        margins: [B, steps] what is given away; 0 where nothing differs.
        wanted: what the file's outputs are compared with, name -> [B, ...].
        rows: [K] images with a difference.
        other, other_wanted: of those, the other file's outputs, and the reference's under that file's decisions; None
            without one.
    """

    alike: np.ndarray
    differs: np.ndarray
    margins: np.ndarray
    wanted: dict[str, np.ndarray]
    rows: np.ndarray
    other: dict[str, np.ndarray] | None = None
    other_wanted: dict[str, np.ndarray] | None = None


class Comparison:
    """Adds up chunks of images.

    Args:
        schedule: the steps that are in the file, or in both files.
        precision: of the looser side; its limits are used.
        outputs: names of the outputs that are compared, the main one first.
        other_file: the other side is a file too, whose decisions are judged by themselves as well.
    """

    def __init__(self, schedule: Schedule, precision: str, *, outputs: tuple[str, ...], other_file: bool = False):
        self.schedule, self.precision, self.names, self.other_file = schedule, precision, outputs, other_file
        self.limits = np.array([near_tie_limit(precision, s) for s in schedule.steps])
        self.verdicts = Counter({"equal": 0, "flipped": 0, "failed": 0})
        self.n_flips = 0
        self._outputs = [OutputSum(name, kind_of(name), precision) for name in outputs]
        self._other_outputs = [OutputSum(name, kind_of(name), precision) for name in outputs]
        self._blocks = [BlockSum(s.block, float(limit)) for s, limit in zip(schedule.steps, self.limits)]
        self._images, self._flips, self._chunks = Worst(KEPT), Worst(KEPT), Worst(1)
        self.pooled = next(filter(is_pooled, outputs), None)
        classes = self.pooled is not None and kind_of(self.pooled).classes
        self._costs = {name: CostSum(classes) for name in ("reference", "dense")}
        self._faults: list[str] = []
        self._not_finite: list[str] = []

    def add(self, reference, chunk: Chunk, *, side: Side, wanted: Side, reach: np.ndarray) -> None:
        """One chunk.

        Args:
            reference: the eager model, which judges decisions that differ.
            chunk: the images.
            side: what the file made of them.
            wanted: what the other side did.
            reach: [B] of the classifiers, see `sides.run_with_reach`.
        """
        judged = self._judge(reference, chunk.images, side, wanted)
        errors = [s.add(side.outputs[s.name], judged.wanted[s.name], reach) for s in self._outputs]
        failed = np.any([e.failed for e in errors], 0)
        if judged.other is not None:
            for s in self._other_outputs:
                some = s.add(judged.other[s.name], judged.other_wanted[s.name], reach[judged.rows])
                failed[judged.rows] |= some.failed
        wrong = judged.differs & ~(judged.margins <= self.limits)  # a margin that is no number is wrong
        failed |= wrong.any(1)
        self._note_not_finite(chunk.names, wanted)
        for k, block in enumerate(self._blocks):
            block.add(judged.alike[:, k], judged.margins[:, k])
        rel = np.max([np.where(s.kind.exact, 0.0, e.max_rel) for s, e in zip(self._outputs, errors)], 0)
        cosine = np.min([e.cosine for e in errors], 0)
        maps = _Maps(self.schedule, (side, wanted))
        for i in range(len(chunk.names)):
            self._add_image(
                chunk, i, judged=judged, failed=bool(failed[i]), figures=(float(rel[i]), float(cosine[i])), maps=maps
            )
        worst = max((float(f), float(r)) for f, r in zip(failed, rel))
        self._chunks.add(worst, WorstChunk(chunk.images, side))

    def add_cost(self, name: str, side: Side, wanted: np.ndarray) -> None:
        """The file's pooled output for a chunk against another model's.

        Args:
            name: "reference" or "dense".
            side: what the file made of the chunk.
            wanted: [B, classes or C] what the model did.
        """
        self._costs[name].add(side.outputs[self.pooled], wanted)

    def _judge(self, reference, images: np.ndarray, side: Side, wanted: Side) -> Judged:
        """Compare decisions; where they differ the reference says what that gives away, and computes under them."""
        import torch

        n_steps = len(self.limits)
        alike = decided_alike(side.plans, wanted.plans).numpy() if n_steps else np.ones((len(images), 0), bool)
        rows = np.flatnonzero(~alike.all(1))
        differs, margins = np.zeros(alike.shape, bool), np.zeros(alike.shape)
        if not len(rows):
            return Judged(alike, differs, margins, wanted.outputs, rows)
        some = torch.from_numpy(rows)
        own = replay(reference, images[rows], plans=side.of_images(some).plans)
        regrets, other, other_wanted = own.regrets, None, None
        if self.other_file:  # the other file is judged by itself as well
            other = wanted.of_images(some)
            judged = replay(reference, images[rows], plans=other.plans)
            regrets = np.maximum(regrets, judged.regrets)
            other, other_wanted = other.outputs, judged.side.outputs
        differs[rows] = ~alike[rows]
        if not self.other_file:  # after an earlier flip, a plan that is the same may give something away
            differs[rows] |= ~(regrets <= 0)
        margins[rows] = np.where(differs[rows], regrets, 0.0)
        # where both decide alike they are compared with each other, not through the reference
        like = {name: _put(wanted.outputs[name], rows, own.side.outputs[name]) for name in self.names}
        return Judged(alike, differs, margins=margins, wanted=like, rows=rows, other=other, other_wanted=other_wanted)

    def _add_image(self, chunk: Chunk, i: int, judged: Judged, failed: bool, figures: tuple, maps: _Maps) -> None:
        """Count one image of a chunk, and keep it when it is among the worst.

        judged, maps: of the chunk. i: the image in it. figures: its max_rel and cosine.
        """
        index, name, (max_rel, cosine) = chunk.start + i, chunk.names[i], figures
        steps = np.flatnonzero(judged.differs[i])
        verdict = "failed" if failed else "flipped" if len(steps) else "equal"
        self.verdicts[verdict] += 1
        given = steps[judged.margins[i, steps] != 0]  # the others differ only because an earlier one does
        for k in given if len(given) else steps[:1]:
            margin, limit = float(judged.margins[i, k]), float(self.limits[k])
            self.n_flips += 1
            flip = Flip(index, name, self.schedule.steps[k].block, margin, limit)
            self._flips.add((not flip.passed, margin / limit if limit else margin), flip)
        badness = (failed, verdict == "flipped", max_rel)
        if self._images.admits(badness):
            row = ImageParity(index, name, verdict=verdict, max_rel=max_rel, cosine=cosine, flips=len(steps))
            self._images.add(badness, (row, maps(i)))

    def _note_not_finite(self, names: list[str], wanted: Side) -> None:
        values = [wanted.outputs[name].reshape(len(names), -1) for name in self.names]
        finite = np.all([np.isfinite(v).all(1) for v in values], 0)
        self._not_finite += [n for n, ok in zip(names, finite) if not ok][: NAMED - len(self._not_finite)]

    def add_fault(self, words: str) -> None:
        """Something that no tie explains. words: for people."""
        self._faults.append(words)

    @property
    def faults(self) -> list[str]:
        """What no tie explains, in words."""
        names = ", ".join(self._not_finite)
        return self._faults + ([f"what it is compared with is not finite on {names}"] if names else [])

    @property
    def share(self) -> float | None:
        """Share of (image, reduction) pairs decided alike; None without reductions, or images."""
        n = sum(b.n for b in self._blocks)
        return sum(b.equal for b in self._blocks) / n if n else None

    @property
    def worst_chunk(self) -> WorstChunk | None:
        """The chunk with the worst image; None without images."""
        return next(iter(self._chunks.items()), None)

    def flips(self) -> list[Flip]:
        """The worst flips. Plans that differ only because an earlier one did give away nothing and are left out."""
        return self._flips.items()

    def outputs(self) -> list[OutputParity]:
        """A row for every output that was compared; of two files, rows of the other one under its own decisions too."""
        rows = [s.parity() for s in self._outputs if s.n]
        return rows + [s.parity(f"{s.name} of the other file") for s in self._other_outputs if s.n]

    def images(self) -> list[ImageParity]:
        """The worst images, failed ones first, then flipped ones."""
        return [row for row, _ in self._images.items()]

    def maps(self) -> dict[int, np.ndarray]:
        """By index of the worst images: where each input token ended up, here and on the other side [2, N0]."""
        return {row.index: where for row, where in self._images.items() if where is not None}

    def blocks(self) -> list[BlockParity]:
        """A row for every reduction."""
        return [b.parity() for b in self._blocks if b.n]

    def cost(self) -> dict[str, Cost]:
        """By model; without those whose outputs, or the file's, are not all finite."""
        costs = {name: s.cost() for name, s in self._costs.items()}
        return {name: cost for name, cost in costs.items() if cost is not None}


class _Maps:
    """Where each input token of a chunk ends up, on both sides; followed only when an image is asked for."""

    def __init__(self, schedule: Schedule, sides: tuple[Side, Side]):
        self.schedule, self.sides, self.maps = schedule, sides, None

    def __call__(self, i: int) -> np.ndarray | None:
        """Image i's rows [2, N0]; None without reductions."""
        if self.maps is None and self.schedule.steps:
            self.maps = [token_maps(side.plans, self.schedule)[-1] for side in self.sides]
        return np.stack([m[i] for m in self.maps]) if self.maps else None


def _put(values: np.ndarray, rows: np.ndarray, new: np.ndarray) -> np.ndarray:
    """A copy of values [B, ...] with some rows replaced."""
    out = values.copy()
    if out.shape[1:] == new.shape[1:]:  # of another shape it fails as it is
        out[rows] = new
    return out
