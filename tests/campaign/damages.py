"""How a good file is broken: a table of damages for every kind of file, and of places where no output can be.

A damage is a function of the copied file that changes it in place and returns the path to name on the command line.
Commands that rightly take what it leaves are named in `taken`; one that finds out only by running, in `codes`.
"""

import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import onnx


class Damage(NamedTuple):
    """One manner of breaking a file.

    Attributes:
        apply: good path -> path to give to the command.
        codes: command -> exit code where it is not 2.
        taken: commands that rightly take the file all the same.
    """

    apply: Callable[[Path], Path]
    codes: dict[str, int] = {}
    taken: tuple[str, ...] = ()


def _removed(path: Path) -> Path:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    return path


def _written(data: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return write


def _share(share: float) -> Callable[[Path], Path]:
    def cut(path: Path) -> Path:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        return path

    return cut


def _directory(path: Path) -> Path:
    _removed(path).mkdir()
    return path


def _loop(path: Path) -> Path:
    _removed(path).symlink_to(path.name)
    return path


def _dangling(path: Path) -> Path:
    _removed(path).symlink_to("nowhere")
    return path


def _pipe(path: Path) -> Path:
    os.mkfifo(_removed(path))
    return path


def _unknown_letters(path: Path) -> Path:
    """A name that is no UTF-8, of nothing that is read."""
    name = os.fsdecode(b"\xff\xfe" + os.fsencode(path.name))
    _removed(path).with_name(name).write_bytes(b"\x00\x01")
    return path.with_name(name)


def _brackets(path: Path) -> Path:
    """Markup of the terminal's in a name."""
    return _removed(path).with_name("[bold]no[" + path.name)


def _lines(path: Path) -> Path:
    """A name of two lines: the message is still one."""
    return _removed(path).with_name("no\nError: such" + path.name)


FILE = {
    "missing": Damage(_removed),
    "empty": Damage(_written(b"")),
    "text": Damage(_written(b"hello\n" * 50)),
    "zeros": Damage(_written(bytes(4096))),
    "half": Damage(_share(0.5)),
    "directory": Damage(_directory),
    "symlink loop": Damage(_loop),
    "dangling symlink": Damage(_dangling),
    "pipe": Damage(_pipe),
    "letters that are no UTF-8": Damage(_unknown_letters),
    "markup in its name": Damage(_brackets),
    "name of two lines": Damage(_lines),
    "name too long": Damage(lambda path: path.with_name("n" * 300 + path.suffix)),
    "a file for a folder": Damage(lambda path: path / path.name),
    "device": Damage(lambda path: Path("/dev/null")),
}
FOLDER = {name: FILE[name] for name in ("missing", "symlink loop", "dangling symlink", "name too long")}
FOLDER |= {"a folder of nothing": Damage(_directory)}


def _model(change: Callable) -> Callable[[Path], Path]:
    """An ONNX file changed as a protobuf."""

    def apply(path: Path) -> Path:
        model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())
        return path

    return apply


def _provenance(change: Callable[[str], str]) -> Callable[[Path], Path]:
    """An ONNX file whose provenance is another text."""

    def rewrite(model):
        model.metadata_props[0].value = change(model.metadata_props[0].value)

    return _model(rewrite)


def _json(change: Callable[[dict], object]) -> Callable[[str], str]:
    """JSON text with a change to what it says."""

    def rewrite(text: str) -> str:
        data = json.loads(text)
        changed = change(data)
        return json.dumps(data if changed is None else changed)

    return rewrite


def _no_provenance(model):
    del model.metadata_props[:]


def _unknown_operator(model):
    model.graph.node[len(model.graph.node) // 2].op_type = "NoSuchOperator"


def _renamed_output(model):
    model.graph.output[0].name = "other"


def _shape(model):
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 99


def _weights(value: float):
    """All large weights of an ONNX file with one value."""

    def change(model):
        import numpy as np

        for tensor in model.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor)
            if array.dtype == np.float32 and array.size > 1000:
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.full_like(array, value), tensor.name))

    return change


def _short_weight(model):
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    tensor.raw_data = tensor.raw_data[:-4]


