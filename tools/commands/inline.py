"""`tokexport inline`."""

from __future__ import annotations

import click


@click.command("inline")
@click.argument("file")
@click.option("-o", "--output", metavar="FILE", help="Default: the file's name with .inline.onnx.")
@click.option("--force", is_flag=True, help="Replace the output file.")
def command(file, output, force):
    """Turn the nodes TokenReduce of FILE, made by `tokexport onnx --plugin`, back into plain operators.

    tokexport inline vit.onnx -o flat.onnx
    """
    from pathlib import Path

    from ...export.graph.calls import inline_file
    from ..show.terminal import console

    path = Path(file).with_suffix(".inline.onnx") if output is None else Path(output)
    n_calls, n_nodes = inline_file(file, path, force=force)
    console().print(f"{path}  {n_calls} nodes TokenReduce written out, {n_nodes} nodes", markup=False)
