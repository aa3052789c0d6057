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
from .manifest import FileEntry, Manifest, read_manifest
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


def checked_manifest(folder: Path, *, allow_host_code: bool) -> Manifest:
    """The manifest of a bundle that may be run here.

    Args:
        folder: of the bundle.
        allow_host_code: take an engine that carries native code of a plugin.
    Raises:
        UsageError: no bundle, one whose files are others than it says, or one with native code that was not allowed.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    if manifest.builder is not None and manifest.builder.host_code and not allow_host_code:
        raise UsageError(
            f"{folder}: the engine carries native code of a plugin, which would run here: if you trust who made it, "
            f"allow it (allow_host_code)"
        )
    return manifest


def named_folder(folder: str | Path) -> Path:
    """A path that can be the name of a new folder. Raises: UsageError."""
    folder = Path(folder)
    if not str(folder).strip() or folder.name in ("", "..") or "\0" in str(folder):
        raise UsageError(f"output {str(folder)!r}: wanted the name of a folder")
    if len(os.fsencode(folder.name)) > 255:
        raise UsageError(f"output {str(folder)[:80]}...: wanted a shorter name")
    return folder


def check_place(folder: str | Path, *, force: bool, manifest: str = NAME, kind: str = "bundle") -> Path:
    """The folder, when one can be written there.

    Args:
        folder: where the bundle, or what else has a manifest, is to be.
        force: whether one of its kind that is there may be replaced; anything else never is.
        manifest: the file by which a folder of this kind is known.
        kind: what it is called.
    Raises:
        UsageError: something is there, or the folder around it is not there or cannot be written.
    """
    folder = named_folder(folder)
    if os.path.lexists(folder):
        if not (folder.is_dir() and not folder.is_symlink() and (folder / manifest).is_file()):
            raise UsageError(f"output {folder} exists and is no {kind}: wanted another name")
        if not force:
            raise UsageError(f"output {folder} exists: give force to replace it, or another name")
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
