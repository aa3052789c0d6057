"""Photos for a search: read when a batch needs them, so that none are held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...export.provenance import Preprocess

if TYPE_CHECKING:
    import numpy as np


class SearchPhotos(NamedTuple):
    """What a search runs on.

    Args:
        paths: of the photos.
        labels: class of each, or None.
    """

    paths: list[Path]
    labels: list[int] | None

    def reader(self, preprocess: Preprocess) -> Callable[[Sequence[int]], np.ndarray]:
        """A function: positions -> images [B, C, H, W] float32, prepared as the model wants them."""
        from ..images import load_images

        return lambda rows: load_images([self.paths[i] for i in rows], preprocess)


def find_photos(
    images: list[str | Path], *, n_classes: int | None = None, class_names: tuple[str, ...] = ()
) -> SearchPhotos:
    """The photos of files and folders, or, with their classes, of one folder that has a folder for each class.

    Args:
        images: files and folders; with n_classes one folder.
        n_classes: of the classifier, when labels are wanted; None without.
        class_names: names of its classes, when known.
    Raises:
        UsageError: there are none, or the folders say no class.
    """
    from ..images import find_images
    from ..measure.labels import labelled

    if n_classes is None:
        return SearchPhotos(find_images(images), None)
    if len(images) != 1:
        from ...export.errors import UsageError

        raise UsageError(f"labels are read off one folder with a folder for each class; {len(images)} were given")
    rows = labelled(Path(images[0]), n_classes, labels=class_names)
    return SearchPhotos([row.path for row in rows], [row.label for row in rows])
