"""`tokexport onnx`."""

from __future__ import annotations

import click

from ...export import reducers
from ...export.errors import UsageError
from ...export.plan import SIGNALS
from ...export.provenance import TARGETS
from .method_options import as_flags, method_options
from .model_options import file_stem, load, model_options, split
from .output_options import input_words, output_options, output_words, split_outputs


@click.command("onnx")
@model_options
@click.option(
    "--method",
    type=click.Choice(list(reducers.TABLE)),
    default=reducers.DEFAULT,
    show_default=True,
    help="How tokens are reduced: " + "; ".join(f"{r.name}, {r.help}" for r in reducers.TABLE.values()) + ".",
)
@method_options
@click.option("--batch", default="dynamic", show_default=True, metavar="N|dynamic", help="Images per run.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    default="fp32",
    show_default=True,
    help="Of the trunk; decisions, sizes and merging, input and outputs stay fp32. int8: linear layers; needs --for.",
)
@click.option(
    "--for",
    "target",
    type=click.Choice(TARGETS),
    default="portable",
    show_default=True,
    help="What the file is written for: portable, conventional ONNX for any tool; cpu, ONNX Runtime and OpenVINO; tensorrt.",
)
@click.option(
    "--calib", multiple=True, metavar="IMAGES", help="Files or folders that int8 is calibrated on; repeatable."
)
@click.option("--opset", default=20, show_default=True, help="ONNX opset, 17 to 23.")
@click.option("--simplify/--no-simplify", default=True, show_default=True, help="Let onnxsim look at the graph too.")
@output_options
@click.option(
    "--plugin",
    is_flag=True,
    help="Write every reduction as one node, TokenReduce, its operators beside it as a function: a runtime with the "
    "native library (`tokexport plugin`) runs that, any other the operators.",
)
@click.option("-o", "--output", metavar="FILE", help="Default: MODEL.METHOD.onnx in this directory.")
@click.option("--force", is_flag=True, help="Replace the output file.")
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON on stdout.")
def command(method, batch, dtype, target, calib, output, force, as_json, **options):
    """Export a ViT, reduced or not, to a static ONNX file.

    tokexport onnx --method tome --r 13 -o vit.onnx
    """
    from ...engines.onnx_export import check_precision
    from ...export.files import check_output
    from ..show.terminal import console, print_json, stages

    images, asked = _batch(batch), split_outputs(options)
    asked |= {name: options.pop(name) for name in ("opset", "simplify", "plugin")}
    model, options = split(options)
    check_precision(dtype, calib, target=target)
    inputs = [model["checkpoint"], model["predictor"], *calib]
    path = check_output(f"{file_stem(model)}.{method}.onnx" if output is None else output, force, inputs)
    out = console()
    with stages(out) as progress:
        progress("loading torch")
        from ...engines.onnx_export import export_onnx

        learned = _check_method(method, options, model["predictor"])
        progress("loading the model")
        loaded = load(model)
        with as_flags(options):
            schedule = loaded.schedule(method, **options)
        with as_flags((*options, *asked, "dtype", "batch", "predictor")):
            result = export_onnx(
                loaded,
                schedule,
                path,
                dtype=dtype,
                target=target,
                calibration=calib,
                force=force,
                progress=progress,
                batch=images,
                **asked,
            )
    notes = [*loaded.notes, *schedule.notes]
    if learned and not loaded.heads:
        notes.append(
            "the layers trained for the method are random too (same seed): give --predictor FILE, or a checkpoint that has them"
        )
    if as_json:
        print_json(_data(result, notes))
    else:
        _print(out, result, notes, batch)


def _check_method(method: str, options: dict, predictor: str | None) -> bool:
    """Options and --predictor are for this method. Returns: it reads trained layers."""
    with as_flags(options):
        reducers.check_names(method, {name: value for name, value in options.items() if value is not None})
    learned = [name for name, r in reducers.TABLE.items() if any(SIGNALS[signal].learned for signal in r.signals)]
    if predictor and method not in learned:
        raise UsageError(f"--predictor goes with --method {', '.join(learned)}, not with {method}")
    return method in learned


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(f"--batch {text!r}: wanted a number of images, 1 or more, or dynamic")
    if len(text) > 5:
        raise UsageError(f"--batch {text[:40]}: more images than one run can hold; wanted at most 99999, or dynamic")
    return int(text)


def _data(result, notes) -> dict:
    from dataclasses import asdict

    p = result.provenance
    return {
        "path": str(result.path),
        "method": p.schedule.method,
        "model": p.model,
        "tokens": result.tokens,
        "macs": result.macs,
        "macs_dense": result.macs_dense,
        "macs_executed": result.macs_executed,
        "nodes": result.nodes,
        "size": result.size,
        "target": p.target,
        "outputs": list(p.outputs),
        "emission": asdict(p.emission),
        "input": p.input,
        "tail": p.tail,
        "preprocess": asdict(p.preprocess),
        "activation": p.activation,
        "weights": p.weights,
        "notes": notes,
    }


def _print(out, result, notes, batch) -> None:
    from ...export.preprocess import words
    from ..show.terminal import macs_words, size_words, tail_words, tokens_words

    p = result.provenance
    out.print(str(result.path), style="bold", end="", markup=False)
    out.print(
        f"  {p.model}, {p.schedule.method}, batch {batch}, {p.precision}, for {p.target}, opset {p.opset}", markup=False
    )
    out.print(f"  tokens   {tokens_words(p.schedule.n_tokens, result.tokens)}")
    out.print(f"  MACs     {macs_words(result.macs, result.macs_dense, result.macs_executed)}")
    if p.tail == "class":
        out.print(f"  tail     {tail_words(p)}", markup=False)
    out.print(
        f"  graph    {result.nodes} nodes, {size_words(result.size)}; input {input_words(p, batch)}", markup=False
    )
    for line in output_words(p, batch):
        out.print(f"  output   {line}", markup=False)
    out.print(f"  photos   {words(p.preprocess)}", markup=False)
    for note in notes:
        out.print("  note     ", style="yellow", end="", markup=False)
        out.print(note, markup=False)
