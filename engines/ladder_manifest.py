"""What a ladder is: its manifest, `ladder.json`, and its folder. docs/ladder.md tells every field. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.errors import UsageError
from ..export.records import from_document, parse, to_document
from .bundle.folder import sha256_of
from .bundle.manifest import FileEntry
from .bundle.names import plain_file, refuse_path

NAME = "ladder.json"
WEIGHTS = "weights.data"
LARGEST = 16 << 20  # bytes of a manifest


@dataclass(frozen=True)
class Rung:
    """One schedule of a ladder.

    Attributes:
        file: its graph, whose weights are the ladder's.
        label: what it is called, e.g. "r=13".
        method: of the reducer table.
        tokens: after each block.
        macs: multiply-accumulates of an image.
        macs_ratio: the dense model's over them.
        ms: of one run, measured.
        speedup: over the dense model, measured beside it.
        error: mean over the images, see `measure` of the ladder; 0 for the dense model.
    """

    file: FileEntry
    label: str
    method: str
    tokens: tuple[int, ...]
    macs: int
    macs_ratio: float
    ms: float
    speedup: float
    error: float


@dataclass(frozen=True)
class Ladder:
    """A folder of graphs that share one file of weights.

    Attributes:
        version: of the tokexport that wrote it.
        weights: the file that all rungs read.
        rungs: from the most tokens to the fewest.
        runtime, processor, threads: what the times were measured with.
        dtype: of the trunk.
        batch: images in a run; null for any number, then the times are of one.
        measure: of the errors: "KL" of the classes' probabilities, dense to reduced, or "1 - cosine" of the outputs.
        images: photos the errors were measured on; 0: on eight images of noise, which say little.
        provenance: of the first rung, as it is stored in it.
    """

    version: str
    weights: FileEntry
    rungs: tuple[Rung, ...]
    runtime: str
    processor: str
    threads: int
    dtype: str
    batch: int | None
    measure: str
    images: int
    provenance: dict[str, Any]

    def __post_init__(self):
        if not self.rungs:
            raise UsageError("rungs: there are none, wanted one or more")
        if any(r.ms <= 0 or r.macs <= 0 for r in self.rungs):
            raise UsageError("rungs: wanted times and multiply-accumulates above 0")

    @property
    def needs(self) -> tuple[str, ...]:
        """Features that a reader must understand: those of the rungs."""
        return tuple(self.provenance.get("needs", ()))

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file beside the manifest."""
        return (self.weights, *(r.file for r in self.rungs))

    def pick(self, budget_ms: float | None, *, times: tuple[float, ...] | None = None) -> int:
        """The rung with the most tokens whose run is within a budget; the fastest where none is.

        Args:
            budget_ms: milliseconds of a run; None: the first rung.
            times: of the rungs, in place of those that are stored.
        Returns:
            Its place in `rungs`.
        """
        times = times or tuple(r.ms for r in self.rungs)
        if budget_ms is None:
            return 0
        return next((i for i, ms in enumerate(times) if ms <= budget_ms), min(range(len(times)), key=times.__getitem__))


def is_ladder(path: str | Path) -> bool:
    """Whether a path is a folder with a ladder's manifest, or that manifest."""
    path = Path(path)
    return path.name == NAME or (path.is_dir() and (path / NAME).is_file())


def read_ladder(folder: str | Path, *, check: bool = True) -> Ladder:
    """The manifest of a ladder.

    Args:
        folder: of the ladder, or its manifest.
        check: also make sure that every file is there and has the size that the manifest says.
    Raises:
        UsageError: there is none, or it is damaged, of a newer format, or its files are not those it speaks of.
    """
    folder = folder_of(folder)
    path = plain_file(folder, NAME, "ladder")
    if path.stat().st_size > LARGEST:
        raise UsageError(f"{path} has {path.stat().st_size} bytes, a manifest at most {LARGEST}: it is none")
    data = parse(path.read_bytes(), name=str(path))
    ladder = from_document(Ladder, data, name=str(path), remake="tokexport ladder")
    names = [entry.name for entry in ladder.files]
    for name in names:
        refuse_path(name, path)
    if len({*names, NAME}) != len(names) + 1:
        raise UsageError(f"{path} names a file twice: {', '.join(names)}")
    for entry in ladder.files if check else ():
        file = plain_file(folder, entry.name, "ladder")
        if file.stat().st_size != entry.size:
            raise UsageError(f"{file} has {file.stat().st_size} bytes, wanted {entry.size}: copy the ladder again")
    return ladder


def folder_of(path: str | Path) -> Path:
    """The folder of a ladder that is named by it or by its manifest."""
    path = Path(path)
    return path.parent if path.name == NAME else path


def check_bytes(folder: str | Path, ladder: Ladder) -> None:
    """Make sure that every file has the bytes that the manifest speaks of.

    Args:
        folder: of the ladder.
        ladder: its manifest.
    Raises:
        UsageError: one is missing or has others.
    """
    for entry in ladder.files:
        path = plain_file(folder_of(folder), entry.name, "ladder")
        if sha256_of(path) != entry.sha256:
            raise UsageError(
                f"{path} is not the file that {NAME} speaks of (SHA-256 differs): it was changed or replaced"
            )


def write_manifest(ladder: Ladder, folder: Path) -> None:
    """Write `ladder.json`.

    Args:
        ladder: what it says.
        folder: of the ladder.
    """
    text = json.dumps(to_document(ladder), indent=1, allow_nan=False) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")
