"""`tokexport trt`."""

from __future__ import annotations

import re

import click

from ...export import precisions
from ...export.errors import UsageError

UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _precision_flags(function):
    """A flag a precision: --fp32, --tf32, ..."""
    for name, row in reversed(precisions.TABLE.items()):
        more = "; needs --calib" if row.product_type == "INT8" else ""
        function = click.option(f"--{name}", is_flag=True, help=f"{row.help[0].upper()}{row.help[1:]}{more}.")(function)
    return function


FLAGS = {name.replace("-", "_"): name for name in precisions.TABLE}  # as click calls the parameters


@click.command("trt")
@click.argument("file")
@click.option("-o", "--output", metavar="PLAN", help="Default: the file's name with .plan.")
@_precision_flags
@click.option(
    "--calib", multiple=True, metavar="IMAGES", help="Files or folders that --int8 is calibrated on; repeatable."
)
@click.option(
    "--builder",
    default="auto",
    show_default=True,
    metavar="auto|rtx|tensorrt",
    help="auto: TensorRT where it and a GPU are there, else TensorRT-RTX.",
)
@click.option(
    "--compute-capability", metavar="86,89,120", help="TensorRT-RTX: GPUs the engine is for; needs none of them here."
)
@click.option("--batch", metavar="MIN:BEST:MAX", help="Batch sizes of a file with a dynamic batch.  [default: 1:8:32]")
@click.option(
    "--timing-cache",
    metavar="FILE",
    help="TensorRT: a file of what was measured in builds before, read and written anew.",
)
@click.option(
    "--opt-level", type=int, metavar="0-5", help="How long the builder may search; default the builder's own."
)
@click.option("--workspace", metavar="4GiB", help="Most GPU memory for scratch; default the builder's own choice.")
@click.option("--version-compatible", is_flag=True, help="TensorRT: an engine for later versions too.")
@click.option(
    "--decisions", is_flag=True, help="The engine gives the merge decisions too, so that verify can judge them."
)
@click.option(
    "--plugin",
    is_flag=True,
    help="Nodes TokenReduce of the file run as the plugin (`tokexport plugin build`), not as plain operators.",
)
@click.option("--embed-plugin", is_flag=True, help="With --plugin: the engine carries the library in itself.")
@click.option("--dry-run", is_flag=True, help="Parse and report only; needs no GPU.")
@click.option("--force", is_flag=True, help="Replace the engine.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
def command(file, output, calib, compute_capability, batch, workspace, as_json, **options):
    """Build a TensorRT engine from FILE, made by `tokexport onnx`; PLAN.json beside it says what it is.

    tokexport trt vit.onnx --fp16 --compute-capability 86,89
    """
    from ...engines.tensorrt.build import build_engine
    from ..show.terminal import bar, console, print_json

    flags = {name: options.pop(name) for name in list(options) if name in FLAGS}
    out = console()
    with bar(out) as progress:
        result = build_engine(
            file,
            output,
            precision=_one(flags),
            capabilities=_capabilities(compute_capability),
            profile=_sizes(batch),
            calibration=list(calib),
            workspace=_bytes(workspace),
            progress=progress,
            **options,
        )
    if as_json:
        print_json(_data(result))
    else:
        _print(out, result)


def _capabilities(text: str | None) -> tuple[str, ...]:
    """ "8.6,sm120" -> ("86", "120")."""
    parts = () if text is None else text.split(",")
    return tuple(part.strip().lower().removeprefix("sm").replace(".", "") for part in parts)


def _one(flags: dict[str, bool]) -> str | None:
    """The precision that is asked for; None for the file's own. Raises: UsageError for more than one."""
    asked = [FLAGS[flag] for flag, given in flags.items() if given]
    if len(asked) > 1:
        raise UsageError(
            f"{' '.join(f'--{name}' for name in sorted(asked))}: an engine has one precision, give one of them"
        )
    return asked[0] if asked else None


def _sizes(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(p.isascii() and p.isdigit() and len(p) < 6 for p in parts):
        raise UsageError(f"--batch {text!r}: wanted smallest:best:largest, e.g. 1:8:32, or one number for all three")
    return tuple(int(p) for p in (parts * 3)[:3])


def _bytes(text: str | None) -> int:
    if text is None:
        return 0
    match = re.fullmatch(r"(\d{1,12}) ?([A-Za-z]*)", text)
    if not match or match[2] not in UNITS or not 0 < int(match[1]) * UNITS[match[2]] < 2**63:
        raise UsageError(f"--workspace {text!r}: wanted a size, e.g. 4GiB or 512MiB")
    return int(match[1]) * UNITS[match[2]]


def _data(result) -> dict:
    from ...export.records import encode

    return {
        "path": str(result.path),
        "cached": result.cached,
        "seconds": result.seconds,
        "builder": encode(result.builder),
        "layers": result.layers,
        "warnings": list(result.warnings),
        "engine": encode(result.engine) if result.engine else None,
    }


def _print(out, result) -> None:
    from ..show.terminal import engine_lines, layers_words, size_words

    engine, words = result.engine, f"{result.builder.words} {result.builder.version}"
    if engine is None:
        out.print(f"{words} takes the file; nothing was built (--dry-run)", style="bold", markup=False)
        lines = [("layers", layers_words(result.layers)), *(("warning", w) for w in result.warnings)]
    else:
        out.print(str(result.path), style="bold", end="", markup=False)
        what = "identical request: the engine is there already" if result.cached else f"built in {result.seconds:.1f} s"
        out.print(f"  {words}, {engine.precision}, {size_words(engine.size)}, {what}", markup=False)
        lines = engine_lines(engine)
    for title, text in lines:
        out.print(f"  {title:<9}", style="yellow" if title == "warning" else None, end="", markup=False)
        out.print(text, markup=False)
