"""Files are written aside and renamed; nothing is replaced unasked. Imports no torch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import UsageError

TWO_GB = 2**31 - 2**24  # protobuf's limit, less room for the graph


def check_output(path: str | Path, force: bool) -> Path:
    """The path, when a file can be written there. Raises: UsageError when it exists (without force) or its folder cannot be written."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"output {path} is a directory: wanted a file name, e.g. {path / 'vit.onnx'}")
    if path.exists() and not force:
        raise UsageError(f"output {path} exists: give --force to replace it, or another name with -o")
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"output {path}: there is no directory {folder}")
    try:  # asking the file system is the only sure way
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UsageError(f"output {path}: directory {folder} cannot be written ({e.strerror})") from None
    return path


def write_model(proto, path: Path) -> int:
    """Write an onnx.ModelProto aside and rename it; weights over 2 GB go to PATH.data. Returns the bytes on disk."""
    import onnx

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new, data = Path(folder) / path.name, Path(folder) / f"{path.name}.data"
        try:
            if proto.ByteSize() < TWO_GB:
                onnx.save_model(proto, new)
            else:
                onnx.save_model(proto, new, save_as_external_data=True, all_tensors_to_one_file=True, location=data.name, size_threshold=1024)
        except OSError as e:
            raise UsageError(f"output {path}: could not be written ({e.strerror or e}); nothing was left behind") from None
        size = sum(f.stat().st_size for f in (new, data) if f.exists())
        old_data = path.with_name(data.name)
        if data.exists():
            os.replace(data, old_data)
        os.replace(new, path)
    return size
