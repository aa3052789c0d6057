"""Configurations of Triton's models, from the manifest of a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...export.errors import UsageError
from ..bundle.manifest import Manifest
from .batching import Batching
from .pbtxt import Word

TYPES = {"float32": Word("TYPE_FP32"), "uint8": Word("TYPE_UINT8"), "int64": Word("TYPE_INT64")}
PHOTO = "photo"  # the input of an ensemble: a photo as it lies on disk
LABELS = "labels.txt"
WARM_UP = "warmup"  # folder of the files that a model is warmed up with


@dataclass(frozen=True)
class Backend:
    """One way for Triton to run a file.

    Attributes:
        name: what it is asked for by, and Triton's own name of it.
        kind: of files that it runs: "onnx" or "engine".
        runtime: the one of `bench` that is the same.
        runs_on: "gpu" or "cpu": where instances are put when nobody says.
    """

    name: str
    kind: str
    runtime: str
    runs_on: str


BACKENDS = {
    b.name: b
    for b in (
        Backend("onnxruntime", "onnx", "ort", "cpu"),
        Backend("openvino", "onnx", "openvino", "cpu"),
        Backend("python", "onnx", "ort", "cpu"),
        Backend("tensorrt", "engine", "trt", "gpu"),
    )
}


@dataclass(frozen=True)
class Instances:
    """Copies of a model. count: on each device. device: "cpu" or "gpu". threads: of a runtime on the CPU, 0 for its
    own choice."""

    count: int = 1
    device: str = "cpu"
    threads: int = 0


def backend_for(manifest: Manifest, asked: str | None) -> Backend:
    """The backend of a bundle's file.

    Args:
        manifest: of the bundle.
        asked: a name of BACKENDS; None for TensorRT or ONNX Runtime, by the kind of file.
    Raises:
        UsageError: there is none of this name, or it does not run such a file.
    """
    if asked is None:
        return BACKENDS["tensorrt" if manifest.kind == "engine" else "onnxruntime"]
    fitting = [b.name for b in BACKENDS.values() if b.kind == manifest.kind]
    if asked not in fitting:
        kind = "an engine" if manifest.kind == "engine" else "an ONNX file"
        raise UsageError(f"backend {asked!r}: {manifest.file.name} is {kind}: wanted {' or '.join(fitting)}")
    return BACKENDS[asked]


def model_config(
    name: str, manifest: Manifest, *, backend: Backend, batching: Batching, instances: Instances
) -> dict[str, Any]:
    """The configuration of the model that runs a bundle's file.

    Args:
        name: of the model, which is its folder's.
        manifest: of the bundle.
        backend: that runs it.
        batching: see `batching_of`.
        instances: copies of it.
    """
    free = batching.most > 0
    dims = lambda shape: [int(n) for n in (shape[1:] if free else shape)]
    outputs = [
        {
            "name": o.name,
            "data_type": TYPES["int64" if o.exact else "float32"],
            "dims": dims(o.shape),
            "label_filename": LABELS if o.kind == "logits" and manifest.labels else None,
        }
        for o in manifest.outputs
    ]
    image = manifest.inputs[0]
    return {
        "name": name,
        **({"platform": "tensorrt_plan"} if backend.name == "tensorrt" else {"backend": backend.name}),
        "max_batch_size": batching.most,
        "default_model_filename": "model.py" if backend.name == "python" else manifest.file.name,
        "input": [{"name": image.name, "data_type": TYPES[image.type], "dims": dims(image.shape)}],
        "output": outputs,
        **_shared(instances, _dynamic(batching)),
        "parameters": _parameters(backend, manifest, instances),
        "model_warmup": _warm_up(image.name, TYPES[image.type], dims(image.shape), sizes=_sizes(batching)),
    }


def preprocess_config(name: str, manifest: Manifest, *, batching: Batching, instances: Instances) -> dict[str, Any]:
    """The configuration of the model that makes a photo the input of a bundle's file.

    Args:
        name: of the model.
        manifest: of the bundle.
        batching: of the model behind it.
        instances: copies of it, on the CPU.
    """
    image, free = manifest.inputs[0], batching.most > 0
    shape = list(image.shape[1:] if free else image.shape)
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": batching.most,
        "input": [_photo(manifest, batching)],
        "output": [{"name": image.name, "data_type": TYPES[image.type], "dims": shape}],
        **_shared(Instances(instances.count), _dynamic(Batching(batching.most, (), 0, ""))),
        "model_warmup": _warm_up(PHOTO, Word("TYPE_STRING"), [1], sizes=(1,)) if free else [],
    }


def _photo(manifest: Manifest, batching: Batching) -> dict[str, Any]:
    """The input for photos: one a request, or as many as a file with a batch size of its own takes."""
    n = 1 if batching.most else int(manifest.inputs[0].shape[0])
    return {"name": PHOTO, "data_type": Word("TYPE_STRING"), "dims": [n]}


def ensemble_config(name: str, manifest: Manifest, *, steps: tuple[str, str], batching: Batching) -> dict[str, Any]:
    """The configuration of photo in, answer out.

    Args:
        name: of the ensemble.
        manifest: of the bundle.
        steps: names of the model that prepares photos and of the one that runs the file.
        batching: of the latter.
    """
    image = manifest.inputs[0].name
    model = model_config(
        steps[1], manifest, backend=backend_for(manifest, None), batching=batching, instances=Instances()
    )
    pairs = lambda names: [{"key": name, "value": name} for name in names]
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": batching.most,
        "input": [_photo(manifest, batching)],
        "output": model["output"],
        "version_policy": model["version_policy"],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": steps[0],
                    "model_version": -1,
                    "input_map": pairs([PHOTO]),
                    "output_map": pairs([image]),
                },
                {
                    "model_name": steps[1],
                    "model_version": -1,
                    "input_map": pairs([image]),
                    "output_map": pairs([o["name"] for o in model["output"]]),
                },
            ]
        },
    }


def _dynamic(batching: Batching) -> dict | None:
    if not batching.most:
        return None
    return {
        "preferred_batch_size": list(batching.preferred) or None,
        "max_queue_delay_microseconds": batching.delay_us,
    }


def _shared(instances: Instances, dynamic: dict | None) -> dict[str, Any]:
    return {
        "version_policy": {"latest": {"num_versions": 1}},
        "dynamic_batching": dynamic,
        "instance_group": [{"count": instances.count, "kind": Word(f"KIND_{instances.device.upper()}")}],
    }


def _parameters(backend: Backend, manifest: Manifest, instances: Instances) -> list[dict]:
    values = {}
    if backend.name == "python":
        values = {"file": manifest.file.name, "threads": str(instances.threads)}
    elif backend.name == "onnxruntime" and instances.threads:
        values = {"intra_op_thread_count": str(instances.threads)}
    elif backend.name == "openvino" and instances.threads:
        values = {"INFERENCE_NUM_THREADS": str(instances.threads)}
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]


def _sizes(batching: Batching) -> tuple[int, ...]:
    """Batch sizes to warm up with; 1 for a file with a batch size of its own too, as Triton wants it."""
    return tuple(sorted({1, *batching.preferred}))


def _warm_up(name: str, kind: Word, dims: list[int], *, sizes: tuple[int, ...]) -> list[dict]:
    value = {"data_type": kind, "dims": dims, "input_data_file": name}
    return [{"name": f"batch of {n}", "batch_size": n, "inputs": [{"key": name, "value": value}]} for n in sizes]
