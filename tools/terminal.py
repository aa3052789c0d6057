"""What people read goes to stderr; `--json` goes to stdout."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager


def console():
    """A rich console on stderr; its progress shows on a terminal only."""
    from rich.console import Console

    terminal = sys.stderr.isatty()
    return Console(stderr=True, highlight=False, soft_wrap=not terminal, width=None if terminal else 140)


@contextmanager
def stages(out):
    """A function that shows the name of the present stage, beside a spinner, until the block ends."""
    with out.status("starting") as status:
        yield lambda stage: status.update(stage)


def print_json(data) -> None:
    """One JSON document on stdout."""
    json.dump(data, sys.stdout, indent=1)
    print()


def size_words(n: int) -> str:
    """12345678 -> "12.3 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n} B"


def tokens_words(tokens: list) -> str:
    """Tokens after each block, from the first: "197 | 184 171 158 ..."."""
    return f"{tokens[0][0]} in, then " + " ".join(str(m) for _, m in tokens)


def macs_words(macs: int, dense: int) -> str:
    """"2.69 G per image (dense 4.58 G, ratio 1.702)"."""
    unit, scale = ("G", 1e9) if dense >= 1e9 else ("M", 1e6)
    return f"{macs / scale:.2f} {unit} per image" + (f" (dense {dense / scale:.2f} {unit}, ratio {dense / macs:.3f})" if macs != dense else "")
