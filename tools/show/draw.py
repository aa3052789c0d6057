"""What was merged, drawn on the photo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ...export.files import aside

GONE = np.float32([14, 20, 56])  # a tint, so that a dark patch that is gone is told from one that is there
CAPTION = 28  # letters of a photo's name


def grid_of(provenance) -> tuple[int, int]:
    """Patches (rows, columns) of the images a file takes."""
    (height, width), n = provenance.preprocess.size, provenance.dims["patches"]
    rows = round((n * height / width) ** 0.5)
    return rows, n // rows


def token_rows(
    file,
    photos: list[Path],
    *,
    steps: list[int],
    runtime: str = "ort",
    progress: Callable[[str], None] = lambda stage: None,
) -> list:
    """For each photo a PIL image: the photo, and beside it which patches a file has merged or dropped after some of
    its steps.

    Args:
        file: a reduced ONNX file, or an engine with its decisions.
        photos: image files.
        steps: indices of the schedule's steps.
        runtime: what runs an ONNX file.
        progress: told which photo is drawn.
    Raises:
        UsageError: the file's decisions are no plan.
    """
    from ...engines.files import inspect_file

    provenance, rows = inspect_file(file).provenance, []
    schedule, grid = provenance.file_schedule, grid_of(provenance)
    for photo, image, maps in patch_maps(file, photos, runtime=runtime, progress=progress):
        patches = [maps[i] for i in steps]
        pictures = [draw_sources(image, grid, sources) for sources in patches]
        captions = [
            f"{step_words(schedule.steps[i])}: {len(np.setdiff1d(sources, [-1]))} of {grid[0] * grid[1]}"
            for i, sources in zip(steps, patches)
        ]
        rows.append(side_by_side([image.resize(pictures[0].size), *pictures], [photo.stem[:CAPTION], *captions]))
    return rows


def patch_maps(
    file, photos: list[Path], *, runtime: str = "ort", progress: Callable[[str], None] = lambda stage: None
) -> Iterator[tuple]:
    """Where every patch of a photo is after each step of a file.

    Args:
        file: a reduced ONNX file, or an engine with its decisions.
        photos: image files.
        runtime: what runs an ONNX file.
        progress: told which photo is drawn.
    Yields:
        (photo, PIL image as the model saw it, maps [steps][N], -1 for what is gone).
    Raises:
        UsageError: the file's decisions are no plan.
    """
    from ...engines.files import inspect_file
    from ...engines.images import crop
    from ...engines.inputs import load_inputs
    from ...engines.parity.decisions import token_maps
    from ...engines.parity.sides import open_side

    provenance = inspect_file(file).provenance
    with open_side(file, runtime) as run:
        for photo in photos:
            progress(f"drawing {photo.name}")
            maps = token_maps(run(load_inputs([photo], provenance)).plans, provenance.file_schedule)
            yield photo, crop(photo, provenance.preprocess), [m[0, provenance.schedule.n_prefix :] for m in maps]


def step_words(step) -> str:
    """ "block 3" or "before block 3"."""
    return f"{'before block' if step.site == 'pre_block' else 'block'} {step.block}"


def save(picture, path: Path) -> None:
    """Write a PIL image aside and rename it.

    Args:
        picture: the image.
        path: where it goes.
    """
    with aside(path) as new:
        picture.save(new)


def draw_sources(image, grid: tuple[int, int], sources: np.ndarray):
    """The photo with every group of merged patches in its mean colour, outlined; patches that are gone are dimmed and
    tinted.

    Args:
        image: PIL image as the model saw it.
        grid: patches (rows, columns).
        sources: [rows * columns] the final token of each patch, -1 for one that is gone.
    Returns:
        A PIL image, at least 448 pixels high.
    """
    from PIL import Image

    scale = max(1, -(-448 // image.height))
    pixels = np.asarray(image.resize((image.width * scale, image.height * scale)), dtype=np.float32)
    cell = (pixels.shape[0] // grid[0], pixels.shape[1] // grid[1])
    pixels = pixels[: cell[0] * grid[0], : cell[1] * grid[1]]
    token = np.asarray(sources).reshape(grid).repeat(cell[0], 0).repeat(cell[1], 1)
    out = pixels.copy()
    for t in np.unique(token):
        here = token == t
        if t < 0:
            out[here] = pixels[here] * 0.25 + GONE
        elif here.sum() > cell[0] * cell[1]:  # a patch that stayed alone keeps its texture
            out[here] = pixels[here].mean(0)
    edge = np.zeros(token.shape, dtype=bool)
    down, right = token[1:] != token[:-1], token[:, 1:] != token[:, :-1]
    edge[1:] |= down
    edge[:, 1:] |= right
    dark = (
        out.reshape(grid[0], cell[0], grid[1], cell[1], 3).mean((1, 3, 4)) < 128
    )  # by patch: a line shows on both halves of a photo
    out[edge] = np.where(dark, 255, 0).repeat(cell[0], 0).repeat(cell[1], 1)[edge][:, None]
    return Image.fromarray(out.clip(0, 255).astype(np.uint8))


def side_by_side(images: list, captions: list[str]):
    """PIL images of one height in a row, each under its caption; a column is as wide as the wider of the two.

    Args:
        images: PIL images.
        captions: as many.
    """
    from PIL import Image, ImageDraw, ImageFont

    gap, top = 12, 36
    font = ImageFont.load_default(18)
    widths = [max(i.width, int(font.getlength(c)) + 1) for i, c in zip(images, captions, strict=True)]
    canvas = Image.new(
        "RGB", (sum(widths) + gap * (len(widths) + 1), max(i.height for i in images) + top + gap), "white"
    )
    pen, x = ImageDraw.Draw(canvas), gap
    for image, caption, width in zip(images, captions, widths):
        pen.text((x, 8), caption, fill="black", font=font)
        canvas.paste(image, (x, top))
        x += width + gap
    return canvas


def stacked(rows: list):
    """PIL images above one another."""
    from PIL import Image

    canvas = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    for i, r in enumerate(rows):
        canvas.paste(r, (0, sum(q.height for q in rows[:i])))
    return canvas
