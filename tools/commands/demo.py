"""`tokexport demo`."""

from __future__ import annotations

from pathlib import Path

import click

from ...export.errors import UsageError

MARK = ".tokexport-demo"  # in folders whose files a demo may replace


@click.command("demo")
@click.option(
    "-o", "--output", "folder", default="demo-out", show_default=True, metavar="DIR", help="Where the files go."
)
@click.option(
    "--offline", is_flag=True, help="Every method on this project's own small model and scikit-learn's digits instead."
)
@click.option(
    "--methods",
    metavar="NAME[,NAME]",
    help="With --offline, the methods that are shown beside the dense model.  [default: all]",
)
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON on stdout.")
def command(folder, offline, methods, as_json):
    """Export, verify, time and draw ToMe on real DINOv2 weights and photos, from packages already installed (see `make demo`)."""
    from ..demo import offline as demo_offline
    from ..demo import real as demo
    from ..show.terminal import console

    if not folder.strip():
        raise UsageError("--output is empty: wanted a folder, e.g. demo-out")
    if methods is not None and not offline:
        raise UsageError("--methods goes with --offline: the demo on real weights shows ToMe")
    chosen = demo_offline.chosen_methods(methods) if offline else ()
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / MARK).exists():
            raise UsageError(f"--output {folder} has files that no demo made: wanted a new or empty folder")
        (folder / MARK).touch()
    except OSError as e:
        raise UsageError(f"--output {folder}: cannot be made ({e.strerror})") from None
    if offline:
        demo_offline.run(folder, as_json, console(), methods=chosen)
    else:
        demo.run(folder, as_json, console())
