"""How far a reduced model is from the dense one on a deployer's own images, by the reference in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...export.errors import EngineError
from ...export.models.learned_layers import learned_layers
from ...export.reference import ReducedViT
from ...export.schedule import Schedule

if TYPE_CHECKING:
    from ...export.models.load import LoadedModel

BATCH = 8  # images at once: the reference's attention is [B, heads, N, N]
KL, COSINE = "KL", "1 - cosine"


@dataclass(frozen=True)
class ImageErrors:
    """One schedule on all images.

    Attributes:
        errors: of every image: KL of the classes' probabilities, dense to reduced, or 1 - cosine of the outputs.
        same: share of images with the same likeliest class; None without classes.
        accuracy: share judged rightly; None without labels.
    """

    errors: np.ndarray
    same: float | None
    accuracy: float | None

    @property
    def mean(self) -> float:
        """Of all images."""
        return float(self.errors.mean())

    @property
    def distances(self) -> np.ndarray:
        """The roots of the errors (the length of a chord, but for a factor): a few bad images do not rule their mean, so schedules are
        ranked by them."""
        return np.sqrt(self.errors)


class ErrorMeter:
    """Runs schedules of one model on images that are held in memory.

    Args:
        loaded: the model.
        pixels: images [n, channels, H, W] float32, prepared as the model wants them.
        labels: class of each, or None.
        progress: told the share of the dense model's images that are done.
    Raises:
        EngineError: the dense model gives values that are not finite.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        pixels: np.ndarray,
        labels: Sequence[int] | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ):
        self.loaded, self.pixels, self.labels = loaded, pixels, None if labels is None else np.asarray(labels)
        self.kind = KL if loaded.activation == "softmax" and loaded.module.num_classes > 1 else COSINE
        self.dense = self._outputs(loaded.module, "the dense model", progress)

    def errors(self, schedule: Schedule, progress: Callable[[float], None] = lambda share: None) -> ImageErrors:
        """One schedule on all images.

        Args:
            schedule: of the model.
            progress: told the share of images that are done.
        Raises:
            EngineError: it gives values that are not finite.
        """
        if not schedule.steps:
            return self._judged(self.dense)
        reference = ReducedViT(self.loaded.module, schedule, learned_layers(self.loaded, schedule))
        return self._judged(self._outputs(reference, schedule.method, progress))

    def sources(self, schedule: Schedule, images: Sequence[int]) -> np.ndarray:
        """Final row of every input token [images, N0], -1 for what is gone.

        Args:
            schedule: of the model.
            images: their positions.
        """
        reference = ReducedViT(self.loaded.module, schedule, learned_layers(self.loaded, schedule))
        return reference.run(torch.from_numpy(self.pixels[list(images)])).sources.numpy()

    def _outputs(self, model, name: str, progress: Callable[[float], None]) -> np.ndarray:
        parts = []
        with torch.no_grad():
            for start in range(0, len(self.pixels), BATCH):
                parts.append(model(torch.from_numpy(self.pixels[start : start + BATCH])).double().numpy())
                progress(min(start + BATCH, len(self.pixels)) / len(self.pixels))
        values = np.concatenate(parts)
        if not np.isfinite(values).all():
            raise EngineError(f"{name} gives values that are not finite on these images")
        return values

    def _judged(self, values: np.ndarray) -> ImageErrors:
        classes = self.loaded.module.num_classes > 1
        errors = divergence(self.dense, values) if self.kind == KL else one_minus_cosine(self.dense, values)
        best = values.argmax(1)
        same = float((best == self.dense.argmax(1)).mean()) if classes else None
        return ImageErrors(errors, same, None if self.labels is None else float((best == self.labels).mean()))


def divergence(dense: np.ndarray, reduced: np.ndarray) -> np.ndarray:
    """KL of softmaxes, dense to reduced, [n].

    Args:
        dense, reduced: logits [n, classes].
    """
    logs = [values - np.logaddexp.reduce(values, axis=1, keepdims=True) for values in (dense, reduced)]
    return np.maximum((np.exp(logs[0]) * (logs[0] - logs[1])).sum(1), 0)


def one_minus_cosine(dense: np.ndarray, reduced: np.ndarray) -> np.ndarray:
    """1 - cosine of rows, [n].

    Args:
        dense, reduced: [n, D].
    """
    lengths = np.maximum(np.linalg.norm(dense, axis=1) * np.linalg.norm(reduced, axis=1), 1e-30)
    return np.maximum(1 - (dense * reduced).sum(1) / lengths, 0)


def paired_difference(a: ImageErrors, b: ImageErrors) -> tuple[float, float | None]:
    """By how much a's mean distance is larger than b's, over b's, and the standard error of that over the same images (None for one).

    Args:
        a, b: of the same images.
    """
    scale = max(float(b.distances.mean()), 1e-30)
    differences = (a.distances - b.distances) / scale
    n = len(differences)
    return float(differences.mean()), float(differences.std(ddof=1) / n**0.5) if n > 1 else None


def chosen_photos(
    paths: Sequence[Path], labels: Sequence[int] | None, *, limit: int, seed: int
) -> tuple[list, list | None]:
    """At most `limit` of the photos, drawn by a seed, in their order; and their labels.

    Args:
        paths: all of them.
        labels: class of each, or None.
        limit: 1 or more.
        seed: the same one draws the same photos.
    """
    order = np.random.default_rng(seed).permutation(len(paths))[:limit]
    rows = sorted(int(i) for i in order)
    return [paths[i] for i in rows], None if labels is None else [labels[i] for i in rows]
