"""What a verification returns: one record for each thing that is judged, all plain values. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

import numpy as np

PARTS = {
    "embed": "embedding",
    "attn": "attention",
    "match": "matching",
    "merge": "merging",
    "mlp": "MLP",
    "head": "head",
}


@dataclass(frozen=True)
class OutputParity:
    """One output against the other side's, on equal decisions, over all images.

    Attributes:
        name: of the output, e.g. "logits".
        max_abs: largest difference of any image; of an exact output the largest share of wrong entries.
        max_rel: largest difference over its image's scale (see `outputs.OutputKind`); of an exact output as max_abs.
        limit: of max_rel, for every image.
        cosine: the lowest of all images.
        kl: largest Kullback-Leibler divergence of the class probabilities, nats; None for what has no classes.
        top1: share of images with the same likeliest class; None likewise.
        top5: mean share of the five likeliest classes that are the same; None likewise.
        exact: whether entries must be equal.
        n_failed: images beyond the limit.
    """

    name: str
    max_abs: float
    max_rel: float
    limit: float
    cosine: float
    kl: float | None
    top1: float | None
    top5: float | None
    exact: bool
    n_failed: int
    passed: bool


@dataclass(frozen=True)
class Flip:
    """Decisions of one image in one block that differ from the other side's.

    Attributes:
        index: of the image, from 0. image: its name.
        block: where.
        margin: what is given away by the reducer's own measure (see its `regret`): near 0 for a near-tie, infinite
            for the impossible, not a number where the reference itself has no number.
        limit: the most that a near-tie may give away here.
    """

    index: int
    image: str
    block: int
    margin: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.margin <= self.limit  # false for a margin that is no number


@dataclass(frozen=True)
class ImageParity:
    """One image.

    Attributes:
        index: of the image, from 0. image: its name; one photo given twice is two images.
        verdict: "equal" decisions, "flipped" near-ties, or "failed".
        max_rel: the worst of its outputs on equal decisions, over the image's own scale; exact outputs aside.
        cosine: the lowest of its outputs.
        flips: reductions decided otherwise.
    """

    index: int
    image: str
    verdict: str
    max_rel: float
    cosine: float
    flips: int


@dataclass(frozen=True)
class BlockParity:
    """Decisions of one block.

    Attributes:
        block: from 0.
        equal: share of images decided alike.
        margin: the most that a difference gives away.
        limit: the most that a near-tie may give away here.
    """

    block: int
    equal: float
    margin: float
    limit: float


@dataclass(frozen=True)
class Cost:
    """A file's main output against another model's, flips and all.

    Attributes:
        cosine: mean of all images. worst: the lowest.
        top1: share of images with the same likeliest class; None without classes.
    """

    cosine: float
    worst: float
    top1: float | None


@dataclass(frozen=True)
class StageParity:
    """One stage of a file, computed by the reference from the file's own tokens before it.

    Attributes:
        stage: "embed", "block3.attn", ..., "head".
        error: the worst image's; of matching, what its decisions give away.
        limit: of the error.
    """

    stage: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    @property
    def words(self) -> str:
        """ "block 3, merging"."""
        block, _, part = self.stage.rpartition(".")
        return f"block {block.removeprefix('block')}, {PARTS[part]}" if block else PARTS[part]


@dataclass(frozen=True)
class ParityReport:
    """The outcome of `verify`. Of many images it holds sums, and the worst of them one by one.

    Attributes:
        path: of the file. runtime: what ran it. against: the other file, None for the reference.
        precision: of the looser side; limits are its.
        n_images: how many were asked for.
        verdicts: images by verdict: "equal", "flipped", "failed".
        outputs: a row for every output.
        decisions: share of (image, reduction) pairs decided alike; None without reductions.
        flips: the worst of them. n_flips: how many there are.
        faults: what cannot be a tie, in words.
        notes: what was not compared, in words.
        by_image: the worst images, failed ones first. by_block: every reduction.
        cost: against the "reference" deciding itself and the "dense" model.
        stages: with bisect, every stage on its own.
        maps: by index of an image of by_image, where each input token ended up, here and on the other side [2, N0].
    """

    path: str
    runtime: str
    against: str | None
    precision: str
    n_images: int
    verdicts: dict[str, int]
    outputs: list[OutputParity]
    decisions: float | None
    flips: list[Flip] = field(default_factory=list)
    n_flips: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    by_image: list[ImageParity] = field(default_factory=list)
    by_block: list[BlockParity] = field(default_factory=list)
    cost: dict[str, Cost] = field(default_factory=dict)
    stages: list[StageParity] = field(default_factory=list)
    maps: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def passed(self) -> bool:
        """No image failed, no stage departs, nothing is amiss otherwise, and every image was judged."""
        judged = sum(self.verdicts.values()) == self.n_images > 0
        return judged and not self.faults and not self.verdicts["failed"] and all(s.passed for s in self.stages)

    @property
    def departs(self) -> str | None:
        """The first stage that is wrong, in words; None when none is, or without bisect."""
        wrong = next((s for s in self.stages if not s.passed), None)
        if wrong is None:
            return None
        what = "its decisions give away" if wrong.stage.endswith("match") else "it is off by"
        limit = f"in {self.precision} at most {wrong.limit:.0e}"
        return f"{wrong.words} is the first stage that departs: {what} {wrong.error:.1e}, {limit}"

    def to_json(self) -> dict:
        """Plain JSON values; None for a figure that is not finite."""
        record = {k: v for k, v in asdict(self).items() if k != "maps"}
        for name in ("flips", "stages"):
            for row, item in zip(record[name], getattr(self, name)):
                row["passed"] = item.passed
        return _finite({**record, "departs": self.departs, "passed": self.passed})

    def summary(self) -> str:
        """The verdict in one line."""
        n, failed, flipped = self.n_images, self.verdicts["failed"], self.verdicts["flipped"]
        parts = ["passed" if self.passed else "FAILED", _images(n)]
        if failed:
            parts.append(f"{failed} of {_images(n)} failed")
        errors = [o.max_rel for o in self.outputs if not o.exact]
        if errors:
            parts.append(f"max relative difference {max(errors):.1e}")
        if self.decisions is not None:
            parts.append(f"decisions equal {self.decisions:.1%}")
        if flipped:
            parts.append(f"{flipped} of {_images(n)} flipped near-ties")
        return ", ".join([*parts, *self.faults, *([self.departs] if self.departs else [])])


def _images(n: int) -> str:
    return f"{n} image{'s' * (n != 1)}"


def _finite(value):
    """The value with None for every float that JSON has no word for."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