def _beside(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A change to the weights beside a file."""

    def apply(path: Path) -> Path:
        change(path.with_name(path.name + ".data"))
        return path

    return apply


def _location(name: str, value: str):
    """Another entry of where a weight lies."""

    def change(model):
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == name).value = value

    return change


SUCH = ("inspect", "trt", "inline")  # look at the graph alone
DEEP = "[" * 100_000
ONNX = {
    **FILE,
    "wrong kind": Damage(_written(b"\x89PNG\r\n\x1a\n" + bytes(100))),
    "cut near the end": Damage(_share(0.98)),
    "cut in the header": Damage(_share(0.001)),
    "huge length": Damage(_written(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(64))),
    "no provenance": Damage(_model(_no_provenance), taken=("inline",)),
    "provenance of brackets": Damage(_provenance(lambda text: DEEP), taken=("inline",)),
    "provenance cut": Damage(_provenance(lambda text: text[: len(text) // 2]), taken=("inline",)),
    "provenance of a list": Damage(_provenance(lambda text: "[1, 2]"), taken=("inline",)),
    "provenance of another major": Damage(
        _provenance(_json(lambda data: data.update(format=[99, 0]))), taken=("inline",)
    ),
    "provenance with an unknown need": Damage(
        _provenance(_json(lambda data: data.update(needs=["teleport"]))), taken=("inline",)
    ),
    "provenance of infinities": Damage(
        _provenance(lambda text: text.replace('"crop": 0.9', '"crop": Infinity').replace('"crop": 0', '"crop": -1')),
        taken=("inline",),
    ),
    "provenance without a schedule": Damage(_provenance(_json(lambda data: {"format": [1, 0]})), taken=("inline",)),
    "an unknown model": Damage(
        _provenance(_json(lambda data: data.update(model="vit_of_nobody"))),
        taken=("inspect", "inline", "run", "viz", "trt", "bench", "eval"),
    ),
    "steps of another graph": Damage(
        _provenance(_json(lambda data: data["schedule"].update(depth=data["schedule"]["depth"] + 1))), taken=("inline",)
    ),
    "an output renamed": Damage(_model(_renamed_output), codes={"inline": 2}, taken=("inline",)),
}
ONNX_RUN = {  # what is found out by whoever runs the file
    "an unknown operator": Damage(
        _model(_unknown_operator),
        codes={**dict.fromkeys(("run", "viz", "eval", "bundle", "verify", "trt"), 3), "bench": 1},
        taken=("inspect", "inline"),
    ),
    "a short weight": Damage(
        _model(_short_weight),
        codes={**dict.fromkeys(("run", "viz", "eval", "bundle", "verify", "trt"), 3), "bench": 1},
        taken=("inspect", "inline"),
    ),
    "weights that are no numbers": Damage(
        _model(_weights(float("nan"))),
        codes={"verify": 1, "bundle": 1},
        taken=("inspect", "inline", "run", "viz", "bench", "trt", "eval"),
    ),
    "weights of zeros": Damage(
        _model(_weights(0.0)),
        codes={"verify": 1, "bundle": 1},
        taken=("inspect", "inline", "run", "viz", "bench", "trt", "eval"),
    ),
}
BESIDE = {
    "weights gone": Damage(_beside(Path.unlink)),
    "weights cut": Damage(_beside(_share(0.9))),
    "weights a directory": Damage(_beside(_directory)),
    "weights a loop": Damage(_beside(_loop)),
    "weights a link": Damage(_beside(lambda data: data.rename(data.with_name("x")) and data.symlink_to("x"))),
    "weights elsewhere": Damage(_model(_location("location", "../beside.onnx.data"))),
    "weights in a device": Damage(_model(_location("location", "/dev/zero"))),
    "weights at no place": Damage(_model(_location("offset", "-8"))),
    "weights beyond the end": Damage(_model(_location("offset", "9" * 18))),
    "weights of many digits": Damage(_model(_location("length", "9" * 5000))),
}


def _safetensors(header: bytes, *, length: int | None = None, data: bytes = b"") -> Callable[[Path], Path]:
    return _written(struct.pack("<Q", len(header) if length is None else length) + header + data)


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
    "cut near the end": Damage(_share(0.98)),
    "wrong kind": Damage(_written(b"\x08\x07\x12\x07pytorch" + bytes(200))),
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
    "a pickle cut": Damage(_written(b"\x80\x02}q\x00(X\x05\x00\x00\x00mod")),
    "a pickle of long memory": Damage(_written(b"\x80\x02r\xff\xff\xff\x7f.")),
    "a pickle of many marks": Damage(_written(b"\x80\x02" + b"(" * 100_000 + b".")),
}


def _inside(name: str, damage: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A damage to a file of a folder."""

    def apply(path: Path) -> Path:
        damage(path / name)
        return path

    return apply


def _text(text: str) -> Callable[[Path], Path]:
    return _written(text.encode())


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
JSON |= {"JSON of letters that are none": Damage(_written(b'{"\xff": 1}'))}
CHECKPOINT_FOLDER = {
    **FOLDER,
    **{f"config: {name}": Damage(_inside("config.json", damage.apply)) for name, damage in JSON.items()},
    "config gone": Damage(_inside("config.json", Path.unlink)),
    "config a directory": Damage(_inside("config.json", _directory)),
    "config a loop": Damage(_inside("config.json", _loop)),
    "weights gone": Damage(_inside("model.safetensors", Path.unlink)),
    "weights cut": Damage(_inside("model.safetensors", _share(0.5))),
    "weights a directory": Damage(_inside("model.safetensors", _directory)),
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
    "a bomb": Damage(_written(_png(60_000, 60_000))),
    "a size of nothing": Damage(_written(_png(0, 0))),
    "less than it claims": Damage(_written(_png(100, 100))),
    "its head alone": Damage(_written(b"\x89PNG\r\n\x1a\n")),
    "a cut JPEG": Damage(_written(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01")),
    "a GIF of nothing": Damage(_written(b"GIF89a\x01\x00\x01\x00\x00\x00\x00;")),
    "floating-point values": Damage(_tiff),
}
PHOTOS = {
    **FOLDER,
    **{f"one: {name}": Damage(_inside("3.png", PHOTO[name].apply)) for name in ("empty", "half", "text", "a bomb")},
    "a file": Damage(lambda path: _written(b"hello")(_removed(path))),
}


def _folders(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def apply(path: Path) -> Path:
        change(path)
        return path

    return apply


LABELLED = {
    **FOLDER,
    "a class less": Damage(
        _folders(lambda path: [_removed(path / "3"), *((path / d).rename(path / f"c{d}") for d in "012456789")])
    ),
    "a class more": Damage(_folders(lambda path: shutil.copytree(path / "3", path / "999"))),
    "a broken photo": Damage(_inside("3/0.png", _share(0.5))),
    "classes of nothing": Damage(_folders(lambda path: [_removed(f) for f in path.glob("*/*.png")])),
}


def _document(name: str, change: Callable[[dict], object]) -> Callable[[Path], Path]:
    """A change to what a JSON file in a folder says."""

    def apply(path: Path) -> Path:
        place = path / name
        place.write_text(_json(change)(place.read_text()))
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
    "model cut": Damage(_first_file(_share(0.5))),
    "model changed": Damage(_first_file(_flipped)),
    "model a directory": Damage(_first_file(_directory)),
    "missing": Damage(_removed),
    "a folder of nothing": Damage(_directory),
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
    "sidecar: missing": Damage(_sidecar(_removed)),
    "sidecar: directory": Damage(_sidecar(_directory)),
    "sidecar: loop": Damage(_sidecar(_loop)),
    "sidecar: half": Damage(_sidecar(_share(0.5))),
}
KINDS = {
    "onnx": {**ONNX, **ONNX_RUN},
    "dense": ONNX,
    "headless": ONNX,
    "trained": FILE,
    "beside": BESIDE,
    "calls": ONNX,
    "plan": PLAN,
    "bundle": BUNDLE,
    "checkpoint": TENSORS,
    "torch": TORCH,
    "folder": CHECKPOINT_FOLDER,
    "layers": TENSORS,
    "rates": RATES,
    "photo": PHOTO,
    "photos": PHOTOS,
    "labelled": LABELLED,
}


def _there(path: Path) -> Path:
    path.write_bytes(b"mine")
    return path


def _folder_there(path: Path) -> Path:
    path.mkdir()
    (path / "mine.txt").write_text("mine")
    return path


def _under_a_file(path: Path) -> Path:
    return _there(path.with_name("taken")) / path.name


def _loop_there(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


def _dangling_there(path: Path) -> Path:
    path.symlink_to("nowhere")
    return path


def _pipe_there(path: Path) -> Path:
    os.mkfifo(path)
    return path


OUTPUT = {
    "there is one": Damage(_there),
    "a folder": Damage(_folder_there),
    "under a file": Damage(_under_a_file),
    "in no folder": Damage(lambda path: path.with_name("no") / path.name, taken=("demo",)),
    "a loop": Damage(_loop_there),
    "a dangling symlink": Damage(_dangling_there),
    "a pipe": Damage(_pipe_there),
    "a name too long": Damage(lambda path: path.with_name("n" * 300 + path.suffix)),
    "a name of a folder": Damage(lambda path: path.parent / ".", taken=("demo",)),
}
