"""`tokexport viz`."""

from __future__ import annotations

import click

from ...export.errors import UsageError
from ..options import runtime_option

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
@runtime_option()
@click.option("--force", is_flag=True, help="Replace the picture.")
def command(file, images, output, blocks, runtime, force):
    """Draw on each IMAGE (files or folders) which patches FILE has merged or dropped, reduction after reduction.

    Patches of one token share its mean colour and an outline; those that are gone are dimmed.
    """
    from ...engines.files import inspect_file
    from ...engines.images import find_images
    from ...engines.runners import runtime_for
    from ...export.files import check_output
    from ..show.terminal import console, stages

    runtime_for(file, runtime)
    schedule = inspect_file(file).provenance.schedule
    if not schedule.steps:
        raise UsageError(
            f"{file} is dense: nothing is merged or dropped; wanted a file with a --method other than none"
        )
    steps = _steps(schedule, blocks)
    photos = find_images(list(images))
    path = check_output(output, force, [file, *photos])
    if path.suffix.lower() != ".png":
        raise UsageError(f"output {path}: wanted a name that ends in .png")
    if len(photos) > MOST:
        raise UsageError(f"{len(photos)} images are more than one picture can show: give at most {MOST}")
    out = console()
    with stages(out) as progress:
        progress("loading torch")
        from ..show import draw

        rows = draw.token_rows(file, photos, steps=steps, runtime=runtime, progress=progress)
        draw.save(draw.stacked(rows), path)
    words = ", ".join(draw.step_words(schedule.steps[i]) for i in steps)
    out.print(f"{path}  {len(rows)} image{'s' * (len(rows) > 1)}, {schedule.method}, {words}", markup=False)


def _steps(schedule, blocks: str | None) -> list[int]:
    """Which of the steps are shown: those of the blocks that are named, or COLUMNS of them, spread evenly, the last
    among them.
    """
    n = len(schedule.steps)
    if blocks is None:
        shown = min(COLUMNS, n)
        return sorted({round(i * (n - 1) / max(shown - 1, 1)) for i in range(shown)})
    index_of = {s.block: i for i, s in enumerate(schedule.steps)}
    asked = [b.strip() for b in blocks.split(",")]
    wrong = [b for b in asked if not (b.isascii() and b.isdigit()) or int(b[:9]) not in index_of]
    if wrong:
        raise UsageError(
            f"--at {blocks[:60]!r}: {wrong[0][:20]!r} is no block with a reduction; these have one: {', '.join(map(str, index_of))}"
        )
    return sorted({index_of[int(b)] for b in asked})
