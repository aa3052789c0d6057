"""How many requests a server puts together, and how long it waits for them: from an engine's profile, or from latencies
that `bench` measured.

Example: bench says 5 ms for one image and 16 ms for eight, and nothing is faster per image than eight. Then eight are
preferred, and a request waits at most 8 ms, half of what that batch takes: nobody's answer is later than half a run by
waiting.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...export.errors import UsageError
from ...export.records import parse

UNMEASURED = 16  # most images of a batch when nothing was measured
WAIT = 0.5  # of the time of the preferred batch


@dataclass(frozen=True)
class Batching:
    """What stands in a configuration.

    Attributes:
        most: images of a batch; 0 for a file with a batch size of its own, which takes no other.
        preferred: sizes that are run at once when they are there.
        delay_us: microseconds that a request waits for others; 0: it takes those that are there.
        origin: what this is from, in words.
    """

    most: int
    preferred: tuple[int, ...]
    delay_us: int
    origin: str


def batching_of(
    batch: int | None,
    profile: tuple[int, int, int] | None,
    *,
    latencies: dict[int, float] | None = None,
    most: int | None = None,
) -> Batching:
    """How requests of a file are put together.

    Args:
        batch: of a file that takes no other; None for any.
        profile: of an engine with a free batch: smallest, best and largest.
        latencies: batch -> milliseconds, measured of this file; None or empty when it was not.
        most: images of a batch at most, as the user wants it; None for what follows from the others.
    Raises:
        UsageError: `most` is not what the file takes.
    """
    limit = batch or (profile[2] if profile else None)
    if most is not None and (most < 1 or (limit is not None and most > limit) or (batch and most != batch)):
        takes = f"batches of {batch}" if batch else f"1 to {limit}" if limit else "1 or more"
        raise UsageError(f"largest batch {most}: the file takes {takes}")
    if batch:
        return Batching(0, (), 0, f"the file takes batches of {batch} and no other")
    cap = most or limit or None
    fitting = {n: ms for n, ms in (latencies or {}).items() if cap is None or n <= cap}
    if fitting:
        best = max(fitting, key=lambda n: (n / fitting[n], -n))
        words = f"measured: {best} at {best / fitting[best] * 1e3:.0f} images a second, {fitting[best]:.3g} ms"
        delay = round(WAIT * fitting[best] * 1e3) if best > 1 else 0
        return Batching(cap or max(best, max(fitting)), (best,) if best > 1 else (), delay, words)
    if profile:
        best = min(profile[1], cap)
        return Batching(cap, (best,) if best > 1 else (), 0, "the engine's profile; no latency was measured")
    return Batching(cap or UNMEASURED, (), 0, "nothing was measured: requests that wait are put together")


def read_latencies(path: str | Path, name: str, runtime: str) -> dict[int, float]:
    """Milliseconds by batch of one file, of a report that `tokexport bench --json` wrote.

    Args:
        path: of the report.
        name: of the file, without folders.
        runtime: that a server will run it with, e.g. "ort", "trt".
    Raises:
        UsageError: it is no such report, or the file was not measured in this runtime.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"latency report {path}: no such file: wanted what `tokexport bench --json` prints")
    report = parse(path.read_bytes(), name=str(path))
    rows = report.get("rows") if isinstance(report, dict) else None
    try:
        every = [(Path(r["file"]).name, str(r["runtime"]), int(r["batch"]), r.get("ms")) for r in rows]
    except (TypeError, KeyError, ValueError, AttributeError):
        raise UsageError(f"latency report {path}: wanted what `tokexport bench --json` prints") from None
    matching = {batch: float(ms) for file, run_by, batch, ms in every if file == name and run_by == runtime and ms}
    if not matching:
        measured = ", ".join(sorted({f"{file} in {run_by}" for file, run_by, _, ms in every if ms})) or "nothing"
        raise UsageError(f"latency report {path} has no latency of {name} in {runtime}: it has {measured[:200]}")
    return matching
