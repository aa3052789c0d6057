"""Two sides of one model on the same images: decisions first, then numbers under the same decisions.

Token reduction decides between tokens; of two almost equal ones, another order of additions may choose the other, and outputs then
differ by far more than rounding. So the reference is replayed with the decisions of the file: numbers are compared like with like,
and each decision is judged by what it gives away in the reference's own scores. A little is a flipped near-tie, more is a fault.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ...export.provenance import Provenance
from .limits import TOLERANCE, near_tie


@dataclass(frozen=True)
class OutputParity:
    """One output against the other side's on equal decisions.

    max_rel: max_abs over the largest value of all images. cosine: the lowest of all images. Of logits also: kl, the largest
    Kullback-Leibler divergence of the class probabilities (nats); top1, share of images with the same likeliest class; top5, mean
    share of the five likeliest that are the same.
    """

    name: str
    max_abs: float
    max_rel: float
    cosine: float
    kl: float | None
    top1: float | None
    top5: float | None
    passed: bool


@dataclass(frozen=True)
class Flip:
    """Decisions of one block that differ from the other side's. margin: what is given away (see the reducer), near 0 for a near-tie."""

    image: str
    block: int
    margin: float
    passed: bool


@dataclass(frozen=True)
class ImageParity:
    """One image. verdict: "equal" decisions, "flipped" near-ties, or "failed". max_rel, cosine: of the output on equal decisions, over
    this image's largest value. flips: reductions decided otherwise."""

    image: str
    verdict: str
    max_rel: float
    cosine: float
    flips: int


@dataclass
class Side:
    """What one side computed for a chunk. plans: decisions, one per step. output [B, C]. sources [B, N0] or None."""

    plans: list
    output: np.ndarray
    sources: np.ndarray | None


