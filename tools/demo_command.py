"""`tokexport demo`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("demo")
@click.option("--out", default="demo-out", show_default=True, metavar="DIR", help="Where the files go.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON on stdout.")
def command(out, as_json):
    """Export, verify, time and draw ToMe on real DINOv2 weights and photos, from packages already installed (see `make demo`)."""
    from .demo import run
    from .terminal import console

    run(Path(out), as_json, console())
