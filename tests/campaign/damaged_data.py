"""How files of weights, JSON, photos, bundles and engines are broken."""

import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from .breaking import DEEP, FILE, FOLDER, Damage, directory, json_text, loop, removed, share, written


def _safetensors(header: bytes, *, length: int | None = None, data: bytes = b"") -> Callable[[Path], Path]:
    return written(struct.pack("<Q", len(header) if length is None else length) + header + data)


def _tensors(change: Callable[[dict], object]) -> Callable[[Path], Path]:
    """A safetensors file with other tensors."""

    def apply(path: Path) -> Path:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(path)
        changed = change(tensors)
        save_file(tensors if changed is None else changed, path)
        return path

    return apply


def _nan(tensors):
    name = next(name for name, value in tensors.items() if value.ndim == 2)
    tensors[name] = tensors[name] * float("nan")


def _one_less(tensors):
    tensors.pop(sorted(tensors)[0])


def _transposed(tensors):
    name = next(name for name, value in tensors.items() if value.ndim == 2 and value.shape[0] != value.shape[1])
    tensors[name] = tensors[name].T.copy()


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
TENSORS = {
    **FILE,
    "huge header": Damage(_safetensors(b"{}", length=2**60)),
    "header of brackets": Damage(_safetensors(DEEP.encode())),
    "header of no letters": Damage(_safetensors(b'{"\xff\xfe": {}}')),
    "header of a list": Damage(_safetensors(b"[1]")),
    "no tensors": Damage(_safetensors(b"{}")),
    "tensors beyond the end": Damage(_safetensors(json.dumps({"a": ENTRY}).encode())),
    "tensors of an unknown type": Damage(
        _safetensors(json.dumps({"a": {**ENTRY, "dtype": "F77"}}).encode(), data=bytes(16))
    ),
    "tensors of a size that overflows": Damage(
        _safetensors(json.dumps({"a": {**ENTRY, "shape": [2**62, 2**62]}}).encode(), data=bytes(16))
    ),
    "tensors of others": Damage(_safetensors(json.dumps({"a": ENTRY}).encode(), data=bytes(16))),
    "cut near the end": Damage(share(0.98)),
    "wrong kind": Damage(written(b"\x08\x07\x12\x07pytorch" + bytes(200))),
    "not finite": Damage(_tensors(_nan), codes={"verify": 2}),
    "one tensor less": Damage(_tensors(_one_less)),
    "one transposed": Damage(_tensors(_transposed)),
}


class _Code:
    """What a pickle would run."""

    def __reduce__(self):
        return (os.system, ("touch was-here",))


def _saved(value: Callable[[], object]) -> Callable[[Path], Path]:
    def apply(path: Path) -> Path:
        import torch

        torch.save(value(), path)
        return path

    return apply


def _zip(entries: dict[str, bytes], *, claim: int | None = None) -> Callable[[Path], Path]:
    """A compressed archive; claim: the size of its first entry, as its directory tells it."""

    def apply(path: Path) -> Path:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        data = stream.getvalue()
        if claim is not None:
            place = data.index(b"PK\x01\x02") + 24
            data = data[:place] + struct.pack("<I", claim) + data[place + 4 :]
        path.write_bytes(data)
        return path

    return apply


TORCH = {
    **FILE,
    "code": Damage(_saved(lambda: {"model": _Code()})),
    "numbers for names": Damage(_saved(lambda: {1: 2})),
    "a list": Damage(_saved(lambda: [1, 2, 3])),
    "nothing in it": Damage(_saved(dict)),
    "an archive of nothing": Damage(_zip({})),
    "an archive of others": Damage(_zip({"readme.txt": b"hello"})),
    "a bomb": Damage(_zip({"a/data.pkl": bytes(32 << 20), "a/version": b"3\n"})),
    "a bomb by its directory": Damage(_zip({"a/data.pkl": b"\x80\x02}.", "a/version": b"3\n"}, claim=0xFFFFFFF0)),
    "a pickle cut": Damage(written(b"\x80\x02}q\x00(X\x05\x00\x00\x00mod")),
    "a pickle of long memory": Damage(written(b"\x80\x02r\xff\xff\xff\x7f.")),
    "a pickle of many marks": Damage(written(b"\x80\x02" + b"(" * 100_000 + b".")),
}


