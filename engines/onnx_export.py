"""A model to an ONNX file in any precision; int8 takes a run over photos, which the exporter cannot do by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export import precisions
from ..export.errors import UsageError
from ..export.files import aside_folder, check_output
from ..export.schedule import Schedule

if TYPE_CHECKING:
    from ..export.graph.export import ExportResult
    from ..export.models.load import LoadedModel


def export_onnx(
    loaded: LoadedModel,
    schedule: Schedule,
    path: str | Path,
    *,
    dtype: str = "fp32",
    target: str = "portable",
    calibration: str | Path | Sequence[str | Path] = (),
    force: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
    **options: Any,
) -> ExportResult:
    """Write a model under a schedule as an ONNX file that carries its provenance.

    Args:
        loaded: from `load_model`.
        schedule: token counts.
        path: of the file, written aside and renamed.
        dtype: a precision that a file can be in (`precisions.IN_FILES`).
        target: what will run it: "portable" (conventional ONNX, for any tool), "cpu" or "tensorrt"; int8 needs one of the latter.
        calibration: images or folders that int8's scales are measured on; of int8 only.
        force: replace what is at path.
        progress: called with the name of each stage.
        options: further ones of `export.graph.export.export_onnx`: batch, opset, simplify, sources, ...
    Returns:
        What was written.
    Raises:
        UsageError: wrong options, or a path that cannot be written; nothing is written then.
        GraphError, EngineError, StorageError: the export, the quantizer or the disk failed.
    """
    from ..export.graph.export import export_onnx as export

    if not check_precision(dtype, calibration, target=target):
        return export(loaded, schedule, path, dtype=dtype, target=target, force=force, progress=progress, **options)
    from .images import find_images
    from .quantize import quantize

    photos, path = find_images(calibration), check_output(path, force)  # known before the export
    with aside_folder(path.parent, f"output {path}") as folder:
        result = export(loaded, schedule, folder / path.name, progress=progress, **options)
        inspection = quantize(result.path, path, calibration=photos, target=target, force=force, progress=progress)
    return replace(
        result,
        path=path,
        provenance=inspection.provenance,
        nodes=sum(inspection.ops.values()),
        size=inspection.size,
    )


def check_precision(dtype: str, calibration: str | Path | Sequence[str | Path], *, target: str) -> bool:
    """Whether a precision takes a run over images.

    Args:
        dtype: name of a precision.
        calibration: the images; they are not looked at.
        target: what the file is written for.
    Raises:
        UsageError: there is no such precision in files, or it does not go with the images or the target.
    """
    row = precisions.get(dtype)
    if not row.in_file:
        raise UsageError(
            f"dtype {dtype}: no file is in it, an engine may be: wanted one of {', '.join(precisions.IN_FILES)}"
        )
    quantised = row.product_type == "INT8"
    if quantised != bool(calibration):
        wanted = (
            "wanted calib too, some tens of images like those the model will see" if quantised else "leave calib out"
        )
        raise UsageError(f"dtype {dtype}: {wanted}")
    if quantised and target not in ("cpu", "tensorrt"):
        raise UsageError(
            f"dtype {dtype} for {target}: wanted for cpu or for tensorrt (target): no one form runs in int8 on both. Runtimes on CPUs "
            f"fall back to floats where a bias is inside a quantised product or the rest is fp16, TensorRT wants both"
        )
    return quantised
