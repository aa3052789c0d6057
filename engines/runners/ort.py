"""ONNX Runtime, on the CPU and on a GPU: "ort", "ort-cuda", "ort-tensorrt"."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from ...export.errors import UsageError
from .. import nodes
from ..plugin import find_library
from .base import Runner, RunnerOptions
from .table import Runtime

CPU = "CPUExecutionProvider"


def check(runtime: Runtime) -> None:
    """Raises: UsageError when the onnxruntime that is installed was built without the runtime's execution provider."""
    if runtime.provider == CPU:
        return
    import onnxruntime

    if runtime.provider not in onnxruntime.get_available_providers():
        raise UsageError(
            f"{runtime.words} is not in the onnxruntime that is installed: pip uninstall onnxruntime; pip install 'tokexport[gpu]'"
        )


def open_file(path: Path, runtime: Runtime, options: RunnerOptions) -> OrtRunner:
    """An ONNX file in a session. Raises: UsageError for bf16 on the CPU, or when the GPU cannot be used."""
    import onnx
    import onnxruntime as ort

    settings = _settings(options.threads)
    if options.share_weights:  # packed weights are copies, one for each session
        settings.add_session_config_entry("session.disable_prepacking", "1")
    source: str | bytes = str(path)
    model = nodes.prepared(path, native=runtime.library is not None, outputs=options.outputs)
    if runtime.library is not None:
        settings.register_custom_ops_library(str(find_library(runtime.library, needed=True).path))
    if options.outputs or model is not None:
        model = nodes.with_outputs(model or onnx.load(path, load_external_data=False), options.outputs)
        if any(i.external_data for i in model.graph.initializer):
            settings.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
            )
        source = model.SerializeToString()
    try:
        session = ort.InferenceSession(source, settings, providers=list(dict.fromkeys([runtime.provider, CPU])))
    except Exception as e:
        if "bfloat16" not in str(e):
            raise
        raise UsageError(
            f"{path}: ONNX Runtime has no bf16 operators on the CPU: use OpenVINO or TensorRT, or a file in fp16"
        ) from None
    if session.get_providers()[0] != runtime.provider:  # it falls back to the CPU by itself
        raise UsageError(f"{path}: {runtime.words} cannot be used here (no NVIDIA GPU, or its libraries are missing)")
    return OrtRunner(runtime, session)


class OrtRunner(Runner):
    """A session of ONNX Runtime."""

    def __init__(self, runtime: Runtime, session):
        self._session, self._on_gpu = session, runtime.device == "gpu"
        self._names = [o.name for o in session.get_outputs()]
        super().__init__(
            runtime.name,
            runtime.words,
            inputs={v.name: _shape(v.shape) for v in session.get_inputs()},
            outputs={v.name: _shape(v.shape) for v in session.get_outputs()},
            input_types={v.name: "uint8" for v in session.get_inputs() if v.type == "tensor(uint8)"},
        )
        if self._on_gpu:
            self.timed = "one run with input and outputs on the GPU, until the GPU is done, by the host's clock"

    def _run(self, feeds: dict) -> dict:
        return dict(zip(self._names, self._session.run(None, feeds)))

    def _prepared(self, feeds: dict):
        session = self._session
        if not self._on_gpu:
            return lambda: session.run(None, feeds)
        import onnxruntime as ort

        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, "cuda", 0))
        for name in self._names:
            binding.bind_output(name, "cuda", 0)
        return lambda: session.run_with_iobinding(binding)  # waits for the GPU by itself

    def _release(self) -> None:
        self._session = None


def profile(path: Path, images: np.ndarray, *, rounds: int, threads: int) -> dict[str, float]:
    """Milliseconds a run spends in each node, from the session's own profiler.

    Args:
        path: an ONNX file.
        images: [B, 3, H, W] float32.
        rounds: runs, of which the mean is taken; two more come before and are not counted.
        threads: of the processor.
    """
    import onnxruntime as ort

    settings = _settings(threads)
    settings.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        settings.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), settings, providers=[CPU])
        for _ in range(rounds + 2):
            session.run(None, {"image": images})
        events = json.loads(Path(session.end_profiling()).read_text())
    durations: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"] / 1e3)
    return {name: float(np.sum(ms[-rounds:]) / rounds) for name, ms in durations.items()}


def _settings(threads: int):
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    if threads:
        settings.intra_op_num_threads = threads
    return settings


def _shape(dims) -> tuple:
    return tuple(d if isinstance(d, int) and d > 0 else None for d in dims)
