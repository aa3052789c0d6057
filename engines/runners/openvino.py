"""OpenVINO on the CPU."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np

from .. import nodes
from ..plugin import find_library
from .base import Runner, RunnerOptions
from .table import Runtime

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}


def open_file(path: Path, runtime: Runtime, options: RunnerOptions) -> OpenVinoRunner:
    """An ONNX file, compiled for the CPU."""
    ov = _package()
    core, native = ov.Core(), runtime.library is not None
    if native:
        core.add_extension(str(find_library(runtime.library, needed=True).path))
    source = nodes.prepared(path, native=native, outputs=options.outputs, functions=False)
    model = _read(core, path, source, options.outputs)
    names = [sorted(o.names)[0] for o in model.outputs]
    for name in options.outputs:
        if name not in {n for o in model.outputs for n in o.names}:
            model.add_outputs(name)
    image = model.inputs[0].partial_shape
    if options.batch and image[0].is_dynamic:
        image[0] = options.batch
        model.reshape({0: image})
    compiled = core.compile_model(model, "CPU", _settings(options.threads))
    return OpenVinoRunner(runtime, compiled, list(dict.fromkeys([*names, *options.outputs])))


def _read(core, path: Path, source, outputs: tuple[str, ...]):
    """The model of a file, or of the onnx.ModelProto made of it. Reading drops what no output hangs on, so it may take two rounds."""
    import onnx

    with nodes.as_file(source, path) as file:
        model = core.read_model(file)
    if set(outputs) <= {name for node in model.get_ops() for port in node.outputs() for name in port.names}:
        return model
    source = onnx.load(path, load_external_data=False) if source is None else source
    with nodes.as_file(nodes.with_outputs(source, outputs), path) as file:
        return core.read_model(file)


class OpenVinoRunner(Runner):
    """A compiled model and its one request."""

    timed = "one inference of an input that is set, by the host's clock"

    def __init__(self, runtime: Runtime, compiled, names: list[str]):
        self._compiled, self._request, self._bf16 = compiled, compiled.create_infer_request(), _package().Type.bf16
        ports = {name: port for port in compiled.outputs for name in port.names}  # one may have several names
        self._ports = {name: ports[name] for name in names}
        super().__init__(
            runtime.name,
            runtime.words,
            inputs={port.any_name: _shape(port) for port in compiled.inputs},
            outputs={name: _shape(port) for name, port in self._ports.items()},
            input_types={p.any_name: "uint8" for p in compiled.inputs if p.element_type == _package().Type.u8},
        )

    def _run(self, feeds: dict) -> dict:
        result = self._request.infer(feeds)
        values = {name: np.array(result[port]) for name, port in self._ports.items()}
        return {
            name: _float32(value) if self._ports[name].element_type == self._bf16 else value
            for name, value in values.items()
        }

    def _prepared(self, feeds: dict):
        ov, request = _package(), self._compiled.create_infer_request()
        for name, value in feeds.items():
            request.set_tensor(name, ov.Tensor(np.ascontiguousarray(value), shared_memory=True))
        return lambda feeds=feeds: request.infer()  # the tensors are shared: the arrays must live as long

    def _release(self) -> None:
        self._request = self._compiled = None
        self._ports = {}


def profile(path: Path, images: np.ndarray, *, rounds: int, threads: int) -> dict[str, float]:
    """Milliseconds a run spends in each node, from the runtime's own counters.

    Args:
        path: an ONNX file.
        images: [B, 3, H, W] float32.
        rounds: runs, of which the mean is taken; two more come before and are not counted.
        threads: of the processor.
    """
    core = _package().Core()
    with nodes.as_file(nodes.prepared(path, native=False, functions=False), path) as file:
        model = core.read_model(file)
    model.reshape({0: list(images.shape)})
    compiled = core.compile_model(model, "CPU", {**_settings(threads), "PERF_COUNT": "YES"})
    request, times = compiled.create_infer_request(), Counter()
    for i in range(rounds + 2):
        request.infer({"image": images})
        for node in request.get_profiling_info() if i > 1 else ():
            times[node.node_name] += node.real_time.total_seconds() * 1e3 / rounds
    return dict(times)


def _package():
    os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
    import openvino

    return openvino


def _settings(threads: int) -> dict[str, str]:
    return {**SETTINGS, **({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})}


def _shape(port) -> tuple:
    return tuple(None if d.is_dynamic else d.get_length() for d in port.partial_shape)


def _float32(bits: np.ndarray) -> np.ndarray:
    """bf16 values, which NumPy does not know and OpenVINO gives as any 16 bits, as float32."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
