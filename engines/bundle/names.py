"""Names in a bundle: plain ones, of regular files right inside the folder; nothing else is ever opened."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ...export.errors import UsageError

NAME = "tokexport.json"  # of the manifest


def refuse_path(name: str, manifest: Path) -> None:
    """Raises: UsageError unless a name is that of a file right inside the folder. manifest: for the message."""
    plain = (
        name and name not in (".", "..") and not set(name) & set("/\\:\0") and name.isprintable() and len(name) <= 200
    )
    if not plain:
        raise UsageError(
            f"{manifest} names a file {name[:80]!r}: wanted a plain name, without folders: do not trust this bundle"
        )


def plain_file(folder: Path, name: str, kind: str = "bundle") -> Path:
    """A file right inside a folder.

    Args:
        folder: of the bundle.
        name: a plain name.
        kind: what the folder is, the name of the command that makes it.
    Raises:
        UsageError: it is not there, or a link, a folder or a device.
    """
    if os.path.isfile(folder):
        raise UsageError(f"{folder} is a file: wanted a {kind}, which `tokexport {kind}` makes of it")
    if not os.path.isdir(folder):
        raise UsageError(f"{folder}: no such folder: wanted a {kind}, which `tokexport {kind}` makes")
    path = folder / name
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        is_none = f"wanted a {kind}, which `tokexport {kind}` makes"
        advice = is_none if name in (NAME, f"{kind}.json") else f"the {kind} is not complete, copy it again"
        raise UsageError(f"{folder} has no {name}: {advice}") from None
    if not stat.S_ISREG(mode):
        raise UsageError(
            f"{path} is {'a link' if stat.S_ISLNK(mode) else 'no regular file'}: a {kind} holds plain files only"
        )
    return path
