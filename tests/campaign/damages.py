"""The tables of damages: for every kind of file, and of places where no output can be. ONNX files are broken here."""

import os
from collections.abc import Callable
from pathlib import Path

import onnx

from .breaking import DEEP, FILE, Damage, directory, json_text, loop, share, written
from .damaged_data import BUNDLE, CHECKPOINT_FOLDER, LABELLED, PHOTO, PHOTOS, PLAN, RATES, TENSORS, TORCH


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


ONNX = {
    **FILE,
    "wrong kind": Damage(written(b"\x89PNG\r\n\x1a\n" + bytes(100))),
    "cut near the end": Damage(share(0.98)),
    "cut in the header": Damage(share(0.001)),
    "huge length": Damage(written(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(64))),
    "no provenance": Damage(_model(_no_provenance), taken=("inline",)),
    "provenance of brackets": Damage(_provenance(lambda text: DEEP), taken=("inline",)),
    "provenance cut": Damage(_provenance(lambda text: text[: len(text) // 2]), taken=("inline",)),
    "provenance of a list": Damage(_provenance(lambda text: "[1, 2]"), taken=("inline",)),
    "provenance of another major": Damage(
        _provenance(json_text(lambda data: data.update(format=[99, 0]))), taken=("inline",)
    ),
    "provenance with an unknown need": Damage(
        _provenance(json_text(lambda data: data.update(needs=["teleport"]))), taken=("inline",)
    ),
    "provenance of infinities": Damage(
        _provenance(lambda text: text.replace('"crop": 0.9', '"crop": Infinity').replace('"crop": 0', '"crop": -1')),
        taken=("inline",),
    ),
    "provenance without a schedule": Damage(_provenance(json_text(lambda data: {"format": [1, 0]})), taken=("inline",)),
    "an unknown model": Damage(
        _provenance(json_text(lambda data: data.update(model="vit_of_nobody"))),
        taken=("inspect", "inline", "run", "viz", "trt", "bench", "eval", "embed"),
    ),
    "steps of another graph": Damage(
        _provenance(json_text(lambda data: data["schedule"].update(depth=data["schedule"]["depth"] + 1))),
        taken=("inline",),
    ),
    "an output renamed": Damage(_model(_renamed_output), codes={"inline": 2}, taken=("inline",)),
}
ONNX_RUN = {  # what is found out by whoever runs the file
    "an unknown operator": Damage(
        _model(_unknown_operator),
        codes={**dict.fromkeys(("run", "viz", "eval", "embed", "bundle", "verify", "trt"), 3), "bench": 1},
        taken=("inspect", "inline"),
    ),
    "a short weight": Damage(
        _model(_short_weight),
        codes={**dict.fromkeys(("run", "viz", "eval", "embed", "bundle", "verify", "trt"), 3), "bench": 1},
        taken=("inspect", "inline"),
    ),
    "weights that are no numbers": Damage(
        _model(_weights(float("nan"))),
        codes={"verify": 1, "bundle": 1},
        taken=("inspect", "inline", "run", "viz", "bench", "trt", "eval", "embed"),
    ),
    "weights of zeros": Damage(
        _model(_weights(0.0)),
        codes={"verify": 1, "bundle": 1},
        taken=("inspect", "inline", "run", "viz", "bench", "trt", "eval", "embed"),
    ),
}
BESIDE = {
    "weights gone": Damage(_beside(Path.unlink)),
    "weights cut": Damage(_beside(share(0.9))),
    "weights a directory": Damage(_beside(directory)),
    "weights a loop": Damage(_beside(loop)),
    "weights a link": Damage(_beside(lambda data: data.rename(data.with_name("x")) and data.symlink_to("x"))),
    "weights elsewhere": Damage(_model(_location("location", "../beside.onnx.data"))),
    "weights in a device": Damage(_model(_location("location", "/dev/zero"))),
    "weights at no place": Damage(_model(_location("offset", "-8"))),
    "weights beyond the end": Damage(_model(_location("offset", "9" * 18))),
    "weights of many digits": Damage(_model(_location("length", "9" * 5000))),
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
    "a name of a folder": Damage(lambda path: path.parent / ".", taken=("demo", "embed", "serve-repo")),
}
