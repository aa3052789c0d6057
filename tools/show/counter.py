"""A progress bar that counts: how many, how many a second, how long it will take."""

from __future__ import annotations

from contextlib import contextmanager


@contextmanager
def counter(out, unit: str):
    """A function (done, total, note) that moves the bar until the block ends; shown on a terminal only.

    Args:
        out: console.
        unit: what is counted, e.g. "images".
    """
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Units a second, of those that this process has done."""

        def render(self, task):
            return Text(f"{task.speed:.1f} {unit}/s" if task.speed else "")

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        console=out,
        transient=True,
        disable=not out.is_terminal,
        speed_estimate_period=60,
    ) as progress:
        task = progress.add_task("", total=None)
        state = {"start": None}

        def show(done: int, total: int, note: str = "") -> None:
            if total and not note and state["start"] is None:  # what an earlier run has done is no speed of this one
                state["start"] = done
                progress.reset(task, total=total, completed=done, description=escape(unit))
            progress.update(task, description=escape(note or unit), completed=done, total=total or None)

        yield show
