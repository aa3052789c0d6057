"""Does a bundle compute here what PyTorch computed where it was made? Needs a runtime and NumPy, neither PyTorch nor
the weights.

The proof holds some photos, the inputs that were made of them, what the reference gave under the file's decisions, what
the file gave itself, and its decisions with the margin of every token (`export/margins`). Each image is judged by
itself: first the input that is made of the photo here, then the decisions in the order of the blocks, then, if they are
equal, the outputs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ...export.errors import MissingPackageError, UsageError
from . import decisions
from .folder import checked_manifest
from .manifest import Manifest, OutputEntry, Preprocessing
from .report import BundleReport, ImageProof, OutputProof

PIXEL = 1.001  # the most a preprocessed photo may differ, in 255ths: one step of a pixel and the rounding of float32


def verify_bundle(folder: str | Path, runtime: str | None = None, *, allow_host_code: bool = False) -> BundleReport:
    """Run the proof of a bundle.

    Args:
        folder: of the bundle.
        runtime: what runs an ONNX file, e.g. "ort" or "openvino"; None for the one it was bundled with, or another that
            is installed. An engine is run by what built it.
        allow_host_code: load an engine that carries native code of a plugin, which then runs here.
    Returns:
        The report; `passed` says whether everything holds.
    Raises:
        UsageError: no bundle, or one that is damaged, incomplete, newer, or names what is not a plain file in its
            folder.
        MissingPackageError: there is nothing to run the file.
        EngineError: the runtime failed.
    """
    from ..runners import in_batches, open_runner

    folder = Path(folder)
    manifest = checked_manifest(folder, allow_host_code=allow_host_code)
    faults = _contradictions(folder, manifest)
    tensors = read_tensors(folder / manifest.proof.file.name, manifest)
    runtime = _runtime(manifest, runtime)
    inner = tuple(name for step in manifest.decisions for name in step.parts.values())
    values = {}
    if not faults:
        with open_runner(
            folder / manifest.file.name, runtime, outputs=inner, allow_host_code=allow_host_code
        ) as runner:
            faults = _misfits(runner, manifest)
            values = {} if faults else in_batches(runner, tensors["input"])
    images, outputs, notes = ((), (), []) if faults else judge(manifest, tensors, values)
    return BundleReport(
        path=str(folder),
        runtime=runtime if manifest.kind == "onnx" else "TensorRT",
        precision=manifest.precision,
        images=images,
        outputs=outputs,
        decisions=bool(manifest.decisions) or manifest.provenance.get("schedule", {}).get("method") == "none",
        faults=tuple(faults),
        notes=tuple(notes),
    )


def _runtime(manifest: Manifest, asked: str | None) -> str:
    """What runs the file. Raises: MissingPackageError when nothing that could is installed."""
    from ..runners import require

    if asked is not None or manifest.kind == "engine":
        return asked or "ort"
    errors = []
    for name in dict.fromkeys((manifest.proof.runtime, "ort", "openvino")):
        try:
            require(name)
            return name
        except MissingPackageError as e:
            errors.append(e)
    raise errors[0]


def _contradictions(folder: Path, manifest: Manifest) -> list[str]:
    """What the file says of itself and the manifest does not, in words."""
    path = folder / manifest.file.name
    if manifest.kind == "engine":
        stored, beside = json.loads((folder / manifest.beside[0].name).read_text()).get("provenance"), set()
    else:
        from ...export.files import weight_files
        from ...export.inspection import read_onnx
        from ...export.provenance import KEY

        model = read_onnx(path)
        stored = next((json.loads(e.value) for e in model.metadata_props if e.key == KEY), None)
        beside = {weights.name for weights in weight_files(model, path)}
    if stored != manifest.provenance:
        return [f"the provenance in {manifest.file.name} is not the manifest's: one of them was changed"]
    foreign = beside - {e.name for e in manifest.beside}
    if foreign:
        raise UsageError(
            f"{path} reads {', '.join(sorted(foreign))[:200]}, which is no file of this bundle: do not trust it"
        )
    pre, own = manifest.preprocessing, stored.get("preprocess", {})
    differ = [
        k
        for k in ("size", "mean", "std", "interpolation", "crop", "crop_mode")
        if _plain(getattr(pre, k)) != _plain(own.get(k))
    ]
    return [f"preprocessing: {', '.join(differ)} of the manifest is not what the file was made for"] if differ else []


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _misfits(runner, manifest: Manifest) -> list[str]:
    """Inputs and outputs that the opened file has otherwise than the manifest says, in words."""
    wanted = {e.name: tuple(e.shape) for e in (*manifest.inputs, *manifest.outputs)}
    shapes = {**runner.inputs, **runner.outputs}
    alike = lambda a, b: len(a) == len(b) and all(None in (x, y) or x == y for x, y in zip(a, b))
    wrong = [name for name, shape in wanted.items() if name not in shapes or not alike(shapes[name], shape)]
    return [f"{', '.join(wrong)}: the file has it otherwise than the manifest says"] if wrong else []


def read_tensors(path: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The tensors of a proof.

    Args:
        path: proof.safetensors.
        manifest: that says what must be in it.
    Returns:
        Name -> array; see docs/bundle.md.
    Raises:
        UsageError: damaged, or a tensor is missing or of another shape or type.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise UsageError(f"{path} cannot be read ({e}): the bundle is damaged, copy it again") from None
    for name, shape, kind in _expected(manifest):
        value = tensors.get(name)
        fits = (
            value is not None and value.ndim == len(shape) and all(w in (None, n) for w, n in zip(shape, value.shape))
        )
        if not fits or value.dtype.kind != kind:
            what = "is missing" if value is None else f"is {value.dtype} {value.shape}"
            raise UsageError(f"{path}: {name} {what}, wanted {shape}: the proof is not of this manifest")
    return tensors


def _expected(manifest: Manifest) -> list[tuple[str, tuple, str]]:
    """Name, shape (None for any) and NumPy's kind of every tensor of a proof."""
    n, image = manifest.proof.images, manifest.inputs[0]
    kinds = {"float32": "f", "uint8": "u"}
    rows = [("input", (n, *image.shape[1:]), kinds.get(image.type, "?"))]
    for o in manifest.outputs:
        rows += [(f"{side}.{o.name}", (n, *o.shape[1:]), "i" if o.exact else "f") for side in ("reference", "own")]
        rows.append((f"scale.{o.name}", (n,), "f"))
    for s in manifest.decisions:
        rows += [(f"keep.block{s.block}", (n, s.n_kept), "i"), (f"host.block{s.block}", (n, s.n_in), "i")]
        rows.append((f"margin.block{s.block}", (2, n, s.n_in), "f"))
    channels = manifest.preprocessing.channels
    return rows + [(f"photo.{i}", (None, None, channels), "u") for i in range(n) if manifest.proof.photos]


