"""How long a schedule takes, from curves of the time that half a block takes on a number of tokens. Imports no torch.

    T(schedule) = q (sum over blocks of attention(n) + mlp(m)  +  sum over reductions of step)

n and m are a block's tokens in the attention and in the MLP; q is the dense model's own time over the sum of its half blocks (the
embedding, the head, and how fast the machine is today); step is what one reduction of a method costs, fitted on one reduced file.

Time over tokens is a staircase: runtimes multiply rows in eights. Of 120 and 121 tokens the second takes 2 to 6 % longer, of 121
and 128 both take almost the same. So curves are measured at multiples of 8 and right behind them, and read in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

from ...export import macs
from ...export.errors import UsageError
from ...export.schedule import Schedule

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

    def half_blocks(self, schedule: Schedule) -> float:
        """Milliseconds of all half blocks of a schedule, as they were measured."""
        return sum(
            staircase(self.tokens, self.attention, n=n) + staircase(self.tokens, self.mlp, n=m)
            for n, m in schedule.tokens_per_block()
        )


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
    """

    curves: LatencyCurves
    scale: float
    steps: dict[str, float]

    @classmethod
    def of_dense(cls, curves: LatencyCurves, schedule: Schedule, *, ms: float) -> LatencyModel:
        """The model with q from the dense model's own time.

        Args:
            curves: of its blocks.
            schedule: any of the model.
            ms: of one run of the dense file.
        """
        return cls(curves, ms / curves.half_blocks(macs.dense(schedule)), dict(curves.steps))

    def fitted(self, schedule: Schedule, *, ms: float) -> LatencyModel:
        """The model with the cost of one reduction of a method, from one reduced file.

        Args:
            schedule: of the file, with a step or more.
            ms: of one run of it, by the same clock as the dense model's.
        """
        rest = ms / self.scale - self.curves.half_blocks(schedule)
        return replace(self, steps={**self.steps, schedule.method: max(rest / len(schedule.steps), 0.0)})

    def predict(self, schedule: Schedule) -> float:
        """Milliseconds of a run. Raises: UsageError for a method whose reductions have not been fitted."""
        if schedule.steps and schedule.method not in self.steps:
            raise UsageError(
                f"latency of {schedule.method}: no file of it has been timed, so its reductions have no cost"
            )
        reductions = len(schedule.steps) * self.steps.get(schedule.method, 0.0)
        return self.scale * (self.curves.half_blocks(schedule) + reductions)
