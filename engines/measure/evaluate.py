"""Accuracy of files on labelled images, beside the reference's and the dense model's, as counts that add up over
shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ...export.errors import EngineError, UsageError
from ...export.inspection import Inspection
from .labels import LabelledImages, open_labelled

BATCH = 16  # images read at once for a file that takes any number


@dataclass(frozen=True)
class Hits:
    """How many images were judged rightly. top1: the likeliest class is the label. top5: it is among the five
    likeliest.
    """

    images: int = 0
    top1: int = 0
    top5: int = 0

    def __add__(self, other: Hits) -> Hits:
        return Hits(self.images + other.images, self.top1 + other.top1, self.top5 + other.top5)


@dataclass(frozen=True)
class Accuracy:
    """Counts of one model.

    Args:
        name: of the file, or "reference, tome", "reference, dense".
        tokens: that are left at the end; None for a reference.
        hits: the counts, of all images or of a shard.
    """

    name: str
    tokens: int | None
    hits: Hits

    @property
    def top1(self) -> float:
        """Share of images whose likeliest class is the label."""
        return self.hits.top1 / max(self.hits.images, 1)

    @property
    def top5(self) -> float:
        """Share of images whose label is among the five likeliest classes."""
        return self.hits.top5 / max(self.hits.images, 1)

    def to_json(self) -> dict:
        """Plain JSON values, counts and shares; `from_json` takes them back."""
        counts = {"images": self.hits.images, "top1_hits": self.hits.top1, "top5_hits": self.hits.top5}
        return {"name": self.name, "tokens": self.tokens, **counts, "top1": self.top1, "top5": self.top5}

    @classmethod
    def from_json(cls, fields: dict) -> Accuracy:
        """The record that `to_json` wrote."""
        return cls(fields["name"], fields["tokens"], Hits(fields["images"], fields["top1_hits"], fields["top5_hits"]))


def added(shards: Iterable[list[Accuracy]]) -> list[Accuracy]:
    """The accuracy over all images from that of every shard, in the order of the first.

    Args:
        shards: what `evaluate` gave for each.
    Raises:
        UsageError: the shards are not of the same models.
    """
    shards = list(shards)
    identities = [[(a.name, a.tokens) for a in shard] for shard in shards]
    if not shards or any(identity != identities[0] for identity in identities):
        raise UsageError("shards that are added must be of the same models in the same order, and at least one")
    return [Accuracy(same[0].name, same[0].tokens, sum((a.hits for a in same), Hits())) for same in zip(*shards)]


def evaluate(
    path: str | Path,
    images: str | Path | list[tuple[str | Path, int]] | LabelledImages,
    *,
    runtime: str = "ort",
    limit: int | None = None,
    shard: int = 0,
    shards: int = 1,
    reference: bool = False,
    dense: bool = False,
    checkpoint: str | Path | None = None,
    predictor: str | Path | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Accuracy]:
    """Top-1 and top-5 accuracy of a file on labelled images.

    Args:
        path: an ONNX file or an engine of a classifier.
        images: what `labels.open_labelled` takes or gives, or the images and their classes.
        runtime: what runs an ONNX file.
        limit: at most so many images, spread evenly; None for all.
        shard, shards: count only every `shards`-th image from `shard` on; `added` sums what the shards gave.
        reference: also the eager reference that the file was made from.
        dense: also the model without reduction.
        checkpoint, predictor: where the weights and the score heads are now, if not where they were.
        progress: told how far it is.
    Returns:
        One `Accuracy` for the file, then the reference's and the dense model's.
    Raises:
        UsageError: the file has no classes, the folders do not name them, or an image cannot be read.
        EngineError: the runtime failed, or the outputs are not finite.
    """
    from ..files import inspect_file

    inspection = inspect_file(path)
    check_classifier(inspection)
    if not 0 <= shard < shards:
        raise UsageError(f"shard {shard} of {shards}: wanted 0 to {shards - 1}")
    wanted = {"reference": reference, "dense": dense, "checkpoint": checkpoint, "predictor": predictor}
    models = _eager_models(inspection, **wanted, progress=progress)
    names = {str(inspection.path): inspection.provenance.schedule.n_final, **dict.fromkeys(models)}
    counts = dict.fromkeys(names, Hits())
    with _opened(images, inspection, limit) as every:
        part = every.shard(shard, shards)
        for labels, logits in _predictions(inspection, part, runtime=runtime, models=models, progress=progress):
            for name, values in logits.items():
                counts[name] += _hits(name, values, labels)
    return [Accuracy(name, tokens, counts[name]) for name, tokens in names.items()]


def _opened(images, inspection: Inspection, limit: int | None):
    """A context of `LabelledImages`, whatever they were given as."""
    classes, labels = inspection.provenance.dims["classes"], inspection.provenance.labels
    if isinstance(images, LabelledImages):
        return nullcontext(images)
    if isinstance(images, list):
        return nullcontext(LabelledImages(images, range(len(images)), classes, labels))
    return open_labelled(images, classes, labels=labels, limit=limit)


def check_classifier(inspection: Inspection) -> None:
    """Raises: UsageError when a file gives no classes."""
    provenance = inspection.provenance
    if provenance.pooled != "logits":
        outputs = ", ".join(provenance.outputs)
        raise UsageError(f"{inspection.path} has no classes (its output is {outputs}): eval needs a classifier")


def check_same_classes(inspections: list[Inspection]) -> None:
    """Raises: UsageError when files have other classes than the first."""
    classes = lambda i: (i.provenance.dims["classes"], i.provenance.labels)
    for inspection in inspections:
        check_classifier(inspection)
        if classes(inspection) != classes(inspections[0]):
            raise UsageError(
                f"{inspection.path} has other classes than {inspections[0].path}: evaluate them one by one"
            )


def _eager_models(inspection: Inspection, *, reference: bool, dense: bool, checkpoint, predictor, progress) -> dict:
    """Name -> a function from images to logits: the reference of a file, and the dense model, as far as they are asked for."""
    if not (reference or dense):
        if checkpoint or predictor:
            raise UsageError(
                f"{checkpoint or predictor}: checkpoint and predictor are for the reference and the dense model, which are not asked for"
            )
        return {}
    progress("loading torch")
    import torch

    from ...export.rebuild import reference_of

    schedule, models = inspection.provenance.schedule, {}
    eager = reference_of(inspection.provenance, inspection.path, checkpoint=checkpoint, predictor=predictor)
    if reference and schedule.steps:
        models[f"reference, {schedule.method}"] = eager
    if dense or not schedule.steps:  # of a dense file the two are one
        models["reference, dense"] = eager.dense

    def on_arrays(model):
        def call(pixels):
            with torch.no_grad():
                return model(torch.from_numpy(pixels)).numpy()

        return call

    return {name: on_arrays(model) for name, model in models.items()}


def _predictions(inspection: Inspection, images: LabelledImages, *, runtime: str, models: dict, progress) -> Iterator:
    """(labels [B], {name: logits [B, classes]}), a batch at a time: memory does not grow with the images."""
    import numpy as np

    from ..decode import Decoder, default_workers, model_input
    from ..runners import in_batches, open_runner

    provenance, done = inspection.provenance, 0
    batch = inspection.batch or BATCH if runtime == "openvino" else None
    workers = default_workers(len(images))
    with (
        open_runner(inspection.path, runtime, batch=batch) as runner,
        Decoder(provenance.preprocess, workers) as decoder,
    ):
        for chunk in decoder.chunks(images.items(), runner.inputs["image"][0] or BATCH):
            if chunk.broken:
                raise UsageError(f"images: {chunk.broken[0].error}")
            progress(f"{inspection.path.name}: image {done + 1} of {len(images)}")
            done += len(chunk.items)
            pixels = model_input(chunk.pixels, provenance.preprocess, provenance.input)
            logits = {str(inspection.path): in_batches(runner, pixels)[provenance.pooled]}
            logits |= {name: model(pixels) for name, model in models.items()}
            yield np.array([item.label for item in chunk.items]), logits


def _hits(name: str, logits, labels) -> Hits:
    """Counts of one batch. Raises: EngineError when an output is not finite."""
    import numpy as np

    if not np.isfinite(logits).all():
        raise EngineError(f"{name} gives values that are not finite on these images")
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    right = best == labels[:, None]
    return Hits(len(labels), int(right[:, 0].sum()), int(right.any(1).sum()))
