"""Files of weights, told by their bytes and read without running code: what they hold, tensors not yet read."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import UsageError
from . import torch_file
from .torch_file import ZIP_DAMAGE, DamagedError, StoredTensor

# The first bytes of files that are given for weights and are none; what to do.
FOREIGN = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights: get them with `git lfs pull`"),
    (b"\x1f\x8b", "is gzipped: unpack it"),
    (b"BZh", "is bzip2-packed: unpack it"),
    (b"7z\xbc\xaf", "is 7z-packed: unpack it"),
    (b"\x89HDF", "is an HDF5 file (Keras): wanted PyTorch or safetensors weights"),
    (b"GGUF", "is a GGUF file: wanted PyTorch or safetensors weights"),
    (b"<", "is a web page, not weights: the download failed"),
    (b"\x93NUMPY", "is one numpy array: wanted the whole .npz, or a state dict"),
)
KINDS = "wanted safetensors (an index of shards too), a file that torch.save wrote, or big_vision's .npz"
LARGEST_INDEX = 64 * 2**20


@dataclass(frozen=True)
class WeightFile:
    """What a file of weights holds.

    path: of it. kind: "safetensors", "torch" or "npz". data: nested dictionaries and lists, tensors as StoredTensor.
    """

    path: Path
    kind: str
    data: object


def read_file(path: str | Path, what: str = "checkpoint") -> WeightFile:
    """What a file holds; its name plays no part.

    Args:
        path: of a file.
        what: the argument's name, for errors.
    Raises:
        UsageError: there is no such file, it is damaged or no file of weights.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UsageError(
            f"{what} {_short(path)}: {'is a directory, wanted a file' if os.path.isdir(path) else 'no such file'}"
        )
    try:
        return _read(path, what)
    except UsageError:
        raise
    except (DamagedError, pickle.UnpicklingError) as e:
        raise UsageError(f"{what} {path}: cannot be read: {e}") from None
    except OSError as e:
        raise UsageError(f"{what} {path}: cannot be read ({e.strerror or type(e).__name__})") from None
    except (struct.error, KeyError, TypeError, ValueError, OverflowError, MemoryError, AttributeError):
        raise UsageError(f"{what} {path}: cannot be read: damaged or cut; copy or download it again") from None


def _short(path: Path) -> str:
    return str(path) if len(str(path)) < 300 else f"{str(path)[:100]}..."


def _read(path: Path, what: str) -> WeightFile:
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise DamagedError("it is empty")
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= path.stat().st_size - 8:
        return WeightFile(path, "safetensors", read_safetensors(path))
    for start, words in FOREIGN:
        if head.startswith(start):
            raise UsageError(f"{what} {path}: {words}")
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path)
    if head.startswith(b"\x80"):
        return WeightFile(path, "torch", torch_file.read_stream(path))
    if head[257:262] == b"ustar" or head[:9].rstrip(b"\0") in (b"storages", b"tensors", b"pickle", b"sys_info"):
        return WeightFile(path, "torch", torch_file.read_tar(path))
    if len(head) > 8 and head[8:9] == b"{":
        return WeightFile(path, "safetensors", read_safetensors(path))
    if head.lstrip()[:1] == b"{":
        return WeightFile(path, "safetensors", read_index(path))
    raise DamagedError(f"its first bytes are of no known kind; {KINDS}")


def _read_zip(path: Path) -> WeightFile:
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = [n for n in archive.namelist() if n.endswith(".npy")]
    except ZIP_DAMAGE as e:
        raise DamagedError(f"a damaged zip ({e})") from None
    if arrays:
        return WeightFile(path, "npz", read_npz(path))
    return WeightFile(path, "torch", torch_file.read_zip(path))


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a safetensors file by name. Raises: DamagedError."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt")
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (a file, no dictionary)
    except (SafetensorError, OSError, ValueError, OverflowError) as e:
        raise DamagedError(f"no safetensors ({_line(e)})") from None

    def load(key):
        try:
            return file.get_tensor(key)
        except Exception as e:  # safetensors' own error for a type that torch lacks
            raise DamagedError(f"tensor {key[:60]} ({_line(e)})") from None

    return {key: StoredTensor(shape, partial(load, key)) for key, shape in shapes.items()}


def _line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:160]


def read_index(path: Path) -> dict[str, StoredTensor]:
    """Tensors by name of all shards that an index names; the shards lie beside it. Raises: DamagedError."""
    if path.stat().st_size > LARGEST_INDEX:
        raise DamagedError("JSON larger than any index of shards")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise DamagedError(f"it starts like JSON and is none; {KINDS}") from None
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
        raise DamagedError(f"JSON without a weight_map, so no index of shards; {KINDS}")
    shards = {}
    for name in sorted(set(files.values())):
        plain = name not in ("", ".", "..") and not set(name) & set("/\\:\0")
        if not plain:
            raise DamagedError(f"shard {name[:80]!r}: wanted the name of a file beside the index")
        if not (path.parent / name).is_file():
            raise DamagedError(f"shard {name} is not beside the index")
        shard = read_file(path.parent / name, "shard").data
        shards[name] = next(iter(_dictionaries(shard)), {})
    lost = [key for key, name in files.items() if not isinstance(shards[name].get(key), StoredTensor)]
    if lost:
        raise DamagedError(f"{lost[0][:80]} is not in {files[lost[0]]}, where the index has it ({len(lost)} such)")
    return {key: shards[name][key] for key, name in files.items()}


def _dictionaries(value):
    if isinstance(value, dict):
        yield value


def read_npz(path: Path) -> dict[str, StoredTensor]:
    """Arrays of an .npz by name, without pickled ones. Raises: DamagedError."""
    import numpy as np

    def load(member):
        import torch

        try:
            with np.load(path, allow_pickle=False) as arrays:
                return torch.from_numpy(np.ascontiguousarray(arrays[member]))
        except (*ZIP_DAMAGE, TypeError, KeyError) as e:
            raise DamagedError(f"array {member[:60]} ({_line(e)})") from None

    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    continue
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
                    shape, _, dtype = header(file)
                    if dtype.hasobject:
                        raise DamagedError(f"array {name[:60]} holds Python objects")
                    if int(np.prod(shape, dtype=object)) * dtype.itemsize > member.file_size:
                        raise DamagedError(f"array {name[:60]} is cut short")
                arrays[name] = StoredTensor(tuple(shape), partial(load, name))
    except (*ZIP_DAMAGE, AttributeError) as e:
        raise DamagedError(f"a damaged npz ({_line(e)})") from None
    return arrays
