"""Engines of TensorRT and TensorRT-RTX: PyTorch allocates on the GPU; what is there already is not copied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...export.errors import EngineError, MissingPackageError, UsageError
from ...export.files import sha256_of
from ..plugin import find_library
from ..tensorrt import runtime as builders
from ..tensorrt.sidecar import EngineFile, read_sidecar
from .base import Runner, RunnerOptions
from .table import ENGINES, TABLE, Runtime, installed


def check(runtime: Runtime) -> None:
    """Raises: MissingPackageError without any TensorRT, UsageError when there is no GPU or PyTorch cannot use it."""
    if not any(installed(package) for package, *_ in builders.PACKAGES.values()):
        raise MissingPackageError("tensorrt or tensorrt_rtx", "rtx", runtime.words)
    if not builders.gpus():
        raise UsageError("there is no NVIDIA GPU here")
    _check_torch("engines")


def open_file(path: Path, runtime: Runtime, options: RunnerOptions) -> EngineRunner:
    """An engine built by `build_engine`, ready to run on the GPU that is current in PyTorch.

    Args:
        path: the engine; its sidecar lies beside it.
        runtime: the table's row.
        options: `outputs` an engine has only when it was built with them (decisions); `threads` and `batch` are not
            for engines.
    Raises:
        UsageError: there is no GPU or another one, the runtime is of another version, or an output is not there.
        MissingPackageError: the TensorRT that built it, or PyTorch, is not installed.
        EngineError: the engine does not load.
    """
    sidecar = read_sidecar(path)
    name, words = sidecar.builder.name, sidecar.builder.words
    missing = [o for o in options.outputs if o not in sidecar.output_names]
    if missing:
        raise UsageError(
            f"{path} does not give the merge decisions ({missing[0]}, ...): build it with `tokexport trt --decisions`"
        )
    builders.choose(name)
    _check_gpu(path, sidecar, words)
    builder = builders.load(name)
    if builder.version != sidecar.builder.version:
        raise UsageError(
            f"{path} was built by {words} {sidecar.builder.version}, here is {builder.version}: build it again"
        )
    return EngineRunner(path, sidecar, builder, cuda_graph=options.cuda_graph, allow_host_code=options.allow_host_code)


def layer_information(path: Path) -> list[dict]:
    """The engine's layers as its inspector tells them. Raises: UsageError, EngineError as `open_file`."""
    with open_file(path, TABLE[ENGINES], RunnerOptions()) as runner:
        return runner.layers()


class _Capture(NamedTuple):
    """A captured run: the graph, and the buffers it reads and writes."""

    graph: object
    image: object
    outputs: dict