def judge(
    manifest: Manifest, tensors: dict, values: dict
) -> tuple[tuple[ImageProof, ...], tuple[OutputProof, ...], list[str]]:
    """Every image and every output.

    Args:
        manifest: of the bundle.
        tensors: of the proof.
        values: what the file gave here, [B, ...].
    Returns:
        Images, outputs and notes.
    """
    n, steps = manifest.proof.images, manifest.decisions
    read = lambda name: [tensors[f"{name}.block{s.block}"] for s in steps]
    stored = [decisions.Fates(keep, host) for keep, host in zip(read("keep"), read("host"))]
    now = [decisions.read_fates(values, s) for s in steps]
    compared = [
        decisions.compare(
            stored, read("margin"), file=now, steps=steps, image=i, tokens=manifest.tokens, ordered=manifest.ordered
        )
        for i in range(n)
    ]
    alike = np.array([c.difference is None for c in compared])
    in_order = alike & ~np.array([c.reordered for c in compared])
    rows, failed = [], np.zeros(n, bool)
    for output in manifest.outputs:
        judged = in_order if output.by_row else alike
        row, beyond = _judge_output(output, values[output.name], tensors, judged)
        rows.append(row)
        failed |= beyond
    pixels = [_pixels(tensors, i, manifest.preprocessing) if manifest.proof.photos else None for i in range(n)]
    failed |= np.array([p is not None and not p <= PIXEL for p in pixels])
    failed |= np.array([c.difference is not None and not c.difference.explained for c in compared])
    verdicts = ["failed" if bad else "equal" if same else "flipped" for bad, same in zip(failed, alike)]
    images = tuple(ImageProof(i, verdicts[i], pixels[i], compared[i].difference) for i in range(n))
    skipped = int((alike & ~in_order).sum())
    by_row = [o.name for o in manifest.outputs if o.by_row]
    notes = (
        [f"{', '.join(by_row)} not compared on {skipped} of {n} images: the tokens stand in another order"]
        if skipped and by_row
        else []
    )
    return images, tuple(rows), notes


