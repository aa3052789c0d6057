"""A good file of every kind, made once with the tiny models; {kind} in a line of `rows` is one of these."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from .. import cases

KINDS = (
    "onnx",
    "dense",
    "headless",
    "trained",
    "beside",
    "calls",
    "plan",
    "bundle",
    "checkpoint",
    "torch",
    "folder",
    "layers",
    "rates",
    "photo",
    "photos",
    "labelled",
)
SUFFIX = {"onnx": ".onnx", "dense": ".onnx", "headless": ".onnx", "trained": ".onnx", "beside": ".onnx"}
SUFFIX |= {"calls": ".onnx", "plan": ".plan", "checkpoint": ".safetensors", "torch": ".pth", "layers": ".safetensors"}
SUFFIX |= {"rates": ".json", "photo": ".png"}
COMPANIONS = {"beside": (".data",), "plan": (".json",)}  # what lies beside a file and belongs to it
GOLDEN = Path(__file__).parents[1] / "golden"


def _photos(folder: Path, n: int) -> Path:
    from PIL import Image

    folder.mkdir(parents=True)
    random = np.random.default_rng(n)
    for i in range(n):
        small = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize((72 + i, 80 - i), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def _onnx_files(folder: Path, exported, tiny) -> None:
    """Exported files: reduced, dense, without classes, with trained weights, with weights beside, with calls."""
    from tokexport import export_onnx, load_model

    loaded = load_model("vit_tiny_patch16_224", dict(cases.KWARGS))
    export_onnx(loaded, loaded.schedule("tome", r=8), folder / "onnx.onnx")
    export_onnx(loaded, loaded.schedule("none"), folder / "dense.onnx")
    headless = load_model("vit_tiny_patch16_224", {**cases.KWARGS, "num_classes": 0})
    export_onnx(headless, headless.schedule("tome", r=8), folder / "headless.onnx")
    shutil.copy(exported("tiny_vit"), folder / "trained.onnx")
    model = onnx.load(folder / "onnx.onnx")
    onnx.save_model(
        model, folder / "beside.onnx", save_as_external_data=True, location="beside.onnx.data", size_threshold=1024
    )
    export_onnx(loaded, loaded.schedule("tome", r=8), folder / "calls.onnx", plugin=True)


def _checkpoints(folder: Path, tiny_layers) -> None:
    """Weights as safetensors and as torch writes them, a folder of timm's, and layers trained for a method."""
    import torch
    from safetensors.torch import load_file

    shutil.copy(GOLDEN / "tiny_vit.safetensors", folder / "checkpoint.safetensors")
    torch.save({"model": load_file(folder / "checkpoint.safetensors")}, folder / "torch.pth")
    shutil.copy(tiny_layers, folder / "layers.safetensors")
    (folder / "folder").mkdir()
    shutil.copy(folder / "checkpoint.safetensors", folder / "folder/model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": cases.KWARGS}
    (folder / "folder/config.json").write_text(json.dumps(config))


def _engine(folder: Path) -> None:
    """An engine as its sidecar tells it; its bytes are no builder's, and no machine without a GPU would look at them."""
    from tokexport.engines.tensorrt import build
    from tokexport.engines.tensorrt.process import Built
    from tokexport.engines.tensorrt.sidecar import Tensor

    def run_child(task, progress):
        Path(task.engine).write_bytes(b"engine" * 100)
        image, logits = Tensor("image", "float32", (None, 3, 64, 64)), Tensor("logits", "float32", (None, 10))
        return Built("1.7", {"CONVOLUTION": {"FLOAT": 1}}, (image,), (logits,), 0.1), ()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "run_child", run_child)
        build.build_engine(folder / "onnx.onnx", folder / "plan.plan", builder="rtx", capabilities=("89",))


@pytest.fixture(scope="session")
def material(exported, tiny, tiny_layers, tmp_path_factory):
    """material(kind) -> path of a good file or folder, which nobody may change."""
    folder = tmp_path_factory.mktemp("material")
    _onnx_files(folder, exported, tiny)
    _checkpoints(folder, tiny_layers)
    _engine(folder)
    (folder / "rates.json").write_text(json.dumps(cases.METHODS["diffrate"].tiny["rates"]))
    shutil.copy(_photos(folder / "photos", 6) / "0.png", folder / "photo.png")
    for label in range(10):
        _photos(folder / "labelled" / str(label), 1)
    from tokexport.engines.bundle.write import write_bundle

    write_bundle(folder / "onnx.onnx", folder / "bundle", images=folder / "photos")
    return lambda kind: folder / f"{kind}{SUFFIX.get(kind, '')}"
