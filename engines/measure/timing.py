"""Interleaved timing: every candidate once per round, so that a change of the machine's speed meets all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

PRECISION = 0.005  # half of the ratio's confidence interval at which timing may end early
FEWEST = 12  # rounds before it may
WARM_UP = 2  # rounds that are not counted

Timer = Callable[[], float]  # runs something once and gives the seconds it took


class Ratio(NamedTuple):
    """A ratio of two times, round by round: its median, and the range it is told with."""

    middle: float
    low: float
    high: float


def interleaved(timers: dict[str, Timer], rounds: int) -> dict[str, list[float]]:
    """Seconds of each timer, once a round, after WARM_UP rounds that are not counted.

    Args:
        timers: name -> a function that gives the seconds of one run (`Runner.timer`, `stopwatch`).
        rounds: how many are counted.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    for i in range(WARM_UP + rounds):
        _round(timers, times if i >= WARM_UP else None)
    return times


def interleaved_until_precise(
    timers: dict[str, Timer], pairs: list[tuple[str, str]], *, seconds: float, fewest: int = 5
) -> dict[str, list[float]]:
    """The same until every ratio is known to PRECISION, but no longer than the given time.

    Args:
        timers: as `interleaved`.
        pairs: names whose ratio (first over second) is to be known.
        seconds: of the host's clock, for everything.
        fewest: rounds that are made whatever the time.
    """
    for _ in range(WARM_UP):
        _round(timers, None)
    times: dict[str, list[float]] = {name: [] for name in timers}
    start, count = time.perf_counter(), 0
    while count < fewest or time.perf_counter() - start < seconds:
        _round(timers, times)
        count += 1
        if count >= FEWEST and count % 4 == 0 and all(half_interval(times[a], times[b]) < PRECISION for a, b in pairs):
            break
    return times


def _round(timers: dict[str, Timer], times: dict[str, list[float]] | None) -> None:
    for name, timer in timers.items():
        seconds = timer()
        if times is not None:
            times[name].append(seconds)


def half_interval(a: list[float], b: list[float]) -> float:
    """Half of the 95 % confidence interval of the median of a / b, over the median: from its order statistics,
    whatever the distribution.

    Args:
        a: seconds, one a round.
        b: seconds of the same rounds.
    """
    values = np.sort(np.array(a) / np.array(b))
    n = len(values)
    low, high = max(int(n / 2 - 0.98 * n**0.5), 0), min(int(np.ceil(n / 2 + 0.98 * n**0.5)), n - 1)
    return float((values[high] - values[low]) / 2 / np.median(values))


def ratio(a: list[float], b: list[float]) -> Ratio:
    """Median, 20 and 80 percentile of a / b, round by round.

    Args:
        a: seconds, one a round.
        b: seconds of the same rounds.
    """
    low, middle, high = np.percentile(np.array(a) / np.array(b), [20, 50, 80])
    return Ratio(float(middle), float(low), float(high))