def _judge_output(
    output: OutputEntry, value: np.ndarray, tensors: dict, judged: np.ndarray
) -> tuple[OutputProof, np.ndarray]:
    """The row of an output, and which images are beyond its limits [B]."""
    scale = tensors[f"scale.{output.name}"]
    errors = [_errors(value, tensors[f"{side}.{output.name}"], scale, output.exact) for side in ("reference", "own")]
    limits = output.limit, output.own_limit
    beyond = judged & ~((errors[0] <= limits[0]) & (errors[1] <= limits[1]))
    worst = [float(e[judged].max(initial=0.0)) for e in errors]
    return OutputProof(
        output.name, worst[0], limit=limits[0], own_error=worst[1], own_limit=limits[1], n_judged=int(judged.sum())
    ), beyond


def _errors(value: np.ndarray, wanted: np.ndarray, scale: np.ndarray, exact: bool) -> np.ndarray:
    """Largest difference of every image over its scale [B], or the share of wrong entries; infinite if not finite."""
    n = len(wanted)
    if value.shape != wanted.shape:
        return np.full(n, np.inf)
    if exact:
        return (value != wanted).reshape(n, -1).mean(1)
    a, b = (v.reshape(n, -1).astype(np.float64) for v in (value, wanted))
    with np.errstate(invalid="ignore"):
        error = np.abs(a - b).max(1) / np.maximum(scale, 1e-30)
    return np.where(np.isfinite(a).all(1) & np.isfinite(b).all(1) & np.isfinite(scale), error, np.inf)


def _pixels(tensors: dict, i: int, preprocessing: Preprocessing) -> float:
    """Largest difference between the stored input and what is made of the photo here, in 255ths."""
    from PIL import Image

    wanted = tensors["input"][i].astype(np.float64)
    photo = tensors[f"photo.{i}"]
    value = to_input(Image.fromarray(photo if photo.shape[-1] == 3 else photo[..., 0]), preprocessing).astype(
        np.float64
    )
    if value.shape != wanted.shape:
        return float("inf")
    unit = np.reshape(preprocessing.std, (-1, 1, 1)) * 255 if preprocessing.normalised else 1.0
    worst = float(np.abs((value - wanted) * unit).max())
    return worst if np.isfinite(worst) else float("inf")


def to_input(image, preprocessing: Preprocessing) -> np.ndarray:
    """A photo as the file takes it.

    Args:
        image: PIL image, RGB or grey as the model is.
        preprocessing: of the manifest.
    Returns:
        [C, H, W] float32 or uint8, or [H, W, C].
    """
    from ..images import fit, normalise

    cropped = fit(image, preprocessing)
    if preprocessing.normalised:
        return normalise(cropped, preprocessing)
    pixels = np.asarray(cropped).reshape(*preprocessing.size, preprocessing.channels)
    return pixels if preprocessing.layout == "nhwc" else np.ascontiguousarray(pixels.transpose(2, 0, 1))
