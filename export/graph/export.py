"""Tracing the static ViT to an ONNX file."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

from ...kernels import ops
from . import checks, precision, stages
from .. import macs
from ..models import vit
from ..errors import UsageError
from ..models.load import LoadedModel
from ..provenance import KEY, Provenance
from ..schedule import Schedule
from ..models.score_head import score_heads
from .static_vit import StaticViT
from ..files import LARGE, check_output, write_model

OPSETS = range(20, 24)


@dataclass(frozen=True)
class ExportResult:
    """What was written. tokens: (attention, MLP) per block. macs, macs_dense: per image. nodes: of the graph. size: bytes on disk."""

    path: Path
    provenance: Provenance
    nodes: int
    size: int
    macs: int
    macs_dense: int

    @property
    def tokens(self) -> list[tuple[int, int]]:
        return self.provenance.schedule.tokens_per_block()


def export_onnx(
    loaded: LoadedModel,
    schedule: Schedule,
    path: str | Path,
    batch: int | None = None,
    opset: int = 20,
    simplify: bool = True,
    sources: bool = False,
    force: bool = False,
    dtype: str = "fp32",
    progress: Callable[[str], None] = lambda stage: None,
) -> ExportResult:
    """Write a model under a schedule as an ONNX file that carries its provenance.

    loaded: from `load_model`. schedule: from `Schedule.parse`. batch: images per run, None for any number. opset: 20 to 23.
    simplify: let onnxsim look at the graph too. sources: add output `sources` [B, N0], the final row of every input token, -1 when gone.
    dtype: "fp32", or "fp16" or "bf16" for the trunk (see `precision`); input and outputs stay float32.
    Input `image` [B, 3, H, W] float32; output `logits` or `features`. Over 2 GB the weights go to PATH.data.
    progress: called with the name of each stage. The file is written aside and renamed.
    Raises: UsageError (nothing is written) for wrong options or a path that cannot be written; GraphError if the graph came out wrong.
    """
    path = check_output(path, force)
    if opset not in OPSETS:
        raise UsageError(f"--opset {opset}: wanted {OPSETS[0]} to {OPSETS[-1]}")
    if dtype not in precision.DTYPES:
        raise UsageError(f"--dtype {dtype}: wanted one of {', '.join(precision.DTYPES)}")
    if batch is not None and batch < 1:
        raise UsageError(f"--batch {batch}: wanted 1 or more, or dynamic")
    model, heads = loaded.module, score_heads(loaded, schedule)
    largest = max((s.n_kept + (0 if schedule.method == "tome" else s.n_folded) for s in schedule.steps), default=0)
    if largest > checks.TOPK_LIMIT:
        raise UsageError(
            f"a block sorts {largest} tokens, more than TensorRT can ({checks.TOPK_LIMIT}): give a smaller image "
            f"or a larger patch"
        )
    provenance = _provenance(loaded, schedule, opset, sources, dtype)
    progress("tracing")
    static = StaticViT(model, schedule, batch, sources, heads).eval()
    graph = _trace(static, provenance, batch, opset)
    decisions = [o.name for o in graph.graph.outputs[len(provenance.outputs) :]]
    progress("simplifying")
    proto, weights = _finish(graph, len(provenance.outputs), batch, simplify, schedule.options.get("at", ()))
    proto, weights = precision.convert(proto, weights, dtype)
    names = {o for n in proto.graph.node for o in n.output}
    provenance = Provenance(**{**vars(provenance), "decisions": tuple(d for d in decisions if d in names)})
    progress("checking")
    checks.check_graph(proto, schedule)
    proto.metadata_props.add(key=KEY, value=provenance.to_json())
    nodes = len(proto.graph.node)
    progress("writing")
    size = write_model(proto, weights, path)
    return ExportResult(
        path,
        provenance,
        nodes,
        size,
        macs.count(provenance.dims, schedule),
        macs.count(provenance.dims, macs.dense(schedule)),
    )


def _provenance(loaded: LoadedModel, schedule: Schedule, opset: int, sources: bool, dtype: str) -> Provenance:
    from importlib.metadata import version

    model = loaded.module
    outputs = (vit.output_name(model), *(["sources"] if sources else []))
    return Provenance(
        version("tokexport"),
        loaded.name,
        loaded.kwargs,
        loaded.weights,
        schedule,
        loaded.preprocess,
        opset,
        dtype,
        outputs,
        vit.dims(model),
        labels_of(loaded),
        activation=loaded.activation,
    )


def labels_of(loaded: LoadedModel) -> tuple[str, ...]:
    """Class names of the checkpoint's folder, or ImageNet's for trained weights of its classifiers; empty when not known."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if loaded.labels:
        return loaded.labels
    if loaded.weights["source"] == "random" or loaded.module.num_classes not in (1000, 21841, 21843, 11821, 12000):
        return ()
    subset = infer_imagenet_subset(loaded.module)
    if not subset:
        return ()
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(info.num_classes()))


TRACED = 2  # images in a trace; for any batch, `ops.reshape` keeps this number out of the graph


def _trace(static: StaticViT, provenance: Provenance, batch: int | None, opset: int):
    """The onnx_ir.Model of a static ViT; its outputs are the provenance's, then the decisions by name.

    A batch that is to be free is traced as a number as well: tracing with a symbol takes three times as long.
    """
    image = torch.zeros(batch or TRACED, static.patch.in_channels, *provenance.preprocess.size)
    program = translate(static, (image,), opset)
    for value, name in zip(program.model.graph.outputs, [*provenance.outputs, *static.decisions], strict=True):
        value.name = name
    return program.model


