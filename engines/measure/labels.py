"""Labelled images for `eval`, whatever they lie in: class folders, a list of paths with classes, parquet with labels."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ...export.errors import UsageError
from ..data import ImageData, ImageItem, open_data
from ..images import SUFFIXES


class LabelledImage(NamedTuple):
    """A photo and the index of its class."""

    path: Path
    label: int


@dataclass(frozen=True)
class LabelledImages:
    """Images with the index of their class.

    Attributes:
        source: where they are, more than these perhaps: (path, class) each, or a large set.
        places: those that count, in rising order, by their place in the source.
        n_classes: of the classifier.
        labels: names of the classes, when known.
    """

    source: Sequence[tuple[str | Path, int]] | ImageData
    places: Sequence[int]
    n_classes: int
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.places)

    def shard(self, shard: int, shards: int) -> LabelledImages:
        """Every `shards`-th image from `shard` on.

        Args:
            shard: from 0.
            shards: how many there are.
        """
        return replace(self, places=self.places[shard::shards])

    def items(self) -> Iterator[ImageItem]:
        """The images, in order. Raises: UsageError for one whose class is not given or is none of the classifier's."""
        if isinstance(self.source, Sequence):
            for place in self.places:
                path, label = self.source[place]
                yield ImageItem(place, str(path), Path(path), label)
            return
        wanted = iter(self.places)
        place = next(wanted, None)
        for item in self.source.items():
            if item.index == place:
                yield item._replace(label=self._class_of(item))
                place = next(wanted, None)
            if place is None:
                return

    def _class_of(self, item: ImageItem) -> int:
        """The index of an image's class."""
        label, path = item.label, self.source.path
        if label is None:
            how = "a column `label`" if self.source.kind == "parquet" else "a tab and the class behind each path"
            raise UsageError(f"images: {path} does not say the class of {item.name}: wanted {how}, by index or label")
        if isinstance(label, str) and label in self.labels:
            return self.labels.index(label)
        text = str(label)
        if text.isascii() and text.isdigit() and len(text) < 9 and int(text) < self.n_classes:
            return int(text)
        raise UsageError(
            f"images: {path} says class {text[:80]!r} of {item.name}: wanted 0 to {self.n_classes - 1}"
            f"{', or a label of the file' if self.labels else ''}"
        )


@contextmanager
def open_labelled(
    path: str | Path, n_classes: int, *, labels: tuple[str, ...] = (), limit: int | None = None
) -> Iterator[LabelledImages]:
    """Labelled images, until the block ends.

    Args:
        path: a folder with a folder for each class (see `labelled`), a list of paths with classes, or parquet
            with encoded images and labels (see `data.open_data`).
        n_classes: of the classifier.
        labels: names of the classes, when known.
        limit: at most so many images, spread evenly; None for all.
    Raises:
        UsageError: there is no such thing, or it names no classes.
    """
    if not str(path).strip():
        raise UsageError(
            "images: an empty name was given: wanted a folder with a folder for each class (. for this one)"
        )
    path = Path(path)
    parquet = path.is_dir() and any(p.suffix.lower() == ".parquet" for p in path.iterdir())
    if not path.is_file() and not parquet:
        pairs = labelled(path, n_classes, labels=labels, limit=limit)
        yield LabelledImages(pairs, range(len(pairs)), n_classes, labels)
        return
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: wanted 1 or more images")
    with tempfile.TemporaryDirectory() as folder:
        source = open_data(path, Path(folder) / "images.txt")
        n = min(limit or source.images, source.images)
        places = range(n) if n == source.images else [i * source.images // n for i in range(n)]
        yield LabelledImages(source, places, n_classes, labels)


def labelled(
    folder: Path, n_classes: int, *, labels: tuple[str, ...] = (), limit: int | None = None
) -> list[LabelledImage]:
    """Images and their classes from a folder with a folder for each class.

    Args:
        folder: its folders are named by class index or by label; or there is one for each class, in alphabetical order.
        n_classes: of the classifier.
        labels: names of the classes, when known.
        limit: at most so many images, spread evenly; None for all.
    Raises:
        UsageError: there are no such folders, they have no images, or their names say no class.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: wanted 1 or more images")
    if not folder.is_dir():
        raise UsageError(f"images {folder}: wanted a folder with a folder for each class")
    names = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not names:
        raise UsageError(f"images {folder} has no folders: wanted one for each class, with its images")
    index = _class_indices(names, n_classes, labels=labels, folder=folder)
    photos = {
        n: sorted(p for p in (folder / n).iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()) for n in names
    }
    images = [LabelledImage(p, index[n]) for n in names for p in photos[n]]
    if not images:
        raise UsageError(f"images {folder}: its folders have no images ({', '.join(SUFFIXES)})")
    if limit is None or limit >= len(images):
        return images
    return [images[i * len(images) // limit] for i in range(limit)]


def _class_indices(names: list[str], n_classes: int, *, labels: tuple[str, ...], folder: Path) -> dict[str, int]:
    """Class folder -> class index: by number, by label, or in order."""
    if all(name.isascii() and name.isdigit() and len(name) < 9 and int(name) < n_classes for name in names):
        return {name: int(name) for name in names}
    by_label = {label: i for i, label in enumerate(labels)}
    if all(name in by_label for name in names):
        return {name: by_label[name] for name in names}
    if len(names) == n_classes:
        return {name: i for i, name in enumerate(names)}
    raise UsageError(
        f"images {folder} has {len(names)} folders ({', '.join(names[:3])}, ...), the model {n_classes} classes: name them by index "
        f"(0 to {n_classes - 1}) or by label, or have one for each class"
    )
