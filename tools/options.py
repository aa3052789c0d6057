"""Options that several commands have: one meaning, one wording."""

from __future__ import annotations

import re

import click

from ..engines.runners.table import TABLE, names
from ..export import reducers
from ..export.errors import UsageError


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


def parse_macs(text: str) -> int:
    """Multiply-accumulates as typed at `--macs`: "2.9G", "350M".

    Raises: UsageError for anything else.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([MG])", text)
    if not match:
        raise UsageError(f"--macs {text[:40]!r}: wanted a number of multiply-accumulates, e.g. 2.9G or 350M")
    return round(float(match[1]) * {"M": 1e6, "G": 1e9}[match[2]])


def parse_sweep(text: str | None):
    """ "r=0,8:-1,13" -> Sweep("r", ("0", "8:-1", "13")); None for None."""
    from ..engines.measure.candidates import Sweep

    if text is None:
        return None
    name, _, values = text.partition("=")
    name, swept = name.replace("-", "_"), reducers.swept()
    values = tuple(dict.fromkeys(v.strip() for v in values.split(",")))
    if name not in swept or not all(values):
        names = " or ".join(f"{o} ({', '.join(reducers.TABLE[m].title for m in ms)})" for o, ms in swept.items())
        raise UsageError(f"--sweep {text[:60]!r}: wanted an option and values, e.g. r=0,8,13; options are {names}")
    return Sweep(name, values)