def translate(module: torch.nn.Module, inputs: tuple, opset: int = 20, dynamic=None) -> torch.onnx.ONNXProgram:
    """Trace a module made of PyTorch's operators and those of `kernels.ops`. dynamic: torch.export's dynamic_shapes."""
    with quiet(), torch.no_grad(), _no_collection():
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
        retrace, program.run_decompositions = program.run_decompositions, lambda table=None: program
        options = {
            "dynamo": True,
            "opset_version": opset,
            "input_names": ["image"],
            "verbose": False,
            "custom_translation_table": ops.translations(),
        }
        try:  # all operators of a plain ViT have an ONNX form: tracing again to decompose them would double the time
            return torch.onnx.export(program, **options)
        except torch.onnx.OnnxExporterError:
            program.run_decompositions = retrace
            return torch.onnx.export(program, **options)


@contextlib.contextmanager
def _no_collection():
    """No garbage collection: a trace makes millions of small objects that live, and walking them takes a tenth of its time."""
    import gc

    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def quiet():
    """Keep the exporter's own chatter off the terminal; what it says is about torch's internals."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w") as null,
            contextlib.redirect_stdout(null),
            contextlib.redirect_stderr(null),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _finish(model, n_outputs: int, batch: int | None, simplify: bool, at):
    """Decisions become inner values, unread nodes go, parameters get the shapes TensorRT takes as they are, nodes the names of their
    stages, the batch becomes free. at: the blocks of the score heads.

    Returns an onnx.ModelProto without its large weights, and those as {name: onnx_ir tensor}: they are written one by one.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    first = "batch" if batch is None else None
    decisions = {d.name: [*([first] if first else d.shape[:1]), *d.shape[1:]] for d in model.graph.outputs[n_outputs:]}
    del model.graph.outputs[n_outputs:]
    common.RemoveUnusedNodesPass()(model)
    _widen_parameters(model)
    stage = "embed"
    for i, node in enumerate(model.graph):
        stage = stages.of_scopes(
            ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes") or "[]"), stage, at
        )
        node.name = f"{stage}/{node.op_type}_{i}"
    model.producer_name = "tokexport"
    weights = {v.name: v.const_value for v in model.graph.initializers.values() if v.const_value.nbytes > LARGE}
    for name in weights:
        del model.graph.initializers[name]
    proto = ir.to_proto(model)
    if first:
        proto = _free_batch(proto, weights)
    return (_simplify(proto, weights, decisions) if simplify else proto), weights


@contextlib.contextmanager
def _as_inputs(graph, weights: dict):
    """The weights that are not in the graph, as inputs of it for a while, so that their shapes are known."""
    import onnx

    n = len(graph.input)
    graph.input.extend(
        onnx.helper.make_tensor_value_info(name, int(t.dtype), list(t.shape)) for name, t in weights.items()
    )
    yield
    del graph.input[n:]


def _free_batch(proto, weights: dict):
    """Every shape anew, from an input whose batch is free: nothing of the traced number of images stays."""
    import onnx

    graph = proto.graph
    del graph.value_info[:]
    for value in graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    with _as_inputs(graph, weights):
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    del proto.graph.input[1:]
    for value in proto.graph.output:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return proto


def _simplify(proto, weights: dict, decisions: dict[str, list]):
    """onnxsim's result on the graph, kept when it has fewer nodes and no new kind of node; decisions stay by being outputs meanwhile.

    New kinds are turned down because the graph's own were chosen by measurement: onnxsim 0.8 makes ReduceL2 and Div one
    LpNormalization, which is nine TensorRT layers instead of four and slower in OpenVINO.
    """
    import onnx
    import onnxsim

    trial = onnx.ModelProto()
    trial.CopyFrom(proto)
    graph = trial.graph
    n_inputs, n_outputs = len(graph.input), len(graph.output)
    inner = {o for n in graph.node for o in n.output}
    graph.output.extend(
        onnx.helper.make_tensor_value_info(k, onnx.TensorProto.INT64, v) for k, v in decisions.items() if k in inner
    )
    with quiet(), _as_inputs(graph, weights):
        simple, ok = onnxsim.simplify(trial, check_n=0)
    kinds = {n.op_type for n in graph.node}
    if not ok or len(simple.graph.node) >= len(graph.node) or {n.op_type for n in simple.graph.node} - kinds:
        return proto
    del simple.graph.input[n_inputs:], simple.graph.output[n_outputs:]
    simple.producer_name = proto.producer_name
    return onnx.shape_inference.infer_shapes(simple)


def _widen_parameters(model) -> None:
    """Shape [C] to [1, C] for biases of Gemm and both parameters of LayerNormalization: TensorRT then needs no broadcast layers."""
    import onnx_ir as ir

    wide = {"Gemm": (2,), "LayerNormalization": (1, 2)}
    for value in model.graph.initializers.values():
        uses = value.uses()
        if len(value.shape) == 1 and uses and all(u.idx in wide.get(u.node.op_type, ()) for u in uses):
            array = value.const_value.numpy().reshape(1, -1)
            value.const_value = ir.tensor(array, name=value.name)
            value.shape = ir.Shape(array.shape)
