"""Is a file what its provenance says? Decisions first, then numbers under the file's own decisions.

Token reduction decides between tokens; of two almost equal ones, another order of additions may choose the other, and outputs then
differ by far more than rounding. So the reference is replayed with the decisions of the file: numbers are compared like with like,
and each decision is judged by what it gives away in the reference's own scores. A little is a flipped near-tie, more is a fault.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np

from ..export.errors import UsageError
from ..export.inspection import inspect
from ..export.provenance import Provenance
from .runners import in_batches, open_engine, require

# By the file's precision. TOLERANCE: of the largest output value, on equal decisions. NEAR_TIE: what a flipped near-tie may give away,
# of a cosine of keys ("metric"), or of a score's logarithm, its relative difference. For fp16 and bf16 these are 16, 32 and 128 times
# their rounding (2^-11, 2^-8); the most seen is 9, 18 and 75 times.
TOLERANCE = {"fp32": 2e-4, "fp16": 8e-3, "bf16": 6e-2, "int8": 5e-1}
NEAR_TIE = {
    "fp32": {"metric": 1e-4, "attention": 1e-4, "head": 1e-4},
    "fp16": {"metric": 1.6e-2, "attention": 6e-2, "head": 6e-2},
    "bf16": {"metric": 1.2e-1, "attention": 5e-1, "head": 5e-1},
    "int8": {"metric": 5e-1, "attention": 2e0, "head": 2e0},
}
CHUNK = 8


@dataclass(frozen=True)
class OutputParity:
    """One output against the reference on equal decisions.

    max_rel: max_abs over the largest reference value. cosine: the lowest of all images.
    """

    name: str
    max_abs: float
    max_rel: float
    cosine: float
    top1: float | None
    passed: bool


@dataclass(frozen=True)
class Flip:
    """Decisions of one block that differ from the reference's. margin: what is given away (see the reducer), near 0 for a near-tie."""

    image: str
    block: int
    margin: float
    passed: bool


@dataclass(frozen=True)
class ParityReport:
    """What verify found.

    near_tie: the most a flip may give away in this precision. decisions: share of (image, reduction) pairs decided as the reference
    decides. faults: what cannot be a tie.
    """

    path: str
    engine: str
    precision: str
    near_tie: float
    images: list[str]
    outputs: list[OutputParity]
    decisions: float | None
    flips: list[Flip] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.faults and all(o.passed for o in self.outputs) and all(f.passed for f in self.flips)

    def to_json(self) -> dict:
        """Plain JSON values."""
        return {**asdict(self), "passed": self.passed}

    def summary(self) -> str:
        """The verdict in one line."""
        worst = max(self.outputs, key=lambda o: o.max_rel, default=None)
        said = ["passed" if self.passed else "FAILED", f"{len(self.images)} images"]
        if worst:
            said.append(f"max relative difference {worst.max_rel:.1e}")
        if self.decisions is not None:
            others = ", the others flipped near-ties" if self.passed and self.decisions < 1 else ""
            said.append(f"decisions equal {self.decisions:.1%}{others}")
        return ", ".join(said + self.faults)


def verify(path: str | Path, images: list[str | Path] | None = None, checkpoint: str | Path | None = None, engine: str = "ort",
           predictor: str | Path | None = None, progress: Callable[[str], None] = lambda stage: None) -> ParityReport:
    """Run a file and the eager reference rebuilt from its provenance on the same images and compare.

    images: files or folders; None for four images of seeded noise. checkpoint, predictor: where the weights and the score
    heads are now, if not where they were; they are checked by hash. engine: "ort" or "openvino".
    Raises: UsageError for a file without provenance, weights that cannot be found or are others, unreadable images.
    """
    from ..export.reference import ReducedViT
    from ..export.score_head import score_heads

    require(engine)
    provenance = inspect(path).provenance
    names, pixels = _images(images, provenance)
    progress("rebuilding the reference")
    loaded = rebuild(provenance, Path(path), checkpoint, predictor)
    reference = ReducedViT(loaded.module, provenance.schedule, score_heads(loaded, provenance.schedule))
    report = _Collector(provenance, names)
    with open_engine(path, engine, outputs=provenance.decisions) as runner:
        batch = next(iter(runner.inputs.values()))[0]
        for start in range(0, len(names), batch or CHUNK):
            progress(f"comparing image {start + 1} of {len(names)}")
            part = pixels[start : start + (batch or CHUNK)]
            report.compare(reference, part, in_batches(runner, part), names[start : start + len(part)])
    return report.finish(str(path), engine)


