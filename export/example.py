"""Six tokens, of which one merges: the worked example of `plan.py`, computed by the code itself, as text and as a drawing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .plan import MergePlan

TOKENS = ("cls", "p", "q", "r", "s", "t")
# Directions of the tokens' keys in degrees: cos(q, r) is 0.9 and cos(s, t) 0.8; all other pairs of an A and a B token are apart.
ANGLES = (0.0, 250.0, math.degrees(math.acos(0.9)), 0.0, 120.0 + math.degrees(math.acos(0.8)), 120.0)


class Example(NamedTuple):
    """What the code makes of the six tokens.

    Args:
        plan: the reference's, row numbers [1, .., 1].
        static: the static plan of one image in the matmul form, columns [.., 1].
    """

    plan: MergePlan
    static: MergePlan


def compute() -> Example:
    """ToMe with r = 1 on six tokens, the first of them a class token."""
    import torch

    from . import reducers
    from .apply import Form, lay_out
    from .plan import Signals
    from .step import Step

    angles = torch.tensor(ANGLES).deg2rad()
    metric = torch.stack([angles.cos(), angles.sin()], -1)
    step, tome = Step(0, "post_attn", 6, 5, 5, signal="keys"), reducers.get("tome")
    plan = tome.reference(Signals(torch.zeros(1, 6, 1), 1, True, metric=metric[None]), step)
    static = tome.static(Signals(torch.zeros(6, 1), 1, True, metric=metric), step)
    return Example(plan, lay_out(static, Form.MATMUL, any_batch=False))


def text() -> str:
    """The plan and its static layout, one column a line."""
    plan, static = compute()
    numbers = lambda column: " ".join(str(v) for v in column.reshape(-1).tolist())
    hosts = [str(v) if i in (2, 4) else "." for i, v in enumerate(static.layout.hosts.reshape(-1).tolist())]
    return "\n".join(
        (
            f"MergePlan    keep = {numbers(plan.keep)}",
            f"             src  = {numbers(plan.src)}",
            f"             dst  = {numbers(plan.dst)}",
            f"StaticLayout labels = {' '.join(map(str, static.layout.labels))}",
            f"             dst    = {numbers(static.dst)}",
            f"             hosts  = {' '.join(hosts)}",
            f"             target = {numbers(static.layout.target)}",
        )
    )


BOX, GAP, TOP, DOWN = 56, 16, 28, 132  # pixels: side and distance of the boxes, upper and lower row
COLOURS = {"prefix": "#d9d9d9", "A": "#b7d3f2", "B": "#f6d6a8"}


def svg() -> str:
    """The six tokens above, the five that are left below, and which goes where."""
    plan = compute().plan
    keep, src, dst = (column.reshape(-1).tolist() for column in (plan.keep, plan.src, plan.dst))
    parts = [_box(i, TOP, name, f"{i}") for i, name in enumerate(TOKENS)]
    names = [TOKENS[i] for i in keep]
    for source, row in zip(src, dst, strict=True):
        names[row] += f"+{TOKENS[source]}"
    parts += [_box(row, DOWN, name, f"{row}", kind=_kind(keep[row])) for row, name in enumerate(names)]
    parts += [_line(i, row) for row, i in enumerate(keep)]
    parts += [_line(i, row, merged=True) for i, row in zip(src, dst, strict=True)]
    width, height = 6 * (BOX + GAP) + GAP, DOWN + BOX + 28
    words = (
        "grey: class token; blue: A, may merge; orange: B, may receive. q merges into r: keep 0 4 1 3 5, src 2, dst 3"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif">\n'
        + "\n".join(parts)
        + f'\n<text x="{GAP}" y="{height - 6}" font-size="8">{words}</text>\n</svg>\n'
    )


def _kind(position: int) -> str:
    return "prefix" if position == 0 else "A" if position % 2 == 0 else "B"


def _centre(column: int) -> float:
    return GAP + column * (BOX + GAP) + BOX / 2


def _box(column: int, y: int, name: str, number: str, *, kind: str | None = None) -> str:
    colour, x = COLOURS[kind or _kind(column)], GAP + column * (BOX + GAP)
    return (
        f'<rect x="{x}" y="{y}" width="{BOX}" height="{BOX}" rx="6" fill="{colour}" stroke="#555"/>'
        f'<text x="{x + BOX / 2}" y="{y + BOX / 2 + 5}" text-anchor="middle" font-size="15">{name}</text>'
        f'<text x="{x + 5}" y="{y + 12}" font-size="9">{number}</text>'
    )


def _line(column: int, row: int, *, merged: bool = False) -> str:
    style = 'stroke="#c0392b" stroke-width="2"' if merged else 'stroke="#555"'
    return f'<line x1="{_centre(column)}" y1="{TOP + BOX}" x2="{_centre(row)}" y2="{DOWN}" {style}/>'
