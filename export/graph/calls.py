"""Reductions as one node each: the nodes of a step become a call `tokexport::TokenReduce`, and their body one ONNX function.

The function is the same for all blocks: what differs between them, tables and counts, are attributes of the calls (`table_1`, ...) that
the body's constants refer to. So ONNX Runtime and TensorRT run the body where they have no operator of that name, and `inline` gives
the plain file back, node for node. What a call means is told by `kernels/token_reduce.py`; its other attributes are those of that page.

A graph is ready for this when its values have the names of `boundaries`, which a static ViT with `calls` gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...kernels.token_reduce import DOMAIN, NAME, VERSION, Reduction
from ..errors import GraphError, UsageError
from ..files import check_output, read_model, write_model
from ..nodes import has_node, reduction
from ..schedule import Schedule
from . import stages
from .bodies import Body, Boundary, constant_names, lower_outputs, put_calls, replace_items

DECISIONS = ("keep", "src", "dst")


def boundaries(schedule: Schedule) -> dict[int, Boundary]:
    """Of every block whose step becomes a node, the names of its boundary.

    Args:
        schedule: of the model.
    """
    named = lambda block: Boundary(*(f"block{block}.{part}" for part in Boundary._fields))
    return {s.block: named(s.block) for s in schedule.steps if has_node(schedule.method, s)}


def has_calls(proto) -> bool:
    """Whether a model has nodes `TokenReduce`."""
    return any(is_call(node) for node in proto.graph.node)


def wrap(proto, weights: dict, schedule: Schedule, *, by_score: bool):
    """Every step that folds tokens as one call.

    Args:
        proto: onnx.ModelProto without its large weights, with the names of `boundaries`, in any precision.
        weights: those, {name: onnx_ir tensor}; they are not changed.
        schedule: of the model.
        by_score: see `reduction`.
    Returns:
        (onnx.ModelProto, weights), those that are left.
    Raises:
        GraphError: a step is not of the form of the others.
    """
    from onnx import ModelProto, helper

    out = ModelProto()
    out.CopyFrom(proto)
    lower_outputs(out.graph, boundaries(schedule))
    steps = {step.block: step for step in schedule.steps}
    bodies = [
        Body(out.graph, weights, block, place, reduction(schedule, steps[block], by_score=by_score))
        for block, place in boundaries(schedule).items()
    ]
    if not bodies:
        return out, weights
    forms = {tuple(body.form) for body in bodies}
    if len(forms) > 1:
        raise GraphError(
            f"the reductions of {schedule.method} are {len(forms)} different graphs: they cannot share a body"
        )
    names = constant_names(bodies)
    opsets = [o for o in out.opset_import if o.domain == ""]
    out.functions.append(bodies[0].function(names, opsets))
    out.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    put_calls(out.graph, [([n for n in b.nodes if n.output[0] not in b.copied], b.call(names)) for b in bodies])
    read = {i for n in out.graph.node for i in n.input} | {o.name for o in out.graph.output}
    replace_items(out.graph.initializer, [i for i in out.graph.initializer if i.name in read])
    return out, {name: tensor for name, tensor in weights.items() if name in read}


def inline(proto):
    """Every call as the nodes of its body: the file as it is without calls, names and stages of nodes included.

    Args:
        proto: onnx.ModelProto; a model without calls comes back as it is.
    """
    from onnx import ModelProto

    out = ModelProto()
    out.CopyFrom(proto)
    bodies = {f.name: f for f in proto.functions if f.domain == DOMAIN}
    expanded = []
    for node in proto.graph.node:
        expanded += (
            _expanded(node, bodies[node.op_type], out.graph) if is_call(node) and node.op_type in bodies else [node]
        )
    replace_items(out.graph.node, expanded)
    del out.functions[:]
    replace_items(out.opset_import, [o for o in out.opset_import if o.domain != DOMAIN])
    return out


def inline_file(source: str | Path, path: str | Path, *, force: bool = False) -> tuple[int, int]:
    """A file with calls as one without.

    Args:
        source: an ONNX file of tokexport.
        path: of the new file.
        force: replace what is there.
    Returns:
        How many calls there were, and how many nodes there are.
    Raises:
        UsageError: the file is none of tokexport's or has no calls, or the new one cannot be written.
    """
    from ..inspection import inspect

    inspect(source)
    path = check_output(path, force, [source])
    proto, weights = read_model(Path(source))
    n_calls = sum(map(is_call, proto.graph.node))
    if not n_calls:
        raise UsageError(f"{source} has no {NAME} nodes: it is a plain file already")
    flat = inline(proto)
    write_model(flat, weights, path)
    return n_calls, len(flat.graph.node)


def converted(proto, weights: dict, convert: Callable[[object, dict], tuple], schedule: Schedule):
    """A model with or without calls through a conversion that knows plain operators only.

    Args:
        proto, weights: as `wrap`.
        convert: (proto, weights) -> the same, converted; values keep their names.
        schedule: of the model.
    Returns:
        (onnx.ModelProto, weights), with calls if there were any.
    """
    if not has_calls(proto):
        return convert(proto, weights)
    by_score = any(a.i for n in filter(is_call, proto.graph.node) for a in n.attribute if a.name == "by_score")
    return wrap(*convert(inline(proto), weights), schedule, by_score=by_score)


def for_native(proto, wanted: tuple[str, ...] = ()):
    """A model whose calls run as native code: without the body, and of the calls' outputs only what is read.

    Args:
        proto: onnx.ModelProto with calls.
        wanted: inner values that are asked for beside the model's outputs.
    """
    from onnx import ModelProto

    out = ModelProto()
    out.CopyFrom(proto)
    read = {i for n in out.graph.node for i in n.input} | {o.name for o in out.graph.output} | set(wanted)
    for node in filter(is_call, out.graph.node):
        attributes = {a.name: a for a in node.attribute}
        parts = dict(zip(_formal(node), node.output))
        decisions = any(parts.get(part) in read for part in DECISIONS)
        sizes = max((k for k, part in ((1, "size"), (2, "log_size")) if parts.get(part) in read), default=0)
        attributes["sizes"].i, attributes["decisions"].i = sizes, int(decisions)
        kept = [name for part, name in parts.items() if _given(part, sizes, decisions)]
        del node.output[:]
        node.output.extend(kept)
        replace_items(node.attribute, [a for name, a in attributes.items() if not name.startswith("table_")])
    del out.functions[:]
    return out


def _given(part: str, sizes: int, decisions: bool) -> bool:
    return decisions if part in DECISIONS else {"x": True, "size": sizes > 0, "log_size": sizes > 1}[part]


def _formal(node) -> tuple[str, ...]:
    """What the outputs of a call are, in order."""
    from onnx import helper

    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    fields = {
        k: v.decode() if isinstance(v, bytes) else v for k, v in values.items() if k in Reduction.__dataclass_fields__
    }
    return Reduction(**fields).outputs


def is_call(node) -> bool:
    """Whether an onnx.NodeProto is a call."""
    return node.domain == DOMAIN and node.op_type == NAME


def _expanded(call, body, graph) -> list:
    """The nodes of a call's body, with the names of the call; its constants become initializers of the graph."""
    from onnx import NodeProto, TensorProto

    block = stages.of_node(call.name).partition(".")[0]
    tables = {a.name: a.t for a in call.attribute}
    outer = dict(zip(body.input, call.input)) | dict(zip(body.output, call.output))
    name_of = lambda inner: outer.get(inner, f"{block}.reduce.{inner}") if inner else ""
    nodes = []
    for node in body.node:
        if node.op_type == "Constant":
            a = node.attribute[0]
            tensor = TensorProto()
            tensor.CopyFrom(tables[a.ref_attr_name] if a.ref_attr_name else a.t)
            tensor.name = name_of(node.output[0])
            graph.initializer.append(tensor)
            continue
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{block}.{node.name}"
        copy.input[:], copy.output[:] = map(name_of, node.input), map(name_of, node.output)
        nodes.append(copy)
    return nodes
