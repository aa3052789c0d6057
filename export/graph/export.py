"""Writing a model under a schedule as an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import macs
from ..errors import UsageError
from ..files import check_output, write_model
from ..models import as_plain
from ..models.learned_layers import learned_layers
from ..models.load import LoadedModel
from ..models.plain_vit import PlainViT
from ..outputs import POOLED, Emission, parse_emission
from ..pixels import input_form, input_shape, pixels_of
from ..provenance import KEY, TARGETS, Provenance
from ..schedule import Schedule
from ..tail import choose_tail
from . import calls, checks, passes, precision
from .conventional import TRACED_OPSET, conventional
from .for_tensorrt import adapt_to_tensorrt
from .static_vit import StaticViT
from .trace import TRACED, trace

OPSETS = range(17, 24)


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Args:
        path: of the file.
        provenance: as it is stored in it.
        nodes: of the graph.
        size: bytes on disk, weights beside the file included.
    """

    path: Path
    provenance: Provenance
    nodes: int
    size: int

    @property
    def tokens(self) -> list[tuple[int, int]]:
        """(tokens in the attention, tokens in the MLP) of every block."""
        return self.provenance.schedule.tokens_per_block()

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image, as the papers count."""
        return macs.count(self.provenance.dims, self.provenance.schedule)

    @property
    def macs_dense(self) -> int:
        """Those of the model without the reduction."""
        return macs.count(self.provenance.dims, macs.dense(self.provenance.schedule))

    @property
    def macs_executed(self) -> int:
        """Per image, what the file computes; less than `macs` with the class tail."""
        return self.provenance.macs_executed


def export_onnx(
    loaded: LoadedModel,
    schedule: Schedule,
    path: str | Path,
    *,
    batch: int | None = None,
    opset: int = 20,
    simplify: bool = True,
    input: str = "float32",
    force: bool = False,
    dtype: str = "fp32",
    target: str = "portable",
    plugin: bool = False,
    tail: str | None = None,
    progress: Callable[[str], None] = lambda stage: None,
    **outputs: Any,
) -> ExportResult:
    """Write a model under a schedule as an ONNX file that carries its provenance.

    Input `image` [B, channels, H, W] float32; output `logits` or `features`, or what is asked for. Over 2 GB the weights go to
    PATH.data. The file is written aside and renamed.

    Args:
        loaded, schedule: from `load_model` and `loaded.schedule`.
        path: of the file.
        batch: images per run, None for any number.
        opset: 17 to 23; older runtimes take older ones (TensorRT 8.6: 17).
        simplify: let onnxsim look at the graph too.
        input: "float32", or pixels: "uint8" [B, H, W, channels] or "uint8-nchw"; their normalisation is folded into the weights.
        force: replace the file.
        dtype: of the trunk, a graph precision (see `precision`); input and outputs stay float32.
        target: what it is written for, one of `provenance.TARGETS`; portable: conventional ONNX, for any tool.
        plugin: write every reduction as one node whose body is a function of the file (see `calls`).
        tail: of the last block compute all ("full"), or what prefix tokens alone need ("class", see `tail`); None: the default.
        progress: called with the name of each stage.
        outputs: emit, layers, norm_layers, layout, dropped and sources, see `outputs.parse_emission`: emit="pooled,patches".
    Raises:
        UsageError: wrong options or an unwritable path, before anything is written; GraphError: the graph came out wrong.
    """
    path, plain = check_output(path, force), as_plain(loaded.module)
    emission = parse_emission(**outputs).resolved(schedule.depth)
    schedule, form = computed(schedule, emission), input_form(input)
    _check_request(plain, schedule, batch=batch, opset=opset, dtype=dtype, target=target)
    tail = choose_tail(tail, emission, rows=plain.pooling.rows, n_prefix=plain.n_prefix)
    heads, pixels = learned_layers(loaded, schedule), pixels_of(form, loaded.preprocess)
    more = {"emission": emission, "input": form, "dtype": dtype, "target": target, "tail": tail}
    provenance = _provenance(loaded, schedule, opset=opset, dims=cost_dims(plain, heads, emission), **more)
    parts = {"emission": emission, "pixels": pixels, "calls": plugin, "tail": tail}
    static = StaticViT(plain, schedule, batch, heads, **parts).eval()
    shape = input_shape(form, plain.preprocess, plain.dims["channels"])
    how = {"batch": batch, "simplify": simplify, "plugin": plugin, "progress": progress}
    proto, weights, decisions = _graph(static, shape, provenance, **how)
    provenance = replace(provenance, decisions=decisions)
    proto.metadata_props.add(key=KEY, value=provenance.to_json())
    progress("writing")
    return ExportResult(path, provenance, len(proto.graph.node), write_model(proto, weights, path))


def _graph(
    static: StaticViT,
    shape: tuple[int, int, int],
    provenance: Provenance,
    *,
    batch: int | None,
    simplify: bool,
    plugin: bool,
    progress: Callable[[str], None],
) -> tuple:
    """The graph as its target, precision and operator set want it: (onnx.ModelProto, weights, names of the decisions that it gives)."""
    n_outputs, p = len(provenance.outputs), provenance
    progress("tracing")
    model = trace(static, shape, batch=batch, opset=max(p.opset, TRACED_OPSET))
    decisions = [o.name for o in model.graph.outputs[n_outputs:] if o.name not in static.edges]
    progress("simplifying")
    graph = passes.finish(model, n_outputs=n_outputs, batch=batch, simplify=simplify, keep_inner=plugin)
    proto = conventional(*graph, opset=p.opset, target=p.target, batch=batch)
    proto, weights = _for_target(*precision.convert(proto, graph.weights, p.precision), p.target)
    there = {o for n in proto.graph.node for o in n.output}
    decisions = tuple(d for d in decisions if d in there)
    progress("checking")
    checks.check_graph(proto, p.file_schedule, p.n_blocks, target=p.target, tail_rows=p.tail_rows)
    checks.check_decisions(decisions, p.file_schedule)
    if plugin:
        shaped = precision.with_shapes(proto, weights)
        proto, weights = calls.wrap(shaped, weights, p.file_schedule, by_score=not static.has_class)
    return proto, weights, decisions


def computed(schedule: Schedule, emission: Emission) -> Schedule:
    """A schedule without the steps behind the last block that an output depends on.

    Args:
        schedule: of the model.
        emission: which outputs are given.
    """
    steps = tuple(s for s in schedule.steps if s.block <= emission.last_block(schedule.depth))
    return schedule if len(steps) == len(schedule.steps) else replace(schedule, steps=steps)


def _for_target(proto, weights: dict, target: str) -> tuple:
    if target == "tensorrt":
        adapt_to_tensorrt(proto, weights)
    passes.set_least_ir_version(proto)
    return proto, weights


def _check_request(
    plain: PlainViT, schedule: Schedule, *, batch: int | None, opset: int, dtype: str, target: str
) -> None:
    if opset not in OPSETS:
        raise UsageError(f"opset {opset}: wanted {OPSETS[0]} to {OPSETS[-1]}")
    if dtype not in precision.graph_precisions():
        raise UsageError(f"dtype {dtype}: wanted one of {', '.join(precision.graph_precisions())}")
    if target not in TARGETS:
        raise UsageError(f"target {target}: wanted one of {', '.join(TARGETS)}")
    check_batch(plain, schedule, batch)


def check_batch(plain: PlainViT, schedule: Schedule, batch: int | None) -> None:
    """Make sure that a graph for a batch can be made on this machine.

    Args:
        plain: the model.
        schedule: its reductions.
        batch: images per run, None for any number.
    Raises:
        UsageError: there are no images, or more than memory holds.
    """
    if batch is not None and batch < 1:
        raise UsageError(f"batch {batch}: wanted 1 or more, or None for any number")
    wanted, there = tracing_bytes(plain, schedule, batch=batch), memory_bytes()
    if wanted > there:
        raise UsageError(
            f"batch {batch}: tracing would take some {wanted / 1e9:.0f} GB for the images and constants of so large a batch, "
            f"this machine has {there / 1e9:.0f} GB: give a smaller batch, or none for any number of images"
        )


def tracing_bytes(plain: PlainViT, schedule: Schedule, *, batch: int | None) -> int:
    """Bytes that grow with the batch while a graph is made: the example images, and constants repeated for every image.

    Args:
        plain: the model.
        schedule: its reductions.
        batch: images per run, None for any number.
    """
    height, width = plain.preprocess.size
    constants = 8 * 8 * (schedule.n_tokens + sum(2 * s.n_in for s in schedule.steps))  # as lists and as tensors
    return (batch or TRACED) * (4 * plain.dims["channels"] * height * width + constants)


def memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cost_dims(plain: PlainViT, layers: nn.ModuleList | None, emission: Emission = POOLED) -> dict:
    """What MACs are counted from (see `macs.count`), with the width of metric layers.

    Args:
        plain: the model.
        layers: from `learned_layers`.
        emission: which outputs are given: what none depends on is not counted.
    """
    metric = {"metric_width": layers[0].out_features} if layers is not None and isinstance(layers[0], nn.Linear) else {}
    n_blocks = emission.last_block(plain.n_blocks) + 1
    blocks = {"blocks": n_blocks} if n_blocks < plain.n_blocks else {}
    head = {} if "pooled" in emission.emit else {"heads": 0, "pool": "none"}
    return plain.dims | metric | blocks | head


def _provenance(
    loaded: LoadedModel,
    schedule: Schedule,
    *,
    opset: int,
    emission: Emission,
    input: str,
    dtype: str,
    target: str,
    dims: dict,
    tail: str,
) -> Provenance:
    from importlib.metadata import version

    plain = as_plain(loaded.module)
    return Provenance(
        version=version("tokexport"),
        model=loaded.name,
        model_kwargs=loaded.kwargs,
        weights=loaded.weights,
        schedule=schedule,
        preprocess=loaded.preprocess,
        opset=opset,
        precision=dtype,
        outputs=emission.names(plain.output_name),
        emission=emission,
        input=input,
        dims=dims,
        labels=loaded.labels or (() if loaded.weights["source"] == "random" else plain.labels()),
        activation=loaded.activation,
        target=target,
        tail=tail,
    )
