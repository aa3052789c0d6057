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
    from rich.markup import escape

    with out.status("starting") as status:
        yield lambda stage: status.update(escape(stage))


def print_json(data) -> None:
    """One JSON document (RFC 8259) on stdout. Raises: ValueError for a float that is not finite, before anything is written."""
    sys.stdout.write(json.dumps(data, indent=1, allow_nan=False))
    print()


def size_words(n: int) -> str:
    """12345678 -> "12.3 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n} B"


TAIL_WORDS = {
    "full": "full: all tokens of the last block are computed",
    "class": "class: of the last block, keys and values of all tokens, the rest of prefix tokens alone",
}


def tail_words(provenance) -> str:
    """What is computed of the last block, and the reduction that is therefore not in the file. provenance: of the file."""
    step = provenance.step_left_out
    return TAIL_WORDS[provenance.tail] + (
        "" if step is None else f"; the reduction of block {step.block} is not in the file"
    )


def tokens_words(n_tokens: int, tokens: list) -> str:
    """Tokens before the first block and after each: "197 in, then 184 171 158 ..."."""
    return f"{n_tokens} in, then " + " ".join(str(m) for _, m in tokens)


def macs_words(macs: int, dense: int, executed: int | None = None) -> str:
    """ "2.69 G per image (dense 4.58 G, ratio 1.702); executed 2.63 G".

    Args:
        macs, dense: of the file and of the model without a reduction, as the papers count.
        executed: what the file computes; told where it is another number.
    """
    unit, scale = ("G", 1e9) if dense >= 1e9 else ("M", 1e6)
    return (
        f"{macs / scale:.2f} {unit} per image"
        + (f" (dense {dense / scale:.2f} {unit}, ratio {dense / macs:.3f})" if macs != dense else "")
        + ("" if executed in (None, macs) else f"; executed {executed / scale:.2f} {unit}")
    )


def layers_words(layers: dict) -> str:
    """{"MATRIX_MULTIPLY": {"HALF": 48}} -> "480 in the network; matrix products 48 HALF; ..."."""
    total = sum(n for types in layers.values() for n in types.values())
    words = {
        "CONVOLUTION": "convolutions",
        "MATRIX_MULTIPLY": "matrix products",
        "SOFTMAX": "softmax",
        "TOPK": "top-k",
        "CAST": "casts",
    }
    parts = [
        f"{said} " + " + ".join(f"{n} {t}" for t, n in sorted(layers[kind].items()))
        for kind, said in words.items()
        if kind in layers
    ]
    return "; ".join([f"{total} in the network", *parts])


def engine_lines(e) -> list[tuple[str, str]]:
    """What an `EngineFile` is for, (title, text) each."""
    batch = str(e.batch) if e.batch else f"{e.profile[0]} to {e.profile[2]}, best at {e.profile[1]}"
    built_on = f" ({e.gpu.name}, which it was built on)" if e.gpu else ""
    return [
        ("for", f"compute capability {', '.join(e.compute_capability)}{built_on}"),
        ("batch", batch),
        ("layers", layers_words(e.layers)),
        *(("warning", w) for w in e.warnings),
    ]


@contextmanager
def bar(out):
    """A function (stage, share done) that moves a progress bar until the block ends."""
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=out,
        transient=True,
        disable=not out.is_terminal,
    ) as progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda stage, share: progress.update(task, description=escape(stage), completed=share)
