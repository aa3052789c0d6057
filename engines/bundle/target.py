"""A file by itself, or the one in a bundle: what commands that take FILE|BUNDLE run."""

from __future__ import annotations

from pathlib import Path

from ...export.errors import UsageError
from .folder import check_files
from .manifest import read_manifest


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
    manifest = read_manifest(path)
    check_files(path, manifest)
    if manifest.builder is not None and manifest.builder.host_code and not allow_host_code:
        raise UsageError(
            f"{path}: the engine carries native code of a plugin, which would run here: if you trust who made it, "
            f"allow it (allow_host_code)"
        )
    return path / manifest.file.name
