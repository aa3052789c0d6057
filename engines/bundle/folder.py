"""The folder of a bundle: its files are those of the manifest; written aside and renamed as a whole. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...export.errors import StorageError, UsageError
from .manifest import FileEntry, Manifest
from .names import NAME, plain_file


def check_files(folder: Path, manifest: Manifest) -> None:
    """Make sure that the files are those the manifest speaks of.

    Args:
        folder: of the bundle.
        manifest: of it.
    Raises:
        UsageError: one is missing, no plain file, or has other bytes.
    """
    for entry in manifest.files:
        path = plain_file(folder, entry.name)
        size = path.stat().st_size
        if size != entry.size:
            raise UsageError(
                f"{path} has {size} bytes, wanted {entry.size}: it was truncated or replaced, copy the bundle again"
            )
        if sha256_of(path) != entry.sha256:
            raise UsageError(
                f"{path} is not the file that {NAME} speaks of (SHA-256 differs): it was changed or replaced"
            )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry_of(path: Path) -> FileEntry:
    """What a manifest says of a file."""
    return FileEntry(path.name, sha256_of(path), path.stat().st_size)


def check_place(folder: str | Path, *, force: bool) -> Path:
    """The folder, when a bundle can be written there.

    Args:
        folder: where the bundle is to be.
        force: whether a bundle that is there may be replaced; anything else never is.
    Raises:
        UsageError: something is there, or the folder around it is not there or cannot be written.
    """
    folder = Path(folder)
    if not str(folder).strip() or folder.name in ("", "..") or "\0" in str(folder):
        raise UsageError(f"output {str(folder)!r}: wanted the name of a folder")
    if len(os.fsencode(folder.name)) > 255:
        raise UsageError(f"output {str(folder)[:80]}...: wanted a shorter name")
    if os.path.lexists(folder):
        a_bundle = folder.is_dir() and not folder.is_symlink() and (folder / NAME).is_file()
        if not (force and a_bundle):
            what = (
                "exists: give force to replace it, or another name"
                if a_bundle
                else "exists and is no bundle: wanted another name"
            )
            raise UsageError(f"output {folder} {what}")
    if not os.path.isdir(folder.parent) or not os.access(folder.parent, os.W_OK):
        raise UsageError(f"output {folder}: there is no folder {folder.parent}, or nothing can be written in it")
    return folder


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A new folder to write to, beside `folder`, whose place it takes when the block ends without an error.

    Args:
        folder: where it is to be; an older bundle there is replaced.
    Raises:
        StorageError: the disk is full or failed; what was there still is, and nothing is left behind.
    """
    aside = Path(tempfile.mkdtemp(prefix=".tokexport-", dir=folder.parent))
    try:
        new, old = aside / "new", aside / "old"
        new.mkdir()
        yield new
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    except OSError as e:
        raise StorageError(
            f"output {folder}: could not be written ({e.strerror or e}); nothing was left behind"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
