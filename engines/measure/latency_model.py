"""How long a schedule takes, from curves of the time that half a block takes on a number of tokens. Imports no torch.

    T(schedule) = q (sum over blocks of attention(n) + mlp(m)  +  sum over reductions of step)

n and m are a block's tokens in the attention and in the MLP; q is the dense model's own time over the sum of its half blocks (the
embedding, the head, and how fast the machine is today); step is what one reduction of a method costs, fitted on one reduced file.

With the class tail (`export/tail`) the last block's MLP is at its prefix tokens, and of its attention half the share is left that its
multiply-accumulates have.

Time over tokens is a staircase: runtimes multiply rows in eights. Of 120 and 121 tokens the second takes 2 to 6 % longer, of 121
and 128 both take almost the same. So curves are measured at multiples of 8 and right behind them, and read in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

from ...export import macs
from ...export.errors import UsageError
from ...export.schedule import Schedule
from ...export.tail import in_file

STEP = 8  # rows that runtimes multiply at once
DISTANCE = 6  # measured multiples of STEP, roughly


@dataclass(frozen=True)
class CurveKey:
    """What a curve depends on.

    Attributes:
        processor: its name and instruction sets, or the GPU's name.
        runtime: name of the runtime. runtime_version: of its package.
        version: of the tokexport that wrote the graphs.
        dtype: of the trunk.
        batch: images in a run.
        threads: of the processor, 0 for the runtime's own choice.
        shape: of a block, in words.
    """

    processor: str
    runtime: str
    runtime_version: str
    version: str
    dtype: str
    batch: int
    threads: int
    shape: str


@dataclass(frozen=True)
class LatencyCurves:
    """Measured time of half a block over the tokens of an image.

    Attributes:
        key: what they were measured on.
        tokens: counts, ascending.
        attention, mlp: milliseconds a run at each count.
        steps: method -> milliseconds of one reduction, in the curves' own scale (q = 1).
    """

    key: CurveKey
    tokens: tuple[int, ...]
    attention: tuple[float, ...]
    mlp: tuple[float, ...]
    steps: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        n = len(self.tokens)
        if n < 2 or len(self.attention) != n or len(self.mlp) != n or any(a >= b for a, b in pairwise(self.tokens)):
            raise UsageError("curves: wanted two or more token counts, ascending, and a time for each")
        if min(self.tokens) < 1 or min(*self.attention, *self.mlp) <= 0 or min(self.steps.values(), default=0.0) < 0:
            raise UsageError("curves: wanted token counts and times above 0")

    def half_blocks(self, schedule: Schedule, tail_dims: dict | None = None) -> float:
        """Milliseconds of all half blocks of a schedule, as they were measured.

        Args:
            schedule: of the file.
            tail_dims: of the model (see `macs.count`) where the file has the class tail; None where it computes the last block whole.
        """
        attention = lambda n: staircase(self.tokens, self.attention, n=n)
        mlp = lambda n: staircase(self.tokens, self.mlp, n=n)
        blocks = schedule.tokens_per_block()
        whole = sum(attention(n) + mlp(m) for n, m in blocks)
        if tail_dims is None:
            return whole
        (n, m), p = blocks[-1], schedule.n_prefix
        return whole - attention(n) * macs.tail_share(tail_dims, n, n_prefix=p) - (mlp(m) - mlp(p))


def staircase(tokens: tuple[int, ...], times: tuple[float, ...], *, n: int) -> float:
    """The time at a number of tokens, read off measured ones.

    At a multiple of 8 it is read off the multiples; elsewhere it lies between the step's lower edge, 8k + 1, read off those that were
    measured there, and its upper edge. With no lower edges, off all.

    Args:
        tokens: measured counts, ascending.
        times: as many.
        n: tokens, 1 or more.
    """
    points = list(zip(tokens, times))
    upper, lower = ([p for p in points if p[0] % STEP == edge] for edge in (0, 1))
    if len(upper) < 2 or len(lower) < 2:
        return _line(points, n)
    if n % STEP == 0:
        return _line(upper, n)
    first = n // STEP * STEP + 1
    low, high = _line(lower, first), _line(upper, first + STEP - 1)
    return low + (high - low) * (n - first) / (STEP - 1)


def _line(points: list[tuple[int, float]], n: int) -> float:
    """Straight from point to point, and on beyond the last two; never less than in proportion below the first."""
    after = next((i for i, (x, _) in enumerate(points) if x >= n), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(after - 1, 0)], points[max(after, 1)]
    value = y0 + (y1 - y0) * (n - x0) / (x1 - x0)
    return max(value, points[0][1] * n / points[0][0]) if n < points[0][0] else value


def token_counts(n_tokens: int, points: int = DISTANCE) -> list[int]:
    """The counts to measure for a model: some multiples of 8 up to its own tokens, and each next one.

    Args:
        n_tokens: of the model, prefix tokens included.
        points: how many multiples, roughly.
    """
    top, floor = -(-n_tokens // STEP) * STEP, n_tokens // STEP * STEP
    distance = max(STEP, -(-top // (points * STEP)) * STEP)
    upper = {*range(top, 0, -distance), *([floor] if floor else [])}
    lower = {n + 1 for n in upper if n < top}
    return sorted(upper | lower | {n_tokens})


@dataclass(frozen=True)
class LatencyModel:
    """Predicts the time of a model's schedules.

    Attributes:
        curves: of its blocks.
        scale: q: the dense model's time over that of its half blocks.
        steps: method -> milliseconds of one reduction at q = 1.
        tail_dims: see `LatencyCurves.half_blocks`; of all files alike.
    """

    curves: LatencyCurves
    scale: float
    steps: dict[str, float]
    tail_dims: dict | None = None

    @classmethod
    def of_dense(
        cls, curves: LatencyCurves, schedule: Schedule, *, ms: float, tail_dims: dict | None = None
    ) -> LatencyModel:
        """The model with q from the dense model's own time.

        Args:
            curves: of its blocks.
            schedule: any of the model.
            ms: of one run of the dense file.
            tail_dims: see `LatencyCurves.half_blocks`.
        """
        return cls(curves, ms / curves.half_blocks(macs.dense(schedule), tail_dims), dict(curves.steps), tail_dims)

    def fitted(self, schedule: Schedule, *, ms: float) -> LatencyModel:
        """The model with the cost of one reduction of a method, from one reduced file.

        Args:
            schedule: of the file, with a step or more.
            ms: of one run of it, by the same clock as the dense model's.
        """
        rest = ms / self.scale - self.curves.half_blocks(schedule, self.tail_dims)
        return replace(self, steps={**self.steps, schedule.method: max(rest / max(self._n_steps(schedule), 1), 0.0)})

    def _n_steps(self, schedule: Schedule) -> int:
        """Reductions in a schedule's file."""
        return len(in_file(schedule, "full" if self.tail_dims is None else "class").steps)

    def predict(self, schedule: Schedule) -> float:
        """Milliseconds of a run. Raises: UsageError for a method whose reductions have not been fitted."""
        if schedule.steps and schedule.method not in self.steps:
            raise UsageError(
                f"latency of {schedule.method}: no file of it has been timed, so its reductions have no cost"
            )
        reductions = self._n_steps(schedule) * self.steps.get(schedule.method, 0.0)
        return self.scale * (self.curves.half_blocks(schedule, self.tail_dims) + reductions)
