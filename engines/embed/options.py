"""What can be asked of an embedding."""

from __future__ import annotations

from dataclasses import dataclass

from ...export.errors import UsageError

PART_SIZE = 4096
RAY_PART_SIZE = 512  # a part's pixels travel as one object
LARGEST_PART = 1 << 20


MOST = 1024  # threads, and decoding processes


@dataclass(frozen=True)
class EmbedOptions:
    """How an embedding is computed.

    Attributes:
        runtime: what runs an ONNX file.
        columns: beside index and path; () for all but the logits.
        top: classes of an image.
        part_size: images of a part; None for PART_SIZE, or RAY_PART_SIZE on a cluster.
        threads: of the runtime, 0 for its own choice.
        workers: decoding processes; None for half the cores.
        allow_host_code: run native code that an engine carries.
        ray: address of a Ray cluster, "local" for one of its own; None for this machine without Ray.
        actors: engines on the cluster; None for as many as it has room for.
        force: start anew.
    """

    runtime: str = "ort"
    columns: tuple[str, ...] = ()
    top: int = 1
    part_size: int | None = None
    threads: int = 0
    workers: int | None = None
    allow_host_code: bool = False
    ray: str | None = None
    actors: int | None = None
    force: bool = False

    def __post_init__(self):
        if self.part_size is not None and not 1 <= self.part_size <= LARGEST_PART:
            raise UsageError(f"part size {self.part_size}: wanted 1 to {LARGEST_PART} images")
        if not 0 <= self.threads <= MOST or not 0 <= (self.workers or 0) <= MOST:
            raise UsageError(f"threads {self.threads}, workers {self.workers}: wanted 0 to {MOST}")
        if self.actors is not None and (self.actors < 1 or self.ray is None):
            raise UsageError(f"actors {self.actors}: wanted 1 or more, and the address of a Ray cluster")

    @property
    def images_a_part(self) -> int:
        """Part size, the default filled in."""
        return self.part_size or (PART_SIZE if self.ray is None else RAY_PART_SIZE)
