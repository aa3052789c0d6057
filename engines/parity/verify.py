"""Is a file what its provenance says? Decisions first, then numbers under the file's own decisions, then what reduction costs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np

from ...export.errors import UsageError
from ...export.provenance import Provenance
from ...export.rebuild import rebuild
from ..files import inspect_file, is_engine
from ..runners import in_batches, open_runner, require
from .bisect import StageParity, not_finite, stage_parity
from .compare import Comparison, Flip, ImageParity, OutputParity, cosines, read_side, run_reference, token_maps, top
from .limits import TOLERANCE

CHUNK = 8


@dataclass(frozen=True)
class BlockParity:
    """Decisions of one block. equal: share of images decided alike. margin: the most that a difference gives away."""

    block: int
    equal: float
    margin: float


@dataclass(frozen=True)
class Cost:
    """A file's outputs against other outputs, flips and all. cosine: mean. worst: lowest of all images. top1: None without classes."""

    cosine: float
    worst: float
    top1: float | None


@dataclass(frozen=True)
class ParityReport:
    """What verify found.

    against: the other file, None for the reference. near_tie: the most a flip may give away in this precision; tolerance: of
    outputs. decisions: share of (image, reduction) pairs decided alike. faults: what cannot be a tie. stages: with bisect, every stage
    on its own. cost: against the reference deciding itself and against the dense model. maps: image -> where each input token ended
    up, here and there [2, N0].
    """

    path: str
    runtime: str
    against: str | None
    precision: str
    near_tie: float
    tolerance: float
    images: list[str]
    outputs: list[OutputParity]
    decisions: float | None
    flips: list[Flip] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    by_image: list[ImageParity] = field(default_factory=list)
    by_block: list[BlockParity] = field(default_factory=list)
    cost: dict[str, Cost] = field(default_factory=dict)
    stages: list[StageParity] = field(default_factory=list)
    maps: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def passed(self) -> bool:
        return (
            not self.faults and all(o.passed for o in self.outputs) and all(f.passed for f in self.flips + self.stages)
        )

    @property
    def departs(self) -> str | None:
        """The first stage that is wrong, in words; None when none is, or without bisect."""
        wrong = next((s for s in self.stages if not s.passed), None)
        if wrong is None:
            return None
        what = "its decisions give away" if wrong.stage.endswith("match") else "it is off by"
        return f"{wrong.words} is the first stage that departs: {what} {wrong.error:.1e}, in {self.precision} at most {wrong.limit:.0e}"

    def to_json(self) -> dict:
        """Plain JSON values."""
        kept = {k: v for k, v in asdict(self).items() if k != "maps"}
        return {**kept, "departs": self.departs, "passed": self.passed}

    def summary(self) -> str:
        """The verdict in one line."""
        worst = max(self.outputs, key=lambda o: o.max_rel, default=None)
        n = len(self.images)
        said = ["passed" if self.passed else "FAILED", f"{n} image{'s' * (n != 1)}"]
        if worst:
            said.append(f"max relative difference {worst.max_rel:.1e}")
        if self.decisions is not None:
            others = ", the others flipped near-ties" if self.passed and self.decisions < 1 else ""
            said.append(f"decisions equal {self.decisions:.1%}{others}")
        return ", ".join(said + self.faults + ([self.departs] if self.departs else []))


def verify(
    path: str | Path,
    images: list[str | Path] | None = None,
    checkpoint: str | Path | None = None,
    runtime: str = "ort",
    predictor: str | Path | None = None,
    progress: Callable[[str], None] = lambda stage: None,
    against: str | Path | None = None,
    bisect: bool = False,
) -> ParityReport:
    """Run a file and the eager reference rebuilt from its provenance on the same images and compare.

    images: files or folders; None for four images of seeded noise. checkpoint, predictor: where the weights and the score
    heads are now, if not where they were; they are checked by hash. engine: "ort" or "openvino". against: another file of the same
    model and schedule, in the reference's place; the reference then judges only the decisions they do not share.
    bisect: also compare every stage on its own, on the worst image and some beside it, to find the one that is wrong.
    Raises: UsageError for a file without provenance, weights that cannot be found or are others, unreadable images.
    """
    from ...export.reference import ReducedViT
    from ...export.models.score_head import score_heads

    provenance = described(path, runtime)
    if bisect and is_engine(path):
        raise UsageError(
            f"--bisect, --report: {path} is an engine, whose stages cannot be read; bisect the ONNX file it was built from"
        )
    precision = provenance.precision
    if against is not None:
        precision = max(precision, _comparable(path, provenance, against), key=TOLERANCE.get)
    names, pixels = _images(images, provenance)
    progress("rebuilding the reference")
    loaded = rebuild(provenance, Path(path), checkpoint=checkpoint, predictor=predictor)
    reference = ReducedViT(loaded.module, provenance.schedule, score_heads(loaded, provenance.schedule))
    found, own, dense = Comparison(provenance, precision, against is not None), [], []
    with open_side(path, runtime) as run, open_side(against, runtime) as other:
        for start in range(0, len(names), CHUNK):
            progress(f"comparing image {start + 1} of {len(names)}")
            part, some = pixels[start : start + CHUNK], names[start : start + CHUNK]
            got, mine = run(part), run_reference(reference, part)
            wanted = mine if against is None else other(part)
            fault = next((s for s in (got, wanted) if isinstance(s, str)), None)
            if fault:
                found.faults.append(fault)
                where = not_finite(Path(path), runtime, provenance.schedule, part) if bisect else None
                found.faults += [f"{where} is the first stage whose tokens are not finite"] if where else []
                break
            found.add(reference, part, got, wanted, some)
            own.append(mine.output)
            dense.append(_dense(reference, part))
    stages, by_image = [], found.images()
    if bisect and found.got:
        k = (
            max(range(len(by_image)), key=lambda i: (by_image[i].verdict == "failed", by_image[i].max_rel)) // CHUNK
        )  # the worst image's
        part = pixels[k * CHUNK : (k + 1) * CHUNK]
        stages = stage_parity(
            Path(path), runtime, reference, provenance.precision, found.near_tie, part, found.got[k], progress
        )
    runtime = "TensorRT" if is_engine(path) else runtime
    return ParityReport(
        str(path),
        runtime,
        None if against is None else str(against),
        precision,
        found.near_tie,
        TOLERANCE[precision],
        names,
        found.outputs(),
        found.share,
        found.flips,
        found.faults,
        by_image,
        _by_block(found),
        _cost(found, own, dense),
        stages,
        _maps(found),
    )