def _inside(name: str, damage: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A damage to a file of a folder."""

    def apply(path: Path) -> Path:
        damage(path / name)
        return path

    return apply


def _text(text: str) -> Callable[[Path], Path]:
    return written(text.encode())


JSON_TEXTS = {
    "brackets": DEEP,
    "no object": "[1]",
    "a word": '"yes"',
    "no JSON": "{'a': 1}",
    "cut": '{"a": ',
    "many digits": '{"a": ' + "9" * 5000 + "}",
    "no number": '{"a": NaN}',
    "other letters": "\ufeff{}",
    "nothing said": "{}",
}
JSON = {f"JSON of {name}": Damage(_text(text)) for name, text in JSON_TEXTS.items()}
JSON |= {"JSON of letters that are none": Damage(written(b'{"\xff": 1}'))}
CHECKPOINT_FOLDER = {
    **FOLDER,
    **{f"config: {name}": Damage(_inside("config.json", damage.apply)) for name, damage in JSON.items()},
    "config gone": Damage(_inside("config.json", Path.unlink)),
    "config a directory": Damage(_inside("config.json", directory)),
    "config a loop": Damage(_inside("config.json", loop)),
    "weights gone": Damage(_inside("model.safetensors", Path.unlink)),
    "weights cut": Damage(_inside("model.safetensors", share(0.5))),
    "weights a directory": Damage(_inside("model.safetensors", directory)),
}
RATES = {
    **FILE,
    **JSON,
    **{
        f"rates {name}": Damage(_text(json.dumps({"prune_kept": prune, "merge_kept": merge})))
        for name, prune, merge in [
            ("of words", ["a"] * 6, ["b"] * 6),
            ("below nothing", [-1] * 6, [-1] * 6),
            ("of zeros", [0] * 6, [0] * 6),
            ("too many", [10**30] * 6, [10**30] * 6),
            ("of fractions", [65.5] * 6, [65.5] * 6),
            ("of truths", [True] * 6, [True] * 6),
            ("of other lengths", [65] * 6, [65] * 5),
            ("of another depth", [65] * 3, [65] * 3),
            ("of one number", 65, 65),
            ("of nothing", None, None),
            ("of lists", [[65]] * 6, [[65]] * 6),
        ]
    },
}


def _png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _tiff(path: Path) -> Path:
    """Floating-point values, whose range nobody knows."""
    import numpy as np
    from PIL import Image

    Image.fromarray(np.ones((8, 8), np.float32), "F").save(path, format="TIFF")
    return path


PHOTO = {
    **FILE,
    "a bomb": Damage(written(_png(60_000, 60_000))),
    "a size of nothing": Damage(written(_png(0, 0))),
    "less than it claims": Damage(written(_png(100, 100))),
    "its head alone": Damage(written(b"\x89PNG\r\n\x1a\n")),
    "a cut JPEG": Damage(written(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01")),
    "a GIF of nothing": Damage(written(b"GIF89a\x01\x00\x01\x00\x00\x00\x00;")),
    "floating-point values": Damage(_tiff),
}
PHOTOS = {
    **FOLDER,
    **{
        f"one: {name}": Damage(_inside("3.png", PHOTO[name].apply), taken=("embed",))
        for name in ("empty", "half", "text", "a bomb")
    },
    "a file": Damage(lambda path: written(b"hello")(removed(path)), taken=("embed",)),  # a list of paths
}


def _folders(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def apply(path: Path) -> Path:
        change(path)
        return path

    return apply


LABELLED = {
    **FOLDER,
    "a class less": Damage(
        _folders(lambda path: [removed(path / "3"), *((path / d).rename(path / f"c{d}") for d in "012456789")])
    ),
    "a class more": Damage(_folders(lambda path: shutil.copytree(path / "3", path / "999"))),
    "a broken photo": Damage(_inside("3/0.png", share(0.5))),
    "classes of nothing": Damage(_folders(lambda path: [removed(f) for f in path.glob("*/*.png")])),
}


def _document(name: str, change: Callable[[dict], object]) -> Callable[[Path], Path]:
    """A change to what a JSON file in a folder says."""

    def apply(path: Path) -> Path:
        place = path / name
        place.write_text(json_text(change)(place.read_text()))
        return path

    return apply


def _first_file(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A change to the model in a bundle."""

    def apply(path: Path) -> Path:
        change(next(path.glob("*.onnx")))
        return path

    return apply


def _flipped(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    return path


def _names_leave(data: dict) -> None:
    data["file"]["name"] = "../../etc/passwd"


BUNDLE = {
    **{
        f"manifest: {name}": Damage(_inside("tokexport.json", damage.apply))
        for name, damage in {**JSON, "empty": FILE["empty"], "half": FILE["half"]}.items()
    },
    "manifest of another major": Damage(_document("tokexport.json", lambda data: data.update(format=[99, 0]))),
    "manifest with an unknown need": Damage(_document("tokexport.json", lambda data: data.update(needs=["teleport"]))),
    "names that lead out": Damage(_document("tokexport.json", _names_leave)),
    "model gone": Damage(_first_file(Path.unlink)),
    "model cut": Damage(_first_file(share(0.5))),
    "model changed": Damage(_first_file(_flipped)),
    "model a directory": Damage(_first_file(directory)),
    "missing": Damage(removed),
    "a folder of nothing": Damage(directory),
}


def _sidecar(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def apply(path: Path) -> Path:
        change(path.with_name(path.name + ".json"))
        return path

    return apply


PLAN = {
    **{name: FILE[name] for name in ("missing", "empty", "half", "directory", "symlink loop", "pipe", "text")},
    "another engine": Damage(_flipped),
    **{f"sidecar: {name}": Damage(_sidecar(damage.apply)) for name, damage in JSON.items()},
    "sidecar: missing": Damage(_sidecar(removed)),
    "sidecar: directory": Damage(_sidecar(directory)),
    "sidecar: loop": Damage(_sidecar(loop)),
    "sidecar: half": Damage(_sidecar(share(0.5))),
}
