"""Files are written aside and renamed; nothing is replaced unasked. Imports no torch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Iterable

from .errors import UsageError

TWO_GB = 2**31 - 2**24  # protobuf's limit, less room for the graph
LARGE = 4096  # bytes; weights above are kept out of the graph until they are written


def check_output(path: str | Path, force: bool, inputs: Iterable[str | Path | None] = ()) -> Path:
    """The path, when a file can be written there.

    inputs: what the command reads, which force does not replace either.
    Raises: UsageError when it exists (without force), is one of the inputs, or its folder cannot be written.
    """
    if not str(path).strip() or "\0" in str(path):
        raise UsageError(f"output {str(path)!r}: wanted a file name, e.g. vit.onnx")
    path = Path(path)
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise UsageError(f"output {path} is a directory: wanted a file name")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"output {path} is no regular file (a device, a pipe): wanted a file name")
    for source in inputs:
        if source and os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise UsageError(f"output {path} is one of the files that are read: wanted another name")
    if os.path.lexists(path) and not force:
        raise UsageError(f"output {path} exists: give --force to replace it, or another name with -o")
    folder = path.parent
    if not os.path.isdir(folder):
        raise UsageError(f"output {path}: there is no directory {folder}")
    try:  # asking the file system is the only sure way
        with tempfile.TemporaryDirectory(prefix=".tokexport-", dir=folder) as trial:
            (Path(trial) / f"{path.name}.data").touch()
    except OSError as e:
        raise UsageError(f"output {path}: cannot be written in {folder} ({e.strerror})") from None
    return path


def read_model(path: Path) -> tuple:
    """An ONNX file as `write_model` takes it: (onnx.ModelProto without its large weights, those as {name: onnx_ir tensor})."""
    import onnx
    from onnx_ir.serde import deserialize_tensor

    proto = onnx.load(path, load_external_data=False)
    large = [i for i in proto.graph.initializer if i.external_data or len(i.raw_data) > LARGE]
    weights = {i.name: deserialize_tensor(i, str(path.parent.resolve())) for i in large}
    small = [i for i in proto.graph.initializer if i.name not in weights]
    kept = [onnx.TensorProto.FromString(i.SerializeToString()) for i in small]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto, weights


def write_model(proto, weights: dict, path: Path) -> int:
    """Write an ONNX file aside and rename it; returns the bytes on disk.

    proto: onnx.ModelProto without its large weights. weights: those, {name: onnx_ir tensor}; each is in memory as bytes only while it
    is written. From 2 GB on they go to PATH.data, where the graph refers to them.
    Raises: UsageError when the disk is full or the folder cannot be written; nothing is left behind.
    """
    with tempfile.TemporaryDirectory(prefix=".tokexport-", dir=path.parent) as folder:
        new, data = Path(folder) / path.name, Path(folder) / f"{path.name}.data"
        try:
            if sum(t.nbytes for t in weights.values()) + proto.ByteSize() < TWO_GB:
                _write_single(proto, weights, new)
            else:
                _write_external(proto, weights, new, data)
        except OSError as e:
            raise UsageError(
                f"output {path}: could not be written ({e.strerror or e}); nothing was left behind"
            ) from None
        size = sum(f.stat().st_size for f in (new, data) if f.exists())
        if data.exists():
            os.replace(data, path.with_name(data.name))
        os.replace(new, path)
    return size


def _write_single(proto, weights: dict, path: Path) -> None:
    """One file: the model's other fields, then the graph as its own fields and one `initializer` field per weight.

    protobuf would hold three copies of the weights to do this. Field numbers: ModelProto.graph 7, GraphProto.initializer 5, both
    length-delimited (onnx.proto; protobuf encoding guide).
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

    with open(data, "wb") as f:
        for name, tensor in weights.items():
            f.write(b"\0" * (-f.tell() % 4096))
            entry = proto.graph.initializer.add(
                name=name, data_type=int(tensor.dtype), dims=list(tensor.shape), data_location=onnx.TensorProto.EXTERNAL
            )
            for key, value in (("location", data.name), ("offset", f.tell()), ("length", tensor.nbytes)):
                entry.external_data.add(key=key, value=str(value))
            f.write(tensor.tobytes())
    path.write_bytes(proto.SerializeToString())
