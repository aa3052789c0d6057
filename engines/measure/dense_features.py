"""How much of a dense model's features a reduced file keeps: patch by patch, and whether its honesty map says where it lost some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...export import macs
from ...export.errors import UsageError
from ..files import inspect_file
from ..inputs import load_inputs
from ..parity.outputs import cosines
from ..runners import in_batches, open_runner


@dataclass(frozen=True)
class PatchFeatures:
    """The patches of one photo.

    Attributes:
        photo: its path.
        dense: [N, C] of the model without a reduction.
        reduced: [N, C] of the file.
        honesty: [N] of the file.
        kept: [N] bool, the patches that have a token; None for all. Figures are of those alone.
    """

    photo: Path
    dense: np.ndarray
    reduced: np.ndarray
    honesty: np.ndarray
    kept: np.ndarray | None = None

    def _of_kept(self, values: np.ndarray) -> np.ndarray:
        return values if self.kept is None else values[self.kept]

    @property
    def loss(self) -> np.ndarray:
        """1 - cosine of every patch that has a token to the dense model's."""
        return 1.0 - cosines(
            self._of_kept(self.reduced).astype(np.float64), self._of_kept(self.dense).astype(np.float64)
        )

    @property
    def cosine(self) -> float:
        """Mean cosine of the patches to the dense model's."""
        return float(1.0 - self.loss.mean())

    @property
    def spearman(self) -> float | None:
        """Rank correlation of the honesty map with `loss`; None where one of them is the same everywhere."""
        return spearman(self._of_kept(self.honesty), self.loss)


def patch_features(
    path: str | Path,
    photos: list[Path],
    *,
    runtime: str = "ort",
    checkpoint: str | Path | None = None,
    predictor: str | Path | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[PatchFeatures]:
    """A file's patches beside those of the dense model, which is rebuilt from its provenance.

    Args:
        path: a file with the output `patches`; of several blocks the last is taken.
        photos: image files.
        runtime: what runs an ONNX file.
        checkpoint, predictor: where the weights and trained layers are now, if not where they were.
        progress: told which photo is looked at.
    Returns:
        One record a photo.
    Raises:
        UsageError: the file gives no patches, or its weights or a photo cannot be read.
    """
    import torch

    from ...export.rebuild import reference_of
    from ...export.reference import ReducedViT

    provenance = inspect_file(path).provenance
    names = [name for name in provenance.outputs if name.partition("_")[0] == "patches"]
    if not names:
        raise UsageError(f"{path} gives {', '.join(provenance.outputs)}: wanted one made with patches in emit")
    honesty = names[-1].replace("patches", "honesty")
    progress("rebuilding the dense model")
    own = reference_of(provenance, Path(path), checkpoint=checkpoint, predictor=predictor)
    plain = replace(own.emission, emit=("patches",), dropped="last")
    dense = ReducedViT(own.plain, macs.dense(own.schedule), emission=plain, pixels=own.pixels)
    records = []
    with open_runner(path, runtime) as runner:
        for photo in photos:
            progress(f"comparing {photo.name}")
            image = load_inputs([photo], provenance)
            values = in_batches(runner, image)
            wanted = dense.run(torch.from_numpy(image)).outputs[names[-1]].numpy()
            rows = (_in_rows(values[names[-1]]), values[honesty][0])
            kept = values.get(names[-1].replace("patches", "mask"))
            records.append(PatchFeatures(photo, _in_rows(wanted), *rows, kept=None if kept is None else kept[0] > 0))
    return records


def _in_rows(patches: np.ndarray) -> np.ndarray:
    """[N, C] of the one image's patches, whatever their layout."""
    return patches[0] if patches.ndim == 3 else patches[0].reshape(patches.shape[1], -1).T


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Correlation of ranks, equal values sharing their mean rank; None where one side is the same everywhere.

    Args:
        a, b: [N].
    """
    first, second = (_ranks(np.asarray(v, np.float64)) for v in (a, b))
    first, second = first - first.mean(), second - second.mean()
    length = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / length) if length > 0 else None


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]
