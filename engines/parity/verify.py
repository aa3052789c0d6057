"""Is a file what its provenance says? Decisions first, then numbers under them, then what reduction costs."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ...export import precisions
from ...export.errors import UsageError
from ...export.provenance import Provenance
from ...export.rebuild import reference_of
from ..files import inspect_file, is_engine
from ..inputs import load_inputs, noise_inputs
from ..prefetch import read_ahead
from .bisect import first_not_finite, stage_parity
from .compare import Chunk, Comparison
from .decisions import DecisionError
from .overflow import has_fp16_trunk, overflow_words, watch_range
from .report import ParityReport, StageParity
from .sides import open_side, run_dense, run_reference, verifiable

CHUNK_PIXELS = 8 * 224 * 224  # compared at once: bounds what the reference's attention takes
CHUNK_IMAGES = (4, 32)  # fewest and most at once
NOISE = 4  # images of noise, where no photos are given
BISECTION = 0.3  # share of the time that bisecting takes, roughly
Chunks = Generator[tuple[int, np.ndarray], None, None]  # index of the first image, and images [B, 3, H, W]


def _silent(text: str, share: float) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True)
class _Job:
    """One verification.

    path: of the file; provenance: its. runtime: what runs ONNX files. against: the other file; against_provenance:
    its. precision: of the looser side. outputs: names compared, the main one first. chunk: images compared at once.
    progress: a function (text, share done).
    """

    path: Path
    provenance: Provenance
    runtime: str
    against: str | Path | None
    against_provenance: Provenance | None
    precision: str
    outputs: tuple[str, ...]
    chunk: int
    bisect: bool
    progress: Callable[[str, float], None]

    @property
    def judged(self) -> Provenance:
        """Of the file; of two the one with fewer steps."""
        both = [p for p in (self.provenance, self.against_provenance) if p]
        return min(both, key=lambda p: len(p.file_schedule.steps))

    @property
    def notes(self) -> list[str]:
        """What is not compared: a reduction that the class tail leaves out, and outputs that only one of two files has."""
        notes, step = [], self.judged.step_left_out
        if step is not None:
            notes.append(
                f"block {step.block}: its reduction is not in the file, whose output reads nothing of what it leaves (tail class): "
                f"not compared"
            )
        if self.against_provenance is not None:
            here, there = (set(p.outputs) for p in (self.provenance, self.against_provenance))
            notes += [f"{name} is not in both files: not compared" for name in sorted(here ^ there)]
        return notes


def verify(
    path: str | Path,
    images: list[str | Path] | None = None,
    *,
    runtime: str = "ort",
    against: str | Path | None = None,
    bisect: bool = False,
    checkpoint: str | Path | None = None,
    predictor: str | Path | None = None,
    progress: Callable[[str, float], None] = _silent,
) -> ParityReport:
    """Run a file and the eager reference rebuilt from its provenance on the same images, and compare.

    Memory does not grow with the number of images: photos are read ahead in chunks, sums are kept, and the worst
    images.

    Args:
        path: ONNX file or engine.
        images: files or folders; None for four images of seeded noise.
        runtime: what runs ONNX files, e.g. "ort" or "openvino".
        against: another file of the same model and schedule, in the reference's place; the reference then judges only
            the decisions they do not share.
        bisect: also compare every stage on its own, on the worst image and some beside it, to find the one that is
            wrong.
        checkpoint, predictor: where the weights and the score heads are now, if not where they were; they are checked
            by hash.
        progress: called with what is being done and the share that is done, 0 to 1.
    Returns:
        `ParityReport`, passed or not.
    Raises:
        UsageError: no provenance, a decision that is missing, weights that cannot be found or are others, unreadable
            images, a file to compare with that computes something else.
        MissingPackageError: the runtime of an ONNX file is not installed.
    """
    job = _job(path, runtime, against, bisect, progress)
    names, chunks = _chunks(images, job.provenance, size=job.chunk)
    progress("rebuilding the reference", 0.0)
    reference = reference_of(job.judged, job.path, checkpoint=checkpoint, predictor=predictor)
    comparison = _compare(job, reference, names, chunks)
    return _report(job, comparison, n_images=len(names), stages=_bisect(job, reference, comparison))


def _job(path, runtime: str, against, bisect: bool, progress) -> _Job:
    """Everything that can be wrong with the files is known before torch is loaded."""
    provenance, other = verifiable(path, runtime), None
    if bisect and is_engine(path):
        raise UsageError(f"{path} is an engine, whose stages cannot be read: bisect the ONNX file it was built from")
    precision, outputs = provenance.precision, provenance.outputs
    if against is not None:
        other = inspect_file(against).provenance
        _check_comparable(path, provenance, against, other)
        if bisect and provenance.file_schedule != other.file_schedule:
            raise UsageError(
                f"bisect: {path} has tail {provenance.tail}, {against} {other.tail}, so the last block's stages are not the same: "
                f"bisect each by itself"
            )
        precision = max(precision, other.precision, key=lambda name: precisions.get(name).output_limit)
        outputs = tuple(name for name in outputs if name in other.outputs)
    chunk = _chunk_size(provenance, [inspect_file(p).batch for p in (path, against) if p is not None])
    return _Job(
        Path(path),
        provenance,
        runtime=runtime,
        against=against,
        against_provenance=other,
        precision=precision,
        outputs=outputs,
        chunk=chunk,
        bisect=bisect,
        progress=progress,
    )


def _chunk_size(provenance: Provenance, batches: list[int | None]) -> int:
    """Images that are compared at once: many small ones or a few large ones, in whole runs of a fixed batch."""
    height, width = provenance.preprocess.size
    fewest, most = CHUNK_IMAGES
    size = min(max(CHUNK_PIXELS // (height * width), fewest), most)
    batch = max(b or 1 for b in batches)
    return -(-size // batch) * batch


def _check_comparable(path, provenance: Provenance, against, other: Provenance) -> None:
    """Raises: UsageError when two files do not compute the same."""
    shared = {*provenance.outputs} & {*other.outputs}
    same = {
        "model": (provenance.model, provenance.model_kwargs) == (other.model, other.model_kwargs),
        "weights": provenance.weights["sha256"] == other.weights["sha256"],
        "method, options or token counts": provenance.schedule == other.schedule,
        "outputs": bool(shared),
        "forms of outputs": _form(provenance, shared) == _form(other, shared),
        "input": provenance.input == other.input,
    }
    wrong = [what for what, equal in same.items() if not equal]
    if wrong:
        raise UsageError(
            f"against {against}: it has other {' and other '.join(wrong)} than {path}; wanted the same model under the "
            f"same schedule (verify each by itself shows what reduction costs)"
        )


def _form(provenance: Provenance, names: set[str]) -> tuple:
    """What decides how these outputs look, beside their names."""
    emission = provenance.emission
    patches = any(name.partition("_")[0] == "patches" for name in names)
    return (emission.layout, emission.dropped) if patches else (), emission.layers and emission.norm_layers


def _compare(job: _Job, reference, names: list[str], chunks: Chunks) -> Comparison:
    """All images, up to the first chunk whose decisions are no plan."""
    two_files, largest, n_steps = job.against is not None, {}, len(job.judged.file_schedule.steps)
    watched = any(has_fp16_trunk(p) for p in (job.provenance, job.against_provenance) if p)
    comparison = Comparison(job.judged.file_schedule, job.precision, outputs=job.outputs, other_file=two_files)
    share = (1 - BISECTION if job.bisect else 1.0) / len(names)
    with closing(chunks), open_side(job.path, job.runtime) as run, open_side(job.against, job.runtime) as run_other:
        for start, images in chunks:
            job.progress(f"comparing image {start + 1} of {len(names)}", start * share)
            with watch_range(reference, largest) if watched else nullcontext():
                own, reach = run_reference(reference, images)
            try:
                side = run(images).first_steps(n_steps)
                wanted = run_other(images).first_steps(n_steps) if two_files else own
            except DecisionError as e:
                comparison.add_fault(str(e))
                where = (
                    first_not_finite(job.path, job.runtime, job.provenance.file_schedule, images)
                    if job.bisect
                    else None
                )
                if where:
                    comparison.add_fault(f"{where} is the first stage whose tokens are not finite")
                break
            chunk = Chunk(start, names[start : start + len(images)], images)
            comparison.add(reference, chunk, side=side, wanted=wanted, reach=reach)
            if comparison.pooled is not None:
                comparison.add_cost("reference", side, own.outputs[comparison.pooled])
                comparison.add_cost("dense", side, run_dense(reference, images))
    overflow = overflow_words(largest)
    if overflow:
        comparison.add_fault(overflow)
    return comparison


def _bisect(job: _Job, reference, comparison: Comparison) -> list[StageParity]:
    """Every stage on the worst chunk; nothing unless it was asked for."""
    if not job.bisect or comparison.worst_chunk is None:
        return []
    done = 1 - BISECTION

    def tell(text: str, share: float) -> None:
        job.progress(text, done + BISECTION * share)

    return stage_parity(
        job.path,
        job.runtime,
        reference=reference,
        provenance=job.provenance,
        worst=comparison.worst_chunk,
        progress=tell,
    )


def _report(job: _Job, comparison: Comparison, *, n_images: int, stages: list[StageParity]) -> ParityReport:
    return ParityReport(
        path=str(job.path),
        runtime="TensorRT" if is_engine(job.path) else job.runtime,
        against=None if job.against is None else str(job.against),
        precision=job.precision,
        n_images=n_images,
        verdicts=dict(comparison.verdicts),
        outputs=comparison.outputs(),
        decisions=comparison.share,
        flips=comparison.flips(),
        n_flips=comparison.n_flips,
        faults=comparison.faults,
        notes=job.notes,
        by_image=comparison.images(),
        by_block=comparison.blocks(),
        cost=comparison.cost(),
        stages=stages,
        maps=comparison.maps(),
    )


def _chunks(images, provenance: Provenance, *, size: int) -> tuple[list[str], Chunks]:
    """Names of the images, and the images in chunks."""
    if images is None:
        noise = noise_inputs(NOISE, provenance)
        return [f"noise {i}" for i in range(NOISE)], ((start, noise) for start in (0,))
    from ..images import find_images

    paths = find_images(images)
    load = partial(load_inputs, provenance=provenance)
    return [str(p) for p in paths], read_ahead(paths, load, chunk=size)
