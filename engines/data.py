"""Large sets of images: a folder, a list of paths, or parquet files of encoded images; read in order, a slice at a time.

Memory does not grow with the number of images: paths lie in a listing on disk, encoded images are read by row group.
Imports pyarrow for parquet alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from ..export.errors import MissingPackageError, UsageError
from .images import SUFFIXES

STRIDE = 512  # lines of a listing between two whose place in the file is kept
AT_ONCE = 64  # rows of a parquet file that are held at once
IMAGE_COLUMNS = ("image", "img", "bytes", "jpg", "jpeg", "png", "content")  # by preference, when several could be it
NAME_COLUMNS = ("path", "file_name", "filename", "key", "__key__")
LABEL_COLUMNS = ("label", "class", "cls")
MAGIC = b"PAR1"
WANTED = "wanted a folder of images, a parquet file of encoded images, or a text file with a path on each line"


class ImageItem(NamedTuple):
    """One image that has not been decoded.

    Attributes:
        index: its place in the data, from 0.
        name: its path as the data gives it, or "FILE.parquet#ROW".
        source: the file, the encoded bytes, or None where a parquet file has none.
        label: its class as the data gives it, by number or by name; None where it gives none.
    """

    index: int
    name: str
    source: Path | bytes | None
    label: int | str | None = None


@dataclass(frozen=True)
class PathListing:
    """Image files, by a text file with a path on each line; what follows a tab is the class.

    Attributes:
        kind: "folder" or "list": what the listing was made of.
        path: of that folder or list.
        listing: the text file.
        root: relative paths start here.
        images: how many.
        digest: SHA-256 of the listing, in hexadecimal.
        offsets: where every STRIDE-th line starts.
    """

    kind: str
    path: str
    listing: Path
    root: Path
    images: int
    digest: str
    offsets: tuple[int, ...]

    def items(self, start: int = 0, stop: int | None = None) -> Iterator[ImageItem]:
        """Images of a slice, in order.

        Args:
            start: index of the first.
            stop: index behind the last; None for all.
        """
        stop = self.images if stop is None else min(stop, self.images)
        if start >= stop:
            return
        with open(self.listing, "rb") as lines:
            lines.seek(self.offsets[start // STRIDE])
            for _ in range(start % STRIDE):
                lines.readline()
            for index in range(start, stop):
                name, _, label = os.fsdecode(lines.readline().rstrip(b"\n")).partition("\t")
                yield ImageItem(index, name, self.root / name, label.strip() or None)


@dataclass(frozen=True)
class ParquetImages:
    """Encoded images in parquet files.

    Attributes:
        path: of the file, or of the folder of the files.
        files: in order.
        rows: of each.
        column: that holds the images: bytes, or a struct with `bytes` and perhaps `path`.
        name_column, label_column: that hold names and classes; None without.
        digest: SHA-256 of names, sizes and rows, in hexadecimal.
    """

    path: str
    files: tuple[Path, ...]
    rows: tuple[int, ...]
    column: str
    name_column: str | None
    label_column: str | None
    digest: str
    kind: str = "parquet"

    @property
    def images(self) -> int:
        """How many."""
        return sum(self.rows)

    def items(self, start: int = 0, stop: int | None = None) -> Iterator[ImageItem]:
        """Images of a slice, in order; row groups outside it are not read.

        Args:
            start: index of the first.
            stop: index behind the last; None for all.
        """
        stop = self.images if stop is None else stop
        for path, n, end in zip(self.files, self.rows, accumulate(self.rows)):
            first = end - n
            if first < stop and end > start:
                yield from self._file_items(path, first, start, stop)

    def _file_items(self, path: Path, first: int, start: int, stop: int) -> Iterator[ImageItem]:
        """Of one file, whose first row is image `first`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [c for c in (self.column, self.name_column, self.label_column) if c]
        try:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                for group in range(file.num_row_groups):
                    end = first + file.metadata.row_group(group).num_rows
                    if first < stop and end > start:
                        yield from self._batch_items(
                            file.iter_batches(AT_ONCE, row_groups=[group], columns=columns), path, first, (start, stop)
                        )
                    first = end
        except (pa.ArrowException, OSError) as e:
            raise UsageError(f"images: {path} cannot be read as parquet: {' '.join(str(e).split())[:200]}") from None

    def _batch_items(self, batches, path: Path, first: int, part: tuple[int, int]) -> Iterator[ImageItem]:
        """Of the batches of a row group, whose first row is image `first`; part: (start, stop) of the slice."""
        before = sum(n for f, n in zip(self.files, self.rows) if f < path)
        for batch in batches:
            low, high = max(part[0] - first, 0), min(part[1] - first, len(batch))
            for i, row in enumerate(batch.slice(low, high - low).to_pylist() if low < high else (), first + low):
                yield self._item(row, i, f"{path.name}#{i - before}")
            first += len(batch)

    def _item(self, row: dict, index: int, name: str) -> ImageItem:
        value = row[self.column]
        if isinstance(value, dict):
            name, value = value.get("path") or name, value.get("bytes")
        if self.name_column:
            name = str(row[self.name_column] or name)
        return ImageItem(index, name, value, row[self.label_column] if self.label_column else None)


ImageData = PathListing | ParquetImages


