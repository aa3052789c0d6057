"""Writing a bundle: the file is verified first, then photos whose decisions are clear are chosen for its proof."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...export.errors import UsageError
from ...export.margins import RowMargins
from ..files import inspect_file
from . import folder as folders
from .decisions import read_fates
from .describe import describe
from .manifest import Manifest, to_text
from .names import NAME, refuse_path
from .proof import to_input

N_IMAGES = 4
CANDIDATES = 8  # photos that are looked at for each one that is taken
PHOTO_SIDE = 2  # photos are stored with a short side of at most so many times the input's
PROOF = "proof.safetensors"


class RefusedError(UsageError):
    """A file that fails `verify` is not bundled; `report` says why."""

    def __init__(self, path: str | Path, report):
        super().__init__(f"{path} is not bundled, since it does not pass verify: {report.summary()}")
        self.report = report


@dataclass(frozen=True)
class Bundle:
    """A bundle that was written.

    Attributes:
        path: of the folder.
        manifest: of it.
        size: bytes.
        photos: those that are in the proof.
        unclear: how many of them have a decision that is a near-tie, on which runtimes may differ.
    """

    path: Path
    manifest: Manifest
    size: int
    photos: tuple[Path, ...]
    unclear: int


class _Run(NamedTuple):
    """What the proof of one photo is made of: the file and the reference on it, under the same decisions."""

    path: Path
    photo: np.ndarray
    values: dict[str, np.ndarray]
    reference: dict[str, np.ndarray]
    margins: list[RowMargins]
    scale: dict[str, float]
    clearness: float


def _silent(stage: str, share: float) -> None:
    """No progress is shown."""


def write_bundle(
    file: str | Path,
    folder: str | Path,
    *,
    images,
    n_images: int = N_IMAGES,
    runtime: str = "ort",
    checkpoint: str | Path | None = None,
    predictor: str | Path | None = None,
    force: bool = False,
    progress: Callable[[str, float], None] = _silent,
) -> Bundle:
    """Write a file, its manifest and its proof into a folder.

    The same arguments give the same bytes on one machine and one set of versions. Photos go into the proof, made
    smaller.

    Args:
        file: ONNX file or engine made by tokexport.
        folder: where the bundle is to be.
        images: photos: files or folders.
        n_images: how many go into the proof, 1 to 64; those whose decisions are clearest, among eight times as many.
        runtime: what runs an ONNX file.
        checkpoint, predictor: where weights and score heads are now; they are checked by hash.
        force: replace a bundle that is there.
        progress: is told what is being done, and the share of it that is done, 0 to 1.
    Returns:
        The bundle.
    Raises:
        UsageError: wrong arguments, or a file without provenance or weights.
        RefusedError: the file does not pass verify; nothing was written.
        StorageError: the disk is full or failed; nothing was left behind.
    """
    from ..images import find_images

    _check(source := Path(file), n_images)
    folder = folders.check_place(folder, force=force)
    provenance = inspect_file(source).provenance
    paths = find_images(images)[: n_images * CANDIDATES]
    weights = {"checkpoint": checkpoint, "predictor": predictor}
    reference = _verified(source, paths, runtime=runtime, weights=weights, progress=progress)
    manifest = describe(source, provenance, runtime=runtime, has_class_token=reference.plain.has_class_token)
    runs = _runs(source, manifest, paths, runtime=runtime, reference=reference, progress=progress)
    runs = _choose(runs, min(n_images, len(paths)))
    progress("writing", 1.0)
    with folders.written_aside(folder) as new:
        manifest = _fill(new, manifest, source.parent, runs)
        size = sum(f.stat().st_size for f in new.iterdir())
    return Bundle(folder, manifest, size, tuple(r.path for r in runs), sum(r.clearness <= 1 for r in runs))


def _verified(source: Path, paths: list[Path], *, runtime: str, weights: dict, progress):
    """The reference of a file. Raises: RefusedError when the file does not pass verify on these photos."""
    from ...export.rebuild import reference_of
    from ..parity.verify import verify

    report = verify(source, paths, runtime=runtime, **weights, progress=progress)
    if not report.passed:
        raise RefusedError(source, report)
    return reference_of(inspect_file(source).provenance, source, **weights)


def _check(source: Path, n_images: int) -> None:
    """Raises: UsageError for a name that cannot be in a bundle, or a number of images that is out of range."""
    if not 1 <= n_images <= 64:
        raise UsageError(f"images in the proof: {n_images}, wanted 1 to 64")
    refuse_path(source.name, source)
    if source.name in (NAME, PROOF):
        raise UsageError(f"{source}: a bundle has a file of its own of that name: rename it")


def _fill(new: Path, manifest: Manifest, source: Path, runs: list[_Run]) -> Manifest:
    """Write a bundle's files into a new folder. source: folder of the file. Returns: the manifest with its proof."""
    for entry in (manifest.file, *manifest.beside):
        shutil.copyfile(source / entry.name, new / entry.name)
    _write_proof(new / PROOF, manifest, runs)
    proof = replace(manifest.proof, file=folders.entry_of(new / PROOF), images=len(runs))
    manifest = replace(manifest, proof=proof)
    (new / NAME).write_text(to_text(manifest), encoding="utf-8")
    folders.check_files(new, manifest)
    return manifest


