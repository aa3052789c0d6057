"""The eager reference as a runtime, "torch": the method as its paper writes it, on the model the file was made from."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...export.errors import UsageError
from ...export.outputs import POOLED
from ...export.pixels import input_shape
from .base import Runner, RunnerOptions
from .table import Runtime


def open_file(path: Path, runtime: Runtime, options: RunnerOptions) -> EagerRunner:
    """The reference of an ONNX file. Raises: UsageError for inner values, or weights that cannot be found."""
    from ...export.inspection import inspect
    from ...export.rebuild import reference_of

    if options.outputs:
        raise UsageError("the eager reference has no inner values to give")
    inspection = inspect(path)
    reference = reference_of(inspection.provenance, path)
    return EagerRunner(runtime, reference, inspection=inspection, threads=options.threads)


class EagerRunner(Runner):
    """The reference in eager mode on the CPU. PyTorch's threads are the process's own: they are changed for the
    length of a run only.
    """

    def __init__(self, runtime: Runtime, reference, *, inspection, threads: int):
        self._reference, self._threads = reference, threads
        self._provenance = provenance = inspection.provenance
        shape = input_shape(provenance.input, provenance.preprocess, provenance.dims["channels"])
        super().__init__(
            runtime.name,
            runtime.words,
            inputs={"image": (inspection.batch, *shape)},
            outputs={name: (inspection.batch, None) for name in provenance.outputs},
            input_types={"image": provenance.input.partition("-")[0]},
        )

    def _run(self, feeds: dict) -> dict:
        import torch

        image = torch.from_numpy(np.ascontiguousarray(feeds["image"]))
        names = self._provenance.outputs
        with _torch_threads(self._threads), torch.no_grad():
            if not self._provenance.schedule.steps and self._provenance.emission == POOLED:
                return {names[0]: self._reference.dense(image).numpy()}
            result = self._reference.run(image)
        return {name: result.outputs[name].numpy() for name in names}

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
