"""The eager reference as a runtime, "torch": the method as its paper writes it, on the model the file was made from."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...export.errors import UsageError
from .base import Runner, RunnerOptions
from .table import Runtime


def open_file(path: Path, runtime: Runtime, options: RunnerOptions) -> EagerRunner:
    """The reference of an ONNX file. Raises: UsageError for inner values, or weights that cannot be found."""
    from ...export.inspection import inspect
    from ...export.models.learned_layers import learned_layers
    from ...export.rebuild import rebuild
    from ...export.reference import ReducedViT

    if options.outputs:
        raise UsageError("the eager reference has no inner values to give")
    inspection = inspect(path)
    provenance = inspection.provenance
    loaded = rebuild(provenance, path)
    reference = ReducedViT(loaded.module, provenance.schedule, learned_layers(loaded, provenance.schedule))
    return EagerRunner(runtime, reference, inspection=inspection, threads=options.threads)


class EagerRunner(Runner):
    """The reference in eager mode on the CPU. PyTorch's threads are the process's own: they are changed for the
    length of a run only.
    """

    def __init__(self, runtime: Runtime, reference, *, inspection, threads: int):
        self._reference, self._threads = reference, threads
        self._provenance = provenance = inspection.provenance
        super().__init__(
            runtime.name,
            runtime.words,
            inputs={"image": (inspection.batch, provenance.dims["channels"], *provenance.preprocess.size)},
            outputs={name: (inspection.batch, None) for name in provenance.outputs},
        )

    def _run(self, feeds: dict) -> dict:
        import torch

        image = torch.from_numpy(np.ascontiguousarray(feeds["image"]))
        names = self._provenance.outputs
        with _torch_threads(self._threads), torch.no_grad():
            if not self._provenance.schedule.steps and "sources" not in names:
                return {names[0]: self._reference.model(image).numpy()}
            result = self._reference.run(image)
        sources = {"sources": result.sources.numpy()} if "sources" in names else {}
        return {names[0]: result.output.numpy(), **sources}

    def _release(self) -> None:
        self._reference = None


@contextmanager
def _torch_threads(threads: int):
    """PyTorch with this many threads (0: as many as it has) until the block ends."""
    import torch

    before = torch.get_num_threads()
    if not threads or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
