"""One way to run a file, whatever the engine: open it, look at .inputs and .outputs, run, close."""

from __future__ import annotations

import importlib.util
import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Iterator

import numpy as np

from ...export.errors import MissingPackageError, UsageError
from ..files import is_engine
from .base import AT_ONCE as AT_ONCE
from .base import PACKAGES, Runner
from .base import in_batches as in_batches

OPENVINO = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
PROVIDERS = {
    "ort": "CPUExecutionProvider",
    "ort-cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
}


def require(runtime: str) -> None:
    """Raises: UsageError for an unknown engine, MissingPackageError when its package is not installed."""
    if runtime not in PACKAGES:
        raise UsageError(f"unknown runtime {runtime!r}: wanted one of {', '.join(PACKAGES)}")
    package, extra, words = PACKAGES[runtime]
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(package, extra, words)
    if PROVIDERS.get(runtime, "CPUExecutionProvider") != "CPUExecutionProvider":
        import onnxruntime

        if PROVIDERS[runtime] not in onnxruntime.get_available_providers():
            raise UsageError(
                f"{words} is not in the onnxruntime that is installed: pip uninstall onnxruntime; pip install 'tokexport[gpu]'"
            )


@contextmanager
def open_runner(
    path: str | Path,
    runtime: str = "ort",
    threads: int = 0,
    outputs: tuple[str, ...] = (),
    batch: int | None = None,
    cuda_graph: bool = False,
) -> Iterator[Runner]:
    """Open an ONNX file, or an engine built by `build_engine` (.plan), for running.

    engine: of an ONNX file: "ort" (ONNX Runtime on the CPU), "ort-cuda", "ort-tensorrt", "openvino", or "torch", the eager reference
    the file was made from. threads: 0 for the engine's own choice. cuda_graph: see `plan_runner.open_plan`; of engines only.
    outputs: inner values to give beside the file's outputs (see `Provenance.decisions`).
    batch: the one batch size a file with a dynamic batch will be run with; OpenVINO is faster when it knows (ToMe DeiT-S, batch 8: 4 %).
    Raises: UsageError when the file does not load, MissingPackageError when the engine is not installed.
    """
    if is_engine(path):
        from .tensorrt import open_plan

        yield open_plan(Path(path), outputs, cuda_graph)
        return
    if cuda_graph:
        raise UsageError(f"{path}: CUDA graphs are of TensorRT engines (.plan)")
    require(runtime)
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file")
    try:
        runner = {"openvino": _openvino, "torch": _torch}.get(runtime, partial(_onnxruntime, runtime))(
            Path(path), threads, outputs, batch
        )
    except UsageError:
        raise
    except Exception as e:
        if runtime.startswith("ort") and "bfloat16" in str(e):
            raise UsageError(
                f"{path}: ONNX Runtime has no bf16 operators on the CPU: use OpenVINO or TensorRT, or a file with "
                f"--dtype fp16"
            ) from None
        raise UsageError(
            f"{path}: {PACKAGES[runtime][2]} cannot load it: {str(e).strip().splitlines()[0][:300]}"
        ) from None
    yield runner


def _model_bytes(path: Path, outputs: tuple[str, ...]):
    """The file's model with some inner values as outputs too (weights beside the file stay there)."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    known, types = (
        {o.name for o in model.graph.output},
        {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info},
    )
    more = [
        onnx.helper.make_tensor_value_info(o, types.get(o, onnx.TensorProto.INT64), None)
        for o in outputs
        if o not in known
    ]
    model.graph.output.extend(more)
    return model


def _shape(dims) -> tuple:
    return tuple(d if isinstance(d, int) and d > 0 else None for d in dims)


def _float32(bits: np.ndarray) -> np.ndarray:
    """bf16 values, which NumPy does not know and OpenVINO gives as any 16 bits, as float32."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _onnxruntime(runtime: str, path: Path, threads: int, outputs: tuple[str, ...], batch: int | None) -> Runner:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    source: object = str(path)
    if outputs:
        model = _model_bytes(path, outputs)
        if any(i.data_location == 1 for i in model.graph.initializer):
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
            )
        source = model.SerializeToString()
    session = ort.InferenceSession(
        source, options, providers=list(dict.fromkeys([PROVIDERS[runtime], "CPUExecutionProvider"]))
    )
    if session.get_providers()[0] != PROVIDERS[runtime]:  # it falls back to the CPU by itself
        raise UsageError(
            f"{path}: {PACKAGES[runtime][2]} cannot be used here (no NVIDIA GPU, or its libraries are missing)"
        )
    names = [o.name for o in session.get_outputs()]
    call = lambda feeds: dict(zip(names, session.run(None, feeds)))
    shapes = lambda values: {v.name: _shape(v.shape) for v in values}
    return Runner(runtime, shapes(session.get_inputs()), shapes(session.get_outputs()), call)


def _openvino(path: Path, threads: int, outputs: tuple[str, ...], batch: int | None) -> Runner:
    os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    asked = [*(sorted(o.names)[0] for o in model.outputs), *outputs]
    for name in outputs:
        if name not in {n for o in model.outputs for n in o.names}:
            model.add_outputs(name)
    image = model.inputs[0].partial_shape
    if batch and image[0].is_dynamic:
        image[0] = batch
        model.reshape({0: image})
    compiled = core.compile_model(
        model, "CPU", {**OPENVINO, **({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})}
    )
    request = compiled.create_infer_request()
    dims = lambda port: tuple(None if d.is_dynamic else d.get_length() for d in port.partial_shape)
    ports = {n: o for o in compiled.outputs for n in o.names}  # one may have several names
    wanted = {name: ports[name] for name in asked}

    def call(feeds):
        result = request.infer(feeds)
        return {
            n: _float32(np.array(result[port])) if port.element_type == ov.Type.bf16 else np.array(result[port])
            for n, port in wanted.items()
        }

    return Runner(
        "openvino", {i.any_name: dims(i) for i in compiled.inputs}, {n: dims(p) for n, p in wanted.items()}, call
    )


def _torch(path: Path, threads: int, outputs: tuple[str, ...], batch: int | None) -> Runner:
    """The eager reference, as the method's paper would run it; threads are PyTorch's own, of the whole process."""
    import torch

    from ...export.inspection import inspect
    from ...export.reference import ReducedViT
    from ...export.models.score_head import score_heads
    from ...export.rebuild import rebuild

    if outputs:
        raise UsageError("the eager reference has no inner values to give")
    found = inspect(path)
    p, loaded = found.provenance, rebuild(found.provenance, path)
    reference = ReducedViT(loaded.module, p.schedule, score_heads(loaded, p.schedule))
    if threads:
        torch.set_num_threads(threads)

    def call(feeds):
        image = torch.from_numpy(np.ascontiguousarray(feeds["image"]))
        if not p.schedule.steps:
            with torch.no_grad():
                return {p.outputs[0]: loaded.module(image).numpy()}
        out = reference.run(image)
        return {
            p.outputs[0]: out.output.numpy(),
            **({"sources": out.sources.numpy()} if "sources" in p.outputs else {}),
        }

    shape = (found.batch, p.dims["channels"], *p.preprocess.size)
    return Runner("torch", {"image": shape}, {n: (found.batch, None) for n in p.outputs}, call)
