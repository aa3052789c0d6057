"""Where an engine spends its time: by the stage of the model each node belongs to, from the engine's own profiler."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from ...export.graph import stages
from ..parity.report import PARTS
from ..runners import OPENVINO

RUNTIMES = ("ort", "openvino")
REST = "rest"


def stage_times(
    path: str | Path, runtime: str, image: np.ndarray, rounds: int = 10, threads: int = 1
) -> dict[str, float]:
    """Milliseconds a run spends in each stage ("embed", "block0.attn", ..., "head"), and in nodes the engine made itself ("rest").

    engine: "ort" or "openvino". image: [B, 3, H, W]. rounds: runs, of which the mean is taken. Profiling itself takes time: compare
    shares, not sums.
    """
    times = {"ort": _onnxruntime, "openvino": _openvino}[runtime](Path(path), image, rounds, threads)
    out: Counter = Counter()
    for name, ms in times.items():
        stage = stages.of_node(name)
        out[stage if stage.rpartition(".")[2] in PARTS else REST] += ms
    return dict(out)


def by_part(times: dict[str, float]) -> dict[str, float]:
    """Stage times summed over blocks: {"attention": ms, ...}."""
    out: Counter = Counter()
    for stage, ms in times.items():
        out[PARTS.get(stage.rpartition(".")[2], REST)] += ms
    return dict(out)


def _onnxruntime(path: Path, image, rounds: int, threads: int) -> dict[str, float]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads, options.enable_profiling = 3, threads, True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(rounds + 2):
            session.run(None, {"image": image})
        events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[str, list] = {}
    for e in events:
        if e.get("cat") == "Node" and e["name"].endswith("_kernel_time"):
            found.setdefault(e["name"].removesuffix("_kernel_time"), []).append(e["dur"] / 1e3)
    return {name: float(np.sum(durations[-rounds:]) / rounds) for name, durations in found.items()}


def _openvino(path: Path, image, rounds: int, threads: int) -> dict[str, float]:
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    model.reshape({0: list(image.shape)})
    compiled = core.compile_model(
        model, "CPU", {**OPENVINO, "INFERENCE_NUM_THREADS": str(threads), "PERF_COUNT": "YES"}
    )
    request, found = compiled.create_infer_request(), Counter()
    for i in range(rounds + 2):
        request.infer({"image": image})
        for node in request.get_profiling_info() if i > 1 else ():
            found[node.node_name] += node.real_time.total_seconds() * 1e3 / rounds
    return dict(found)
