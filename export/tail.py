"""The class tail: behind the last block's attention a class token reads no other token, so the last block need not compute them.

With tail "class" the last block has keys and values of all tokens, but queries, attention rows, projection and MLP of the prefix
tokens alone, and no reduction behind its attention: nothing would read what that leaves. A reduction in front of the last block
stays, since it decides which keys there are. The pooled output is the same but for rounding. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from .errors import UsageError
from .outputs import Emission
from .schedule import Schedule
from .step import Step

Tail = Literal["full", "class"]
TAILS = get_args(Tail)
DEFAULT: Tail = "full"  # where the class tail could be had and nothing was asked for


def check_tail(tail: str | None, emission: Emission) -> None:
    """Make sure that a tail goes with the outputs, as far as that is known without a model.

    Args:
        tail: as asked for, None for the default.
        emission: which outputs are given.
    Raises:
        UsageError: there is no such tail, or an output reads the tokens that it leaves out.
    """
    if tail is not None and tail not in TAILS:
        raise UsageError(f"tail {tail!r}: wanted {' or '.join(TAILS)}")
    others = [part for part in emission.emit if part != "pooled"]
    if tail == "class" and others:
        raise UsageError(
            f"tail class leaves the last block's other tokens out, and emit asks for {', '.join(others)}, which reads them: "
            f"give tail full, or leave it out, or emit pooled alone"
        )


def choose_tail(tail: str | None, emission: Emission, *, rows: Sequence[int], n_prefix: int) -> Tail:
    """What is computed of the last block.

    Args:
        tail: as asked for, None for the default: "class" is then taken only where it changes no output.
        emission: which outputs are given.
        rows: of the tokens that the pooled output reads; empty where it pools them all (`Pooling.rows`).
        n_prefix: prefix tokens at the head of the sequence.
    Raises:
        UsageError: "class" was asked for, and some output reads other tokens than prefix ones.
    """
    check_tail(tail, emission)
    prefix_alone = bool(rows) and max(rows) < n_prefix
    if tail == "class" and not prefix_alone:
        raise UsageError(
            "tail class leaves the last block's other tokens out, and this model's pooled output reads them (it pools all its "
            "tokens, by their average or by attention): give tail full, or leave it out"
        )
    possible = prefix_alone and emission.emit == ("pooled",)
    return "full" if not possible else tail or DEFAULT


def left_out(schedule: Schedule, tail: str) -> Step | None:
    """The step that is in a schedule and, for its tail, not in the file: the one behind the last block's attention.

    Args:
        schedule: as it was asked for.
        tail: of the file.
    """
    step = schedule.by_site.get((schedule.depth - 1, "post_attn"))
    return step if tail == "class" else None


def in_file(schedule: Schedule, tail: str) -> Schedule:
    """A schedule with the steps that a file of this tail has.

    Args:
        schedule: as it was asked for.
        tail: of the file.
    """
    return schedule if left_out(schedule, tail) is None else replace(schedule, steps=schedule.steps[:-1])
