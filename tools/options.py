"""Options that several commands have: one meaning, one wording."""

from __future__ import annotations

import click

from ..engines.runners.table import TABLE, names


def runtime_option(default: str = "ort", *, several: bool = False):
    """`--runtime`: what runs an ONNX file; the words come from the table of runtimes.

    Args:
        default: what is taken without the option.
        several: whether it takes names with commas between them.
    """
    words = "; ".join(f"{name}: {TABLE[name].words}" for name in names())
    return click.option(
        "--runtime",
        "runtimes" if several else "runtime",
        default=default,
        show_default=True,
        metavar="NAME[,NAME]" if several else "NAME",
        help=f"What runs an ONNX file ({words}). An engine is run by TensorRT.",
    )
