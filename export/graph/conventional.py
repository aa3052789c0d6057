"""What older and stricter tools want of a file: operators of an older set, and norms that every shape inference knows.

These are passes over a finished float32 graph. Nodes that they write are named as those of a trace, STAGE/OPERATOR_VALUE.
"""

from __future__ import annotations

import math
from ..errors import UsageError
from . import stages
from .bodies import replace_items
from .precision import with_shapes

TRACED_OPSET = 20  # the least in which `torch.onnx` and `kernels.ops` write
REDUCTIONS = ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin")  # axes an attribute before opset 18, an input from there on
AXES_ARE_INPUTS = 18
GELU = 20  # the opset that has it
SPLIT_COUNTS = 18  # the opset from which a Split of equal parts says how many


def conventional(proto, weights: dict, *, opset: int, target: str):
    """A graph as it was traced in the operator set that is asked for, and in the form that its target wants.

    Args:
        proto: onnx.ModelProto of TRACED_OPSET or more without its large weights, changed in place.
        weights: those, {name: onnx_ir tensor}.
        opset: 17 or more.
        target: what it is written for, one of `provenance.TARGETS`.
    Returns:
        onnx.ModelProto with all shapes.
    Raises:
        UsageError: an operator of the graph has no form in that set.
    """
    if opset < TRACED_OPSET:
        lower_opset(proto, opset)
    if target == "portable" and opset >= AXES_ARE_INPUTS:
        spell_norms(proto)
    return with_shapes(proto, weights)


def spell_norms(proto) -> None:
    """Every ReduceL2 as Mul, ReduceSum and Sqrt, which is what TensorRT makes of it as well.

    ONNX Runtime's symbolic shape inference (1.32), which its preparation for quantising starts with, does not read the axes of a
    ReduceL2 from opset 18 on and stops; those of a ReduceSum it reads. Can go when `SymbolicShapeInference` takes ReduceL2.

    Args:
        proto: onnx.ModelProto, changed in place.
    """
    from onnx import helper

    nodes = []
    for node in proto.graph.node:
        if node.op_type != "ReduceL2":
            nodes.append(node)
            continue
        stage, result = stages.of_node(node.name), node.output[0]
        square, total = f"{result}.square", f"{result}.total"
        keep = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
        x, *axes = node.input
        nodes += [
            helper.make_node("Mul", [x, x], [square], name=f"{stage}/Mul_{square}"),
            helper.make_node("ReduceSum", [square, *axes], [total], name=f"{stage}/ReduceSum_{total}", keepdims=keep),
            helper.make_node("Sqrt", [total], [result], name=f"{stage}/Sqrt_{result}"),
        ]
    replace_items(proto.graph.node, nodes)


def lower_opset(proto, opset: int) -> None:
    """A graph of TRACED_OPSET in an older operator set.

    Args:
        proto: onnx.ModelProto, changed in place.
        opset: 17 or more.
    Raises:
        UsageError: an operator of the graph has no form in that set.
    """
    nodes, constants = [], {i.name: i for i in proto.graph.initializer}
    for node in proto.graph.node:
        if opset < GELU and node.op_type == "Gelu":
            nodes += _gelu(node, constants)
            continue
        if opset < AXES_ARE_INPUTS and node.op_type in REDUCTIONS and len(node.input) > 1:
            _put_axes_inside(node, constants)
        if opset < SPLIT_COUNTS and node.op_type == "Split":
            replace_items(node.attribute, [a for a in node.attribute if a.name != "num_outputs"])
        nodes.append(node)
    for node in nodes:
        _fit(node, opset)
    replace_items(proto.graph.node, nodes)
    read = {name for node in proto.graph.node for name in node.input} | {o.name for o in proto.graph.output}
    replace_items(proto.graph.initializer, [i for name, i in constants.items() if name in read])
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset


def _put_axes_inside(node, constants: dict) -> None:
    from onnx import helper, numpy_helper

    axes = numpy_helper.to_array(constants[node.input[1]]).reshape(-1).tolist()
    del node.input[1:]
    node.attribute.append(helper.make_attribute("axes", axes))


def _gelu(node, constants: dict) -> list:
    """The nodes that a Gelu stands for, in the order in which ONNX Runtime and OpenVINO know them as one."""
    from onnx import helper

    stage, (x,), (result,) = stages.of_node(node.name), node.input, node.output
    approximate = next((a.s for a in node.attribute if a.name == "approximate"), b"none")

    def make(operator: str, *inputs: str | float):
        names = [_constant(i, constants) if isinstance(i, float) else i for i in inputs]
        made = helper.make_node(operator, names, [f"{result}.{len(nodes)}"], name=f"{stage}/{operator}_{result}_{len(nodes)}")
        nodes.append(made)
        return made.output[0]

    nodes: list = []
    if approximate == b"tanh":
        cube = make("Mul", make("Mul", x, x), x)
        inner = make("Tanh", make("Mul", make("Add", x, make("Mul", cube, 0.044715)), math.sqrt(2 / math.pi)))
    else:
        inner = make("Erf", make("Div", x, math.sqrt(2)))
    make("Mul", make("Mul", x, make("Add", inner, 1.0)), 0.5)
    nodes[-1].output[0] = result
    return nodes


def _constant(value: float, constants: dict) -> str:
    import numpy as np
    from onnx import numpy_helper

    name = f"constant_{value:.6g}"
    constants.setdefault(name, numpy_helper.from_array(np.array(value, np.float32), name))
    return name


def _fit(node, opset: int) -> None:
    """Leave out attributes that an operator set does not know yet and that say what is so without them.

    Raises:
        UsageError: the set does not have the node as it is.
    """
    from onnx import defs

    if node.domain not in ("", "ai.onnx"):
        return
    try:
        schema = defs.get_schema(node.op_type, opset, "")
    except defs.SchemaError:
        raise UsageError(
            f"opset {opset}: it has no {node.op_type} ({stages.of_node(node.name)}); wanted {TRACED_OPSET} or more"
        ) from None
    newer = defs.get_schema(node.op_type, TRACED_OPSET, "").attributes
    replace_items(
        node.attribute, [a for a in node.attribute if a.name in schema.attributes or newer[a.name].default_value != a]
    )
    unknown = [a.name for a in node.attribute if a.name not in schema.attributes]
    if unknown or len(node.input) > schema.max_input:
        raise UsageError(
            f"opset {opset}: its {node.op_type} has no {', '.join(unknown) or f'input {len(node.input)}'} "
            f"({stages.of_node(node.name)}); wanted {TRACED_OPSET} or more"
        )
