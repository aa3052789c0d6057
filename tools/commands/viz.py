"""`tokexport viz`."""

from __future__ import annotations

from pathlib import Path

import click

from ...export.errors import UsageError
from ..options import runtime_option

COLUMNS = 4  # reductions shown beside the photo
MOST = 32  # photos in one picture


@click.command("viz")
@click.argument("file")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("-o", "--output", metavar="PNG", help="The picture. Default: tokens.png, or features.png.")
@click.option(
    "--at",
    "blocks",
    metavar="3,6,9",
    help=f"After which blocks; default: at most {COLUMNS}, spread evenly, the last among them.",
)
@click.option(
    "--features",
    is_flag=True,
    help="Show the patches of a file with --emit patches instead: dense features beside the reduced ones, their first three "
    "principal components as colours, and the honesty map.",
)
@click.option(
    "--html", "page", metavar="PAGE", help="Write a page with a slider over the blocks instead of the picture."
)
@click.option("--checkpoint", metavar="FILE|DIR", help="Where the weights are now, for --features.")
@runtime_option()
@click.option("--force", is_flag=True, help="Replace the picture or the page.")
def command(file, images, output, blocks, features, page, checkpoint, runtime, force):
    """Draw on each IMAGE (files or folders) which patches FILE has merged or dropped, reduction after reduction.

    Patches of one token share its mean colour and an outline; those that are gone are dimmed.
    """
    from ...engines.files import inspect_file
    from ...engines.images import find_images
    from ...engines.runners import runtime_for
    from ..show.terminal import console, stages

    runtime_for(file, runtime)
    _check_together(output, blocks, features, page, checkpoint)
    provenance = inspect_file(file).provenance
    schedule = provenance.file_schedule
    if not schedule.steps and not features:
        raise UsageError(
            f"{file} is dense: nothing is merged or dropped; wanted a file with a --method other than none"
        )
    steps = _steps(schedule, blocks)
    photos = find_images(list(images))
    if len(photos) > MOST:
        raise UsageError(f"{len(photos)} images are more than one picture can show: give at most {MOST}")
    path = _output_path(page or output or ("features.png" if features else "tokens.png"), page, force, [file, *photos])
    out = console()
    with stages(out) as progress:
        progress("loading torch")
        shared = {"provenance": provenance, "runtime": runtime, "progress": progress}
        if page:
            words = _write_page(path, file, photos, **shared)
        elif features:
            words = _draw_features(path, file, photos, checkpoint=checkpoint, **shared)
        else:
            words = _draw_tokens(path, file, photos, steps=steps, **shared)
    out.print(
        f"{path}  {len(photos)} image{'s' * (len(photos) > 1)}, {provenance.schedule.method}, {words}", markup=False
    )


def _check_together(output, blocks, features: bool, page, checkpoint) -> None:
    """Raises: UsageError for options that contradict each other."""
    if page is not None and (output is not None or features or blocks is not None):
        raise UsageError("--html writes a page with every block: leave out -o, --features and --at")
    if features and blocks is not None:
        raise UsageError("--at is of the picture of tokens, not of --features: leave one of them out")
    if checkpoint is not None and not features:
        raise UsageError("--checkpoint is read for --features only: leave it out")


def _output_path(name: str, page, force: bool, inputs: list) -> Path:
    from ...export.files import check_output

    path, suffixes = check_output(name, force, inputs), (".png",) if page is None else (".html", ".htm")
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"output {path}: wanted a name that ends in {suffixes[0]}")
    return path


def _draw_tokens(path, file, photos, *, provenance, runtime, progress, steps) -> str:
    from ..show import draw

    rows = draw.token_rows(file, photos, steps=steps, runtime=runtime, progress=progress)
    draw.save(draw.stacked(rows), path)
    return ", ".join(draw.step_words(provenance.file_schedule.steps[i]) for i in steps)


def _draw_features(path, file, photos, *, provenance, runtime, progress, checkpoint) -> str:
    import numpy as np

    from ...engines.measure.dense_features import patch_features
    from ..show import draw
    from ..show.features import feature_rows

    records = patch_features(file, photos, runtime=runtime, checkpoint=checkpoint, progress=progress)
    rows = feature_rows(records, draw.grid_of(provenance), preprocess=provenance.preprocess)
    draw.save(draw.stacked(rows), path)
    ranks = [r.spearman for r in records if r.spearman is not None]
    words = f"mean cosine to the dense features {np.mean([r.cosine for r in records]):.4f}"
    return words + (f", honesty map's Spearman {np.mean(ranks):.2f}" if ranks else "")


def _write_page(path, file, photos, *, provenance, runtime, progress) -> str:
    from ..show import draw
    from ..show.slider import write_slider

    maps = draw.patch_maps(file, photos, runtime=runtime, progress=progress)
    shown = [(photo.name, image, patches) for photo, image, patches in maps]
    title = f"{provenance.model}, {provenance.schedule.method}"
    write_slider(path, title=title, schedule=provenance.file_schedule, grid=draw.grid_of(provenance), photos=shown)
    return f"a slider over {provenance.schedule.depth} blocks"


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
            f"--at {blocks[:60]!r}: {wrong[0][:20]!r} is no block with a reduction in the file; these have one: {', '.join(map(str, index_of))}"
        )
    return sorted({index_of[int(b)] for b in asked})
