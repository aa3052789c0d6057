"""Files are written aside and renamed, nothing is replaced unasked; weights beside a file. Imports no torch.

What is not ready lies in a folder `.tokexport-...` beside the output. It goes when the work ends, whether well or with
an error or a SIGTERM; what a killed process (SIGKILL, power) leaves is removed by the next one that writes there, a day
later.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StorageError, UsageError

TWO_GB = 2**31 - 2**24  # protobuf's limit, less room for the graph
LARGE = 4096  # bytes; weights above are kept out of the graph until they are written
WEIGHTS = ".data"  # behind a file's name: its weights, when they are a file of their own
ASIDE = ".tokexport-"  # how the names of folders with unfinished files begin
STALE = 24 * 3600  # seconds after which such a folder is nobody's any more
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}


def check_output(
    path: str | Path, force: bool, inputs: Iterable[str | Path | None] = (), *, beside: tuple[str, ...] = (WEIGHTS,)
) -> Path:
    """The path, when a file can be written there.

    Args:
        path: of the file.
        force: whether what is there may be replaced.
        inputs: what the command reads, which `force` does not replace either.
        beside: endings of the files that may be written with it, PATH + ending; they are looked at in the same way.
    Returns:
        The path.
    Raises:
        UsageError: one of the files exists (without force), is an input or no regular file, or the folder cannot be
        written.
    """
    if not str(path).strip() or "\0" in str(path):
        raise UsageError(f"output {str(path)!r}: wanted a file name, e.g. vit.onnx")
    path, inputs = Path(path), list(inputs)
    for output in (path, *(path.with_name(path.name + ending) for ending in beside if path.name)):
        _check_place(output, force, inputs)
    folder = path.parent
    if not os.path.isdir(folder):
        raise UsageError(f"output {path}: there is no directory {folder}")
    try:  # asking the file system is the only sure way
        with tempfile.TemporaryDirectory(prefix=ASIDE, dir=folder) as trial:
            (Path(trial) / f"{path.name}{WEIGHTS}").touch()
    except OSError as e:
        if is_disk_error(e):
            raise StorageError(f"output {path}: cannot be written in {folder} ({e.strerror})") from None
        raise UsageError(f"output {path}: cannot be written in {folder} ({e.strerror})") from None
    return path


def _check_place(path: Path, force: bool, inputs: list) -> None:
    """Raises: UsageError unless a file may be put at this very path."""
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise UsageError(f"output {path} is a directory: wanted a file name")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"output {path} is no regular file (a device, a pipe): wanted a file name")
    for source in inputs:
        if source and os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise UsageError(f"output {path} is one of the files that are read: wanted another name")
    if os.path.lexists(path) and not force:
        raise UsageError(f"output {path} exists: give --force to replace it, or another name with -o")


def is_disk_error(error: OSError) -> bool:
    """Whether an error is the disk's (full, failing, read-only), not the fault of who named the file."""
    return error.errno in DISK_ERRORS


@contextmanager
def aside(path: Path, *, beside: tuple[str, ...] = ()) -> Iterator[Path]:
    """A path to write to, aside; when the block ends without an error, the file takes its place at `path`.

    Further files may be put into that folder; they go with it.

    Args:
        path: where the file is to be; what is there is replaced (see `check_output`).
        beside: endings of files that are moved too, PATH + ending, those that were written. With them the old file at
            `path` goes
            first: a process that is killed in between leaves no pair of which one is old.
    Raises:
        StorageError: the disk is full or failed; nothing is left behind and what was there still is.
    """
    with aside_folder(path.parent, f"output {path}") as folder:
        new = folder / path.name
        yield new
        parts = [(new.with_name(new.name + e), path.with_name(path.name + e)) for e in beside]
        parts = [(source, place) for source, place in parts if source.exists()]
        if parts and path.exists():
            path.unlink()
        for source, place in [*parts, (new, path)]:
            os.replace(source, place)


