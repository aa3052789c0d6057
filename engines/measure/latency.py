"""What a benchmark gives: a row of figures for each file, and what they say together."""

from __future__ import annotations

from dataclasses import asdict, dataclass

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class LatencyRow:
    """One file in one runtime at one batch size.

    Times are of the runtime alone (`timed` says what that is) in milliseconds. Of one process, `ms` is the median of
    its rounds and low and high are their 20 and 80 percentiles; of several, the mean, least and largest of their
    medians. The same holds for ratios, which are taken round by round.

    Args:
        runtime, batch, file, method: what was timed.
        macs_ratio: multiply-accumulates of the dense model over the file's.
        error: why it was not timed, "" when it was; then all figures are None.
        timed: what the time is of, in words.
        processes, rounds: how often it was measured; rounds of all processes.
        percentiles: of the rounds, {"50": ms, "90": ms, "95": ms, "99": ms}; of several processes their mean.
        images_per_second: batch over ms.
        end_to_end_ms: the median of whole calls: input check, copies to and from a GPU, waiting.
        speedup: the dense file's time over the file's.
        bound: the speedup of the free bound, which no matching can beat.
        of_bound: speedup over bound, 1 at best but for noise.
        quotient: speedup over the MACs ratio.
        value, cosine, top1: of a sweep: the option's value, and the agreement with the dense model (see `agreement`).
    """

    runtime: str
    batch: int
    file: str
    method: str
    macs_ratio: float
    error: str = ""
    timed: str | None = None
    processes: int | None = None
    rounds: int | None = None
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    percentiles: dict[str, float] | None = None
    images_per_second: float | None = None
    end_to_end_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    bound: float | None = None
    of_bound: float | None = None
    of_bound_low: float | None = None
    of_bound_high: float | None = None
    quotient: float | None = None
    value: str | None = None
    cosine: float | None = None
    top1: float | None = None

    def to_json(self) -> dict:
        """Plain JSON values, without what was not measured."""
        return {k: v for k, v in asdict(self).items() if v not in (None, "")}


@dataclass(frozen=True)
class Profile:
    """Milliseconds of a file by stage and by part (see `stage_profile`)."""

    runtime: str
    batch: int
    file: str
    parts: dict[str, float]
    stages: dict[str, float]


@dataclass(frozen=True)
class LatencyReport:
    """What `bench` measured, and on what. rows: dense files before those compared with them. swept: the option that
    was swept.
    """

    machine: dict
    threads: int
    rows: list[LatencyRow]
    profiles: list[Profile]
    swept: str | None = None

    @property
    def slow(self) -> list[LatencyRow]:
        """Reduced files that are no faster than dense, or failed."""
        return [r for r in self.rows if r.method != "none" and (r.speedup or 0) <= 1]

    def to_json(self) -> dict:
        """Plain JSON values."""
        profiles = {"profiles": [asdict(p) for p in self.profiles]} if self.profiles else {}
        return {"machine": self.machine, "threads": self.threads, "rows": [r.to_json() for r in self.rows], **profiles}


def break_even(rows: list[LatencyRow]) -> dict[tuple[str, str], int | None]:
    """(runtime, file) -> the smallest measured batch from which on the file is faster than its dense one; None when
    there is none.
    """
    batches = {}
    for row in rows:
        key = row.runtime, row.file
        timed = [r for r in rows if (r.runtime, r.file) == key and r.speedup is not None]
        slow = [r.batch for r in timed if r.speedup <= 1]
        fast = [r.batch for r in timed if r.speedup > 1 and r.batch > max(slow, default=0)]
        if row.method != "none":
            batches[key] = min(fast, default=None)
    return batches
