"""`tokexport inspect`."""

from __future__ import annotations

import click


@click.command("inspect")
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON on stdout.")
def command(file, as_json):
    """Show what FILE, an ONNX file or an engine, is: provenance, tokens per block, MACs, operators, what TensorRT would refuse."""
    from ...engines.files import is_engine
    from ...export.inspection import inspect
    from ..show.terminal import macs_words, print_json, size_words, tokens_words

    if is_engine(file):
        _engine(file, as_json)
        return
    found = inspect(file)
    if as_json:
        print_json(found.to_json())
        return
    p = found.provenance
    _print(
        [
            *_origin(p),
            ("tokens", tokens_words(p.schedule.n_tokens, p.schedule.tokens_per_block())),
            ("MACs", macs_words(found.macs, found.macs_dense)),
            _input(p, found.batch or "dynamic"),
            ("outputs", ", ".join(p.outputs) + (f" ({len(p.labels)} labels)" if p.labels else "")),
            ("file", f"{size_words(found.size)}, opset {p.opset}, {p.precision}, tokexport {p.version}"),
            ("graph", f"{sum(found.ops.values())} nodes: " + ", ".join(f"{n} {k}" for k, n in found.ops.items())),
            ("TensorRT", "nothing it would refuse" if not found.refusals else "REFUSED: " + "; ".join(found.refusals)),
            *(("note", n) for n in p.schedule.notes),
        ]
    )


def _engine(file: str, as_json: bool) -> None:
    """What the sidecar of an engine says."""
    import json
    from dataclasses import asdict

    from ...engines.tensorrt.sidecar import read_sidecar
    from ...export.provenance import Provenance
    from ..show.terminal import engine_lines, print_json, size_words, tokens_words

    e = read_sidecar(file)
    layers = _layers(file)
    if as_json:
        print_json({"path": str(file), **asdict(e), **({"engine_layers": layers} if layers else {})})
        return
    p = Provenance.from_json(json.dumps(e.provenance))
    words = {"rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}.get(e.runtime["name"], e.runtime["name"])
    _print(
        [
            *_origin(p),
            ("tokens", tokens_words(p.schedule.n_tokens, p.schedule.tokens_per_block())),
            _input(p, e.batch or "dynamic"),
            ("outputs", ", ".join(e.outputs)),
            ("engine", f"{words} {e.runtime['version']}, {e.precision}, {size_words(e.size)}, from {e.source}"),
            *engine_lines(e),
            *([("built", f"{len(layers)} layers in the engine")] if layers else []),
        ]
    )


def _layers(file: str) -> list[dict]:
    """The engine's own layers, where it can be loaded; none elsewhere."""
    from pathlib import Path

    from ...engines.tensorrt import runtime as trt
    from ...engines.runners.tensorrt import layer_information
    from ...export.errors import UsageError

    if not trt.gpus():
        return []
    try:
        return layer_information(Path(file))
    except UsageError:
        return []


def _origin(p) -> list[tuple[str, str]]:
    """Model, weights and method of a provenance."""
    weights, s = p.weights, p.schedule
    where = f"seed {weights['seed']}" if weights["source"] == "random" else weights["file"]
    options = ", ".join(f"{k} {_short(v)}" for k, v in s.options.items())
    return [
        ("model", " ".join([p.model, *(f"{k}={v}" for k, v in p.model_kwargs.items())])),
        ("weights", f"{weights['source']} ({where}), SHA-256 {weights['sha256'][:16]}..."),
        ("method", s.method + (f" ({options})" if options else "")),
    ]


def _input(p, batch) -> tuple[str, str]:
    (h, w), pre = p.preprocess.size, p.preprocess
    return (
        "input",
        f"image [{batch}, {p.dims['channels']}, {h}, {w}], mean {_short(pre.mean)}, std {_short(pre.std)}, "
        f"{pre.interpolation}, crop {pre.crop:g} ({pre.crop_mode})",
    )


def _print(lines: list[tuple[str, str]]) -> None:
    from ..show.terminal import console

    out = console()
    for title, text in lines:
        out.print(f"{title:<9}", end="", style="bold")
        out.print(text, markup=False)


def _short(value) -> str:
    if isinstance(value, (list, tuple)):
        same = len(set(value)) == 1 and len(value) > 3
        return (
            f"{value[0]} in each block"
            if same
            else ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
        )
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