def rebuild(provenance: Provenance, path: Path, checkpoint: str | Path | None = None, predictor: str | Path | None = None):
    """The model a file was made from, loaded. Raises: UsageError when its weights cannot be found or are not the same."""
    from ..export.load import load_model

    weights, source = provenance.weights, {}
    if checkpoint or weights["source"] == "checkpoint":
        source["checkpoint"] = checkpoint or _found(weights["file"], path, "--checkpoint")
    elif weights["source"] == "pretrained":
        source["pretrained"] = True
    else:
        source["seed"] = weights["seed"]
    if predictor or weights.get("predictor"):
        source["predictor"] = predictor or _found(weights["predictor"], path, "--predictor")
    loaded = load_model(provenance.model, provenance.model_kwargs, **source)
    if loaded.weights["sha256"] != weights["sha256"]:
        raise UsageError(f"weights are not those {path} was made from: SHA-256 is {loaded.weights['sha256'][:16]}..., wanted "
                         f"{weights['sha256'][:16]}... ({', '.join(f'{k} {v}' for k, v in source.items())})")
    return loaded


def _found(said: str, path: Path, option: str) -> Path:
    """A file of weights where it was when the file at path was made, or beside it."""
    found = next((p for p in (Path(said), path.parent / Path(said).name) if p.is_file()), None)
    if found is None:
        raise UsageError(f"{path} was made from {said}, which is not there (nor beside the file): give it with {option}")
    return found


def _images(images, provenance: Provenance) -> tuple[list[str], np.ndarray]:
    if images is not None:
        from .images import find_images, load_images

        paths = find_images(images)
        return [str(p) for p in paths], load_images(paths, provenance.preprocess)
    shape = (4, provenance.dims["channels"], *provenance.preprocess.size)
    return [f"noise {i}" for i in range(4)], np.random.default_rng(0).standard_normal(shape).astype(np.float32)


class _Collector:
    """Adds up the comparison over chunks of images."""

    def __init__(self, provenance: Provenance, names: list[str]):
        from ..export import reducers

        self.provenance, self.names = provenance, names
        self.pairs: dict[str, list] = {n: [] for n in provenance.outputs}
        self.equal, self.total, self.flips, self.faults = 0, 0, [], []
        needs = getattr(reducers.get(provenance.schedule.method), "NEEDS", ())
        self.near_tie = max((NEAR_TIE[provenance.precision][n] for n in needs), default=0.0)

    def compare(self, reference, part, got: dict[str, np.ndarray], names: list[str]) -> None:
        """One chunk: decisions, then numbers under the file's decisions."""
        import torch

        image = torch.from_numpy(part)
        own = reference.run(image)
        plans = self._plans(got)
        if plans is None:
            return
        if self._decisions(plans, own.plans, names):
            other = reference.run(image, replay=plans)
            for step, plan, mine, regret in zip(self.provenance.schedule.steps, plans, own.plans, other.regrets):
                for i, name in enumerate(names):
                    if regret[i] > 0 or not _same(plan, mine, i):
                        self.flips.append(Flip(name, step.block, float(regret[i]), bool(regret[i] <= self.near_tie)))
            own = other
        for name, wanted in (("sources", own.sources), (self.provenance.outputs[0], own.output)):
            if name in self.pairs:
                self.pairs[name].append((got[name], wanted.numpy()))

    def _plans(self, got):
        """The file's decisions as reference plans; None (and a fault) when they are no plan at all."""
        import torch

        plans = []
        for step in self.provenance.schedule.steps:
            name = f"block{step.block}."
            part = {k.removeprefix(name): torch.from_numpy(v) for k, v in got.items() if k.startswith(name)}
            if step.n_in == 1 and not part:  # nothing to decide: the graph has it as a constant
                part = {"keep": torch.zeros(len(got[self.provenance.outputs[0]]), 1, 1, dtype=torch.int64),
                        "src": torch.zeros(len(got[self.provenance.outputs[0]]), 0, 1, dtype=torch.int64)}
            plan = _plan(part, step, self.provenance.schedule)
            if plan is None:
                self.faults.append(f"block {step.block}: the decisions of the file are no plan (a row is kept twice, lost, or has no host)")
                return None
            plans.append(plan)
        return plans

    def _decisions(self, plans, own, names) -> bool:
        """Count equal decisions; whether any differs."""
        same = [[_same(a, b, i) for a, b in zip(plans, own)] for i in range(len(names))]
        self.equal += sum(map(sum, same))
        self.total += sum(map(len, same))
        return not all(map(all, same))

    def finish(self, path: str, engine: str) -> ParityReport:
        outputs = [_parity(n, *map(np.concatenate, zip(*p)), TOLERANCE[self.provenance.precision]) for n, p in self.pairs.items() if p]
        flips = _first_only(self.flips)
        share = self.equal / self.total if self.total else None
        return ParityReport(path, engine, self.provenance.precision, self.near_tie, self.names, outputs, share, flips, self.faults)


