"""What a manifest says of a file: worked out from its provenance and from the opened file, once, when it is bundled."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from ...export import precisions
from ...export.files import weight_files
from ...export.outputs import row_of
from ...export.provenance import KEY, Provenance
from ..files import is_engine
from ..outputs import activation_of
from .folder import entry_of
from .manifest import Builder, DecisionEntry, FileEntry, Manifest, OutputEntry, Preprocessing, ProofEntry, TensorEntry

# Methods that partition tokens by where they stand: without a class token, which keeps them in place, order decides.
BY_POSITION = ("tome", "tofu", "dtem")
# What a file in a precision may differ from what it gave itself when it was bundled, where that is not its output limit.
# Of int8, weights and scales are the same on any runtime and only rounding differs: three times the most that was seen
# between ONNX Runtime and OpenVINO on equal decisions (0.025 and 0.046 on the digits, 0.070 on DINOv2).
OWN_LIMITS = {"int8": 2e-1}


def describe(path: Path, provenance: Provenance, *, runtime: str, has_class_token: bool) -> Manifest:
    """The manifest of a file, its proof still to come.

    Args:
        path: ONNX file or engine.
        provenance: of it.
        runtime: what will run an ONNX file for the proof.
        has_class_token: of the model.
    Raises:
        UsageError: it cannot be run, or has an output that has no rule.
    """
    from ..runners import open_runner

    engine = is_engine(path)
    names = provenance.decisions
    with open_runner(path, runtime, outputs=names) as runner:
        inputs, shapes = dict(runner.inputs), dict(runner.outputs)
    (image, shape), batch = next(iter(inputs.items())), next(iter(inputs.values()))[0]
    pixels = provenance.input
    preprocessing = _preprocessing(provenance, pixels)
    return Manifest(
        version=version("tokexport"),
        kind="engine" if engine else "onnx",
        file=entry_of(path),
        beside=_beside(path, engine),
        inputs=(TensorEntry(image, pixels.partition("-")[0], tuple(shape), _input_words(preprocessing)),),
        outputs=tuple(_output(name, shapes[name], batch, provenance) for name in provenance.outputs),
        preprocessing=preprocessing,
        classes=_n_classes(provenance),
        labels=provenance.labels if len(provenance.labels) == _n_classes(provenance) else (),
        activation=_activation(provenance),
        precision=provenance.precision,
        decisions=decision_entries(provenance),
        ordered=provenance.schedule.method in BY_POSITION and not has_class_token,
        tokens=provenance.schedule.n_tokens,
        proof=ProofEntry(
            FileEntry("proof.safetensors", "", 0), 0, *_runtime_version(path, engine, runtime), photos=True
        ),
        builder=_builder(path) if engine else None,
        provenance=_stored(path, engine),
    )


def decision_entries(provenance: Provenance) -> tuple[DecisionEntry, ...]:
    """Every reduction whose decision the file gives. provenance: of it."""
    from ...export import reducers
    from ..parity.decisions import near_tie_limit

    schedule, entries = provenance.file_schedule, []
    for step in schedule.steps:
        prefix = f"block{step.block}."
        parts = {d.removeprefix(prefix): d for d in provenance.decisions if d.startswith(prefix)}
        if not parts:
            continue
        labels = reducers.get(schedule.method).row_labels(step, schedule.n_prefix)
        entries.append(
            DecisionEntry(
                block=step.block,
                site=step.site,
                n_in=step.n_in,
                n_kept=step.n_kept,
                n_out=step.n_out,
                n_folded=step.n_folded,
                signal=step.signal,
                near_tie=near_tie_limit(provenance.precision, step),
                parts=parts,
                type="int64",
                row_labels=() if step.n_out > step.n_kept or not step.n_folded else labels,
            )
        )
    return tuple(entries)


def _output(name: str, shape: tuple, batch: int | None, provenance: Provenance) -> OutputEntry:
    row, precision = row_of(name), provenance.precision
    limit = 0.0 if row.exact else precisions.get(row.precision or precision).output_limit
    own = 0.0 if row.exact else OWN_LIMITS.get(row.precision or precision, limit)
    last = {
        "classes": provenance.dims["classes"],
        "width": provenance.dims["width"],
        "inputs": provenance.schedule.n_tokens,
    }
    return OutputEntry(
        name=name,
        type="int64" if row.whole else "float32",
        shape=(batch, *shape[1:-1], shape[-1] or last.get(row.axes[-1])),
        meaning=row.meaning,
        kind=name.partition("_")[0],
        exact=row.whole,  # of float32 ones a limit of 0 says the same
        by_row=row.by_row,
        limit=limit,
        own_limit=own,
    )


def _preprocessing(provenance: Provenance, pixels: str) -> Preprocessing:
    p = provenance.preprocess
    return Preprocessing(
        size=p.size,
        mean=p.mean,
        std=p.std,
        interpolation=p.interpolation,
        crop=float(p.crop),
        crop_mode=p.crop_mode,
        channels=provenance.dims["channels"],
        layout="nhwc" if pixels == "uint8-nhwc" else "nchw",
        normalised=pixels == "float32",
    )


def _input_words(p: Preprocessing) -> str:
    what = "(value / 255 - mean) / std" if p.normalised else "pixels, 0 to 255"
    return f"{'RGB' if p.channels == 3 else 'grey'} images, resized and cropped: {what}"


def _n_classes(provenance: Provenance) -> int:
    """Classes of the file's logits; 0 without any."""
    return provenance.dims["classes"] if provenance.pooled == "logits" else 0


def _activation(provenance: Provenance) -> str:
    n_classes = _n_classes(provenance)
    return activation_of(provenance.activation, n_classes) if n_classes else "none"


def _beside(path: Path, engine: bool) -> tuple[FileEntry, ...]:
    if engine:
        from ..tensorrt.sidecar import sidecar

        return (entry_of(sidecar(path)),)
    from ...export.inspection import read_onnx

    return tuple(entry_of(weights) for weights in sorted(weight_files(read_onnx(path), path)))


def _builder(path: Path) -> Builder:
    from ..tensorrt.sidecar import read_sidecar

    engine = read_sidecar(path)
    return Builder(
        engine.builder.name,
        engine.builder.version,
        engine.compute_capability,
        engine.plugin is not None and engine.plugin.embedded,
    )


def _stored(path: Path, engine: bool) -> dict:
    """The provenance as it stands in the file, or in an engine's sidecar."""
    if engine:
        from ..tensorrt.sidecar import sidecar

        return json.loads(sidecar(path).read_text())["provenance"]
    from ...export.inspection import read_onnx

    return json.loads(next(e.value for e in read_onnx(path).metadata_props if e.key == KEY))


def _runtime_version(path: Path, engine: bool, runtime: str) -> tuple[str, str]:
    if engine:
        from ..tensorrt.sidecar import read_sidecar

        builder = read_sidecar(path).builder
        return builder.name, builder.version
    package = "openvino" if runtime == "openvino" else "onnxruntime"
    return runtime, version(package)