def open_data(path: str | Path, listing: str | Path) -> ImageData:
    """A set of images, looked through once: how many there are, and which.

    Args:
        path: a folder (with folders in it; hidden ones are left out), a parquet file or a folder of parquet files, or
            a text file with a path on each line, from the text file's folder on, perhaps with a tab and a class.
        listing: a file that is written with the paths of a folder or list; it is needed as long as the data is read.
    Raises:
        UsageError: there is no such thing, or no image in it.
        MissingPackageError: parquet without pyarrow.
    """
    if not str(path).strip():
        raise UsageError(f"images: an empty name was given: {WANTED} (. for this folder)")
    path, listing = Path(path), Path(listing)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".parquet" and p.is_file())
        return _parquet(path, files) if files else _listed("folder", path, path, _walk(path), listing)
    if not path.is_file():
        raise UsageError(f"images: {path}: no such file or folder: {WANTED}")
    if path.suffix.lower() in SUFFIXES:
        raise UsageError(f"images: {path} is a single photo: {WANTED}; `tokexport run` takes photos")
    with open(path, "rb") as file:
        beginning = file.read(4096)
    if beginning[:4] == MAGIC or path.suffix.lower() == ".parquet":
        return _parquet(path, [path])
    if b"\0" in beginning:
        raise UsageError(f"images: {path} is neither text nor parquet: {WANTED}")
    return _listed("list", path, path.parent, _lines(path), listing)


def _walk(folder: Path) -> Iterator[bytes]:
    """Paths of images below a folder, in order of name, a folder's own before those of the folders in it."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                relative = os.path.relpath(os.path.join(place, name), folder)
                if "\n" in relative or "\t" in relative:
                    raise UsageError(f"images: {relative!r} has a line break or a tab in its name: rename it")
                yield os.fsencode(relative)


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as lines:
        for line in lines:
            if line.strip():
                yield line.strip(b"\r\n")


def _listed(kind: str, path: Path, root: Path, lines: Iterator[bytes], listing: Path) -> PathListing:
    """Write the listing. Raises: UsageError when there is nothing to list."""
    digest, offsets, n, place = hashlib.sha256(), [], 0, 0
    with open(listing, "wb") as out:
        for line in lines:
            if n % STRIDE == 0:
                offsets.append(place)
            digest.update(line + b"\n")
            place += out.write(line + b"\n")
            n += 1
    if not n:
        what = "has no image in it or in its folders" if kind == "folder" else "is empty"
        raise UsageError(f"images: {path} {what} ({', '.join(SUFFIXES)}): {WANTED}")
    sha = digest.hexdigest()
    return PathListing(kind, str(path), listing, root.resolve(), images=n, digest=sha, offsets=tuple(offsets))


def _parquet(path: Path, files: list[Path]) -> ParquetImages:
    """Parquet files by their metadata. Raises: UsageError for one that is none, or has no column of images."""
    pq = need_pyarrow("reading parquet").parquet
    rows, schemas, digest = [], [], hashlib.sha256()
    for file in files:
        try:
            metadata = pq.read_metadata(file)
            schema = metadata.schema.to_arrow_schema()
        except Exception as e:  # of many kinds, for a damaged file
            words = " ".join(str(e).split())[:200]
            raise UsageError(f"images: {file} cannot be read as parquet: {words}") from None
        rows.append(metadata.num_rows)
        schemas.append(schema)
        digest.update(f"{file.name}\n{file.stat().st_size}\n{metadata.num_rows}\n".encode())
    if not sum(rows):
        raise UsageError(f"images: {path} has no rows: {WANTED}")
    column = _image_column(schemas[0], files[0])
    lacking = [
        f for f, s in zip(files, schemas) if column not in s.names or s.field(column) != schemas[0].field(column)
    ]
    if lacking:
        raise UsageError(f"images: {lacking[0]} has no column {column!r} like that of {files[0].name}")
    pick = lambda names: next((c for c in names if all(c in s.names for s in schemas)), None)
    names = pick([c for c in NAME_COLUMNS if c in schemas[0].names and str(schemas[0].field(c).type) in TEXT])
    return ParquetImages(
        str(path), tuple(files), tuple(rows), column, names, label_column=pick(LABEL_COLUMNS), digest=digest.hexdigest()
    )


TEXT = ("string", "large_string", "string_view")


def _image_column(schema, path: Path) -> str:
    """The column that holds encoded images. Raises: UsageError when none or several could be it."""
    import pyarrow as pa

    def encoded(kind) -> bool:
        if pa.types.is_struct(kind):
            fields = [kind.field(i) for i in range(kind.num_fields)]
            return any(f.name == "bytes" and encoded(f.type) for f in fields)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    names = [field.name for field in schema if encoded(field.type)]
    best = next((name for name in IMAGE_COLUMNS if name in names), names[0] if len(names) == 1 else None)
    if best is None:
        columns = ", ".join(f"{f.name} ({f.type})" for f in schema)[:300]
        raise UsageError(
            f"images: {path} has {'several columns' if names else 'no column'} of encoded images (bytes, or a struct "
            f"with bytes): it has {columns}; name the one with the images `image`"
        )
    return best


def need_pyarrow(purpose: str):
    """The package pyarrow. Raises: MissingPackageError, for a purpose in words."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise MissingPackageError("pyarrow", "data", purpose) from None
    return pyarrow
