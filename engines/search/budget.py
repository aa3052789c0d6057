"""What a deployer asks of `tune`: a speedup, a latency or an amount of arithmetic. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ...export.errors import UsageError

UNITS = {"speedup": "times", "latency_ms": "ms", "macs": "multiply-accumulates"}
MISSED, SPARE = (
    1.01,
    0.97,
)  # of the budget's time: a measured file above the one misses it, below the other gives too much away


@dataclass(frozen=True)
class Budget:
    """One of three.

    Attributes:
        kind: "speedup" over the dense model in the same runtime, "latency_ms" of one run, or "macs" of one image.
        value: a speedup above 1; milliseconds or multiply-accumulates above 0.
    """

    kind: Literal["speedup", "latency_ms", "macs"]
    value: float

    def __post_init__(self):
        if self.kind not in UNITS:
            raise UsageError(f"budget {self.kind!r}: wanted one of {', '.join(UNITS)}")
        if not math.isfinite(self.value) or self.value <= (1 if self.kind == "speedup" else 0):
            least = "a speedup above 1" if self.kind == "speedup" else f"a number of {UNITS[self.kind]} above 0"
            raise UsageError(f"{self.kind} {self.value:g}: wanted {least}")

    def most_ms(self, dense_ms: float) -> float:
        """Milliseconds a run may take; infinite where arithmetic is what counts."""
        return {"speedup": dense_ms / self.value, "latency_ms": self.value}.get(self.kind, math.inf)

    def fits(self, ms: float, macs: int, *, dense_ms: float) -> bool:
        """Whether a schedule is within the budget.

        Args:
            ms: milliseconds of a run, predicted.
            macs: multiply-accumulates of an image.
            dense_ms: of a run of the dense model.
        """
        return macs <= self.value if self.kind == "macs" else ms <= self.most_ms(dense_ms)

    def off(self, ms: float, *, dense_ms: float) -> bool:
        """Whether a measured time is so far from the budget that the schedule should be solved for again.

        Args:
            ms: milliseconds of a run, measured.
            dense_ms: of the dense model, measured beside it.
        """
        share = ms / self.most_ms(dense_ms)
        return self.kind != "macs" and not SPARE <= share <= MISSED

    def met(self, ms: float, *, dense_ms: float) -> bool:
        """Whether a measured time is within the budget, a hundredth of noise allowed.

        Args:
            ms, dense_ms: see `off`.
        """
        return ms <= self.most_ms(dense_ms) * MISSED

    @property
    def words(self) -> str:
        """E.g. "1.5 times the speed", "20 ms a run", "2.90 G multiply-accumulates"."""
        if self.kind == "speedup":
            return f"{self.value:g} times the dense model's speed"
        if self.kind == "latency_ms":
            return f"{self.value:g} ms a run"
        return f"{self._macs(self.value)} multiply-accumulates an image"

    def reached_words(self, ms: float, macs: int, *, dense_ms: float) -> str:
        """What a schedule comes to, in the budget's own unit.

        Args:
            ms, macs, dense_ms: see `fits`.
        """
        if self.kind == "speedup":
            return f"{dense_ms / ms:.3f} times"
        return f"{ms:.2f} ms" if self.kind == "latency_ms" else self._macs(macs)

    def _macs(self, macs: float) -> str:
        """In the unit of the budget, so that two of them can be compared."""
        scale, unit = (1e9, "G") if self.value >= 1e9 else (1e6, "M")
        return f"{macs / scale:.4g} {unit}"
