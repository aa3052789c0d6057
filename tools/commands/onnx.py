"""`tokexport onnx`."""

from __future__ import annotations

import click

from ...export.errors import UsageError
from ...export.reducers import METHODS
from .model_options import file_stem, load, model_options, split


@click.command("onnx")
@model_options
@click.option("--method", type=click.Choice(METHODS), default="tome", show_default=True, help="How tokens are reduced.")
@click.option(
    "--r", metavar="R", help="ToMe: tokens merged per block: 13, 13:-1 (r:inflection) or 8,8,4,... (one a block)."
)
@click.option(
    "--keep-rate",
    metavar="RATE",
    help="EViT, eTPS, dTPS, DynamicViT: share of tokens kept, or a list, one a stage; default 0.7. "
    "A list for dTPS and DynamicViT holds shares of all patches.",
)
@click.option("--at", metavar="BLOCKS", help="The same: blocks with a reduction, from 0; default 3,6,9.")
@click.option("--fuse/--no-fuse", default=None, help="EViT: the tokens left out become one; default on.")
@click.option(
    "--rates",
    metavar="NAME|FILE",
    help="DiffRate: a published list (tokexport rates), e.g. deit_small@2.9, or a JSON file.",
)
@click.option(
    "--prop-attn/--no-prop-attn",
    default=None,
    help="ToMe, DiffRate: proportional attention, default on; off for ToMe on MAE-trained models and on models trained with ToMe.",
)
@click.option(
    "--pool",
    type=click.Choice(["size", "mean"]),
    help="ToMe, DiffRate: weigh an average pool by token size, or not; "
    "default by size for models that pool like MAE's, as the authors do.",
)
@click.option(
    "--score",
    type=click.Choice(["class", "mean"]),
    help="EViT, eTPS, DiffRate: sort by the attention the class token pays "
    "(default), or by the mean attention received (a substitute, for models without a class token).",
)
@click.option("--batch", default="dynamic", show_default=True, metavar="N|dynamic", help="Images per run.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    default="fp32",
    show_default=True,
    help="Of the trunk; decisions, sizes and merging, input and outputs stay fp32. int8: linear layers, the rest fp16.",
)
@click.option(
    "--calib", multiple=True, metavar="IMAGES", help="Files or folders that int8 is calibrated on; repeatable."
)
@click.option("--opset", default=20, show_default=True, help="ONNX opset, 20 to 23.")
@click.option("--simplify/--no-simplify", default=True, show_default=True, help="Let onnxsim look at the graph too.")
@click.option(
    "--sources",
    is_flag=True,
    help="Add output sources [B, N0]: the final row of every input token, -1 when it is gone.",
)
@click.option("-o", "--output", metavar="FILE", help="Default: MODEL.METHOD.onnx in this directory.")
@click.option("--force", is_flag=True, help="Replace the output file.")
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON on stdout.")
def command(
    method,
    batch,
    dtype,
    calib,
    opset,
    simplify,
    sources,
    output,
    force,
    as_json,
    **options,
):
    """Export a ViT, reduced or not, to a static ONNX file.

    tokexport onnx --method tome --r 13 -o vit.onnx
    """
    from ...export.files import check_output
    from ..show.terminal import console, print_json, stages

    images, (which, options) = _batch(batch), split(options)
    checkpoint, predictor = which["checkpoint"], which["predictor"]
    if bool(calib) != (dtype == "int8"):
        raise UsageError(
            f"--dtype {dtype}: "
            + (
                "--calib goes with --dtype int8: leave it out"
                if calib
                else "wanted --calib IMAGES too, a folder of some tens of images like those the model will see"
            )
        )
    path = check_output(f"{file_stem(which)}.{method}.onnx" if output is None else output, force, [checkpoint, predictor, *calib])
    out = console()
    with stages(out) as progress:
        progress("loading torch")
        from ...export.models import vit
        from ...export.graph import export as onnx_export
        from ...export import reducers
        from ...export.schedule import Schedule

        reducers.check_options(method, {k: v for k, v in options.items() if v is not None})
        if predictor and "head" not in getattr(reducers.get(method), "NEEDS", ()):
            raise UsageError(f"--predictor goes with --method dtps, dynamicvit, not with {method}")
        progress("loading the model")
        loaded = load(which)
        model = loaded.module
        schedule = Schedule.parse(
            method=method,
            depth=len(model.blocks),
            n_tokens=vit.n_tokens(model),
            n_prefix=model.num_prefix_tokens,
            **options,
        )
        export = lambda to, dtype: onnx_export.export_onnx(
            loaded, schedule, to, images, opset, simplify, sources, force, dtype, progress
        )
        result = _int8(export, calib, path, force, progress) if dtype == "int8" else export(path, dtype)
    notes = [*loaded.notes, *schedule.notes]
    if "head" in getattr(reducers.get(method), "NEEDS", ()) and not loaded.heads:
        notes.append("the score heads are random too (same seed): give --predictor FILE, or a checkpoint that has them")
    if as_json:
        print_json(_data(result, notes))
    else:
        _print(out, result, notes, batch)


def _int8(export, calib, path, force: bool, progress):
    """The fp32 file is made aside and quantised to path."""
    import tempfile
    from dataclasses import replace
    from pathlib import Path

    from ...engines.images import find_images
    from ...engines.quantize import quantize
    from ...export.inspection import inspect

    find_images(list(calib))  # known before the export
    with tempfile.TemporaryDirectory(prefix=".tokexport-", dir=path.parent) as aside:
        result = export(Path(aside) / path.name, "fp32")
        quantize(result.path, list(calib), path, force, progress)
    made = inspect(path)
    return replace(result, path=path, provenance=made.provenance, nodes=sum(made.ops.values()), size=made.size)


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
        "nodes": result.nodes,
        "size": result.size,
        "outputs": list(p.outputs),
        "preprocess": asdict(p.preprocess),
        "activation": p.activation,
        "weights": p.weights,
        "notes": notes,
    }


def _print(out, result, notes, batch) -> None:
    from ...export.preprocess import words
    from ..show.terminal import macs_words, size_words, tokens_words

    p = result.provenance
    h, w = p.preprocess.size
    out.print(str(result.path), style="bold", end="", markup=False)
    out.print(f"  {p.model}, {p.schedule.method}, batch {batch}, {p.precision}, opset {p.opset}", markup=False)
    out.print(f"  tokens   {tokens_words(p.schedule.n_tokens, result.tokens)}")
    out.print(f"  MACs     {macs_words(result.macs, result.macs_dense)}")
    out.print(
        f"  graph    {result.nodes} nodes, {size_words(result.size)}; input image [{batch}, {p.dims['channels']}, {h}, {w}], "
        f"output {', '.join(p.outputs)}",
        markup=False,
    )
    out.print(f"  photos   {words(p.preprocess)}", markup=False)
    for note in notes:
        out.print("  note     ", style="yellow", end="", markup=False)
        out.print(note, markup=False)