@dataclass
class Comparison:
    """Adds up chunks. precision: of the looser side. two_files: the other side is a file too, whose decisions are judged as well.

    got, wanted: per chunk, as computed; replayed: what got is compared with, on equal decisions. equal: per block, whether each image
    is decided alike. margins: (image, block) -> what a difference gives away. others: the other file's outputs and the reference's under
    its decisions, of chunks with differences.
    """

    provenance: Provenance
    precision: str
    two_files: bool = False
    names: list[str] = field(default_factory=list)
    got: list[Side] = field(default_factory=list)
    wanted: list[Side] = field(default_factory=list)
    replayed: list[Side] = field(default_factory=list)
    equal: dict[int, list] = field(default_factory=dict)
    margins: dict[tuple[str, int], float] = field(default_factory=dict)
    others: list[tuple] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def near_tie(self) -> float:
        return near_tie(self.precision, self.provenance.schedule.method)

    def add(self, reference, image: np.ndarray, got: Side, wanted: Side, names: list[str]) -> None:
        """One chunk. reference: the eager model, which judges decisions that differ."""
        import torch

        steps, like = self.provenance.schedule.steps, wanted
        same = [[_same(a, b, i) for a, b in zip(got.plans, wanted.plans)] for i in range(len(names))]
        for step, column in zip(steps, zip(*same)):
            self.equal.setdefault(step.block, []).extend(column)
        if not all(map(all, same)):
            like, regrets = replay(reference, image, got.plans)
            if self.two_files:  # the other file is judged by itself as well
                other, more = replay(reference, image, wanted.plans)
                regrets = [torch.maximum(a, b) for a, b in zip(regrets, more)]
                self.others.append((wanted.output, other.output, list(names)))
            for k, step in enumerate(steps):
                for i, name in enumerate(names):
                    if (regrets[k][i] > 0 and not self.two_files) or not _same(got.plans[k], wanted.plans[k], i):
                        self.margins[name, step.block] = max(
                            float(regrets[k][i]), self.margins.get((name, step.block), 0.0)
                        )
            rows = [
                all(row) for row in same
            ]  # where both decide alike they are compared with each other, not through the reference
            pick = lambda a, b: (
                None if a is None or b is None else np.where(np.reshape(rows, (-1, *[1] * (a.ndim - 1))), a, b)
            )
            like = Side(got.plans, pick(wanted.output, like.output), pick(wanted.sources, like.sources))
        if not np.isfinite(wanted.output).all():
            bad = [n for n, row in zip(names, wanted.output) if not np.isfinite(row).all()]
            self.faults.append(f"what it is compared with is not finite on {', '.join(bad[:3])}")
        self.names += names
        for kept, new in ((self.got, got), (self.wanted, wanted), (self.replayed, like)):
            kept.append(new)

    @property
    def share(self) -> float | None:
        """Share of (image, reduction) pairs decided alike."""
        all_of = [v for column in self.equal.values() for v in column]
        return sum(all_of) / len(all_of) if all_of else None

    @property
    def flips(self) -> list[Flip]:
        """Every flip that gives something away; plans that differ only because an earlier one did give away nothing."""
        found = [Flip(name, block, m, m <= self.near_tie) for (name, block), m in self.margins.items()]
        return [f for f in found if f.margin > 0] or found[:1]

    def outputs(self) -> list[OutputParity]:
        """Every output, on equal decisions."""
        if not self.got:
            return []
        join = lambda sides, what: np.concatenate([getattr(s, what) for s in sides])
        name, rows = self.provenance.outputs[0], []
        if self.got[0].sources is not None and self.replayed[0].sources is not None:
            rows.append(_same_rows(join(self.got, "sources"), join(self.replayed, "sources")))
        limit = TOLERANCE[self.precision]
        if self.others:
            found = output_parity(name, *(np.concatenate([o[i] for o in self.others]) for i in range(2)), limit)
            rows.append(replace(found, name=f"{name} of the other file"))
        return [output_parity(name, join(self.got, "output"), join(self.replayed, "output"), limit), *rows]

    def images(self) -> list[ImageParity]:
        """Every image."""
        rows, flips = [], self.flips
        differ = {name for name, _ in self.margins}
        limit, first = TOLERANCE[self.precision], self.provenance.outputs[0]
        broken = {
            n
            for a, b, names in self.others
            for n, x, y in zip(names, a, b)
            if not output_parity(first, x[None], y[None], limit).passed
        }
        for side, like, start in zip(self.got, self.replayed, np.cumsum([0] + [len(s.output) for s in self.got])):
            for i, (a, b) in enumerate(zip(side.output, like.output)):
                name = self.names[start + i]
                found = output_parity(self.provenance.outputs[0], a[None], b[None], TOLERANCE[self.precision])
                wrong = not found.passed or name in broken or any(f.image == name and not f.passed for f in flips)
                verdict = "failed" if wrong else "flipped" if name in differ else "equal"
                rows.append(
                    ImageParity(name, verdict, found.max_rel, found.cosine, sum(n == name for n, _ in self.margins))
                )
        return rows


def replay(reference, image: np.ndarray, plans: list) -> tuple[Side, list]:
    """The reference under given decisions, and what each gives away, per step [B]."""
    import torch

    out = reference.run(torch.from_numpy(image), replay=plans)
    return Side(plans, out.output.numpy(), out.sources.numpy()), out.regrets


def run_reference(reference, image: np.ndarray) -> Side:
    """The reference deciding itself."""
    import torch

    out = reference.run(torch.from_numpy(image))
    return Side(out.plans, out.output.numpy(), out.sources.numpy())


def read_side(got: dict[str, np.ndarray], provenance: Provenance) -> Side | str:
    """A file's outputs and decisions for a chunk; a sentence when its decisions are no plan."""
    import torch

    plans, output = [], got[provenance.outputs[0]]
    for step in provenance.schedule.steps:
        name = f"block{step.block}."
        part = {k.removeprefix(name): torch.from_numpy(v) for k, v in got.items() if k.startswith(name)}
        if step.n_in == 1 and not part:  # nothing to decide: the graph has it as a constant
            part = {
                "keep": torch.zeros(len(output), 1, 1, dtype=torch.int64),
                "src": torch.zeros(len(output), 0, 1, dtype=torch.int64),
            }
        plan = _plan(part, step, provenance.schedule)
        if plan is None:
            what = (
                ""
                if np.isfinite(output).all()
                else "; its output is not finite (verify --bisect names the first such stage)"
            )
            return f"block {step.block}: the decisions of the file are no plan (a row is kept twice, lost, or has no host){what}"
        plans.append(plan)
    return Side(plans, output, got.get("sources"))


