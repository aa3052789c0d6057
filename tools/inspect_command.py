"""`tokexport inspect`."""

from __future__ import annotations

import click


@click.command("inspect")
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON on stdout.")
def command(file, as_json):
    """Show what FILE is: provenance, tokens per block, MACs, operators, and anything a TensorRT build would refuse."""
    from ..export.inspection import inspect
    from .terminal import console, macs_words, print_json, size_words, tokens_words

    found = inspect(file)
    if as_json:
        print_json(found.to_json())
        return
    out, p = console(), found.provenance
    weights, s = p.weights, p.schedule
    where = f"seed {weights['seed']}" if weights["source"] == "random" else weights["file"]
    options = ", ".join(f"{k} {_short(v)}" for k, v in s.options.items())
    h, w = p.preprocess.size
    lines = [
        ("model", " ".join([p.model, *(f"{k}={v}" for k, v in p.model_kwargs.items())])),
        ("weights", f"{weights['source']} ({where}), SHA-256 {weights['sha256'][:16]}..."),
        ("method", s.method + (f" ({options})" if options else "")),
        ("tokens", tokens_words(s.tokens_per_block())),
        ("MACs", macs_words(found.macs, found.macs_dense)),
        ("input", f"image [{found.batch or 'dynamic'}, {p.dims['channels']}, {h}, {w}], mean {_short(p.preprocess.mean)}, std {_short(p.preprocess.std)}, "
                  f"{p.preprocess.interpolation}, crop {p.preprocess.crop:g} ({p.preprocess.crop_mode})"),
        ("outputs", ", ".join(p.outputs) + (f" ({len(p.labels)} labels)" if p.labels else "")),
        ("file", f"{size_words(found.size)}, opset {p.opset}, {p.precision}, tokexport {p.version}"),
        ("graph", f"{sum(found.ops.values())} nodes: " + ", ".join(f"{n} {k}" for k, n in found.ops.items())),
        ("TensorRT", "nothing it would refuse" if not found.refusals else "REFUSED: " + "; ".join(found.refusals)),
        *(("note", n) for n in s.notes),
    ]
    for title, text in lines:
        out.print(f"{title:<9}", end="", style="bold")
        out.print(text, markup=False)


def _short(value) -> str:
    if isinstance(value, (list, tuple)):
        same = len(set(value)) == 1 and len(value) > 3
        return f"{value[0]} in each block" if same else ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