@contextmanager
def aside_folder(parent: Path, purpose: str) -> Iterator[Path]:
    """A folder for unfinished files, on the disk where they will be; it is removed in any case.

    Args:
        parent: the folder it lies in.
        purpose: what is being written, for messages.
    Raises:
        StorageError: writing in the block failed because of the disk.
    """
    _remove_stale(parent)
    try:
        with tempfile.TemporaryDirectory(prefix=ASIDE, dir=parent, ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except OSError as e:
        if is_disk_error(e):
            raise StorageError(f"{purpose}: could not be written ({e.strerror}); nothing was left behind") from None
        raise


def _remove_stale(parent: Path) -> None:
    """Remove this user's folders of unfinished files that have not been touched for a day."""
    for folder in parent.glob(f"{ASIDE}*"):
        try:
            state = folder.lstat()
            stale = folder.is_dir() and not folder.is_symlink() and time.time() - state.st_mtime > STALE
            if stale and (not hasattr(os, "getuid") or state.st_uid == os.getuid()):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # somebody else removed it
            continue


def weight_files(proto, path: Path) -> list[Path]:
    """The files beside an ONNX file that hold weights of it, each once.

    Args:
        proto: its onnx.ModelProto, weights not loaded.
        path: of the ONNX file.
    Raises:
        UsageError: one is missing, too short, or no plain file of the same folder (a link, or a name that leads out of
        it).
    """
    extents: dict[str, int] = {}
    for tensor in _tensors([proto.graph, *proto.functions]):
        entries = {e.key: e.value for e in tensor.external_data}
        if "location" in entries:
            numbers = [entries.get(k, "0") for k in ("offset", "length")]
            if not all(n.isascii() and n.isdigit() and len(n) < 20 for n in numbers):
                raise UsageError(
                    f"{path}: weight {tensor.name[:80]} lies at {', '.join(numbers)[:80]}: the file is damaged"
                )
            end = sum(map(int, numbers))
            extents[entries["location"]] = max(end, extents.get(entries["location"], 0))
    for name, end in extents.items():
        file = path.parent / name
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or file.is_symlink():
            raise UsageError(f"{path} names {name[:80]!r} for its weights: wanted a plain file in the same folder")
        if not file.is_file():
            raise UsageError(f"{path} has its weights in {name}, which is not beside it: put it there")
        if file.stat().st_size < end:
            raise UsageError(
                f"{path} has its weights in {name}, which has {file.stat().st_size} bytes instead of {end}: "
                f"it was cut, or is another file's"
            )
    return [path.parent / name for name in extents]


def _tensors(graphs: Iterable) -> Iterator:
    """All tensors that a graph or a function holds, those of its nodes and of graphs inside it too."""
    for graph in graphs:
        yield from getattr(graph, "initializer", ())
        for attribute in (a for node in graph.node for a in node.attribute):
            yield from ([attribute.t] if attribute.HasField("t") else attribute.tensors)
            yield from _tensors([attribute.g] if attribute.HasField("g") else attribute.graphs)


def sha256_of(*paths: Path) -> str:
    """The SHA-256 of the bytes of files, one after the other, in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_model(path: Path) -> tuple:
    """An ONNX file as `write_model` takes it: the graph, and its large weights as {name: onnx_ir tensor}.

    Raises: UsageError when its weights are not where it says.
    """
    import onnx
    from onnx_ir.serde import deserialize_tensor

    proto = onnx.load(path, load_external_data=False)
    weight_files(proto, path)
    large = [i for i in proto.graph.initializer if i.external_data or len(i.raw_data) > LARGE]
    weights = {i.name: deserialize_tensor(i, str(path.parent.resolve())) for i in large}
    small = [i for i in proto.graph.initializer if i.name not in weights]
    kept = [onnx.TensorProto.FromString(i.SerializeToString()) for i in small]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto, weights


def write_model(proto, weights: dict, path: Path) -> int:
    """Write an ONNX file aside and rename it; returns the bytes on disk.

    Args:
        proto: onnx.ModelProto without its large weights; it is not changed.
        weights: those, {name: onnx_ir tensor}; each is in memory as bytes only while it is written. From 2 GB on they
            go to PATH.data, where the graph refers to them.
        path: of the file. What is there is replaced, and a PATH.data that belongs to it goes with it.
    Returns:
        Bytes of the file and of its weights.
    Raises:
        StorageError: the disk is full or failed; nothing is left behind.
    """
    old_weights = _own_weights(path)
    with aside(path, beside=(WEIGHTS,)) as new:
        data = new.with_name(new.name + WEIGHTS)
        if sum(t.nbytes for t in weights.values()) + proto.ByteSize() < TWO_GB:
            _write_single(proto, weights, new)
        else:
            _write_external(proto, weights, new, data)
            old_weights = None  # it is replaced
        size = sum(f.stat().st_size for f in (new, data) if f.exists())
    if old_weights:
        old_weights.unlink(missing_ok=True)
    return size


def _own_weights(path: Path) -> Path | None:
    """PATH.data, when there is an ONNX file at path that has its weights there."""
    import onnx

    data = path.with_name(path.name + WEIGHTS)
    if not (path.is_file() and data.is_file() and not data.is_symlink()):
        return None
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception:  # no ONNX file: then it has no weights either
        return None
    locations = {e.value for i in proto.graph.initializer for e in i.external_data if e.key == "location"}
    return data if data.name in locations else None


def _write_single(proto, weights: dict, path: Path) -> None:
    """One file: the model's other fields, then the graph as its own fields and one `initializer` field per weight.

    protobuf would hold three copies of the weights to do this. Field numbers: ModelProto.graph 7,
    GraphProto.initializer 5, both length-delimited (onnx.proto; protobuf encoding guide).
    """
    import onnx
    from onnx_ir.serde import serialize_tensor

    def encoded(name, tensor) -> bytes:
        proto = serialize_tensor(tensor)
        proto.name = name  # the graph's name for it, which the tensor need not share
        return proto.SerializeToString()

    head = onnx.ModelProto()
    head.CopyFrom(proto)
    head.ClearField("graph")
    graph = proto.graph.SerializeToString()
    length = len(graph)
    for item in weights.items():
        n = len(encoded(*item))
        length += 1 + len(_varint(n)) + n
    with open(path, "wb") as f:
        f.write(head.SerializeToString() + b"\x3a" + _varint(length) + graph)
        for item in weights.items():
            raw = encoded(*item)
            f.write(b"\x2a" + _varint(len(raw)) + raw)


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def _write_external(proto, weights: dict, path: Path, data: Path) -> None:
    """Graph in one file, weights in another, each at a multiple of 4096 bytes so that it can be mapped."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(proto)
    with open(data, "wb") as f:
        for name, tensor in weights.items():
            f.write(b"\0" * (-f.tell() % 4096))
            entry = model.graph.initializer.add(
                name=name, data_type=int(tensor.dtype), dims=list(tensor.shape), data_location=onnx.TensorProto.EXTERNAL
            )
            for key, value in (("location", data.name), ("offset", f.tell()), ("length", tensor.nbytes)):
                entry.external_data.add(key=key, value=str(value))
            f.write(tensor.tobytes())
    path.write_bytes(model.SerializeToString())