def _plan(part: dict, step, schedule):
    """Columns of a static plan [B, .., 1], by name, as a plan of row numbers; None when they are none."""
    import torch

    from ..export import reducers
    from ..export.plan import MergePlan

    order = part["order"] if "order" in part else torch.cat([part["keep"], part["src"]], 1)
    rows = order[..., 0].sort(-1).values
    if rows.shape[1] != step.n_kept + step.n_folded or rows.min() < 0 or rows.max() >= step.n_in or not (rows.diff() > 0).all():
        return None
    keep, src = order[:, : step.n_kept], order[:, step.n_kept :]
    if not step.n_folded:
        return MergePlan(keep)
    if step.n_out > step.n_kept:
        return MergePlan(keep, src, torch.full_like(src, step.n_kept), n_extra=1)
    label = part["dst"] if "dst" in part else part["target"].gather(1, src)
    reducer = reducers.get(schedule.method)
    names = reducer.labels(step, schedule.n_prefix) if hasattr(reducer, "labels") else range(step.n_kept)
    hit = label == torch.tensor(list(names))
    return MergePlan(keep, src, hit.to(torch.int8).argmax(-1, keepdim=True)) if hit.any(-1).all() else None


def _same(a, b, i: int) -> bool:
    """Whether two plans keep, fold and host alike for image i; the order in which rows are folded is no decision."""
    pairs = lambda p: set() if p.src is None else {(int(s), int(d)) for s, d in zip(p.src[i, :, 0], p.dst[i, :, 0])}
    return bool((a.keep[i] == b.keep[i]).all()) and pairs(a) == pairs(b)


def _first_only(flips: list[Flip]) -> list[Flip]:
    """Per image: every flip that gives something away; plans that differ only because an earlier one did give away nothing."""
    return [f for f in flips if f.margin > 0] or flips[:1]


def _parity(name: str, got: np.ndarray, wanted: np.ndarray, tolerance: float) -> OutputParity:
    if name == "sources":
        wrong = float((got != wanted).mean()) if got.shape == wanted.shape else 1.0
        return OutputParity(name, wrong, wrong, 1.0 - wrong, None, wrong == 0)
    if got.shape != wanted.shape or not np.isfinite(got).all():
        return OutputParity(name, float("inf"), float("inf"), 0.0, 0.0, False)
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    max_abs = float(np.abs(a - b).max())
    max_rel = max_abs / max(float(np.abs(b).max()), 1e-12)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = float(((a * b).sum(1) / np.maximum(norms, 1e-30)).min())
    top1 = float((a.argmax(1) == b.argmax(1)).mean()) if name == "logits" else None
    return OutputParity(name, max_abs, max_rel, cosine, top1, max_rel <= tolerance)
