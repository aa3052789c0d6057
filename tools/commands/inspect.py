"""`tokexport inspect`."""

from __future__ import annotations

import click


@click.command("inspect")
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON on stdout.")
def command(file, as_json):
    """Show what FILE (ONNX, an engine, a bundle or a ladder) is: provenance, tokens per block, MACs, operators, what builders refuse."""
    from ...engines.bundle.target import file_of
    from ...engines.files import EngineInspection, inspect_file
    from ...engines.ladder_manifest import is_ladder
    from ..show.terminal import print_json

    if is_ladder(file):
        return _ladder(file, as_json)
    inspection = inspect_file(file_of(file))
    if isinstance(inspection, EngineInspection):
        layers = _layers(file)
        if as_json:
            print_json({**inspection.to_json(), **({"engine_layers": layers} if layers else {})})
        else:
            _print(_engine_lines(inspection.engine, len(layers)))
    elif as_json:
        print_json(inspection.to_json())
    else:
        _print(_file_lines(inspection))


def _ladder(folder: str, as_json: bool) -> None:
    """A ladder's table; every file is looked at."""
    from ...engines.ladder_manifest import folder_of, read_ladder
    from ...export.records import to_document
    from ..show.ladder import print_ladder
    from ..show.terminal import console, print_json

    ladder = read_ladder(folder)
    if as_json:
        print_json({"path": str(folder_of(folder)), **to_document(ladder)})
    else:
        print_ladder(console(), folder_of(folder), ladder)


def _file_lines(inspection) -> list[tuple[str, str]]:
    """What an `Inspection` of an ONNX file says, (title, text) each."""
    from ..show.terminal import macs_words, size_words, tail_words, tokens_words

    p, refusals = inspection.provenance, inspection.refusals
    return [
        *_origin(p),
        ("tokens", tokens_words(p.schedule.n_tokens, p.schedule.tokens_per_block())),
        ("MACs", macs_words(inspection.macs, inspection.macs_dense, inspection.macs_executed)),
        ("tail", tail_words(p)),
        _input(p, inspection.batch or "dynamic"),
        ("outputs", ", ".join(p.outputs) + (f" ({len(p.labels)} labels)" if p.labels else "")),
        (
            "file",
            f"{size_words(inspection.size)}, opset {p.opset}, {p.precision}, for {p.target}, tokexport {p.version}",
        ),
        ("graph", f"{sum(inspection.ops.values())} nodes: " + ", ".join(f"{n} {k}" for k, n in inspection.ops.items())),
        ("engines", "nothing that a builder refuses" if not refusals else "REFUSED: " + "; ".join(refusals)),
        *(("note", note) for note in p.schedule.notes),
    ]


def _engine_lines(engine, n_layers: int) -> list[tuple[str, str]]:
    """What an `EngineFile` says, (title, text) each; n_layers: of the loaded engine, 0 where it cannot be loaded."""
    from ..show.terminal import engine_lines, size_words, tokens_words

    p, builder = engine.provenance, engine.builder
    return [
        *_origin(p),
        ("tokens", tokens_words(p.schedule.n_tokens, p.schedule.tokens_per_block())),
        _input(p, engine.batch or "dynamic"),
        ("outputs", ", ".join(engine.output_names)),
        (
            "engine",
            f"{builder.words} {builder.version}, {engine.precision}, {size_words(engine.size)}, from {engine.source}",
        ),
        *engine_lines(engine),
        *([("built", f"{n_layers} layers in the engine")] if n_layers else []),
    ]


def _layers(file: str) -> list[dict]:
    """The engine's own layers, where it can be loaded; none elsewhere."""
    from pathlib import Path

    from ...engines.runners.tensorrt import layer_information
    from ...engines.tensorrt import runtime as trt
    from ...export.errors import EngineError, UsageError

    if not trt.gpus():
        return []
    try:
        return layer_information(Path(file))
    except (UsageError, EngineError):
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
    from ...export.pixels import input_shape

    pre = p.preprocess
    axes = ", ".join(map(str, (batch, *input_shape(p.input, pre, p.dims["channels"]))))
    kind = p.input.partition("-")[0]
    norm = f"mean {_short(pre.mean)}, std {_short(pre.std)}"
    norm = norm if kind == "float32" else f"pixels as they are ({norm} are inside)"
    return "input", f"image {kind} [{axes}], {norm}, {pre.interpolation}, crop {pre.crop:g} ({pre.crop_mode})"


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
