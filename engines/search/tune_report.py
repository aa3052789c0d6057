"""What `tune` gives: a table of candidates, the one it chose, and in words what that gives up. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .budget import Budget


@dataclass(frozen=True)
class TuneRow:
    """One candidate.

    Attributes:
        name: in words, e.g. "tome, every other block".
        method, options: as `tokexport onnx` takes them, JSON values.
        strength: how strongly it reduces, in the variant's own unit.
        tokens: after each block.
        macs, macs_ratio: multiply-accumulates of an image, and the dense model's over them.
        predicted_ms, predicted_speedup: of a run, by the latency model.
        reaches: its strongest form is within the budget.
        error, distance: mean over the images, see `ImageErrors`; None when it was not run on them.
        same: share of images with the dense model's likeliest class; None without classes.
        accuracy: share judged rightly; None without labels.
        measured_ms, speedup, speedup_low, speedup_high: of the exported file, beside the dense one; None when it was not timed.
        over_best: by how much its distance is larger than the chosen one's, over that; over_best_error: its standard error.
        chosen: it is the file that was written.
        further: it is not for the budget: the chosen variant, more or less strongly.
    """

    name: str
    method: str
    options: dict[str, Any]
    strength: float
    tokens: tuple[int, ...]
    macs: int
    macs_ratio: float
    predicted_ms: float
    predicted_speedup: float
    reaches: bool = True
    error: float | None = None
    distance: float | None = None
    same: float | None = None
    accuracy: float | None = None
    measured_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    over_best: float | None = None
    over_best_error: float | None = None
    chosen: bool = False
    further: bool = False


@dataclass(frozen=True)
class WorstImage:
    """An image on which the chosen file is far from the dense model. error: its own. sources: final row of every patch, -1: gone."""

    path: str
    error: float
    sources: tuple[int, ...]


@dataclass(frozen=True)
class TuneReport:
    """What was compared and chosen.

    Attributes:
        path: of the file that was written; None when no candidate reaches the budget.
        model: its name.
        budget: as asked.
        runtime, dtype, batch, threads: what the file is for and was timed with.
        processor: that it was timed on.
        images, seed: photos it was judged on, and the seed that drew them.
        measure: of the errors, "KL" or "1 - cosine".
        dense_ms: of one run of the dense file, beside the last files that were timed.
        dense_accuracy: None without labels.
        rows: all candidates, the best first.
        notes: what was left out or solved for again, in words.
        worst: images, the worst first.
    """

    path: Path | None
    model: str
    budget: Budget
    runtime: str
    dtype: str
    batch: int
    threads: int
    processor: str
    images: int
    seed: int
    measure: str
    dense_ms: float
    dense_accuracy: float | None
    rows: tuple[TuneRow, ...]
    notes: tuple[str, ...] = ()
    worst: tuple[WorstImage, ...] = field(default=(), repr=False)

    @property
    def passed(self) -> bool:
        """Whether a file within the budget was written."""
        return self.path is not None

    @property
    def chosen(self) -> TuneRow | None:
        """The row of the file that was written."""
        return next((row for row in self.rows if row.chosen), None)

    @property
    def nearest(self) -> TuneRow | None:
        """The row that comes nearest to the budget, by its measured time where it was timed."""
        if self.budget.kind == "macs":
            return min(self.rows, key=lambda row: row.macs, default=None)
        return min(self.rows, key=lambda row: row.measured_ms or row.predicted_ms, default=None)

    def to_json(self) -> dict:
        """Plain JSON values, without the token maps of the worst images."""
        values = asdict(self)
        values["path"] = None if self.path is None else str(self.path)
        values["worst"] = [{"path": w.path, "error": w.error} for w in self.worst]
        values["rows"] = [{**asdict(row), "tokens": list(row.tokens)} for row in self.rows]
        return {"passed": self.passed, **values, "notes": list(self.notes)}

    def words(self) -> list[str]:
        """What was chosen and what it gives up, a sentence each."""
        row = self.chosen
        if row is None:
            return [self._nearest_words()]
        if row.method == "none":
            return [
                f"The dense model itself is within the budget ({self.budget.words}): {self.dense_ms:.2f} ms a run. Nothing is reduced."
            ]
        out = [self._speed_words(row), self._loss_words(row)]
        rivals = [r for r in self.rows if not r.chosen and not r.further and r.over_best is not None and r.reaches]
        if rivals:
            out.append(_rival_words(rivals[0]))
        return out

    def _nearest_words(self) -> str:
        row = self.nearest
        if row is None:
            return f"No candidate reaches {self.budget.words}: there is none."
        ms = row.measured_ms or row.predicted_ms
        reached = self.budget.reached_words(ms, row.macs, dense_ms=self.dense_ms)
        return (
            f"No candidate reaches {self.budget.words}. The nearest is {row.name}: {reached}"
            f"{'' if row.measured_ms or self.budget.kind == 'macs' else ' (predicted)'}. Nothing was written."
        )

    def _speed_words(self, row: TuneRow) -> str:
        time = f"{row.measured_ms:.2f} ms a run instead of {self.dense_ms:.2f}"
        spread = f"{row.speedup:.3f} times ({row.speedup_low:.3f} to {row.speedup_high:.3f})"
        gain = (
            ""
            if row.speedup > 1
            else " That is no faster than the dense model: fewer multiply-accumulates gain nothing here."
        )
        return (
            f"{row.name}: {time} in {self.runtime}, {spread}; asked were {self.budget.words}.{gain} "
            f"MACs fall by {row.macs_ratio:.3f}, the prediction was {row.predicted_ms:.2f} ms."
        )

    def _loss_words(self, row: TuneRow) -> str:
        what = "the classes' probabilities" if self.measure == "KL" else "the outputs"
        text = f"On {self.images} images {what} move by {self.measure} {row.error:.3g} on average"
        if self.worst:
            text += f", at most {self.worst[0].error:.3g} ({Path(self.worst[0].path).name})"
        if row.same is not None:
            text += f"; the likeliest class stays on {row.same:.1%} of them"
        if row.accuracy is not None:
            text += f"; accuracy {row.accuracy:.1%} instead of {self.dense_accuracy:.1%}"
        return text + "."


def _rival_words(row: TuneRow) -> str:
    """How sure the choice is, against the next candidate."""
    gap, error = row.over_best, row.over_best_error
    if error is None:
        return f"The next is {row.name}; one image tells no two candidates apart."
    sure = (
        "which these images tell apart"
        if gap > 2 * error
        else "which these images do not tell apart (two standard errors)"
    )
    way = "farther from" if gap >= 0 else "nearer to"
    return f"The next is {row.name}, {abs(gap):.1%} {way} the dense model (standard error {error:.1%}), {sure}."
