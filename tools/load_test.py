"""A load test of a ladder on loopback: one server, one client, requests that come as they please.

    python -m tokexport.tools.load_test LADDER --target-ms 400 --seconds 10 --load 0.5,1,1.5,2

The server takes images of one byte a value over TCP and runs them one after another on one thread. The client sends them at random
times (exponential gaps, seeded) at a multiple of what the slowest rung can serve. Each rung by itself is compared with the ladder, which
gives every request what is left of half of the target, divided among those that wait. A request's time runs from when it was due,
whatever the client had to do meanwhile, to its answer.
"""

from __future__ import annotations

import argparse
import json
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..engines.ladder import OpenLadder, open_ladder
from ..export.errors import FailureError, UsageError

MOST = 5000  # requests of one run
RESERVE = 0.5  # of the target
GRACE = 30.0  # seconds that answers are waited for after the last request


@dataclass(frozen=True)
class LoadRow:
    """One policy under one load.

    Attributes:
        policy: "ladder", or the label of the one rung that serves all.
        load: requests a second, over what the slowest rung can serve.
        requests: sent. unanswered: without an answer when waiting ended.
        ms50, ms95, ms99: percentiles of the time of a request.
        within: share of requests answered within the target.
        error: mean over requests of their rung's error.
        shares: of the requests, by rung.
    """

    policy: str
    load: float
    requests: int
    unanswered: int
    ms50: float
    ms95: float
    ms99: float
    within: float
    error: float
    shares: dict[str, float]


class Server:
    """Takes connections on loopback and answers each image with the number of the rung that ran it.

    Args:
        ladder: opened, of one image a run.
        rung: the one that serves all; None: the ladder picks.
        target: seconds that a request may take.
    """

    def __init__(self, ladder: OpenLadder, rung: int | None, target: float):
        self.ladder, self.rung, self.target = ladder, rung, target
        provenance = ladder.ladder.provenance
        self.shape = (provenance["dims"]["channels"], *provenance["preprocess"]["size"])
        self.waiting: queue.Queue = queue.Queue()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = self.socket.getsockname()

    def __enter__(self) -> Server:
        for work in (self._accept, self._serve):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.waiting.put(None)
        self.socket.close()

    def _accept(self) -> None:
        try:
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self._read, args=(connection,), daemon=True).start()
        except OSError:  # closed
            return

    def _read(self, connection: socket.socket) -> None:
        size = int(np.prod(self.shape))
        with connection, connection.makefile("rb") as stream:
            while len(head := stream.read(8)) == 8:
                body = stream.read(size)
                if len(body) == size:
                    self.waiting.put((time.perf_counter(), head, body, connection))

    def _serve(self) -> None:
        while (item := self.waiting.get()) is not None:
            came, head, body, connection = item
            image = np.frombuffer(body, np.uint8).reshape(1, *self.shape).astype(np.float32) / 128 - 1
            place = self.place(time.perf_counter() - came)
            self.ladder.runner(place).run_unchecked({"image": image})
            try:
                connection.sendall(head + struct.pack("<i", place))
            except OSError:  # the client has gone
                continue

    def place(self, waited: float) -> int:
        """The rung for a request that has waited so many seconds: what is left of half of its target, divided among those that wait. The
        other half is for those that come meanwhile."""
        if self.rung is not None:
            return self.rung
        left = (self.target * (1 - RESERVE) - waited) / (self.waiting.qsize() + 1)
        return self.ladder.ladder.pick(left * 1e3, times=self.ladder.times)


def drive(
    address: tuple, size: int, *, rate: float, seconds: float, seed: int
) -> tuple[list[float], dict[int, tuple[float, int]]]:
    """Send images at random times and take the answers.

    Args:
        address: of the server.
        size: bytes of an image.
        rate: requests a second.
        seconds: how long requests are sent.
        seed: of the times.
    Returns:
        When each request was due (seconds), and of each that was answered when and by which rung.
    """
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rate, min(int(seconds * rate) + 1, MOST))
    due, image, answers = np.cumsum(gaps), rng.integers(0, 256, size, dtype=np.uint8).tobytes(), {}
    with socket.create_connection(address) as connection:
        start = time.perf_counter()

        def take() -> None:
            with connection.makefile("rb") as stream:
                while len(answers) < len(due) and len(answer := stream.read(12)) == 12:
                    number, rung = struct.unpack("<qi", answer)
                    answers[number] = (time.perf_counter() - start, rung)

        taker = threading.Thread(target=take, daemon=True)
        taker.start()
        for i, when in enumerate(due):
            time.sleep(max(start + when - time.perf_counter(), 0))
            connection.sendall(struct.pack("<q", i) + image)
        taker.join(GRACE)
        connection.shutdown(socket.SHUT_RDWR)
    return list(due), dict(answers)