def _runs(source: Path, manifest: Manifest, paths: list[Path], *, runtime: str, reference, progress) -> list[_Run]:
    """A run for every photo."""
    from ..runners import in_batches, open_runner

    provenance = inspect_file(source).provenance
    inner = tuple(name for step in manifest.decisions for name in step.parts.values())
    runs = []
    with open_runner(source, runtime, outputs=inner) as runner:
        for i, path in enumerate(paths):
            progress("measuring how clear the photos are", i / len(paths))
            photo = _photo(path, manifest)
            values = {"input": to_input(photo, manifest.preprocessing)[None]}
            values |= in_batches(runner, values["input"])
            runs.append(
                _against_reference(
                    path, photo, values=values, manifest=manifest, provenance=provenance, reference=reference
                )
            )
    return runs


def _against_reference(path: Path, photo, values: dict, manifest: Manifest, provenance, reference) -> _Run:
    from ..parity.outputs import kind_of
    from ..parity.sides import read_side, run_with_reach

    plans = read_side(values, provenance).plans if manifest.decisions else None
    result, reach = run_with_reach(reference, values["input"], replay=plans, margins=True)
    wanted = {o.name: result.outputs[o.name].numpy() for o in manifest.outputs}
    scale = {name: float(kind_of(name).scales(value, reach)[0]) for name, value in wanted.items()}
    decided = [m for m, s in zip(result.margins, provenance.file_schedule.steps) if s.n_in > 1]
    clear = [min(m.fate.min(), m.host.min()) / s.near_tie for m, s in zip(decided, manifest.decisions)]
    pixels = np.asarray(photo)
    return _Run(
        path,
        pixels.reshape(*pixels.shape[:2], -1),
        values=values,
        reference=wanted,
        margins=decided,
        scale=scale,
        clearness=float(min(clear, default=np.inf)),
    )


def _photo(path: Path, manifest: Manifest):
    """A photo as it is stored: RGB or grey, its short side at most PHOTO_SIDE times the input's."""
    from ..images import read_image

    image = read_image(path, manifest.preprocessing.channels)
    side = PHOTO_SIDE * max(manifest.preprocessing.size)
    if min(image.size) > side:
        ratio = side / min(image.size)
        image = image.resize([max(1, round(n * ratio)) for n in image.size])
    return image


def _choose(runs: list[_Run], n: int) -> list[_Run]:
    """The n clearest ones, in the order they were given; all that are clear count alike."""
    order = sorted(range(len(runs)), key=lambda i: (-min(runs[i].clearness, 1.0 + 1e-9), i))
    return [runs[i] for i in sorted(order[:n])]


def _write_proof(path: Path, manifest: Manifest, runs: list[_Run]) -> None:
    from safetensors.numpy import save_file

    join = lambda parts: np.concatenate([np.asarray(p) for p in parts])
    tensors = {"input": join(r.values["input"] for r in runs)}
    for i, run in enumerate(runs):
        tensors[f"photo.{i}"] = run.photo
    for o in manifest.outputs:
        kind = np.int64 if o.exact else np.float32
        tensors[f"reference.{o.name}"] = join(r.reference[o.name] for r in runs).astype(kind)
        tensors[f"own.{o.name}"] = join(r.values[o.name] for r in runs).astype(kind)
        tensors[f"scale.{o.name}"] = np.array([r.scale[o.name] for r in runs], np.float32)
    for k, step in enumerate(manifest.decisions):
        fates = [read_fates(r.values, step) for r in runs]
        tensors[f"keep.block{step.block}"] = join(f.keep for f in fates).astype(np.int32)
        tensors[f"host.block{step.block}"] = join(f.host for f in fates).astype(np.int32)
        both = [np.stack([m.numpy() for m in r.margins[k]]) for r in runs]
        tensors[f"margin.block{step.block}"] = np.concatenate(both, 1).astype(np.float32)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
