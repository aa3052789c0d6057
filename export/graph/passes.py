"""What is done to a traced graph before it is written, one pass after another."""

from __future__ import annotations

import ast
import contextlib
from typing import NamedTuple

from ..files import LARGE
from . import stages
from .trace import TRACED, quiet


class Graph(NamedTuple):
    """An onnx.ModelProto without its large weights, and those as {name: onnx_ir tensor}: they are written one by one."""

    proto: object
    weights: dict


class InnerValue(NamedTuple):
    """ONNX type and shape of a value that keeps its name: a decision, or what goes into a reduction."""

    type: int
    shape: list | None


def _free(shape, first: str | None) -> list | None:
    """The shape of an inner value; None where its first axis is not the batch that is free."""
    if first is None:
        return list(shape)
    return [first, *list(shape)[1:]] if shape[0] == TRACED else None


def finish(model, *, n_outputs: int, batch: int | None, simplify: bool, keep_inner: bool = False) -> Graph:
    """Decisions become inner values, unread nodes go, nodes get the names of their stages, the batch becomes free.

    Args:
        model: onnx_ir.Model, as traced.
        n_outputs: outputs that stay; those behind are decisions and boundaries of reductions.
        batch: images per run, None for any number.
        simplify: let onnxsim look at the graph too.
        keep_inner: keep decisions and boundaries that nothing reads as well.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    first = "batch" if batch is None else None
    inner = {d.name: InnerValue(int(d.dtype), _free(d.shape, first)) for d in model.graph.outputs[n_outputs:]}
    if keep_inner:
        common.RemoveUnusedNodesPass()(model)
    del model.graph.outputs[n_outputs:]
    if not keep_inner:
        common.RemoveUnusedNodesPass()(model)
    name_by_stage(model)
    model.producer_name = "tokexport"
    weights = {v.name: v.const_value for v in model.graph.initializers.values() if v.const_value.nbytes > LARGE}
    for name in weights:
        del model.graph.initializers[name]
    proto = ir.to_proto(model)
    if first:
        proto = free_batch(proto, weights)
    return Graph(simplified(proto, weights, inner=inner) if simplify else proto, weights)


def name_by_stage(model) -> None:
    """Every node of an onnx_ir.Model is called STAGE/OPERATOR_NUMBER; where in the code it was traced is left out."""
    stage = "embed"
    for i, node in enumerate(model.graph):
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes") or "[]")
        stage = stages.of_scopes(scopes, stage)
        node.name = f"{stage}/{node.op_type}_{i}"
        node.metadata_props.clear()  # stack traces with paths of the machine it was traced on


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


def set_least_ir_version(proto) -> None:
    """The least version of the ONNX format that has the operator set of an onnx.ModelProto: older tools refuse a newer one."""
    from onnx import helper

    proto.ir_version = helper.find_min_ir_version_for(proto.opset_import, ignore_unknown=True)


def free_batch(proto, weights: dict):
    """Every shape anew, from an input whose batch is free: nothing of the traced number of images stays.

    Args:
        proto: onnx.ModelProto whose one input is the image.
        weights: those that are not in it.
    """
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


def simplified(proto, weights: dict, *, inner: dict[str, InnerValue]):
    """onnxsim's result on a graph, kept when it has fewer nodes and no new kind of node.

    New kinds are turned down because the graph's own were chosen by measurement: onnxsim 0.8 makes ReduceL2 and Div one
    LpNormalization, which is nine TensorRT layers instead of four and slower in OpenVINO.

    Args:
        proto: onnx.ModelProto.
        weights: those that are not in it.
        inner: by name, values that must stay; they are outputs meanwhile.
    """
    import onnx
    import onnxsim

    trial = onnx.ModelProto()
    trial.CopyFrom(proto)
    graph = trial.graph
    n_inputs, n_outputs = len(graph.input), len(graph.output)
    there = {o for n in graph.node for o in n.output}
    graph.output.extend(
        onnx.helper.make_tensor_value_info(name, *value) for name, value in inner.items() if name in there
    )
    with quiet(), _as_inputs(graph, weights):
        simple, ok = onnxsim.simplify(trial, check_n=0)
    kinds = {n.op_type for n in graph.node}
    if not ok or len(simple.graph.node) >= len(graph.node) or {n.op_type for n in simple.graph.node} - kinds:
        return proto
    del simple.graph.input[n_inputs:], simple.graph.output[n_outputs:]
    simple.producer_name = proto.producer_name
    return onnx.shape_inference.infer_shapes(simple)