def token_maps(side: Side, schedule) -> list[np.ndarray]:
    """Row of each input token after every step under a side's decisions, -1 when it is gone: one [B, N0] a step."""
    import torch

    from ...export import reducers
    from ...export.apply import follow

    at, out = torch.arange(schedule.n_tokens).expand(len(side.output), -1), []
    for step, plan in zip(schedule.steps, side.plans):
        at = follow(plan, at, step.n_in, squeezes=reducers.get(schedule.method).squeezes)
        out.append(at.numpy())
    return out


def _plan(part: dict, step, schedule):
    """Columns of a static plan [B, .., 1], by name, as a plan of row numbers; None when they are none."""
    import torch

    from ...export import reducers
    from ...export.plan import MergePlan

    order = part["order"] if "order" in part else torch.cat([part["keep"], part["src"]], 1)
    rows = order[..., 0].sort(-1).values
    if (
        rows.shape[1] != step.n_kept + step.n_folded
        or rows.min() < 0
        or rows.max() >= step.n_in
        or not (rows.diff() > 0).all()
    ):
        return None
    keep, src = order[:, : step.n_kept], order[:, step.n_kept :]
    if not step.n_folded:
        return MergePlan(keep)
    if step.n_out > step.n_kept:
        return MergePlan(keep, src, torch.full_like(src, step.n_kept), combine="sum")
    label = part["dst"] if "dst" in part else part["target"].gather(1, src)
    names = reducers.get(schedule.method).row_labels(step, schedule.n_prefix)
    hit = label == torch.tensor(names)
    return MergePlan(keep, src, hit.to(torch.int8).argmax(-1, keepdim=True)) if hit.any(-1).all() else None


def _same(a, b, i: int) -> bool:
    """Whether two plans keep, fold and host alike for image i; the order in which rows are folded is no decision."""
    pairs = lambda p: set() if p.src is None else {(int(s), int(d)) for s, d in zip(p.src[i, :, 0], p.dst[i, :, 0])}
    return bool((a.keep[i] == b.keep[i]).all()) and pairs(a) == pairs(b)


def _same_rows(got: np.ndarray, wanted: np.ndarray) -> OutputParity:
    wrong = float((got != wanted).mean()) if got.shape == wanted.shape else 1.0
    return OutputParity("sources", wrong, wrong, 1.0 - wrong, None, None, None, wrong == 0)


def output_parity(name: str, got: np.ndarray, wanted: np.ndarray, tolerance: float) -> OutputParity:
    """Logits or features [B, C] of two sides."""
    if got.shape != wanted.shape or not np.isfinite(got).all() or not np.isfinite(wanted).all():
        return OutputParity(name, float("inf"), float("inf"), 0.0, float("inf"), 0.0, 0.0, False)
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    max_abs = float(np.abs(a - b).max())
    max_rel = max_abs / max(float(np.abs(b).max()), 1e-12)
    classes = (_divergence(b, a), top(a, b, 1), top(a, b, 5)) if name == "logits" else (None, None, None)
    return OutputParity(name, max_abs, max_rel, float(cosines(a, b).min()), *classes, max_rel <= tolerance)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of every row [B, C] -> [B]."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(norms, 1e-30)


def top(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Mean share of the k likeliest classes of a that are also among those of b."""
    k = min(k, a.shape[1])
    best = lambda v: np.argsort(-v, axis=1, kind="stable")[:, :k]
    return float(np.mean([len(set(x) & set(y)) / k for x, y in zip(best(a), best(b))]))


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    """The largest Kullback-Leibler divergence of the rows' softmax, KL(p || q), in nats."""
    log = lambda v: v - v.max(1, keepdims=True) - np.log(np.exp(v - v.max(1, keepdims=True)).sum(1, keepdims=True))
    p, q = log(p), log(q)
    return float((np.exp(p) * (p - q)).sum(1).max())
