"""What a file says of photos: their likeliest classes, or which of them are alike when the model has no classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..export.errors import EngineError, UsageError
from .files import inspect_file
from .images import find_images
from .inputs import load_inputs
from .outputs import TOP, ClassScore, class_scores, score_words
from .runners import in_batches, open_runner

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ImageClasses:
    """An image and its likeliest classes, most likely first.

    Attributes:
        image: its path.
        top: TOP classes at most.
        activation: of the file, see `outputs.activation_of`.
        n_classes: of the classifier.
    """

    image: str
    top: tuple[ClassScore, ...]
    activation: str | None
    n_classes: int

    @property
    def lines(self) -> list[str]:
        """Each class in words."""
        return [score_words(score, self.activation, self.n_classes) for score in self.top]

    def to_json(self) -> dict:
        """Plain JSON values."""
        top = [{"class": s.index, "label": s.label, "logit": s.logit, "probability": s.probability} for s in self.top]
        return {"image": self.image, "top": top}


@dataclass(frozen=True)
class ImageFeatures:
    """An image's features against the other images'. length: of the feature vector, of `values` numbers. nearest: the
    image most
    alike, cosine: to it; both None for a single image."""

    image: str
    values: int
    length: float
    nearest: str | None
    cosine: float | None

    def to_json(self) -> dict:
        """Plain JSON values."""
        return asdict(self)


def predict(
    path: str | Path,
    images: list[str | Path],
    *,
    runtime: str = "ort",
    progress: Callable[[str], None] = lambda stage: None,
) -> list[ImageClasses] | list[ImageFeatures]:
    """Run a file on photos, prepared as the file says.

    Args:
        path: an ONNX file or an engine.
        images: files or folders.
        runtime: what runs an ONNX file.
        progress: told how far it is.
    Returns:
        One record per image: its likeliest classes, or its nearest neighbour when the model has no classes.
    Raises:
        UsageError: no such file, or an image cannot be read.
        EngineError: the runtime failed, or the outputs are not finite.
    """
    import numpy as np

    provenance, paths = inspect_file(path).provenance, find_images(list(images))
    values = outputs_of(path, paths, runtime=runtime, progress=progress)
    if not np.isfinite(values).all():
        small = provenance.precision == "fp16"
        advice = ": fp16 may be too small for this model, try bf16 or fp32" if small else ""
        raise EngineError(f"{path} gives values that are not finite{advice}")
    if provenance.pooled == "logits":
        scores = class_scores(values, provenance.activation, labels=provenance.labels, top=TOP)
        identity = provenance.activation, values.shape[1]
        return [ImageClasses(str(photo), tuple(row), *identity) for photo, row in zip(paths, scores)]
    return _neighbours(paths, values)


def outputs_of(path: str | Path, photos: list[Path], *, runtime: str, progress: Callable[[str], None]) -> np.ndarray:
    """A file's pooled output [images, values] of photos, a batch at a time.

    Args:
        path: an ONNX file or an engine.
        photos: image files.
        runtime: what runs an ONNX file.
        progress: told how far it is.
    Raises:
        UsageError: it has none.
    """
    import numpy as np

    provenance, parts = inspect_file(path).provenance, []
    if provenance.pooled is None:
        raise UsageError(
            f"{path} gives {', '.join(provenance.outputs)} and neither classes nor features of an image: make it with pooled "
            f"in emit too, or read those with open_runner(...).run"
        )
    progress("opening the file")
    with open_runner(path, runtime) as runner:
        size = runner.inputs["image"][0] or 8
        for start in range(0, len(photos), size):
            progress(f"image {start + 1} of {len(photos)}")
            images = load_inputs(photos[start : start + size], provenance)
            parts.append(in_batches(runner, images)[provenance.pooled])
    return np.concatenate(parts)


def _neighbours(photos: list[Path], features) -> list[ImageFeatures]:
    import numpy as np

    length = np.linalg.norm(features, axis=1)
    if len(photos) == 1:
        return [ImageFeatures(str(photos[0]), features.shape[1], float(length[0]), None, None)]
    cosine = features @ features.T / np.maximum(np.outer(length, length), 1e-30)
    np.fill_diagonal(cosine, -np.inf)
    best = cosine.argmax(1)
    return [
        ImageFeatures(str(photo), features.shape[1], float(length[i]), str(photos[best[i]]), float(cosine[i, best[i]]))
        for i, photo in enumerate(photos)
    ]
