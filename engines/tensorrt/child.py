"""The process in which an engine is built: TensorRT may crash, and then only this process ends.

Reads one request (JSON) from standard input, writes one message (JSON) a line to the descriptor it was started with as argument:
{"phase": [name, parent, steps]}, {"step": [name, done]}, {"done": name}, {"log": [severity, text]}, at last {"result": {...}} or
{"error": text}. The engine is written to the request's "plan".
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Iterable

from ...export.graph import stages
from ...export.errors import UsageError
from . import runtime as runtimes

WANTED = {
    "fp32": "FLOAT",
    "tf32": "FLOAT",
    "fp16": "HALF",
    "bf16": "BF16",
    "int8": "HALF",
}  # int8: of what is not quantised


def main() -> None:
    channel = os.fdopen(int(sys.argv[1]), "w")

    def say(**message):
        print(json.dumps(message), file=channel, flush=True)

    try:
        say(result=build(json.load(sys.stdin), say))
    except UsageError as e:
        say(error=str(e))


def build(request: dict, say) -> dict:
    """Parse, and unless it is a dry run, build and write. Returns layers, whether a profile was set, bytes and seconds."""
    import time

    runtime = runtimes.load(request["runtime"])
    trt = runtime.trt
    logger = _logger(trt, say)
    builder = trt.Builder(logger)
    if builder is None:
        raise UsageError(f"{runtime.words} {runtime.version} cannot start")
    network = builder.create_network(runtime.network_flags())
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        raise UsageError(_parse_errors(parser, runtime))
    _mark(network, request["outputs"])
    layers = count_layers(network)
    check_label(count_layers([layer for layer in network if not stages.in_fp32(layer.name)]), request["precision"])
    found = {"layers": layers, "version": runtime.version, "size": 0, "seconds": 0.0}
    if request["dry_run"]:
        return found
    config = _config(runtime, builder, network, request, say)
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UsageError(f"{runtime.words} {runtime.version} could not build the engine; its own words are below")
    Path(request["plan"]).write_bytes(memoryview(engine))
    if request["timing_cache"] and not runtime.ahead_of_time:
        Path(request["timing_cache"]).write_bytes(memoryview(config.get_timing_cache().serialize()))
    return {**found, "size": engine.nbytes, "seconds": time.perf_counter() - start}


def _config(runtime, builder, network, request: dict, say):
    trt = runtime.trt
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt, say)
    (config.set_flag if request["precision"] == "tf32" else config.clear_flag)(trt.BuilderFlag.TF32)
    if request["opt_level"] is not None:
        config.builder_optimization_level = request["opt_level"]
    if request["workspace"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace"])
    if request["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if runtime.ahead_of_time:
        kinds = [runtime.capabilities[c] for c in request["capabilities"]] or [trt.ComputeCapability.CURRENT]
        config.num_compute_capabilities = len(kinds)
        for i, kind in enumerate(kinds):
            if not config.set_compute_capability(kind, i):
                raise UsageError(
                    f"{runtime.words} {runtime.version} cannot build for compute capability {request['capabilities'][i]}"
                )
    elif request["timing_cache"]:
        path = Path(request["timing_cache"])
        config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.exists() else b""), False)
    if request["profile"]:
        image = network.get_input(0)
        profile = builder.create_optimization_profile()
        profile.set_shape(image.name, *((n, *tuple(image.shape)[1:]) for n in request["profile"]))
        config.add_optimization_profile(profile)
    return config


def _mark(network, outputs: list[str]) -> None:
    """Make values outputs of the network that are none yet. Raises: UsageError for one that it does not have."""
    wanted = set(outputs) - {network.get_output(i).name for i in range(network.num_outputs)}
    for layer in network:
        for i in range(layer.num_outputs):
            if layer.get_output(i).name in wanted:
                wanted.remove(layer.get_output(i).name)
                network.mark_output(layer.get_output(i))
    if wanted:
        raise UsageError(
            f"the network has no {', '.join(sorted(wanted)[:3])}: make the ONNX file again with this version of tokexport"
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
    """Raises: UsageError unless most matrix products, and the convolution, are in the type the precision names.

    layers: from `count_layers`, of the parts that are not float32 whatever the precision.
    """
    for kind, wanted in (
        ("MATRIX_MULTIPLY", "INT8" if precision == "int8" else WANTED[precision]),
        ("CONVOLUTION", WANTED[precision]),
    ):
        types = layers.get(kind, {})
        if not types or max(types, key=types.get) != wanted:
            had = ", ".join(f"{n} {t}" for t, n in types.items()) or "none"
            raise UsageError(
                f"the network is not {precision}: of its {kind} layers are {had}, wanted most of them {wanted}"
            )


def _parse_errors(parser, runtime) -> str:
    """What the parser refuses, by node and the part of the model it comes from."""
    said = []
    for i in range(min(parser.num_errors, 5)):
        e = parser.get_error(i)
        name = e.node_name() if hasattr(e, "node_name") else ""
        part = f" ({name.rpartition('/')[0].replace('.', ', ')})" if "/" in name else ""
        said.append(f"node {name or e.node()}{part}: {e.desc()}")
    return f"{runtime.words} {runtime.version} cannot parse the file: " + "; ".join(said or ["it does not say why"])


def _logger(trt, say):
    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, text):
            if severity <= trt.ILogger.Severity.WARNING:
                say(log=[severity.name, text])

    return Logger()


def _monitor(trt, say):
    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase, parent, steps):
            say(phase=[phase, parent, steps])

        def step_complete(self, phase, step):
            say(step=[phase, step + 1])
            return True

        def phase_finish(self, phase):
            say(done=phase)

    return Monitor()


if __name__ == "__main__":
    main()
