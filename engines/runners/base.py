"""One way to run a file, whatever runs it: the runner, and any number of images through any batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ...export.errors import UsageError

PACKAGES = {
    "ort": ("onnxruntime", "cpu", "ONNX Runtime"),
    "openvino": ("openvino", "cpu", "OpenVINO"),
    "torch": ("torch", "cpu", "PyTorch"),
    "ort-cuda": ("onnxruntime", "gpu", "ONNX Runtime with CUDA"),
    "ort-tensorrt": ("onnxruntime", "gpu", "ONNX Runtime with TensorRT"),
}
AT_ONCE = 16  # images in one run of a file that takes any number


@dataclass
class Runner:
    """An opened file. inputs, outputs: name -> shape (None where free). `run` takes and gives float32 (int64 for indices) arrays.

    plan: of a TensorRT engine, what is loaded.
    """

    runtime: str
    inputs: dict[str, tuple]
    outputs: dict[str, tuple]
    _call: object = field(repr=False, default=None)
    plan: object = field(repr=False, default=None)

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One run. Raises: UsageError when an input is missing, of another shape or type or not finite, or the engine fails."""
        for name, shape in self.inputs.items():
            if name not in feeds:
                raise UsageError(f"input {name!r} is missing: got {', '.join(feeds) or 'nothing'}")
            got = feeds[name]
            fits = len(got.shape) == len(shape) and all(w in (None, g) for g, w in zip(got.shape, shape))
            if not fits or str(got.dtype).removeprefix("torch.") != "float32":
                wanted = " x ".join("any" if w is None else str(w) for w in shape)
                raise UsageError(
                    f"input {name!r} is {got.dtype} {' x '.join(map(str, got.shape))}, wanted float32 {wanted}"
                )
            if isinstance(got, np.ndarray) and not np.isfinite(got).all():
                raise UsageError(
                    f"input {name!r} has values that are not finite: {np.size(got) - np.isfinite(got).sum()} of {np.size(got)}"
                )
        try:
            return self._call(feeds)
        except UsageError:
            raise
        except Exception as e:  # engines have exception types of their own
            words = PACKAGES[self.runtime][2] if self.runtime in PACKAGES else "TensorRT"
            raise UsageError(f"{words} failed while running the file: {' '.join(str(e).split())[:400]}") from None


def in_batches(runner: Runner, image: np.ndarray, tokens: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Outputs for any number of images [B, 3, H, W]: in runs of the runner's fixed batch, the last one filled up and cut again,
    or of at most AT_ONCE.

    Inner values get the batch axis that they do not have: decisions of a file for one image, and `tokens`, rows of all images at once.
    """
    batch = next(iter(runner.inputs.values()))[0]
    step = batch or AT_ONCE
    if len(image) > step:
        runs = [in_batches(runner, image[i : i + step], tokens) for i in range(0, len(image), step)]
        return {k: np.concatenate([r[k] for r in runs]) for k in runs[0]}
    short = (batch or len(image)) - len(image)
    full = np.concatenate([image, np.repeat(image[-1:], short, 0)]) if short else image
    out = runner.run({"image": full})
    split = lambda k, v: (
        v.reshape(len(full), -1, v.shape[-1]) if k in tokens else v[None] if batch == 1 and "." in k else v
    )
    return {k: split(k, v)[: len(image)] for k, v in out.items()}
