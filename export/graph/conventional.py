"""What older and stricter tools want of a file: operators of an older set, and reductions that every shape inference knows.

These are passes over a finished float32 graph. Nodes that they write are named as those of a trace, STAGE/OPERATOR_VALUE.
"""

from __future__ import annotations

import math

from ..errors import UsageError
from . import stages
from .bodies import replace_items
from .precision import with_shapes

TRACED_OPSET = 20  # the least in which `torch.onnx` and `kernels.ops` write
REDUCTIONS = (
    "ReduceL2",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
)  # axes an attribute before opset 18, an input from there on
AXES_ARE_INPUTS = 18
GELU = 20  # the opset that has it
SPLIT_COUNTS = 18  # the opset from which a Split of equal parts says how many


def conventional(proto, weights: dict, *, opset: int, target: str, batch: int | None):
    """A graph as it was traced in the operator set that is asked for, and in the form that its target wants.

    Args:
        proto: onnx.ModelProto of TRACED_OPSET or more without its large weights, changed in place.
        weights: those, {name: onnx_ir tensor}.
        opset: 17 or more.
        target: what it is written for, one of `provenance.TARGETS`.
        batch: images per run, None for any number.
    Returns:
        onnx.ModelProto with all shapes.
    Raises:
        UsageError: an operator of the graph has no form in that set.
    """
    if opset < TRACED_OPSET:
        lower_opset(proto, opset)
    if target == "portable" and batch == 1 and opset >= AXES_ARE_INPUTS:
        spell_reductions(proto)
    return with_shapes(proto, weights)


def spell_reductions(proto) -> None:
    """Reductions whose axes are an input, as operators that do the same: ReduceL2 as Mul, ReduceSum and Sqrt (TensorRT makes the same of
    it), ReduceMax over one axis as the first of a TopK.

    ONNX Runtime's symbolic shape inference (1.32), with which its preparation for quantising starts, reads the axes of ReduceSum and
    ReduceMean alone from opset 18 on, and stops at others. Can go when `SymbolicShapeInference` takes ReduceL2 and ReduceMax. Files for
    more images than one gain nothing: it does not read the `batch_dims` of their GatherND either, and no form without is as fast.

    Args:
        proto: onnx.ModelProto, changed in place.
    """
    nodes, constants = [], {i.name: i for i in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "ReduceL2":
            nodes += _norm(node)
        elif node.op_type == "ReduceMax" and _one_axis(node, constants) is not None:
            nodes.append(_largest(node, _one_axis(node, constants), constants))
        else:
            nodes.append(node)
    replace_items(proto.graph.node, nodes)
    _keep_read(proto, constants)


def _norm(node) -> list:
    from onnx import helper

    stage, result, (x, *axes) = stages.of_node(node.name), node.output[0], node.input
    square, total = f"{result}.square", f"{result}.total"
    keep = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
    return [
        helper.make_node("Mul", [x, x], [square], name=f"{stage}/Mul_{square}"),
        helper.make_node("ReduceSum", [square, *axes], [total], name=f"{stage}/ReduceSum_{total}", keepdims=keep),
        helper.make_node("Sqrt", [total], [result], name=f"{stage}/Sqrt_{result}"),
    ]


def _one_axis(node, constants: dict) -> int | None:
    """The axis of a reduction that keeps it, where it is one."""
    from onnx import numpy_helper

    keeps = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
    if not keeps or len(node.input) < 2 or node.input[1] not in constants:
        return None
    axes = numpy_helper.to_array(constants[node.input[1]]).reshape(-1).tolist()
    return axes[0] if len(axes) == 1 else None


def _largest(node, axis: int, constants: dict):
    import numpy as np
    from onnx import helper, numpy_helper

    stage, result = stages.of_node(node.name), node.output[0]
    constants.setdefault("constant_one_row", numpy_helper.from_array(np.array([1], np.int64), "constant_one_row"))
    inputs, outputs = [node.input[0], "constant_one_row"], [result, f"{result}.at"]
    return helper.make_node("TopK", inputs, outputs, name=f"{stage}/TopK_{result}", axis=axis, largest=1, sorted=1)


def _keep_read(proto, constants: dict) -> None:
    """The constants that something reads, as the graph's initializers."""
    read = {name for node in proto.graph.node for name in node.input} | {o.name for o in proto.graph.output}
    replace_items(proto.graph.initializer, [i for name, i in constants.items() if name in read])


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
    _keep_read(proto, constants)
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
        made = helper.make_node(
            operator, names, [f"{result}.{len(nodes)}"], name=f"{stage}/{operator}_{result}_{len(nodes)}"
        )
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
    is_default = lambda a: a.name in newer and newer[a.name].default_value == a
    replace_items(node.attribute, [a for a in node.attribute if a.name in schema.attributes or not is_default(a)])
    unknown = [a.name for a in node.attribute if a.name not in schema.attributes]
    if unknown or len(node.input) > schema.max_input:
        raise UsageError(
            f"opset {opset}: its {node.op_type} has no {', '.join(unknown) or f'input {len(node.input)}'} "
            f"({stages.of_node(node.name)}); wanted {TRACED_OPSET} or more"
        )
