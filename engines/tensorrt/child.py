"""The process in which an engine is built: TensorRT may crash, and then only this process ends.

Reads one `BuildTask` (JSON) from standard input, writes one message (JSON) a line to the descriptor it was started with
as argument: {"phase": [name, parent, steps]}, {"step": [name, done]}, {"done": name}, {"log": [severity, text]}, at
last {"result": {...}} or {"error": [kind, text]}, kind the name of an error type. The engine is written to the task's
path.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from ...export import precisions
from ...export.errors import BuildError, StorageError, UsageError
from ...export.files import is_disk_error
from ...export.graph import calls, stages
from ...export.records import decode, encode
from . import runtime as runtimes
from .process import Built
from .request import BuildRequest, BuildTask
from .sidecar import Tensor

NUMPY_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
}  # where lower case of TensorRT's name is not NumPy's


def main() -> None:
    """Build what standard input asks for. Every way to fail that can be foreseen is one message."""
    channel, lock = os.fdopen(int(sys.argv[1]), "w"), threading.Lock()

    def send(**message):
        with lock:  # builders log from threads of their own
            channel.write(json.dumps(message) + "\n")
            channel.flush()

    try:
        send(result=encode(build(decode(BuildTask, json.load(sys.stdin), name="the task"), send)))
    except (UsageError, BuildError, StorageError) as e:
        send(error=[type(e).__name__, str(e)])
    except OSError as e:
        kind = StorageError if is_disk_error(e) else BuildError
        send(error=[kind.__name__, f"{e.strerror or e} ({e.filename or 'while writing the engine'})"])
    except MemoryError:
        send(error=[BuildError.__name__, "out of memory: give a smaller batch or workspace"])


def build(task: BuildTask, send: Callable) -> Built:
    """Parse, and unless it is a dry run, build and write.

    Args:
        task: what is to be built, and where.
        send: called with what happens meanwhile, as messages of this module.
    Raises:
        BuildError: TensorRT refuses the file or fails. UsageError: the request does not go with the file.
    """
    import time

    request, runtime = task.request, runtimes.load(task.request.builder)
    trt = runtime.trt
    logger = _logger(trt, send)
    builder = trt.Builder(logger)
    if builder is None:
        raise BuildError(f"{runtime.words} {runtime.version} cannot start")
    if task.plugin:
        load_plugin(trt, task.plugin)
    network = builder.create_network(runtime.network_flags())
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(task.onnx):
        raise BuildError(_parse_errors(parser, runtime))
    _check_plugin(network, task)
    _mark(network, request.outputs)
    layers = count_layers(network)
    check_label(count_layers([layer for layer in network if not stages.in_fp32(layer.name)]), request.precision)
    inputs = tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs))
    by_name = {t.name: t for t in (_tensor(network.get_output(i)) for i in range(network.num_outputs))}
    outputs, seconds = tuple(by_name[name] for name in request.outputs), 0.0
    if not task.dry_run:
        config = _config(runtime, builder, network, task, send)
        start = time.perf_counter()
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise BuildError(f"{runtime.words} {runtime.version} could not build the engine; its own words are below")
        Path(task.engine).write_bytes(memoryview(engine))
        if task.new_timing_cache:
            Path(task.new_timing_cache).write_bytes(memoryview(config.get_timing_cache().serialize()))
        seconds = time.perf_counter() - start
    return Built(runtime.version, layers, inputs, outputs, seconds)


def load_plugin(trt, path: str) -> None:
    """Make the nodes of a native library known to this process.

    Args:
        trt: the TensorRT module.
        path: of the library.
    Raises:
        BuildError: TensorRT cannot load it.
    """
    try:
        handle = trt.get_plugin_registry().load_library(path)
    except Exception as e:
        raise BuildError(f"the plugin {path} cannot be loaded: {' '.join(str(e).split())[:300]}") from None
    if handle is None:
        raise BuildError(f"the plugin {path} cannot be loaded: build it again with force")


def _check_plugin(network, task: BuildTask) -> None:
    """Raises: BuildError unless every node TokenReduce has become a layer of the plugin."""
    import onnx

    if task.plugin is None:
        return
    nodes = onnx.load(task.onnx, load_external_data=False).graph.node
    wanted, layers = sum(calls.is_call(n) for n in nodes), sum(layer.type.name == "PLUGIN_V3" for layer in network)
    if layers != wanted:
        raise BuildError(f"the network has {layers} layers of the plugin, the file has {wanted} nodes for it")


def _tensor(tensor) -> Tensor:
    """A network's input or output as a record."""
    kind = tensor.dtype.name
    return Tensor(tensor.name, NUMPY_NAMES.get(kind, kind.lower()), tuple(None if n < 0 else n for n in tensor.shape))


