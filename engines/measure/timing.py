"""Interleaved timing: every candidate once per round, so that a change of the machine's speed meets all alike."""

from __future__ import annotations

import time
from typing import Callable

import numpy as np

SURE = 0.005  # half of the ratio's confidence interval at which timing may end early
LEAST = 12  # rounds before it may


def interleaved(calls: dict[str, Callable], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, once a round, after `warmup` rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + rounds):
        _round(calls, times if i >= warmup else None)
    return times


def until_sure(calls: dict[str, Callable], pairs: list[tuple[str, str]], seconds: float) -> dict[str, list[float]]:
    """The same until every ratio of pairs (a over b) is known to SURE, but no longer than `seconds`; five rounds at least."""
    for _ in range(2):
        _round(calls, None)
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, done = time.perf_counter(), 0
    while done < 5 or time.perf_counter() - start < seconds:
        _round(calls, times)
        done += 1
        if done >= LEAST and done % 4 == 0 and all(_unsure(times[a], times[b]) < SURE for a, b in pairs):
            break
    return times


def _round(calls: dict[str, Callable], times: dict[str, list[float]] | None) -> None:
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        if times is not None:
            times[name].append(time.perf_counter() - start)


def _unsure(a: list[float], b: list[float]) -> float:
    """Half of the 95 % confidence interval of the median of a / b, over the median: from its order statistics, whatever the
    distribution."""
    values = np.sort(np.array(a) / np.array(b))
    n = len(values)
    low, high = max(int(n / 2 - 0.98 * n**0.5), 0), min(int(np.ceil(n / 2 + 0.98 * n**0.5)), n - 1)
    return float((values[high] - values[low]) / 2 / np.median(values))


def ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Median, 20 and 80 percentile of a / b, round by round."""
    low, middle, high = np.percentile(np.array(a) / np.array(b), [20, 50, 80])
    return float(middle), float(low), float(high)
