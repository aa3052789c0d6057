"""What torch.save wrote, in its three forms (zip, the stream before torch 1.6, the tar before 0.1.10), read by bytes
alone."""

from __future__ import annotations

import io
import math
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .stand_ins import LARGEST_PICKLE, Dtype, Inert, Storage, Tensor, storage_of, unpickle

MAGIC = 0x1950A86A20F9469CFC6C
LARGEST_EXPANDED = 2**28  # bytes of a tensor with strides of 0, which stores less than it holds


# What a damaged or encrypted zip raises, wherever the damage is; a seek to a place that cannot be is an OSError.
ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError)


class DamagedError(Exception):
    """A file that is not what it says; the text completes "cannot be read: ..."."""


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a file that is read when it is asked for.

    shape: of it. load: reads it; raises DamagedError when the bytes are not there.
    """

    shape: tuple[int, ...]
    load: Callable


@dataclass(frozen=True)
class Span:
    """Where a storage's bytes are in the file. big: most significant byte first."""

    start: int
    size: int
    big: bool = False


def read_zip(path: Path):
    """The data of a zip that torch.save wrote. Raises: DamagedError."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {m.filename: m for m in archive.infolist()}
            pickles = [name for name in members if name.split("/")[-1] == "data.pkl"]
            if not pickles:
                raise DamagedError("a zip without data.pkl, so torch.save did not write it")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}constants.pkl" in members:
                raise DamagedError("a TorchScript archive, which holds code: save its state_dict() with torch.save")
            if members[pickles[0]].file_size > LARGEST_PICKLE:
                raise DamagedError("its pickle is larger than any checkpoint's")
            content = archive.read(pickles[0])
            big = f"{root}byteorder" in members and archive.read(f"{root}byteorder").strip() == b"big"
    except ZIP_DAMAGE as e:
        raise DamagedError(f"a damaged zip ({e})") from None
    data = unpickle(io.BytesIO(content), storage_of)

    def span(key: str) -> Span:
        member = members.get(f"{root}data/{key}")
        if member is None or member.compress_type != zipfile.ZIP_STORED:
            raise DamagedError(f"storage {key[:40]} is {'not there' if member is None else 'compressed'}")
        with path.open("rb") as file:
            file.seek(member.header_offset)
            header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise DamagedError(f"storage {key[:40]} has no header")
        return Span(member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30])), member.file_size, big)

    return bound(data, path, span)


def read_stream(path: Path):
    """The data of a file of torch before 1.6: five pickles, then the storages. Raises: DamagedError."""
    with path.open("rb") as file:
        if unpickle(file) != MAGIC:
            raise DamagedError(
                "a pickle that torch.save did not write: save the tensors with torch.save or safetensors"
            )
        if unpickle(file) != 1001:
            raise DamagedError("another version of torch.save's old form")
        unpickle(file)  # of the machine it was written on
        widths: dict[str, str] = {}

        def storage(pid):
            value = storage_of(pid)
            if isinstance(value, Storage):
                widths[value.key] = value.dtype
            return value

        data, keys, spans = unpickle(file, storage), unpickle(file), {}
        if not isinstance(keys, list):
            raise DamagedError("it has no list of storages")
        for key in map(str, keys):
            head = file.read(8)
            if len(head) < 8 or key not in widths:
                raise DamagedError("a storage is missing: it is cut short")
            size = struct.unpack("<q", head)[0] * _width(widths[key])
            spans[key] = Span(file.tell(), size)
            if size < 0 or file.tell() + size > path.stat().st_size:
                raise DamagedError("a storage is missing: it is cut short")
            file.seek(size, 1)
    return bound(data, path, lambda key: spans.get(key))


def read_tar(path: Path):
    """The data of a tar that torch.save wrote before 0.1.10. Raises: DamagedError."""
    try:
        with tarfile.open(path, "r:") as archive:
            members = {m.name: (m.offset_data, m.size) for m in archive.getmembers() if m.isfile()}
    except (tarfile.TarError, OSError, ValueError) as e:
        raise DamagedError(f"a damaged tar ({e})") from None
    if not {"storages", "tensors", "pickle"} <= set(members):
        raise DamagedError("a tar archive of other files: unpack it and give the checkpoint inside")
    with path.open("rb") as file:
        spans, dtypes = _tar_storages(file, *members["storages"])
        tensors = _tar_tensors(file, members["tensors"][0], dtypes)
        file.seek(members["pickle"][0])
        data = unpickle(file, lambda pid: pid[0] if isinstance(pid, tuple) else tensors.get(str(pid), Inert()))
    return bound(data, path, lambda key: spans.get(key))


def _tar_storages(file, start: int, length: int) -> tuple[dict[str, Span], dict[str, str]]:
    file.seek(start)
    spans, dtypes = {}, {}
    for _ in range(_count(unpickle(file))):
        key, _, kind = unpickle(file)
        head = file.read(8)
        if not isinstance(kind, Dtype) or len(head) < 8:
            raise DamagedError("a storage of an unknown kind")
        size = struct.unpack("<q", head)[0] * _width(kind.name)
        if size < 0 or file.tell() + size > start + length:
            raise DamagedError("a storage is missing: it is cut short")
        spans[str(key)], dtypes[str(key)] = Span(file.tell(), size), kind.name
        file.seek(size, 1)
    for target, source, offset, n in unpickle(file):
        width = _width(dtypes[str(source)])
        spans[str(target)] = Span(spans[str(source)].start + offset * width, n * width)
        dtypes[str(target)] = dtypes[str(source)]
    return spans, dtypes


def _tar_tensors(file, start: int, dtypes: dict[str, str]) -> dict:
    file.seek(start)
    tensors = {}
    for _ in range(_count(unpickle(file))):
        key, storage, _ = unpickle(file)
        (n_dims,) = struct.unpack("<i4x", file.read(8))
        if not 0 <= n_dims <= 64 or str(storage) not in dtypes:
            raise DamagedError("a tensor of an unknown kind")
        numbers = struct.unpack(f"<{2 * n_dims + 1}q", file.read(8 * (2 * n_dims + 1)))
        dtype = dtypes[str(storage)]
        tensors[str(key)] = Tensor(
            Storage(str(storage), dtype, 0), dtype, numbers[-1], numbers[:n_dims], numbers[n_dims : 2 * n_dims]
        )
    return tensors


def _count(value) -> int:
    if type(value) is not int or not 0 <= value <= 10**6:
        raise DamagedError("a list of unknown length")
    return value


def _width(dtype: str) -> int:
    import torch

    return getattr(torch, dtype).itemsize


def bound(data, path: Path, span: Callable[[str], Span | None]):
    """The data with every tensor's description replaced by a StoredTensor, in place of dictionaries and lists that
    hold it.

    Args:
        data: out of `unpickle`.
        path: the file.
        span: where a storage of this key is.
    """
    ready: dict[int, object] = {}
    kept = []  # ids are of objects that live

    def convert(value, depth):
        if isinstance(value, Tensor):
            return StoredTensor(value.size, partial(_load, path, value, span))
        if depth > 50 or not isinstance(value, (dict, list, tuple, Inert)):
            return value
        if id(value) in ready:
            return ready[id(value)]
        kept.append(value)
        if isinstance(value, Inert):
            ready[id(value)] = value
            items = {k: convert(v, depth + 1) for k, v in value.entries.items()}
            value.entries = items
            value.state = convert(value.state, depth + 1)
            return value
        if isinstance(value, dict):
            ready[id(value)] = out = {}
            out.update((k, convert(v, depth + 1)) for k, v in value.items())
            return out
        ready[id(value)] = out = []
        out += [convert(v, depth + 1) for v in value]
        return out

    return convert(data, 0)


def _load(path: Path, tensor: Tensor, span: Callable[[str], Span | None]):
    """The torch tensor of a description. Raises: DamagedError when its storage is not there, or too small."""
    import torch

    place, dtype = span(tensor.storage.key), getattr(torch, tensor.dtype)
    if place is None:
        raise DamagedError(f"storage {tensor.storage.key[:40]} is not there")
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.size, tensor.stride)) if all(tensor.size) else -1
    start = tensor.storage.start * _width(tensor.storage.dtype)
    need = (last + 1) * dtype.itemsize
    if min(tensor.offset, *tensor.size, *tensor.stride, 0) < 0 or start + need > place.size:
        raise DamagedError(f"storage {tensor.storage.key[:40]} is smaller than a tensor of shape {tensor.size}")
    if math.prod(tensor.size) * dtype.itemsize > max(need, LARGEST_EXPANDED):
        raise DamagedError(f"a tensor of shape {tensor.size} repeats its few stored values")
    values = torch.empty(need, dtype=torch.uint8)
    if need:
        with path.open("rb") as file:
            file.seek(place.start + start)
            if file.readinto(values.numpy()) != need:
                raise DamagedError("it is cut short")
    if place.big:
        values = values.view(-1, dtype.itemsize).flip(1).reshape(-1).contiguous()
    return values.view(dtype).as_strided(tensor.size, tensor.stride, tensor.offset).contiguous()