def measured(
    ladder: OpenLadder, *, loads: list[float], target_ms: float, seconds: float, seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[LoadRow]:  # fmt: skip
    """Every rung by itself and the ladder, under every load.

    Args:
        ladder: opened.
        loads: requests a second, over what the slowest rung can serve.
        target_ms: milliseconds that a request may take.
        seconds: of each run.
        seed: of the times of requests, the same for all policies.
        progress: told what runs.
    """
    rungs, rows = ladder.ladder.rungs, []
    capacity = 1e3 / max(ladder.times)
    for load in loads:
        for place in (None, *range(len(rungs))):
            policy = "ladder" if place is None else rungs[place].label
            progress(f"load {load:g}, {policy}")
            with Server(ladder, place, target_ms / 1e3) as server:
                size = int(np.prod(server.shape))
                due, answers = drive(server.address, size, rate=load * capacity, seconds=seconds, seed=seed)
            rows.append(_row(policy, load, due, answers, rungs=rungs, target_ms=target_ms))
    return rows


def _row(policy: str, load: float, due: list, answers: dict, *, rungs, target_ms: float) -> LoadRow:
    times = np.array([(answers[i][0] - when) * 1e3 if i in answers else np.inf for i, when in enumerate(due)])
    served = [place for _, place in answers.values()]
    finite = [float(min(v, 1e9)) for v in np.percentile(times, [50, 95, 99], method="higher")]
    return LoadRow(
        policy=policy,
        load=load,
        requests=len(due),
        unanswered=len(due) - len(answers),
        ms50=finite[0],
        ms95=finite[1],
        ms99=finite[2],
        within=float((times <= target_ms).mean()),
        error=float(np.mean([rungs[p].error for p in served])) if served else 0.0,
        shares={rung.label: served.count(i) / max(len(served), 1) for i, rung in enumerate(rungs)},
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the test and print its table; exit code 2 for wrong use, 3 for a runtime that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tokexport.tools.load_test", description="A ladder under load, on loopback."
    )
    parser.add_argument("ladder", type=Path)
    parser.add_argument("--target-ms", type=float, required=True, help="time that a request may take")
    parser.add_argument("--load", default="0.5,1,1.5,2", help="of what the slowest rung can serve; default %(default)s")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each run; default %(default)s")
    parser.add_argument("--runtime", help="default: what the ladder was measured with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="the rows as JSON on stdout")
    args = parser.parse_args(arguments)
    try:
        loads = _loads(args.load)
        if not 0 < args.seconds <= 600 or not args.target_ms > 0:
            raise UsageError("--seconds: wanted more than 0 and at most 600; --target-ms: more than 0")
        with open_ladder(args.ladder, args.runtime, measure=True) as ladder:
            say = lambda text: print(text, file=sys.stderr)
            where = {"target_ms": args.target_ms, "seconds": args.seconds, "seed": args.seed}
            rows = measured(ladder, loads=loads, progress=say, **where)
            times = dict(zip((r.label for r in ladder.ladder.rungs), ladder.times, strict=True))
    except (UsageError, FailureError) as e:
        print(f"Error: {e}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 3
    if args.json:
        print(json.dumps({**where, "ms": times, "rows": [asdict(r) for r in rows]}, indent=1))
    else:
        _print(rows, times, args.target_ms)
    return 0


def _loads(text: str) -> list[float]:
    try:
        loads = [float(part) for part in text.split(",")]
    except ValueError:
        loads = [0.0]
    if not all(0 < load <= 20 for load in loads):
        raise UsageError(f"--load {text[:60]!r}: wanted numbers above 0 and at most 20, e.g. 0.5,1,2")
    return loads


def _print(rows: list[LoadRow], times: dict[str, float], target: float) -> None:
    print(
        "milliseconds a run: " + ", ".join(f"{label} {ms:.1f}" for label, ms in times.items()) + f"; target {target:g}"
    )
    print(f"{'load':>5}  {'policy':<12}{'within':>8}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'error':>10}  shares")
    for r in rows:
        shares = " ".join(f"{label} {share:.0%}" for label, share in r.shares.items() if share)
        print(
            f"{r.load:>5g}  {r.policy:<12}{r.within:>8.1%}{r.ms50:>9.0f}{r.ms95:>9.0f}{r.ms99:>9.0f}{r.error:>10.3g}  {shares}"
        )


if __name__ == "__main__":
    sys.exit(main())
