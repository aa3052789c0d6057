"""Embedding on a Ray cluster: parts are decoded by tasks, run by actors that hold the file, and written by them.

A row of the Ray dataset is a part. Folder and images must be where every node sees them under the same path. What a dead
worker or node was at is done again elsewhere; a part is written aside and renamed, so that twice is no more than once.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...export.errors import EngineError, FailureError, MissingPackageError, UsageError
from ...export.inspection import Inspection
from ..data import ImageData
from ..decode import decode
from ..runners.table import TABLE
from .job import EmbedJob, open_file, plan_job, write_part
from .options import EmbedOptions

STORE = 512 << 20  # bytes of the object store of a cluster of our own: a few parts of decoded pixels


def need_ray():
    """The package Ray, with its data library. Raises: MissingPackageError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError:
        raise MissingPackageError("ray", "ray", "computing on a cluster") from None
    return ray


@contextmanager
def attached(address: str) -> Iterator:
    """Ray, attached to a cluster until the block ends; one that this process is attached to already is kept.

    Args:
        address: of its head, e.g. "10.0.0.1:6379" or "auto"; "local" starts one of this machine, which goes with it.
    Raises:
        UsageError: there is no cluster at this address.
    """
    ray = need_ray()
    if ray.is_initialized():
        yield ray
        return
    if address != "local":
        _check_reachable(address)
    own = {"include_dashboard": False, "object_store_memory": STORE, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(address, logging_level="error", log_to_driver=False, **(own if address == "local" else {}))
    except Exception as e:  # of many kinds
        words = " ".join(str(e).split())[:200]
        raise UsageError(
            f"ray {address!r}: there is no cluster to be reached ({words}): wanted its head, or local"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises: UsageError when nobody listens there; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"ray {address!r}: wanted HOST:PORT of a cluster's head, auto, or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as e:
        raise UsageError(
            f"ray {address!r}: there is no cluster to be reached ({e.strerror or e}): wanted its head, or local"
        ) from None


def count_machines(address: str) -> int:
    """Nodes of a cluster. Raises: as `attached`."""
    with attached(address) as ray:
        return sum(node["Alive"] for node in ray.nodes())


@contextmanager
def connected(inspection: Inspection, folder: Path, options: EmbedOptions) -> Iterator[tuple]:
    """(job, function that computes parts) of a Ray cluster.

    Args:
        inspection: of the file.
        folder: of the parts.
        options: of the run; threads of each engine are 1 unless they say more.
    """
    from ..runners import runtime_for

    options = replace(options, threads=options.threads or 1)
    on_gpu = runtime_for(inspection.path, options.runtime).device == "gpu"
    with attached(options.ray) as ray, _told():
        resources = {"num_cpus": options.threads, "num_gpus": int(on_gpu)}
        _check_resources(ray, resources)
        job = ray.get(ray.remote(**resources)(_plan).remote(inspection, folder, options))
        yield job, partial(_compute, resources=resources, actors=options.actors)


def _check_resources(ray, wanted: dict[str, int]) -> None:
    """Raises: UsageError when no node could hold an engine, for which Ray would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(n.get("CPU", 0) >= wanted["num_cpus"] and n.get("GPU", 0) >= wanted["num_gpus"] for n in nodes):
        best = [f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes]
        raise UsageError(
            f"ray: no node has {wanted['num_cpus']} CPUs and {wanted['num_gpus']} GPUs for an engine: they have "
            f"{', '.join(best[:4])}"
        )

    if sum(n.get("CPU", 0) for n in nodes) < wanted["num_cpus"] + 1:
        raise UsageError(
            f"ray: all nodes together have {sum(n.get('CPU', 0) for n in nodes):g} CPUs: wanted one for decoding too"
        )


def _plan(inspection: Inspection, folder: Path, options: EmbedOptions) -> EmbedJob:
    """The job, planned where the file can be opened."""
    runtime = TABLE[options.runtime].name if options.runtime in TABLE else options.runtime
    with open_file(inspection.path, runtime, options.threads, allow_host_code=options.allow_host_code) as runner:
        return plan_job(inspection, runner, folder=folder, options=options)


def _compute(
    job: EmbedJob,
    images: ImageData,
    slices: dict[int, tuple[int, int]],
    *,
    tick: Callable[[int], None],
    resources: dict[str, int],
    actors: int | None,
) -> tuple[float, None]:
    """Compute parts. Returns: seconds, and None for those that engines ran, which nobody counts here."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    count = min(actors or _room(ray, resources), len(slices))
    dataset = _dataset(ray, job, images, slices=slices, resources=resources, actors=count)
    begin = time.perf_counter()
    for row in dataset.iter_rows():
        tick(row["rows"] + row["broken"])
    return time.perf_counter() - begin, None


def _dataset(ray, job: EmbedJob, images: ImageData, *, slices: dict, resources: dict[str, int], actors: int):
    """A row for every part that has been written: its number, rows and broken images."""
    rows = [{"part": part, "start": start, "stop": stop} for part, (start, stop) in slices.items()]
    preprocess = job.provenance.preprocess
    # What a task holds: the pixels and their packed copies. That decoding asks for memory and the engine does not also keeps
    # Ray from fusing the two into one actor, which would decode while its engine waits.
    images_a_part = max(stop - start for start, stop in slices.values())
    memory = 3 * images_a_part * preprocess.size[0] * preprocess.size[1] * len(preprocess.mean)
    decoded = ray.data.from_items(rows, override_num_blocks=min(len(rows), 10_000)).map_batches(
        _decode_parts,
        batch_size=1,
        fn_kwargs={"images": images, "chunk": job.chunk, "preprocess": preprocess},
        num_cpus=1,
        memory=memory,
    )
    return decoded.map_batches(
        _Engine,
        batch_size=1,
        fn_constructor_kwargs={"job": job},
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
        **resources,
    )


def _room(ray, resources: dict[str, int]) -> int:
    """Engines that a cluster has room for: one a GPU, or so many that decoding has a core for each."""
    total = ray.cluster_resources()
    if resources["num_gpus"]:
        return max(1, int(total.get("GPU", 0)))
    return max(1, int(total.get("CPU", 1)) // (resources["num_cpus"] + 1))


def _decode_parts(batch: dict, *, images: ImageData, chunk: int, preprocess) -> dict:
    """Parts with their images decoded, packed as bytes."""
    packed = []
    for start, stop in zip(batch["start"], batch["stop"]):
        items = list(images.items(int(start), int(stop)))
        chunks = [decode(items[i : i + chunk], preprocess) for i in range(0, len(items), chunk)]
        packed.append(pickle.dumps(chunks, protocol=5))
    return {"part": batch["part"], "chunks": packed}


class _Engine:
    """An actor that holds the file and writes parts."""

    def __init__(self, job: EmbedJob):
        self._job, self._runner = job, job.open()

    def __call__(self, batch: dict) -> dict:
        counts = [
            write_part(self._job, self._runner, part=int(part), chunks=pickle.loads(chunks))
            for part, chunks in zip(batch["part"], batch["chunks"])
        ]
        return {"part": batch["part"], "rows": [c.rows for c in counts], "broken": [c.broken for c in counts]}


@contextmanager
def _told() -> Iterator[None]:
    """Errors of workers as what they were there; Ray's own in one line."""
    try:
        yield
    except (UsageError, FailureError, GeneratorExit, KeyboardInterrupt):
        raise
    except Exception as e:
        cause: BaseException | None = e
        while cause is not None:
            for error in (cause, getattr(cause, "cause", None)):
                if isinstance(error, (UsageError, FailureError)):
                    raise _plain(error) from None
            cause = cause.__cause__ or cause.__context__
        lines = [line for line in str(e).splitlines() if line.strip()]
        raise EngineError(
            f"Ray failed: {lines[-1].strip()[:300] if lines else type(e).__name__}; finished parts are kept"
        ) from None


def _plain(error: Exception) -> Exception:
    """An error of a worker without the traceback that Ray writes into its text."""
    kind = next(k for k in type(error).__mro__ if k.__module__.endswith("export.errors"))
    text = str(getattr(error, "cause", None) or error)
    return EngineError(text) if kind is FailureError else kind(text)
