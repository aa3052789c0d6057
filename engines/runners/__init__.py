"""One way to run a file, whatever runs it: open it, look at .inputs and .outputs, run, close."""

from __future__ import annotations

from pathlib import Path

from ...export.errors import UsageError
from .base import AT_ONCE as AT_ONCE
from .base import Runner as Runner
from .base import RunnerOptions as RunnerOptions
from .base import failure
from .base import in_batches as in_batches
from .table import TABLE as TABLE
from .table import Runtime
from .table import names as names
from .table import require as require
from .table import runtime_for as runtime_for

MOST_THREADS = 1024


def open_runner(
    path: str | Path,
    runtime: str = "ort",
    *,
    threads: int = 0,
    outputs: tuple[str, ...] = (),
    batch: int | None = None,
    cuda_graph: bool = False,
    allow_host_code: bool = False,
    share_weights: bool = False,
) -> Runner:
    """Open an ONNX file, or an engine built by `build_engine`, for running.

        with open_runner("vit.onnx") as runner:
            logits = runner.run({"image": images})["logits"]

    Args:
        path: the file.
        runtime: what runs an ONNX file, a name of `TABLE`: "ort" (ONNX Runtime on the CPU), "openvino", "torch" (the
            eager reference the file was made from), "ort-cuda", "ort-tensorrt"; "ort-plugin" and "openvino-plugin" run
            nodes TokenReduce by the library of `tokexport plugin build --cpu`. An engine is run by TensorRT,
            whatever this says.
        threads: of the processor; 0 for the runtime's own choice.
        outputs: inner values to give beside the file's outputs (see `Provenance.decisions`).
        batch: the one batch size that a file with a free batch will be run with; OpenVINO is faster when it knows
            (ToMe DeiT-S, batch 8: 4 %).
        cuda_graph: of engines: capture the work once for each shape and replay it.
        allow_host_code: of engines: run the native code of a plugin that one carries in itself.
        share_weights: of ONNX Runtime on the CPU: read weights where their file lies instead of packing them; files of one ladder
            then share the memory of one, and each is some hundredths slower.
    Returns:
        A `Runner`; close it, or use it in a `with` block.
    Raises:
        UsageError: there is no such file or runtime, or the file is not for this machine.
        MissingPackageError: the runtime is not installed.
        EngineError: the runtime failed to load the file.
    """
    if not 0 <= threads <= MOST_THREADS:
        raise UsageError(f"threads {threads}: wanted 1 to {MOST_THREADS}, or 0 for the runtime's own choice")
    path, row = Path(path), runtime_for(path, runtime)
    _check_request(path, row, cuda_graph=cuda_graph, share_weights=share_weights)
    try:
        return row.load().open_file(
            path,
            row,
            RunnerOptions(threads, tuple(outputs), batch, cuda_graph, allow_host_code, share_weights=share_weights),
        )
    except Exception as e:  # runtimes have exception types of their own
        raise failure(path, row, e) from None


def _check_request(path: Path, row: Runtime, *, cuda_graph: bool, share_weights: bool) -> None:
    if cuda_graph and row.reads != "engine":
        raise UsageError(f"{path}: CUDA graphs are of TensorRT engines (.plan)")
    if share_weights and row.name != "ort":
        raise UsageError(
            f"share_weights: {row.words} packs or copies weights for each file; only runtime ort shares them"
        )
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
