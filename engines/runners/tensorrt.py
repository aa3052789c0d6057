"""Running TensorRT engines: PyTorch allocates, on its current stream; what is on the GPU is not copied."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ...export.errors import UsageError
from ..tensorrt import runtime as runtimes
from ..tensorrt.sidecar import EngineFile, read_sidecar
from .base import Runner


def open_plan(path: Path, outputs: tuple[str, ...] = (), cuda_graph: bool = False) -> Runner:
    """An engine built by `build_engine`, ready to run on the GPU that is current in PyTorch.

    outputs: further outputs that are wanted; an engine has them only when it was built with them (`decisions`). cuda_graph: capture the
    engine's work once for each shape and replay it.
    `run` takes and gives arrays, or CUDA tensors for a CUDA tensor: those are read where they are, and nothing waits for the result.
    Raises: UsageError when there is no GPU or another one, the runtime is missing or of another version, or the engine does not load.
    """
    found = read_sidecar(path)
    name, words = found.builder.name, found.builder.words
    missing = [o for o in outputs if o not in found.output_names]
    if missing:
        raise UsageError(
            f"{path} does not give the merge decisions ({missing[0]}, ...): build it with `tokexport trt --decisions`"
        )
    runtimes.choose(name)
    if not runtimes.gpus():
        raise UsageError(
            f"{path} is an engine of {words} and there is no NVIDIA GPU here: run the ONNX file it was built from"
        )
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"{path}: PyTorch {torch.__version__} cannot use the GPU here: install a PyTorch with CUDA")
    here = "".join(map(str, torch.cuda.get_device_capability()))
    if here not in found.compute_capability:
        raise UsageError(
            f"{path} is for compute capability {', '.join(found.compute_capability)}, this GPU "
            f"({torch.cuda.get_device_name()}) has {here}: build it with --compute-capability {here}"
        )
    runtime = runtimes.load(name)
    if runtime.version != found.builder.version:
        raise UsageError(
            f"{path} was built by {words} {found.builder.version}, here is {runtime.version}: build it again"
        )
    return _Plan(runtime, path, found, cuda_graph).runner()


def layer_information(path: Path) -> list[dict]:
    """The engine's layers as its inspector tells them. Raises: UsageError as `open_plan`."""
    runner = open_plan(path)
    inspector = runner.plan.engine.create_engine_inspector()
    kind = runner.plan.trt.LayerInformationFormat.JSON
    layers = json.loads(inspector.get_engine_information(kind)).get("Layers", [])
    return [layer if isinstance(layer, dict) else {"Name": layer} for layer in layers]


class _Plan:
    """A loaded engine, its context, and captured graphs by input shape."""

    def __init__(self, runtime, path: Path, found: EngineFile, cuda_graph: bool):
        self.trt, self.path, self.found, self.cuda_graph = runtime.trt, path, found, cuda_graph
        self.said: list[str] = []
        trt, said = self.trt, self.said

        class Logger(trt.ILogger):
            def __init__(self):
                trt.ILogger.__init__(self)

            def log(self, severity, text):
                if severity <= trt.ILogger.Severity.ERROR:
                    said.append(text)

        self.logger = Logger()
        self.runtime = trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes()) if self.runtime else None
        if self.engine is None:
            raise UsageError(f"{path}: {runtime.words} cannot load it: {'; '.join(said[:3]) or 'it does not say why'}")
        if runtime.ahead_of_time and cuda_graph:  # TensorRT-RTX captures by itself
            config = self.engine.create_runtime_config()
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self.context, self.cuda_graph = self.engine.create_execution_context(config), False
        else:
            self.context = self.engine.create_execution_context()
        self.captured: dict[tuple, tuple] = {}
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.outputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]

    def runner(self) -> Runner:
        shape = lambda n: tuple(None if d < 0 else d for d in self.engine.get_tensor_shape(n))
        return Runner("trt", {"image": shape("image")}, {n: shape(n) for n in self.outputs}, self, self)

    def __call__(self, feeds: dict) -> dict:
        import torch

        image = feeds["image"]
        if self.found.profile and not self.found.profile[0] <= len(image) <= self.found.profile[2]:
            low, _, high = self.found.profile
            raise UsageError(
                f"{self.path} is built for {low} to {high} images a run, these are {len(image)}: build it with another --batch"
            )
        on_gpu = not isinstance(image, np.ndarray)
        x = image.contiguous() if on_gpu else torch.from_numpy(np.ascontiguousarray(image)).cuda()
        out = self._captured(x) if self.cuda_graph else self._enqueue(x, self._empty(x))
        return out if on_gpu else {n: v.cpu().numpy() for n, v in out.items()}

    def _empty(self, x) -> dict:
        import torch

        self.context.set_input_shape("image", tuple(x.shape))
        types = {self.trt.float32: torch.float32, self.trt.int64: torch.int64, self.trt.int32: torch.int32}
        make = lambda n: torch.empty(
            tuple(self.context.get_tensor_shape(n)), dtype=types[self.engine.get_tensor_dtype(n)], device=x.device
        )
        return {n: make(n) for n in self.outputs}

    def _enqueue(self, x, out: dict) -> dict:
        import torch

        self.context.set_tensor_address("image", x.data_ptr())
        for name, value in out.items():
            self.context.set_tensor_address(name, value.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise UsageError(f"{self.path}: the engine failed: {'; '.join(self.said[-3:]) or 'it does not say why'}")
        return out

    def _captured(self, x) -> dict:
        """The work for this shape, replayed on buffers of its own."""
        import torch

        if tuple(x.shape) not in self.captured:
            still, graph = x.clone(), torch.cuda.CUDAGraph()
            out = self._empty(still)
            self._enqueue(still, out)  # what is allocated at the first run is not captured
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                self._enqueue(still, out)
            self.captured[tuple(x.shape)] = graph, still, out
        graph, still, out = self.captured[tuple(x.shape)]
        still.copy_(x)
        graph.replay()
        return {n: v.clone() for n, v in out.items()}
