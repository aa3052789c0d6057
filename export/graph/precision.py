"""Precision is decided in the graph: TensorRT 11 and TensorRT-RTX build strongly typed networks, without flags for FP16 or BF16.

A typed file has its trunk (embedding, attention, MLP, head) in fp16 or bf16; decisions, sizes and merging stay in float32 (see
`stages`), and so do the input and the outputs. A Cast stands only where a value goes from one to the other, once for each value.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from . import stages
from ..errors import UsageError
from ..provenance import KEY, of_model
from ..files import read_model, write_model

FP16_MAX = 65504.0
DTYPES = ("fp32", "fp16", "bf16")


def convert(proto, weights: dict, dtype: str):
    """A float32 graph of tokexport in another precision: (onnx.ModelProto, weights).

    proto: onnx.ModelProto without its large weights. weights: those, {name: onnx_ir tensor}. dtype: one of DTYPES.
    Raises: UsageError for a graph whose nodes have no stages, one that is typed already, or a weight that fp16 cannot hold.
    """
    import onnx
    from onnx import TensorProto, helper

    if dtype == "fp32":
        return proto, weights
    low, high = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[dtype], TensorProto.FLOAT
    types = _types(proto, weights)
    if any(t in (TensorProto.FLOAT16, TensorProto.BFLOAT16) for t in types.values()):
        raise UsageError("the graph has fp16 or bf16 in it already: give the float32 file")
    if not all(stages.of_node(n.name) for n in proto.graph.node):
        raise UsageError(
            "the graph's nodes do not say what part of the model they are: make the file again with this version of tokexport"
        )
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    graph = out.graph
    small = {i.name: i for i in graph.initializer}
    typed, made = {v.name: high for v in graph.input}, {}
    nodes, initializers, new_weights = [], {}, {}
    results = {o.name for o in graph.output}

    def cast(name, to, stage):
        made[name, to] = f"{name}.{_word(to)}"
        nodes.append(helper.make_node("Cast", [name], [made[name, to]], name=f"{stage}/Cast_{name}", to=to))

    def constant(name, to):
        """The name of an initializer in one type: its own in float32."""
        new = made.setdefault((name, to), name if to == high else f"{name}.{_word(to)}")
        if name in weights:
            new_weights[new] = weights[name] if to == high else _as(weights[name].numpy(), dtype, name, new)
        elif to == high:
            initializers[new] = small[name]
        else:
            from onnx_ir.serde import serialize_tensor

            initializers[new] = serialize_tensor(_as(onnx.numpy_helper.to_array(small[name]), dtype, name, new))
        return new

    for node in graph.node:
        to = high if stages.in_fp32(node.name) else low
        for i, name in enumerate(node.input):
            if types.get(name) != high:
                if name in small:
                    initializers[name] = small[name]
                elif name in weights:
                    new_weights[name] = weights[name]
                continue
            if name in small or name in weights:
                node.input[i] = constant(name, to)
            elif typed[name] != to or (name, to) in made:
                if (name, to) not in made:
                    cast(name, to, stages.of_node(node.name))
                node.input[i] = made[name, to]
        for a in node.attribute:
            if node.op_type == "Cast" and a.name == "to" and a.i == high:
                a.i = to
        for i, name in enumerate(node.output):
            if types.get(name) == high:
                typed[name] = to
                if name in results and to != high:  # what a caller reads stays float32
                    node.output[i] = made[name, to] = f"{name}.{_word(to)}"
        nodes.append(node)
    initializers |= {n: small[n] for n in results if n in small}
    for name in results:
        if typed.get(name, high) != high:
            nodes.append(helper.make_node("Cast", [made[name, low]], [name], name=f"head/Cast_{name}", to=high))
    del graph.value_info[:]
    _replace(graph.node, _turned_products(nodes, set(made.values())))
    _replace(graph.initializer, list(initializers.values()))
    inferred = _with_shapes(out, new_weights)
    return inferred, new_weights


def write_as(path: Path, to: Path, dtype: str) -> int:
    """Write a float32 file of tokexport in another precision; returns its bytes.

    to: written aside and renamed, whatever is there. Raises: UsageError as `convert`.
    """
    proto, weights = convert(*read_model(path), dtype)
    made = replace(of_model(proto, str(path)), precision=dtype)
    del proto.metadata_props[:]
    proto.metadata_props.add(key=KEY, value=made.to_json())
    return write_model(proto, weights, to)


def _turned_products(nodes: list, casts: set[str]) -> list:
    """Products A^T B of which B has just been cast, as (B^T A)^T.

    TensorRT-RTX 1.7 cannot build the first form (a check in its Myelin, tactic.cpp:2418, fails); the second is the same sum.
    """
    from onnx import helper

    out = []
    for node in nodes:
        attributes = {a.name: a.i for a in node.attribute}
        turned = attributes.get("transA") and not attributes.get("transB")
        if node.op_type == "Gemm" and turned and len(node.input) == 2 and node.input[1] in casts:
            name, a, b = node.output[0], *node.input
            out.append(helper.make_node("Gemm", [b, a], [f"{name}.T"], name=node.name, transA=1))
            node = helper.make_node("Transpose", [f"{name}.T"], [name], name=f"{node.name}_T", perm=[1, 0])
        out.append(node)
    return out


def _replace(field, items):
    items = [type(i).FromString(i.SerializeToString()) for i in items]
    del field[:]
    field.extend(items)


def _word(to: int) -> str:
    return {1: "fp32", 10: "fp16", 16: "bf16"}[to]


def _as(array: np.ndarray, dtype: str, name: str, new: str):
    """An array as an onnx_ir tensor in fp16 or bf16."""
    import ml_dtypes
    import onnx_ir as ir

    if dtype == "fp16" and array.size and np.abs(array).max() > FP16_MAX:
        raise UsageError(
            f"weight {name} has values up to {np.abs(array).max():.3g}, more than fp16 can hold ({FP16_MAX:g}): use bf16"
        )
    return ir.tensor(array.astype(np.float16 if dtype == "fp16" else ml_dtypes.bfloat16), name=new)


def _types(proto, weights: dict) -> dict[str, int]:
    """Element type of every value of a graph."""
    graph = _with_shapes(proto, weights).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return {
        **types,
        **{i.name: i.data_type for i in graph.initializer},
        **{n: int(t.dtype) for n, t in weights.items()},
    }


def _with_shapes(proto, weights: dict):
    """The model with types and shapes of all values inferred, the large weights standing in as inputs meanwhile."""
    import onnx

    n = len(proto.graph.input)
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(k, int(t.dtype), list(t.shape)) for k, t in weights.items()
    )
    try:
        out = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    finally:
        del proto.graph.input[n:]
    del out.graph.input[n:]
    return out
