"""The way of the tokens through the blocks as one page that needs nothing else: a slider over the blocks, on which tokens merge and go."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

import numpy as np

from ...export.files import aside
from ...export.schedule import Schedule

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1e; margin: 2rem auto; max-width: 72rem; padding: 0 1.5rem }
h1 { font-size: 1.4rem; margin-bottom: .2rem } .note { color: #555 }
.bar { position: sticky; top: 0; background: #fff; padding: .6rem 0; display: flex; gap: 1rem; align-items: center }
.bar input[type=range] { flex: 1 } .bar output { min-width: 22rem; font-variant-numeric: tabular-nums }
.photos { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0 } figcaption { color: #555 }
canvas { width: 448px; max-width: 100% }
"""
SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("block"), words = document.getElementById("words");
const [rows, columns] = data.grid;
const views = data.photos.map((photo, k) => {
  const canvas = document.querySelectorAll("canvas")[k], pen = canvas.getContext("2d", {willReadFrequently: true});
  return {photo, canvas, pen, image: null, means: null};
});
function load(view) {
  return new Promise(done => {
    const image = new Image();
    image.onload = () => {
      const scale = Math.max(1, Math.ceil(448 / image.height));
      view.canvas.width = image.width * scale; view.canvas.height = image.height * scale;
      view.pen.imageSmoothingEnabled = false;
      view.pen.drawImage(image, 0, 0, view.canvas.width, view.canvas.height);
      view.image = view.pen.getImageData(0, 0, view.canvas.width, view.canvas.height);
      view.means = means(view.image);
      done();
    };
    image.src = view.photo.image;
  });
}
const top_of = (i, n, length) => Math.floor(i * length / n);
function means(image) {
  const out = [];
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
    const sum = [0, 0, 0]; let n = 0;
    for (let y = top_of(r, rows, image.height); y < top_of(r + 1, rows, image.height); y++)
      for (let x = top_of(c, columns, image.width); x < top_of(c + 1, columns, image.width); x++, n++)
        for (let k = 0; k < 3; k++) sum[k] += image.data[4 * (y * image.width + x) + k];
    out.push(sum.map(v => v / n));
  }
  return out;
}
function draw(view, tokens) {
  const {pen, canvas, image} = view, groups = new Map();
  tokens.forEach((t, i) => groups.has(t) ? groups.get(t).push(i) : groups.set(t, [i]));
  pen.putImageData(image, 0, 0);
  const box = i => {
    const r = Math.floor(i / columns), c = i % columns;
    const x = top_of(c, columns, canvas.width), y = top_of(r, rows, canvas.height);
    return [x, y, top_of(c + 1, columns, canvas.width) - x, top_of(r + 1, rows, canvas.height) - y];
  };
  for (const [t, members] of groups) {
    if (t >= 0 && members.length < 2) continue;
    const mean = [0, 1, 2].map(k => members.reduce((s, i) => s + view.means[i][k], 0) / members.length);
    pen.fillStyle = t < 0 ? "rgba(14, 20, 56, 0.8)" : `rgb(${mean.map(Math.round)})`;
    for (const i of members) pen.fillRect(...box(i));
  }
  pen.fillStyle = "rgba(255, 255, 255, 0.85)";
  tokens.forEach((t, i) => {
    const [x, y, w, h] = box(i);
    if (i % columns && tokens[i - 1] !== t) pen.fillRect(x, y, 1, h);
    if (i >= columns && tokens[i - columns] !== t) pen.fillRect(x, y, w, 1);
  });
}
function show() {
  const step = Number(slider.value), state = data.states[step];
  words.textContent = `${state.words}: ${state.tokens} tokens`;
  views.forEach(view => {
    const tokens = view.photo.maps[state.map];
    draw(view, tokens);
    const left = new Set(tokens.filter(t => t >= 0)).size, gone = tokens.filter(t => t < 0).length;
    view.canvas.nextElementSibling.textContent = `${view.photo.name}: ${left} of ${tokens.length} patch tokens` +
      (gone ? `, ${gone} patches are gone` : "");
  });
}
slider.addEventListener("input", show);
Promise.all(views.map(load)).then(show);
"""


def write_slider(path: Path, *, title: str, schedule: Schedule, grid: tuple[int, int], photos: list[tuple]) -> None:
    """Write the page, aside and renamed.

    Args:
        path: of the page.
        title: over it.
        schedule: of the file.
        grid: patches (rows, columns).
        photos: (name, PIL image as the model saw it, maps) each: where every patch is after each step [steps][N], -1 for gone.
    """
    with aside(path) as new:
        new.write_text(slider_page(title=title, schedule=schedule, grid=grid, photos=photos), encoding="utf-8")


def slider_page(*, title: str, schedule: Schedule, grid: tuple[int, int], photos: list[tuple]) -> str:
    """The page as HTML.

    Args:
        title, schedule, grid, photos: see `write_slider`.
    """
    states = _states(schedule)
    start = list(range(grid[0] * grid[1]))
    data = {
        "grid": list(grid),
        "states": states,
        "photos": [
            {"name": name, "image": _data_url(image), "maps": [start, *(np.asarray(m).tolist() for m in maps)]}
            for name, image, maps in photos
        ],
    }
    figures = "".join("<figure><canvas></canvas><figcaption></figcaption></figure>" for _ in photos)
    text = json.dumps(data).replace("<", "\\u003c")  # nothing in it ends the script
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p class=note>Patches of one token share its mean colour; those that are gone are dark. "
        f"Move the slider, or use the arrow keys.</p>"
        f"<div class=bar><label for=block>block</label>"
        f"<input id=block type=range min=0 max={len(states) - 1} value={len(states) - 1} autofocus>"
        f"<output id=words for=block></output></div><div class=photos>{figures}</div>"
        f"<script id=data type=application/json>{text}</script><script>{SCRIPT}</script></html>\n"
    )


def _states(schedule: Schedule) -> list[dict]:
    """What the slider stops at: the input, and every block with the tokens behind it."""
    states = [{"words": "input", "tokens": schedule.n_tokens, "map": 0}]
    blocks = [s.block for s in schedule.steps]
    for block, (_, n) in enumerate(schedule.tokens_per_block()):
        n_steps = sum(b <= block for b in blocks)
        states.append({"words": f"behind block {block}", "tokens": n, "map": n_steps})
    return states


def _data_url(image) -> str:
    data = io.BytesIO()
    image.convert("RGB").save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
