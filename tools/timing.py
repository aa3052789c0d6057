"""Interleaved timing: every candidate once per round, so that a change of the machine's speed meets all alike."""

from __future__ import annotations

import time
from typing import Callable

import numpy as np


def interleaved(calls: dict[str, Callable], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, once a round, after `warmup` rounds that are not counted."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Median, 20 and 80 percentile of a / b, round by round."""
    low, middle, high = np.percentile(np.array(a) / np.array(b), [20, 50, 80])
    return float(middle), float(low), float(high)
