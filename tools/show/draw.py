"""What was merged, drawn on the photo."""

from __future__ import annotations

import numpy as np


GONE = np.float32([14, 20, 56])  # a tint, so that a dark patch that is gone is told from one that is there


def grid_of(provenance) -> tuple[int, int]:
    """Patches (rows, columns) of the images a file takes."""
    (h, w), n = provenance.preprocess.size, provenance.dims["patches"]
    rows = round((n * h / w) ** 0.5)
    return rows, n // rows


def draw_sources(image, grid: tuple[int, int], sources: np.ndarray):
    """The photo with every group of merged patches in its mean colour, outlined; patches that are gone are dimmed and tinted.

    image: PIL image as the model saw it. grid: patches (rows, columns). sources: [rows * columns] the final token of each patch, -1 gone.
    Returns a PIL image, at least 448 pixels high.
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
    """PIL images of one height in a row, each under its caption; a column is as wide as the wider of the two."""
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
