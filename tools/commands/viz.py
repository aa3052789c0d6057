"""`tokexport viz`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from ...export.errors import UsageError

COLUMNS = 4  # reductions shown beside the photo
MOST = 32  # photos in one picture


@click.command("viz")
@click.argument("file")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("-o", "--output", default="tokens.png", show_default=True, metavar="PNG")
@click.option(
    "--at",
    "blocks",
    metavar="3,6,9",
    help=f"After which blocks; default: at most {COLUMNS}, spread evenly, the last among them.",
)
@click.option("--runtime", default="ort", show_default=True, metavar="ort|openvino")
@click.option("--force", is_flag=True, help="Replace the picture.")
def command(file, images, output, blocks, runtime, force):
    """Draw on each IMAGE (files or folders) which patches FILE has merged or dropped, reduction after reduction.

    Patches of one token share its mean colour and an outline; those that are gone are dimmed.
    """
    import numpy as np

    from ...engines.images import crop, find_images, normalise
    from ...engines.files import inspect_file
    from ...engines.runners import require
    from ...export.files import check_output
    from ..show.terminal import console, stages

    require(runtime)
    p = inspect_file(file).provenance
    if not p.schedule.steps:
        raise UsageError(
            f"{file} is dense: nothing is merged or dropped; wanted a file with a --method other than none"
        )
    steps = _steps(p.schedule, blocks)
    photos = find_images(list(images))
    path = check_output(output, force, [file, *photos])
    if path.suffix.lower() != ".png":
        raise UsageError(f"output {path}: wanted a name that ends in .png")
    if len(photos) > MOST:
        raise UsageError(f"{len(photos)} images are more than one picture can show: give at most {MOST}")
    out = console()
    with stages(out) as progress:
        progress("loading torch")
        from ...engines.parity.decisions import token_maps
        from ...engines.parity.sides import open_side
        from ..show import draw

        rows, grid = [], draw.grid_of(p)
        with open_side(file, runtime) as run:
            for photo in photos:
                progress(f"drawing {photo.name}")
                image = crop(photo, p.preprocess)
                maps = token_maps(run(normalise(image, p.preprocess)[None]).plans, p.schedule)
                shown = [draw.draw_sources(image, grid, maps[i][0, p.schedule.n_prefix :]) for i in steps]
                left = [len(np.setdiff1d(maps[i][0, p.schedule.n_prefix :], [-1])) for i in steps]
                words = [f"{_after(p.schedule.steps[i])}: {n} of {grid[0] * grid[1]}" for i, n in zip(steps, left)]
                rows.append(draw.side_by_side([image.resize(shown[0].size), *shown], [photo.stem[:28], *words]))
        with tempfile.TemporaryDirectory(prefix=".tokexport-", dir=path.parent) as aside:
            draw.stacked(rows).save(Path(aside) / path.name)
            os.replace(Path(aside) / path.name, path)
    out.print(
        f"{path}  {len(rows)} image{'s' * (len(rows) > 1)}, {p.schedule.method}, "
        f"{', '.join(_after(p.schedule.steps[i]) for i in steps)}",
        markup=False,
    )


def _after(step) -> str:
    return f"{'before block' if step.site == 'pre_block' else 'block'} {step.block}"


def _steps(schedule, blocks: str | None) -> list[int]:
    """Which of the steps are shown."""
    n = len(schedule.steps)
    if blocks is None:
        return (
            sorted({round(i * (n - 1) / max(min(COLUMNS, n) - 1, 1)) for i in range(min(COLUMNS, n))}) if n > 1 else [0]
        )
    there = {s.block: i for i, s in enumerate(schedule.steps)}
    asked = [b.strip() for b in blocks.split(",")]
    wrong = [b for b in asked if not (b.isascii() and b.isdigit()) or int(b[:9]) not in there]
    if wrong:
        raise UsageError(
            f"--at {blocks[:60]!r}: {wrong[0][:20]!r} is no block with a reduction; these have one: {', '.join(map(str, there))}"
        )
    return sorted({there[int(b)] for b in asked})