class EngineRunner(Runner):
    """A deserialised engine, its context, and captured graphs by input shape.

    Args:
        path: of the engine.
        sidecar: what the engine is.
        builder: the TensorRT that runs it.
        cuda_graph: capture the work once for each shape and replay it.
        allow_host_code: run native code that the engine carries in itself.
    """

    timed = "the engine alone, input and outputs on the GPU, between two CUDA events"

    def __init__(
        self, path: Path, sidecar: EngineFile, builder, *, cuda_graph: bool = False, allow_host_code: bool = False
    ):
        self._allow_host_code = allow_host_code
        self._path, self._trt, self._profile, self._plugin = path, builder.trt, sidecar.profile, sidecar.plugin
        self._cuda_graph, self._captures, self._messages = cuda_graph, {}, []
        self._stream = self._context = self._engine = self._runtime = None
        try:
            self._load(builder)
            names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
            output = self._trt.TensorIOMode.OUTPUT
            byte_inputs = [n for n in names if self._engine.get_tensor_dtype(n) == getattr(self._trt, "uint8", None)]
            shapes = {n: tuple(None if d < 0 else d for d in self._engine.get_tensor_shape(n)) for n in names}
            results = [n for n in names if self._engine.get_tensor_mode(n) == output]
        except BaseException:
            self._release()
            raise
        super().__init__(
            ENGINES,
            builder.words,
            inputs={n: shape for n, shape in shapes.items() if n not in results},
            outputs={n: shapes[n] for n in results},
            input_types=dict.fromkeys(set(byte_inputs) - set(results), "uint8"),
        )

    def _load(self, builder) -> None:
        """Runtime, engine and context, each looked at: TensorRT gives None where it fails."""
        import torch

        trt, messages = self._trt, self._messages

        class Logger(trt.ILogger):
            def __init__(self):
                trt.ILogger.__init__(self)

            def log(self, severity, text):
                if severity <= trt.ILogger.Severity.ERROR:
                    messages.append(text)

        self._logger = Logger()
        self._runtime = self._there(trt.Runtime(self._logger), f"{builder.words} does not start")
        self._load_plugin()
        content = self._path.read_bytes()
        self._engine = self._there(self._runtime.deserialize_cuda_engine(content), f"{builder.words} cannot load it")
        if builder.ahead_of_time and self._cuda_graph:  # TensorRT-RTX captures by itself
            config = self._engine.create_runtime_config()
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context, self._cuda_graph = self._engine.create_execution_context(config), False
        else:
            context = self._engine.create_execution_context()
        self._context = self._there(context, "it has no room to run (is the GPU's memory full?)")
        self._stream = torch.cuda.Stream()  # on the default one, TensorRT would wait for the GPU at every run

    def _load_plugin(self) -> None:
        """Native code comes from the cache, or from the engine itself when that carries it; no file names it."""
        if self._plugin is None:
            return
        if self._plugin.embedded:
            if not self._allow_host_code:
                raise UsageError(
                    f"{self._path} carries native code of a plugin in itself, which would run here: if you trust who built it, allow it "
                    f"(allow_host_code)"
                )
            self._runtime.engine_host_code_allowed = True
            return
        library = find_library("tensorrt", needed=True)
        if sha256_of(library.path) != self._plugin.sha256:
            raise UsageError(f"{self._path} was built with another plugin than {library.path}: build the engine again")
        handle = self._trt.get_plugin_registry().load_library(str(library.path))
        self._there(handle, f"the plugin {library.path} cannot be loaded")

    def _there(self, value, words: str):
        """The value, unless it is None. Raises: EngineError with what TensorRT said."""
        if value is None:
            raise EngineError(f"{self._path}: {words}: {self._reason()}")
        return value

    def _reason(self) -> str:
        return "; ".join(self._messages[-3:]) or "TensorRT does not say why"

    def layers(self) -> list[dict]:
        """The layers as the engine's inspector tells them."""
        self._check_open()
        inspector = self._engine.create_engine_inspector()
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        return [layer if isinstance(layer, dict) else {"Name": layer} for layer in json.loads(text).get("Layers", [])]

    def _run(self, feeds: dict) -> dict:
        image = feeds["image"]
        on_gpu = not isinstance(image, np.ndarray)
        x = image.contiguous() if on_gpu else _to_gpu(image)
        outputs = self._replay(x) if self._cuda_graph else self._enqueue(x, self._buffers(x))
        return outputs if on_gpu else {name: value.cpu().numpy() for name, value in outputs.items()}

    def timer(self, feeds: dict) -> Callable[[], float]:
        """Seconds of the engine alone: two events on its stream, around the work on buffers that stay on the GPU."""
        import torch

        self.run(feeds)  # inputs are looked at here, and nowhere below
        image = feeds["image"]
        x = image.contiguous() if not isinstance(image, np.ndarray) else _to_gpu(image)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._cuda_graph:
            graph, outputs = self._capture(x).graph, None
        else:
            graph, outputs = None, self._buffers(x)

        def seconds() -> float:
            self._check_open()
            with torch.cuda.stream(self._stream):
                if graph is None:
                    self._bind(x, outputs)
                start.record(self._stream)
                if graph is None:
                    self._execute(self._stream)
                else:
                    graph.replay()
                end.record(self._stream)
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return seconds

    def _buffers(self, x) -> dict:
        """Tensors for the outputs of an input of this shape. Raises: UsageError when the engine is not built for it."""
        import torch

        if self._profile and not self._profile[0] <= len(x) <= self._profile[2]:
            raise UsageError(
                f"{self._path} is built for {self._profile[0]} to {self._profile[2]} images a run, these are {len(x)}: "
                f"build it with another batch"
            )
        self._set_shape(x)
        trt = self._trt
        types = {trt.float32: torch.float32, trt.int64: torch.int64, trt.int32: torch.int32}
        shape = lambda name: tuple(self._context.get_tensor_shape(name))
        return {
            name: torch.empty(shape(name), dtype=types[self._engine.get_tensor_dtype(name)], device=x.device)
            for name in self.outputs
        }

    def _set_shape(self, x) -> None:
        if not self._context.set_input_shape("image", tuple(x.shape)):
            raise EngineError(
                f"{self._path}: TensorRT refuses images of {' x '.join(map(str, x.shape))}: {self._reason()}"
            )

    def _bind(self, x, outputs: dict) -> None:
        """Tell the context the shape and where input and outputs lie."""
        self._set_shape(x)
        for name, value in {"image": x, **outputs}.items():
            if not self._context.set_tensor_address(name, value.data_ptr()):
                raise EngineError(f"{self._path}: TensorRT refuses the memory of {name!r}: {self._reason()}")

    def _execute(self, stream) -> None:
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise EngineError(f"{self._path}: the engine failed: {self._reason()}")

    def _enqueue(self, x, outputs: dict) -> dict:
        """One run on the engine's stream, between what PyTorch's current stream did before and does next."""
        import torch

        current = torch.cuda.current_stream()
        self._bind(x, outputs)
        self._stream.wait_stream(current)
        self._execute(self._stream)
        current.wait_stream(self._stream)
        return outputs

    def _capture(self, x) -> _Capture:
        """The work for this shape, captured once, on buffers of its own."""
        import torch

        if tuple(x.shape) not in self._captures:
            image, graph = x.clone(), torch.cuda.CUDAGraph()
            outputs = self._buffers(image)
            self._enqueue(image, outputs)  # what is allocated at the first run is not captured
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                self._execute(torch.cuda.current_stream())
            self._captures[tuple(x.shape)] = _Capture(graph, image, outputs)
        return self._captures[tuple(x.shape)]

    def _replay(self, x) -> dict:
        capture = self._capture(x)
        capture.image.copy_(x)
        capture.graph.replay()
        return {name: value.clone() for name, value in capture.outputs.items()}

    def _release(self) -> None:
        """Graphs, context, engine, runtime, in this order, once the GPU is done with them: their memory is free when
        this returns.
        """
        if self._stream is not None:
            self._stream.synchronize()
        self._captures.clear()
        self._context = None
        self._engine = None
        self._runtime = None
        self._stream = None


def _to_gpu(image: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(image)).cuda()


def _check_torch(what: str):
    """PyTorch, which allocates. Raises: MissingPackageError without it, UsageError when it cannot use the GPU."""
    if not installed("torch"):
        raise MissingPackageError("torch", "export", f"running {what}")
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"{what}: PyTorch {torch.__version__} cannot use the GPU here: install a PyTorch with CUDA")
    return torch


def _check_gpu(path: Path, sidecar: EngineFile, words: str) -> None:
    """Raises: UsageError when there is no GPU, PyTorch cannot use it, or the engine is for another."""
    if not builders.gpus():
        raise UsageError(
            f"{path} is an engine of {words} and there is no NVIDIA GPU here: run the ONNX file it was built from"
        )
    torch = _check_torch(str(path))
    here = "".join(map(str, torch.cuda.get_device_capability()))
    if sidecar.compute_capability and here not in sidecar.compute_capability:
        raise UsageError(
            f"{path} is for compute capability {', '.join(sidecar.compute_capability)}, this GPU "
            f"({torch.cuda.get_device_name()}) has {here}: build it with --compute-capability {here}"
        )
