"""The folder of an embedding: parts, errors, and the manifest by which a later run knows what is finished.

    DIR/manifest.json                what was computed of what; complete: true when all parts are there
    DIR/parts/part-000000.parquet    the rows of one part, in the order of the data
    DIR/errors/part-000000.parquet   the images of that part that gave nothing; only where there are some
    DIR/images.txt                   the paths of a folder or list as they were at the start

A part is written aside and renamed, its errors before it: a part that is there is finished.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ...export.errors import StorageError, UsageError
from ...export.files import ASIDE, aside, is_disk_error
from ...export.records import encode, from_document, parse, to_document
from .columns import Column

NAME, LISTING, PARTS, ERRORS, LOCK = "manifest.json", "images.txt", "parts", "errors", ".lock"
OWN = {NAME, LISTING, PARTS, ERRORS, LOCK}
OTHER = {
    "sha256": "another file",
    "data_sha256": "other images",
    "data": "images of another kind",
}  # fields whose values say nothing


@dataclass(frozen=True)
class EmbedManifest:
    """What a folder of parts is.

    Attributes:
        version: of the tokexport that started it.
        file: name of the ONNX file or engine. sha256: of its bytes, in hexadecimal.
        runtime: what ran it.
        data: what the images came from: "folder", "list" or "parquet". data_path: where it was. data_sha256: of its
            listing, or of the names, sizes and rows of parquet files.
        images: how many there are.
        part_size: images of a part; the last may have fewer.
        columns: of the parts, in order.
        labels: of the classes, or none.
        complete: all parts are there. broken: images without a row; 0 until it is complete.
    """

    version: str
    file: str
    sha256: str
    runtime: str
    data: str
    data_path: str
    data_sha256: str
    images: int
    part_size: int
    columns: tuple[Column, ...]
    labels: tuple[str, ...]
    complete: bool = False
    broken: int = 0

    @property
    def needs(self) -> tuple[str, ...]:
        """Features that a reader must understand: none."""
        return ()

    @property
    def n_parts(self) -> int:
        """Parts of the complete folder."""
        return -(-self.images // self.part_size)

    def slice(self, part: int) -> tuple[int, int]:
        """(index of a part's first image, index behind its last)."""
        return part * self.part_size, min((part + 1) * self.part_size, self.images)


def part_path(folder: Path, part: int) -> Path:
    """Of the rows of a part; its errors have the same name in ERRORS."""
    return folder / PARTS / f"part-{part:06d}.parquet"


def error_path(folder: Path, part: int) -> Path:
    """Of the errors of a part."""
    return folder / ERRORS / f"part-{part:06d}.parquet"


@contextmanager
def opened(folder: str | Path, *, force: bool) -> Iterator[Path]:
    """A folder for parts, for this process alone until the block ends.

    Args:
        folder: a new one, an empty one, or one that an earlier run has begun.
        force: remove what an earlier run has left there.
    Raises:
        UsageError: it holds something else, cannot be written, or another process is writing there.
    """
    folder = Path(folder)
    if not str(folder).strip() or "\0" in str(folder):
        raise UsageError(f"output {str(folder)!r}: wanted the name of a folder")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder} is a file: wanted a folder, new or of an earlier run")
    strange = (
        [p.name for p in folder.iterdir() if p.name not in OWN and not p.name.startswith(ASIDE)]
        if folder.exists()
        else []
    )
    if strange:
        raise UsageError(
            f"output {folder} holds {strange[0]!r}, which is no part of an embedding: wanted a folder of its own"
        )
    new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        lock = open(folder / LOCK, "w")  # noqa: SIM115 - held as long as the block lasts
    except OSError as e:
        kind = StorageError if is_disk_error(e) else UsageError
        raise kind(f"output {folder}: cannot be written ({e.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UsageError(
            f"output {folder}: another process is writing there; wait for it, or take another folder"
        ) from None
    try:
        if force:
            _clear(folder)
        for place in (PARTS, ERRORS):
            (folder / place).mkdir(exist_ok=True)
            for left in (folder / place).glob(f"{ASIDE}*"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        yield folder
    finally:
        lock.close()
        if new and not (folder / NAME).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove what an earlier run has written: the manifest first, so that no half of it is taken for a run."""
    (folder / NAME).unlink(missing_ok=True)
    (folder / LISTING).unlink(missing_ok=True)
    for place in (PARTS, ERRORS):
        shutil.rmtree(folder / place, ignore_errors=True)


def read_embedding(folder: str | Path) -> EmbedManifest:
    """The manifest of a folder of parts. Raises: UsageError when there is none, or one that cannot be read."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise UsageError(f"{folder} has no {NAME}: wanted a folder that `tokexport embed` has begun")
    return from_document(
        EmbedManifest, parse(path.read_bytes(), name=str(path)), name=str(path), remake="tokexport embed"
    )


def begin(folder: Path, manifest: EmbedManifest) -> EmbedManifest:
    """Write the manifest of a new run, or make sure that an earlier one was of the same job.

    Args:
        folder: of the parts.
        manifest: of this run.
    Returns:
        The manifest that stands there.
    Raises:
        UsageError: the parts that are there are of another job.
    """
    if not (folder / NAME).exists():
        if any((folder / PARTS).iterdir()):
            raise UsageError(f"output {folder} has parts and no {NAME}: give force to start anew, or another folder")
        write_manifest(folder, manifest)
        return manifest
    earlier = read_embedding(folder)
    ours, theirs = (encode(replace(m, complete=False, broken=0, version="", data_path="")) for m in (manifest, earlier))
    unlike = [name for name in ours if ours[name] != theirs[name]]
    for side in (ours, theirs):
        side["columns"] = " ".join("x".join(map(str, (c["name"], *c["shape"]))) for c in side["columns"])
    if unlike:
        told = lambda name: (
            OTHER.get(name) or f"{name.replace('_', ' ')} was {_short(theirs[name])}, is {_short(ours[name])}"
        )
        words = "; ".join(dict.fromkeys(map(told, unlike)))
        raise UsageError(
            f"output {folder} holds another run ({words}): give force to start anew, or another folder; a run goes on "
            f"only with the same file, images, columns and part size"
        )
    return earlier


def write_manifest(folder: Path, manifest: EmbedManifest) -> None:
    """Write the manifest aside and rename it.

    Args:
        folder: of the parts.
        manifest: what to write.
    """
    with aside(folder / NAME) as new:
        new.write_text(json.dumps(to_document(manifest), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def missing_parts(folder: Path, manifest: EmbedManifest) -> list[int]:
    """Numbers of the parts that are not finished, in order."""
    return [part for part in range(manifest.n_parts) if not part_path(folder, part).exists()]


def finish(folder: Path, manifest: EmbedManifest) -> EmbedManifest:
    """Write that all parts are there; returns the manifest with the number of broken images.

    Args:
        folder: of the parts.
        manifest: of the run.
    """
    import pyarrow.parquet as pq

    broken = sum(pq.read_metadata(path).num_rows for path in sorted((folder / ERRORS).glob("part-*.parquet")))
    manifest = replace(manifest, complete=True, broken=broken)
    write_manifest(folder, manifest)
    return manifest


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