def described(path: str | Path, runtime: str) -> Provenance:
    """What an ONNX file, or a TensorRT engine, that is to be run says of itself. engine: what runs an ONNX file.

    Raises: UsageError for a file without provenance, a runtime that is not installed, or an engine that keeps its decisions to itself.
    """
    if not is_engine(path):
        require(runtime)
        if runtime == "torch":
            raise UsageError(
                "--runtime torch is the reference itself: wanted what the file is to run on, e.g. ort or openvino"
            )
    p = inspect_file(path).provenance
    if is_engine(path) and any(s.n_in > 1 for s in p.schedule.steps) and not p.decisions:
        raise UsageError(
            f"{path} does not give its merge decisions, without which a flipped near-tie cannot be told from a bug: build it "
            f"with `tokexport trt --decisions`"
        )
    return p


def _comparable(path, provenance: Provenance, against) -> str:
    """The other file's precision. Raises: UsageError when the two do not compute the same."""
    other = inspect_file(against).provenance
    same = {
        "model": (provenance.model, provenance.model_kwargs) == (other.model, other.model_kwargs),
        "weights": provenance.weights["sha256"] == other.weights["sha256"],
        "method, options or token counts": provenance.schedule == other.schedule,
    }
    wrong = [what for what, ok in same.items() if not ok]
    if wrong:
        raise UsageError(
            f"--against {against}: it has other {' and other '.join(wrong)} than {path}; wanted the same model under the "
            f"same schedule (verify each by itself shows what reduction costs)"
        )
    return other.precision


@contextmanager
def open_side(path: str | Path | None, runtime: str = "ort"):
    """A function: images [B, 3, H, W] -> `Side`, or a sentence when the file's decisions are no plan. None for no path."""
    if path is None:
        yield None
        return
    p = described(path, runtime)
    with open_runner(path, runtime, outputs=p.decisions) as runner:
        yield lambda image: read_side(in_batches(runner, image), p)


def _dense(reference, image: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return reference.model(torch.from_numpy(image)).numpy()


def _by_block(found: Comparison) -> list[BlockParity]:
    margin = lambda block: max((m for (_, b), m in found.margins.items() if b == block), default=0.0)
    return [BlockParity(b, sum(v) / len(v), margin(b)) for b, v in found.equal.items()]


def _cost(found: Comparison, own: list, dense: list) -> dict[str, Cost]:
    if not found.got:
        return {}
    got = np.concatenate([s.output for s in found.got]).astype(np.float64)
    out = {}
    for name, wanted in (("reference", np.concatenate(own)), ("dense", np.concatenate(dense))):
        if np.isfinite(got).all() and np.isfinite(wanted).all():
            near = cosines(got, wanted.astype(np.float64))
            classes = found.provenance.outputs[0] == "logits"
            out[name] = Cost(float(near.mean()), float(near.min()), top(got, wanted, 1) if classes else None)
    return out


def _maps(found: Comparison) -> dict[str, np.ndarray]:
    """Where each input token ended up, by image: the file's row, then the other side's."""
    out, start = {}, 0
    for got, wanted in zip(found.got, found.wanted):
        both = [token_maps(side, found.provenance.schedule)[-1:] for side in (got, wanted)]
        for i in range(len(got.output) if both[0] else 0):
            out[found.names[start + i]] = np.stack([b[0][i] for b in both])
        start += len(got.output)
    return out


def _images(images, provenance: Provenance) -> tuple[list[str], np.ndarray]:
    if images is not None:
        from ..images import find_images, load_images

        paths = find_images(images)
        return [str(p) for p in paths], load_images(paths, provenance.preprocess)
    shape = (4, provenance.dims["channels"], *provenance.preprocess.size)
    return [f"noise {i}" for i in range(4)], np.random.default_rng(0).standard_normal(shape).astype(np.float32)
