"""The sides of a comparison: a file that is run, and the eager reference, deciding itself or under given decisions."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...export.errors import UsageError
from ...export.provenance import Provenance
from ..files import inspect_file, is_engine
from ..runners import in_batches, open_runner, require
from .decisions import DecisionError, check_parts, of_images, read_plans
from .outputs import kind_of


@dataclass(frozen=True)
class Side:
    """What one side computed for a chunk of B images.

    Attributes:
        plans: its decisions, a `MergePlan` for every step that it has.
        outputs: name -> [B, ...].
    """

    plans: list
    outputs: dict[str, np.ndarray]

    def first_steps(self, n: int) -> Side:
        """The same with the first n steps' decisions: what it shares with a side that leaves the last step out."""
        return Side(self.plans[:n], self.outputs)

    def of_images(self, rows) -> Side:
        """The same of some images only. rows: [K] integer tensor."""
        return Side(of_images(self.plans, rows), {name: v[rows.numpy()] for name, v in self.outputs.items()})


@dataclass(frozen=True)
class Replay:
    """The reference under somebody's decisions.

    Attributes:
        side: what it computed.
        regrets: [B, steps] what each decision gives away by the reference's own scores.
    """

    side: Side
    regrets: np.ndarray


def verifiable(path: str | Path, runtime: str) -> Provenance:
    """What a file that is to be verified says of itself.

    Args:
        path: ONNX file or engine.
        runtime: what is to run an ONNX file; not looked at for an engine.
    Returns:
        Its provenance.
    Raises:
        UsageError: no provenance, a decision or a part of one is missing, an output that has no rule, or the runtime
            is no other than the reference.
        MissingPackageError: the runtime of an ONNX file is not installed.
    """
    if not is_engine(path):
        if runtime == "torch":
            raise UsageError(
                "runtime torch is the reference itself: wanted what the file is to run on, e.g. ort or openvino"
            )
        require(runtime)
    provenance = inspect_file(path).provenance
    if is_engine(path) and any(s.n_in > 1 for s in provenance.file_schedule.steps) and not provenance.decisions:
        raise UsageError(
            f"{path} does not give its merge decisions, without which a flipped near-tie cannot be told from a bug: "
            f"build it with `tokexport trt --decisions`"
        )
    check_parts(path, provenance)
    for name in provenance.outputs:
        kind_of(name)
    return provenance


@contextmanager
def open_side(path: str | Path | None, runtime: str = "ort"):
    """Open a file for comparing: a function, images [B, 3, H, W] -> `Side`; None for no path.

    Args:
        path: ONNX file or engine.
        runtime: what runs an ONNX file.
    Raises:
        UsageError: as `verifiable`; by the function DecisionError, when the file's decisions are no plan.
    """
    if path is None:
        yield None
        return
    provenance = verifiable(path, runtime)

    def run(images: np.ndarray) -> Side:
        try:
            return read_side(in_batches(runner, images), provenance)
        except DecisionError as e:
            raise DecisionError(f"{path}, {e}") from None

    with open_runner(path, runtime, outputs=provenance.decisions) as runner:
        yield run


def read_side(values: dict[str, np.ndarray], provenance: Provenance) -> Side:
    """A file's outputs and decisions for a chunk.

    Args:
        values: name -> [B, ...], as the file gave them.
        provenance: of the file.
    Returns:
        `Side` of B images.
    Raises:
        DecisionError: the decisions are no plan.
    """
    outputs = {name: values[name] for name in provenance.outputs}
    main = outputs[provenance.outputs[0]]
    try:
        plans = read_plans(values, provenance, n_images=len(main))
    except DecisionError as e:
        if np.isfinite(main).all():
            raise
        raise DecisionError(f"{e}; its output is not finite (verify with bisect names the first such stage)") from None
    return Side(plans, outputs)


def run_reference(reference, images: np.ndarray) -> tuple[Side, np.ndarray]:
    """The reference deciding itself.

    Args:
        reference: the eager model.
        images: [B, 3, H, W].
    Returns:
        What it computed, and the reach of its classifiers [B] (see `run_with_reach`).
    """
    result, reach = run_with_reach(reference, images)
    return Side(result.plans, _outputs(result)), reach


def replay(reference, images: np.ndarray, *, plans: list) -> Replay:
    """The reference under given decisions.

    Args:
        reference: the eager model.
        images: [B, 3, H, W].
        plans: a `MergePlan` for every step.
    Returns:
        `Replay` of B images.
    """
    import torch

    result = reference.run(torch.from_numpy(images), replay=plans)
    regrets = np.stack([r.numpy() for r in result.regrets], 1) if result.regrets else np.zeros((len(images), 0))
    return Replay(Side(plans, _outputs(result)), regrets)


def _outputs(result) -> dict[str, np.ndarray]:
    """Every output of a reference's result, by name."""
    return {name: value.numpy() for name, value in result.outputs.items()}


def run_with_reach(reference, images: np.ndarray, **options):
    """Run the reference and see how large its logits could be.

    The most that a classifier's row w with bias b can make of a feature f is |w| |f| + |b|; the reach of an image is
    the largest of all rows, the mean over classifiers where there are several (a distilled DeiT averages two).

    Args:
        reference: the eager model.
        images: [B, 3, H, W].
        options: for its `run`.
    Returns:
        The reference's result, and the reach [B]; zeros for a model without classes.
    """
    import torch

    reaches = []

    def watch(classifier, inputs, output):
        norms = inputs[0].norm(dim=1, keepdim=True) * classifier.weight.norm(dim=1)
        reaches.append((norms if classifier.bias is None else norms + classifier.bias.abs()).amax(1))

    classifiers = [m for m in reference.plain.pooling.classifiers if isinstance(m, torch.nn.Linear)]
    hooks = [m.register_forward_hook(watch) for m in classifiers]
    try:
        mine = images if images.flags.writeable else images.copy()  # torch warns of arrays that it could not write to
        result = reference.run(torch.from_numpy(mine), **options)
    finally:
        for hook in hooks:
            hook.remove()
    return result, torch.stack(reaches).mean(0).double().numpy() if reaches else np.zeros(len(images))


def run_dense(reference, images: np.ndarray) -> np.ndarray:
    """The dense model's pooled output.

    Args:
        reference: the eager model.
        images: [B, 3, H, W].
    Returns:
        [B, classes or C].
    """
    import torch

    return reference.dense(torch.from_numpy(images)).numpy()
