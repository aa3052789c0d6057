"""The options that say what a file takes and gives."""

from __future__ import annotations

from collections.abc import Callable

import click

from ...export.outputs import DROPPED, PARTS, parse_emission, row_of
from ...export.pixels import INPUTS, input_shape
from ...export.tail import TAILS, check_tail
from .method_options import as_flags

NAMES = ["emit", "sources", "layers", "norm_layers", "layout", "dropped", "input", "tail"]
OPTIONS = (
    click.option("--emit", metavar="PART[,PART]", help="Outputs: " + "; ".join(f"{k}, {v}" for k, v in PARTS.items()) + ". Default: pooled."),
    click.option("--sources", is_flag=True, help="Add sources to --emit."),
    click.option("--layers", metavar="BLOCK[,BLOCK]", help="Tokens and patches of these blocks, e.g. -2 or 2,5,8,11, in the place of the "
                 "last's, without the final norm; outputs tokens_5, sizes_5, ... Blocks count from 0, negative ones from the end."),
    click.option("--norm-layers", is_flag=True, help="Put those through the final norm too."),
    click.option("--layout", type=click.Choice(["nlc", "nchw"]), help="Of patches: [B, N, C] or [B, C, rows, columns]. Default: nlc."),
    click.option("--dropped", type=click.Choice(list(DROPPED)), help="What stands for a patch whose token was dropped: "
                 + "; ".join(f"{k}, {v}" for k, v in DROPPED.items()) + ". Default: last."),
    click.option("--input", type=click.Choice(list(INPUTS)), default="float32", show_default=True, help="What the file takes: normalised "
                 "float32 [B, C, H, W], or pixels, uint8 [B, H, W, C] or uint8-nchw [B, C, H, W]: normalisation is then in the weights."),
    click.option("--tail", type=click.Choice(TAILS), help="What is computed of the last block: full, all of it; class, keys and values of "
                 "all tokens and the rest of prefix tokens alone, which changes no class-token output. Default: full."),
)  # fmt: skip


def output_options(command: Callable) -> Callable:
    """A command with all options that say what a file takes and gives."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def split_outputs(options: dict) -> dict:
    """Take those options out of a command's; what was not typed is left to the library.

    Raises: UsageError when they do not go together.
    """
    values = {name: options.pop(name) for name in NAMES}
    values = {name: value for name, value in values.items() if value is not None}
    with as_flags(NAMES):
        emission = parse_emission(**{name: value for name, value in values.items() if name not in ("input", "tail")})
        check_tail(values.get("tail"), emission)
    return values


def input_words(provenance, batch) -> str:
    """What a file takes, e.g. "image [dynamic, 3, 224, 224]".

    Args:
        provenance: of the file.
        batch: images per run, as typed.
    """
    p = provenance
    axes = ", ".join(map(str, (batch, *input_shape(p.input, p.preprocess, p.dims["channels"]))))
    return f"image [{axes}]" + ("" if p.input == "float32" else f" of {p.input.partition('-')[0]} pixels, 0 to 255")


def output_words(provenance, batch) -> list[str]:
    """What a file gives, a line each: name, shape and meaning.

    Args:
        provenance: of the file.
        batch: images per run, as typed.
    """
    return [f"{name} {_shape(name, provenance, batch)}, {row_of(name).meaning}" for name in provenance.outputs]


def _shape(name: str, provenance, batch) -> str:
    kind, _, block = name.partition("_")
    schedule, emission = provenance.schedule, provenance.emission
    tokens = schedule.tokens_per_block()[int(block)][1] if block else schedule.n_final
    sizes = {"classes": provenance.dims["classes"], "width": provenance.dims["width"], "tokens": tokens}
    sizes |= {"inputs": schedule.n_tokens, "patches": schedule.n_tokens - schedule.n_prefix}
    axes = [str(sizes.get(axis, axis)) for axis in row_of(name).axes]
    if kind == "patches" and emission.layout == "nchw":
        axes = [str(sizes["width"]), "rows", "columns"]
    return f"[{', '.join([str(batch), *axes])}]"
