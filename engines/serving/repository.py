"""A Triton model repository from bundles.

A file that takes pixels becomes one model. One that takes normalised images becomes three: NAME, an ensemble of
NAME-prepare (a photo as it lies on disk -> the file's input, by the same code as in Python) and NAME-run (the file).
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path

import numpy as np

from ...export.errors import UsageError
from ...export.files import aside_folder
from .. import images
from ..bundle.folder import checked_manifest, named_folder
from ..bundle.manifest import Manifest
from ..bundle.proof import read_tensors
from .batching import Batching, batching_of, read_latencies
from .config import (
    LABELS,
    PHOTO,
    WARM_UP,
    Backend,
    Instances,
    backend_for,
    ensemble_config,
    model_config,
    preprocess_config,
)
from .kserve import to_yaml
from .pbtxt import to_pbtxt

CONFIG, VERSION, REQUIREMENTS, KSERVE = "config.pbtxt", "1", "requirements.txt", "kserve.yaml"
ROLES = ("prepare", "run")  # behind the name of an ensemble


STORAGE = "pvc://models"
MOST, LARGEST_BATCH = 1024, 65536  # copies and threads; images


@dataclass(frozen=True)
class ServeOptions:
    """How bundles are served.

    Attributes:
        backend: a name of `config.BACKENDS`; None for TensorRT or ONNX Runtime, by the kind of file.
        device: "cpu" or "gpu"; None for the backend's own.
        instances: copies of each model.
        threads: of a runtime on the CPU, 0 for its own choice.
        most: images of a batch at most; None for what the file takes, or what was measured.
        latency: a report of `tokexport bench --json`, by which batches are chosen.
        kserve: also write a manifest for KServe. storage: where it says that the repository is; None for STORAGE.
        allow_host_code: serve an engine that carries native code of a plugin.
        force: replace a repository that is there.
    """

    backend: str | None = None
    device: str | None = None
    instances: int = 1
    threads: int = 0
    most: int | None = None
    latency: str | Path | None = None
    kserve: bool = False
    storage: str | None = None
    allow_host_code: bool = False
    force: bool = False

    def __post_init__(self):
        if not 1 <= self.instances <= MOST or not 0 <= self.threads <= MOST:
            raise UsageError(f"instances {self.instances}, threads {self.threads}: wanted 1 to {MOST}, and 0 to {MOST}")
        if self.most is not None and not 1 <= self.most <= LARGEST_BATCH:
            raise UsageError(f"largest batch {self.most}: wanted 1 to {LARGEST_BATCH} images")
        if self.storage is not None and not self.kserve:
            raise UsageError(
                f"storage {self.storage[:80]!r} is where a KServe manifest says that the repository is: it goes with kserve"
            )
        if self.device not in (None, "cpu", "gpu"):
            raise UsageError(f"device {self.device!r}: wanted cpu or gpu")


@dataclass(frozen=True)
class ServedModel:
    """One bundle in a repository.

    Attributes:
        name: to ask for.
        models: folders it became; the one of this name first.
        input: what to send: "photo" (a file's bytes) or the file's own input.
        backend: that runs the file. batching: of it.
    """

    name: str
    models: tuple[str, ...]
    input: str
    backend: Backend
    batching: Batching

    def to_json(self) -> dict:
        """Plain JSON values."""
        b = self.batching
        return {
            "name": self.name,
            "models": list(self.models),
            "input": self.input,
            "backend": self.backend.name,
            "max_batch_size": b.most,
            "preferred_batch_sizes": list(b.preferred),
            "max_queue_delay_us": b.delay_us,
            "batching": b.origin,
        }


def write_repository(
    bundles: Sequence[str | Path], folder: str | Path, *, options: ServeOptions | None = None
) -> list[ServedModel]:
    """Write a Triton model repository, aside and renamed.

    Args:
        bundles: folders that `tokexport bundle` made; the model is called as its folder.
        folder: of the repository.
        options: see `ServeOptions`.
    Returns:
        What each bundle became, in order.
    Raises:
        UsageError: no bundle or a damaged one, two of one name, options that a file cannot have; nothing was written.
        StorageError: the disk is full or failed; nothing was left behind.
    """
    options, folder = options or ServeOptions(), _check_place(folder, force=(options or ServeOptions()).force)
    if not bundles:
        raise UsageError("bundles: none were given: wanted folders that `tokexport bundle` made")
    plans = [_plan(Path(bundle), options) for bundle in bundles]
    names = [name for plan in plans for name in plan.served.models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"bundles: two become a model {twice[0]!r}: rename the folder of one")
    with aside_folder(folder.parent, f"output {folder}") as aside:
        new = aside / "new"
        new.mkdir()
        for plan in plans:
            _write_models(new, plan, options)
        if any((new / name / VERSION / "model.py").exists() for name in names):
            (new / REQUIREMENTS).write_text(_requirements(plans), encoding="utf-8")
        if options.kserve:
            gpu = any(plan.instances.device == "gpu" for plan in plans)
            cores = sum(plan.instances.count * max(plan.instances.threads, 1) for plan in plans)
            text = to_yaml(folder.name, storage=options.storage or STORAGE, gpu=gpu, cores=cores, models=names)
            (new / KSERVE).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rename(aside / "old")
        new.rename(folder)
    return [plan.served for plan in plans]


@dataclass(frozen=True)
class _Plan:
    bundle: Path
    manifest: Manifest
    served: ServedModel
    instances: Instances


def _check_place(folder: str | Path, *, force: bool) -> Path:
    """The folder, when a repository can be written there. Raises: UsageError."""
    folder = named_folder(folder)
    if folder.is_symlink() or folder.is_file():
        raise UsageError(f"output {folder} is no folder: wanted another name")
    if folder.exists() and any(folder.iterdir()):
        others = [
            p.name for p in folder.iterdir() if p.name not in (REQUIREMENTS, KSERVE) and not (p / CONFIG).is_file()
        ]
        if others:
            raise UsageError(f"output {folder} holds {others[0]!r}, which is no model: wanted another name")
        if not force:
            raise UsageError(f"output {folder} exists: give force to replace it, or another name")
    if not folder.parent.is_dir():
        raise UsageError(f"output {folder}: there is no folder {folder.parent}")
    return folder


def _plan(bundle: Path, options: ServeOptions) -> _Plan:
    """What a bundle becomes. Raises: UsageError when it is none, or the options are not for it."""
    manifest = checked_manifest(bundle, allow_host_code=options.allow_host_code)
    backend = backend_for(manifest, options.backend)
    device = options.device or backend.runs_on
    if device != backend.runs_on and backend.name != "onnxruntime":
        raise UsageError(f"device {device!r}: the backend {backend.name} runs on the {backend.runs_on} here")
    _check_runs(bundle, manifest, backend)
    latencies = read_latencies(options.latency, manifest.file.name, backend.runtime) if options.latency else None
    batch, profile = manifest.inputs[0].shape[0], None
    if manifest.kind == "engine":
        from ..tensorrt.sidecar import read_sidecar

        engine = read_sidecar(bundle / manifest.file.name)
        batch, profile = engine.batch, engine.profile
    batching = batching_of(batch, profile, latencies=latencies, most=options.most)
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", bundle.resolve().name)
    ensemble = manifest.preprocessing.normalised
    models = (name, *(f"{name}-{role}" for role in ROLES)) if ensemble else (name,)
    served = ServedModel(name, models, PHOTO if ensemble else manifest.inputs[0].name, backend, batching=batching)
    return _Plan(bundle, manifest, served, Instances(options.instances, device, options.threads))


def _check_runs(bundle: Path, manifest: Manifest, backend: Backend) -> None:
    """Raises: UsageError for OpenVINO and nodes TokenReduce, which it has no operator for."""
    if backend.name == "openvino":
        import onnx

        if onnx.load(bundle / manifest.file.name, load_external_data=False).functions:
            raise UsageError(
                f"{bundle}: OpenVINO cannot read nodes TokenReduce: turn them back with `tokexport inline`"
            )


def _write_models(new: Path, plan: _Plan, options: ServeOptions) -> None:
    """Write the models of one bundle."""
    manifest, served = plan.manifest, plan.served
    runner = served.models[-1]
    tensors = read_tensors(plan.bundle / manifest.proof.file.name, manifest)
    config = model_config(runner, manifest, backend=served.backend, batching=served.batching, instances=plan.instances)
    place = _model(new, runner, config, labels=manifest.labels)
    for entry in (manifest.file, *manifest.beside):
        if not (manifest.kind == "engine" and entry.name.endswith(".json")):  # an engine's sidecar is of no use there
            shutil.copyfile(plan.bundle / entry.name, place / entry.name)
    if served.backend.name == "python":
        (place / "model.py").write_text(template("run_model.py.in"), encoding="utf-8")
    warm_up = place.parent / WARM_UP
    warm_up.mkdir()
    n = 1 if served.batching.most else int(manifest.inputs[0].shape[0])
    rows = np.resize(np.arange(len(tensors["input"])), n)
    (warm_up / manifest.inputs[0].name).write_bytes(np.ascontiguousarray(tensors["input"][rows]).tobytes())
    if len(served.models) > 1:
        _write_ensemble(new, plan, tensors)


def _write_ensemble(new: Path, plan: _Plan, tensors: dict[str, np.ndarray]) -> None:
    """The model that prepares photos, and the one that is both."""
    manifest, (name, prepare, run), batching = plan.manifest, plan.served.models, plan.served.batching
    config = preprocess_config(prepare, manifest, batching=batching, instances=plan.instances)
    place = _model(new, prepare, config)
    (place / "model.py").write_text(template("prepare_model.py.in"), encoding="utf-8")
    (place / "tokexport_images.py").write_text(image_code(), encoding="utf-8")
    p = manifest.preprocessing
    values = {k: getattr(p, k) for k in ("size", "mean", "std", "interpolation", "crop", "crop_mode")}
    (place / "preprocess.json").write_text(json.dumps(values) + "\n", encoding="utf-8")
    warm_up = place.parent / WARM_UP
    warm_up.mkdir()
    (warm_up / PHOTO).write_bytes(_string(_png(tensors["photo.0"])))
    ensemble = _model(
        new, name, ensemble_config(name, manifest, steps=(prepare, run), batching=batching), manifest.labels
    )
    (ensemble / "empty").write_text("A version of an ensemble is a folder with nothing in it.\n", encoding="utf-8")


def _model(new: Path, name: str, config: dict, labels: tuple[str, ...] = ()) -> Path:
    """The folder of a model's version, its configuration and labels written."""
    place = new / name / VERSION
    place.mkdir(parents=True)
    (place.parent / CONFIG).write_text(to_pbtxt(config), encoding="utf-8")
    if labels:
        lines = [" ".join(label.split()) for label in labels]
        (place.parent / LABELS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return place


def _png(photo: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(photo if photo.shape[-1] == 3 else photo[..., 0]).save(out, "PNG")
    return out.getvalue()


def _string(content: bytes) -> bytes:
    """A tensor of one string as Triton stores it."""
    return len(content).to_bytes(4, "little") + content


def template(name: str) -> str:
    """The code of a model that runs in the server's Python."""
    return (package_files(__package__) / name).read_text(encoding="utf-8")


def image_code() -> str:
    """The code by which photos are read and prepared here, so that it runs without tokexport."""
    text = Path(images.__file__).read_text(encoding="utf-8")
    shims = {
        r"^from \.\.export\.errors import UsageError$": "class UsageError(ValueError):\n    pass\n",
        r"^from \.\.export\.provenance import Preprocess$": "from types import SimpleNamespace as Preprocess",
    }
    for pattern, shim in shims.items():
        text = re.sub(pattern, shim, text, flags=re.MULTILINE)
    return text


def _requirements(plans: list[_Plan]) -> str:
    """What the server's Python needs for the models that are Python, in the versions of here."""
    from importlib.metadata import version

    packages = ["pillow"] + ["onnxruntime"] * any(plan.served.backend.name == "python" for plan in plans)
    return "".join(f"{package}=={version(package)}\n" for package in packages) + "numpy\n"
