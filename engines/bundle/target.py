"""A file by itself, or the one in a bundle: what commands that take FILE|BUNDLE run."""

from __future__ import annotations

from pathlib import Path

from ...export.errors import UsageError
from .folder import checked_manifest


def file_of(path: str | Path, *, allow_host_code: bool = False) -> Path:
    """The ONNX file or engine to run.

    Args:
        path: that file, or a bundle, whose files are compared with their hashes.
        allow_host_code: take an engine that carries native code of a plugin.
    Raises:
        UsageError: no bundle, one that is damaged, or one with native code that was not allowed.
    """
    if not str(path).strip():
        raise UsageError("an empty file name was given: wanted an ONNX file, an engine or a bundle")
    path = Path(path)
    if not path.is_dir():
        return path
    return path / checked_manifest(path, allow_host_code=allow_host_code).file.name