def _config(runtime: runtimes.Runtime, builder, network, task: BuildTask, send: Callable):
    """The builder's configuration for a request."""
    trt, request = runtime.trt, task.request
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt, send)
    (config.set_flag if request.precision == "tf32" else config.clear_flag)(trt.BuilderFlag.TF32)
    if request.opt_level is not None:
        config.builder_optimization_level = request.opt_level
    if request.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace)
    if task.plugin and request.embed_plugin:
        config.plugins_to_serialize = [task.plugin]
    if request.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if runtime.ahead_of_time:
        _set_capabilities(runtime, config, request)
    elif task.new_timing_cache:
        path = Path(task.timing_cache or "")
        config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.is_file() else b""), False)
    if request.profile:
        image = network.get_input(0)
        profile = builder.create_optimization_profile()
        profile.set_shape(image.name, *((n, *tuple(image.shape)[1:]) for n in request.profile))
        config.add_optimization_profile(profile)
    return config


def _set_capabilities(runtime: runtimes.Runtime, config, request: BuildRequest) -> None:
    kinds = [runtime.capabilities[c] for c in request.capabilities] or [runtime.trt.ComputeCapability.CURRENT]
    config.num_compute_capabilities = len(kinds)
    for i, kind in enumerate(kinds):
        if not config.set_compute_capability(kind, i):
            raise BuildError(
                f"{runtime.words} {runtime.version} cannot build for compute capability "
                f"{', '.join(request.capabilities)}"
            )


def _mark(network, outputs: Iterable[str]) -> None:
    """Make values outputs of the network that are none yet. Raises: UsageError for one that it does not have."""
    wanted = set(outputs) - {network.get_output(i).name for i in range(network.num_outputs)}
    for layer in network:
        for i in range(layer.num_outputs):
            if layer.get_output(i).name in wanted:
                wanted.remove(layer.get_output(i).name)
                network.mark_output(layer.get_output(i))
    if wanted:
        raise UsageError(
            f"the network has no {', '.join(sorted(wanted)[:3])}: make the ONNX file again with this version"
        )


def count_layers(network: Iterable) -> dict[str, dict[str, int]]:
    """Layers of a strongly typed network, by kind and the type they give: {"MATRIX_MULTIPLY": {"HALF": 48, ...}, ...}.

    A product of two dequantized values counts as INT8, which is what it runs in.
    """
    counts: dict[str, Counter] = {}
    dequantized = {layer.get_output(0).name for layer in network if layer.type.name == "DEQUANTIZE"}
    for layer in network:
        if layer.num_outputs:
            int8 = layer.type.name == "MATRIX_MULTIPLY" and all(
                layer.get_input(i).name in dequantized for i in range(2)
            )
            counts.setdefault(layer.type.name, Counter())["INT8" if int8 else layer.get_output(0).dtype.name] += 1
    return {kind: dict(types) for kind, types in sorted(counts.items())}


def check_label(layers: dict, precision: str) -> None:
    """Make sure that most matrix products, and the convolution, are in the type that the precision names.

    Args:
        layers: from `count_layers`, of the parts that are not float32 whatever the precision.
        precision: a name of `precisions.TABLE`.
    Raises:
        BuildError: they are not.
    """
    row = precisions.get(precision)
    for kind, wanted in (("MATRIX_MULTIPLY", row.product_type), ("CONVOLUTION", row.tensorrt_type)):
        types = layers.get(kind, {})
        if not types or max(types, key=types.get) != wanted:
            had = ", ".join(f"{n} {t}" for t, n in types.items()) or "none"
            raise BuildError(
                f"the network is not {precision}: of its {kind} layers are {had}, wanted most of them {wanted}"
            )


def _parse_errors(parser, runtime: runtimes.Runtime) -> str:
    """What the parser refuses, by node and the part of the model it comes from."""
    reasons = []
    for i in range(min(parser.num_errors, 5)):
        e = parser.get_error(i)
        name = e.node_name() if hasattr(e, "node_name") else ""
        part = f" ({name.rpartition('/')[0].replace('.', ', ')})" if "/" in name else ""
        reasons.append(f"node {name or e.node()}{part}: {e.desc()}")
    return f"{runtime.words} {runtime.version} cannot parse the file: " + "; ".join(reasons or ["it does not say why"])


def _logger(trt, send: Callable):
    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, text):
            if severity <= trt.ILogger.Severity.WARNING:
                send(log=[severity.name, text])

    return Logger()


def _monitor(trt, send: Callable):
    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase, parent, steps):
            send(phase=[phase, parent, steps])

        def step_complete(self, phase, step):
            send(step=[phase, step + 1])
            return True

        def phase_finish(self, phase):
            send(done=phase)

    return Monitor()


if __name__ == "__main__":
    main()
