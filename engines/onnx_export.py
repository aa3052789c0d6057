"""A model to an ONNX file in any precision that a file can be in: int8 takes a run over photos, which the exporter itself cannot do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Sequence

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

    quantised = precisions.get(dtype).product_type == "INT8"
    if quantised != bool(calibration):
        wanted = "wanted calib too, some tens of images like those the model will see" if quantised else "leave calib out"
        raise UsageError(f"dtype {dtype}: {wanted}")
    if not quantised:
        return export(loaded, schedule, path, dtype=dtype, force=force, progress=progress, **options)
    from .images import find_images
    from .quantize import quantize

    photos, path = find_images(calibration), check_output(path, force)  # known before the export
    with aside_folder(path.parent, f"output {path}") as folder:
        result = export(loaded, schedule, folder / path.name, progress=progress, **options)
        inspection = quantize(result.path, path, calibration=photos, force=force, progress=progress)
    return replace(
        result,
        path=path,
        provenance=inspection.provenance,
        nodes=sum(inspection.ops.values()),
        size=inspection.size,
    )
