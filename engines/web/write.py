"""The page of a bundle: plain files beside it, without a build step and without anything from elsewhere.

DIR/web/index.html, page.mjs, tokexport.mjs, prove.mjs     the page, and the proof for Node
DIR/web/decisions.pb                                       the file's decisions as outputs, merged into it in memory
DIR/web/ort/                                               onnxruntime-web, out of its npm package
DIR/web/dense.onnx                                         the dense model, where one was given, to be timed against
"""

from __future__ import annotations

import os
import shutil
from importlib.resources import files as package_files
from pathlib import Path

from ...export.errors import UsageError
from ...export.files import aside_folder
from ..bundle.manifest import Manifest, read_manifest

FOLDER, DECISIONS, DENSE = "web", "decisions.pb", "dense.onnx"
PAGE = ("index.html", "page.mjs", "tokexport.mjs", "prove.mjs")
RUNTIME = ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
VARIABLE = "TOKEXPORT_ONNXRUNTIME_WEB"


def find_runtime(folder: str | Path | None = None) -> Path:
    """The files of onnxruntime-web.

    Args:
        folder: of the unpacked npm package; None for what TOKEXPORT_ONNXRUNTIME_WEB names, else
            ~/.cache/tokexport/onnxruntime-web.
    Returns:
        Its folder `dist`.
    Raises:
        UsageError: the package is not there.
    """
    place = Path(folder or os.environ.get(VARIABLE) or Path.home() / ".cache/tokexport/onnxruntime-web")
    for dist in (place / "dist", place / "package/dist", place / "node_modules/onnxruntime-web/dist"):
        if all((dist / name).is_file() for name in RUNTIME):
            return dist
    raise UsageError(
        f"the npm package onnxruntime-web is not in {place}: fetch it there with `npm install --prefix {place} "
        f"onnxruntime-web`, or name its folder ({VARIABLE})"
    )


def add_page(bundle: str | Path, *, runtime: str | Path | None = None, dense: str | Path | None = None) -> Path:
    """Put a page beside a bundle.

    Args:
        bundle: of an ONNX file.
        runtime: folder of onnxruntime-web's npm package, see `find_runtime`.
        dense: ONNX file of the dense model, to be timed against.
    Returns:
        The page's folder.
    Raises:
        UsageError: no bundle, an engine, no onnxruntime-web, or dense is no such file, or one of another tail.
        StorageError: the disk is full or failed; nothing was left behind.
    """
    bundle, manifest = Path(bundle), read_manifest(bundle)
    check_web(manifest.kind == "engine", dense=dense, tail=manifest.provenance.get("tail"))
    dist = find_runtime(runtime)
    with aside_folder(bundle, f"output {bundle / FOLDER}") as aside:
        new = aside / FOLDER
        (new / "ort").mkdir(parents=True)
        for name in PAGE:
            (new / name).write_bytes((package_files(__package__) / "page" / name).read_bytes())
        for name in RUNTIME:
            shutil.copyfile(dist / name, new / "ort" / name)
        (new / DECISIONS).write_bytes(decisions_of(manifest))
        if dense is not None:
            shutil.copyfile(dense, new / DENSE)
        if (bundle / FOLDER).exists():
            (bundle / FOLDER).rename(aside / "old")
        new.rename(bundle / FOLDER)
    return bundle / FOLDER


def check_web(is_engine: bool, *, dense: str | Path | None, tail: str | None = None) -> None:
    """Raises: UsageError when a browser could not run the file, or would time it against one that computes another last block.

    Args:
        is_engine: whether it is an engine.
        dense: ONNX file of the dense model, or None.
        tail: of the file; None where it is not known.
    """
    if is_engine:
        raise UsageError("web: browsers run ONNX files, this is an engine: bundle the ONNX file it was built from")
    if dense is not None and not Path(dense).is_file():
        raise UsageError(f"dense {dense}: no such file: wanted the ONNX file of the dense model")
    other = None if dense is None else _tail_of(Path(dense))
    if tail and other and tail != other:
        raise UsageError(
            f"dense {dense} has tail {other}, the file has {tail}: wanted a dense one exported with tail {tail}"
        )


def _tail_of(dense: Path) -> str | None:
    """What a dense file computes of its last block; None of a file that is not tokexport's."""
    from ...export.inspection import inspect

    try:
        return inspect(dense).provenance.tail
    except UsageError:
        return None


def decisions_of(manifest: Manifest) -> bytes:
    """A piece of an ONNX file that has nothing but outputs: the file's decisions. Behind the file's bytes it is merged."""
    import onnx

    kinds = {"int64": onnx.TensorProto.INT64, "int32": onnx.TensorProto.INT32}
    piece = onnx.ModelProto()
    for step in manifest.decisions:
        for name in step.parts.values():
            piece.graph.output.append(onnx.helper.make_tensor_value_info(name, kinds[step.type], None))
    return piece.SerializeToString()
