"""Reductions as one node each: the nodes of a step become a call `tokexport::TokenReduce`, and their body one ONNX function.

The function is the same for all blocks: what differs between them, tables and counts, are attributes of the calls (`table_1`, ...) that
the body's constants refer to. So ONNX Runtime and TensorRT run the body where they have no operator of that name, and `inline` gives
the plain file back, node for node. What a call means is told by `kernels/token_reduce.py`; its other attributes are those of that page.

A graph is ready for this when its values have the names of `boundaries`, which a static ViT with `calls` gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...kernels.token_reduce import DOMAIN, FOLLOWS_SIZES, NAME, VERSION, Reduction
from .. import reducers
from ..errors import GraphError, UsageError
from ..files import check_output, read_model, write_model
from ..schedule import Schedule
from . import stages

PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}  # by which TensorRT's parser finds the plugin
DECISIONS = ("keep", "src", "dst")


class Boundary(NamedTuple):
    """Names of the values that go into and come out of one step; of those that a method does not have there is none."""

    x: str
    signal: str
    x_out: str
    size_out: str
    log_size: str


def follows_sizes(method: str) -> bool:
    """Whether the node of a method takes sizes."""
    node = reducers.get(method).node
    return node is not None and node["fold"] in FOLLOWS_SIZES


def boundaries(schedule: Schedule) -> dict[int, Boundary]:
    """Of every block whose step becomes a node, the names of its boundary.

    Steps that fold nothing are two operators as they are; a node pairs tokens by the keys of its own block's attention only.
    """
    node = reducers.get(schedule.method).node
    named = lambda block: Boundary(*(f"block{block}.{part}" for part in Boundary._fields))
    fits = lambda step: step.n_folded and (node["select"] == "score" or (step.signal, step.site) == ("keys", "post_attn"))
    return {s.block: named(s.block) for s in schedule.steps if node is not None and fits(s)}


def reduction(schedule: Schedule, block: int, *, by_score: bool) -> Reduction:
    """The attributes of a step's node.

    Args:
        schedule: with the step.
        block: of the step.
        by_score: tokens left in A are in descending score: the model has no class token. For a method that pairs tokens.
    """
    step = next(s for s in schedule.steps if s.block == block)
    node = reducers.get(schedule.method).node
    sizes = (2 if schedule.prop_attn else 1) if follows_sizes(schedule.method) else 0
    by_score = by_score and node["select"] == "pairs"
    counts = {"n_in": step.n_in, "n_kept": step.n_kept, "n_folded": step.n_folded, "n_prefix": schedule.n_prefix}
    return Reduction(**node, **counts, by_score=int(by_score), sizes=sizes, decisions=1)


def has_calls(proto) -> bool:
    """Whether a model has nodes `TokenReduce`."""
    return any(_is_call(node) for node in proto.graph.node)


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
    _low_outputs(out.graph, boundaries(schedule))
    bodies = [
        _Body(out.graph, weights, block, place, reduction(schedule, block, by_score=by_score))
        for block, place in boundaries(schedule).items()
    ]
    if not bodies:
        return out, weights
    forms = {tuple(body.form) for body in bodies}
    if len(forms) > 1:
        raise GraphError(f"the reductions of {schedule.method} are {len(forms)} different graphs: they cannot share a body")
    names = _constant_names(bodies)
    opsets = [o for o in out.opset_import if o.domain == ""]
    out.functions.append(bodies[0].function(names, opsets))
    out.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    _put_calls(out.graph, [([n for n in b.nodes if n.output[0] not in b.copied], b.call(names)) for b in bodies])
    read = {i for n in out.graph.node for i in n.input} | {o.name for o in out.graph.output}
    _replace(out.graph.initializer, [i for i in out.graph.initializer if i.name in read])
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
        expanded += _expanded(node, bodies[node.op_type], out.graph) if _is_call(node) and node.op_type in bodies else [node]
    _replace(out.graph.node, expanded)
    del out.functions[:]
    _replace(out.opset_import, [o for o in out.opset_import if o.domain != DOMAIN])
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
    n_calls = sum(map(_is_call, proto.graph.node))
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
    by_score = any(a.i for n in filter(_is_call, proto.graph.node) for a in n.attribute if a.name == "by_score")
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
    for node in filter(_is_call, out.graph.node):
        attributes = {a.name: a for a in node.attribute}
        parts = dict(zip(_formal(node), node.output))
        decisions = any(parts.get(part) in read for part in DECISIONS)
        sizes = max((k for k, part in ((1, "size"), (2, "log_size")) if parts.get(part) in read), default=0)
        attributes["sizes"].i, attributes["decisions"].i = sizes, int(decisions)
        kept = [name for part, name in parts.items() if _given(part, sizes, decisions)]
        del node.output[:]
        node.output.extend(kept)
        _replace(node.attribute, [a for name, a in attributes.items() if not name.startswith("table_")])
    del out.functions[:]
    return out


def _constant_names(bodies: list) -> list[str]:
    """A name for every use of a constant: table_1, ... where blocks differ, constant_1, ... where they are alike.

    Uses that have the same values in every block share a name.
    """
    known: dict[tuple, str] = {}
    for same in zip(*(body.constants for body in bodies)):
        key = tuple(tensor.SerializeToString(deterministic=True) for tensor in same)
        kind = "table" if len(set(key)) > 1 else "constant"
        known.setdefault(key, f"{kind}_{sum(name.startswith(kind) for name in known.values()) + 1}")
    return [known[tuple(t.SerializeToString(deterministic=True) for t in same)] for same in zip(*(b.constants for b in bodies))]


def _given(part: str, sizes: int, decisions: bool) -> bool:
    return decisions if part in DECISIONS else {"x": True, "size": sizes > 0, "log_size": sizes > 1}[part]


def _formal(node) -> tuple[str, ...]:
    """What the outputs of a call are, in order."""
    from onnx import helper

    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    fields = {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items() if k in Reduction.__dataclass_fields__}
    return Reduction(**fields).outputs


def _is_call(node) -> bool:
    return node.domain == DOMAIN and node.op_type == NAME


class _Body:
    """The nodes of one step, between its boundary, in a form that can be compared with other steps'."""

    def __init__(self, graph, weights: dict, block: int, place: Boundary, op: Reduction):
        self.block, self.op, self.graph = block, op, graph
        by_part = {"x": place.x_out, "size": place.size_out, "log_size": place.log_size}
        self.outputs = {part: by_part.get(part, f"block{block}.{part}") for part in op.outputs}
        made_by = {o: n for n in graph.node for o in n.output}
        held = {i.name: i for i in graph.initializer} | weights
        missing = [name for name in (place.x, place.signal, *self.outputs.values()) if name not in made_by]
        if missing:
            raise GraphError(f"block {block}: the graph has no value {', '.join(missing)}")
        inputs = {"x": place.x, "signal": place.signal}
        self.nodes, self.copied, visited = [], set(), set()
        ours = (f"block{block}.match", f"block{block}.merge")

        def visit(name: str) -> None:
            """Take the node that makes a value, behind those that it reads: an order that does not hang on the graph's."""
            node = made_by.get(name)
            if not name or name in inputs.values() or name in held or node is None or node.output[0] in visited:
                return
            if stages.of_node(node.name) not in ours:
                if node.op_type != "Cast" or node.input[0] not in inputs.values():
                    if inputs.setdefault("size", name) != name:
                        raise GraphError(f"block {block}: its reduction reads {name} too")
                    return
                self.copied.add(name)  # others read it as well
            visited.add(node.output[0])
            for read in node.input:
                visit(read)
            self.nodes.append(node)

        for name in self.outputs.values():
            visit(name)
        self.inputs = {part: inputs[part] for part in ("x", "signal", "size") if part in inputs}
        if op.has_size and "size" not in inputs:  # before the first block that merges, sizes are a constant
            self.inputs["size"] = self._ones(held)
        self._describe({name: tensor for name, tensor in held.items() if name not in self.inputs.values()})

    def _ones(self, held: dict) -> str:
        """The name of the constant that the first sizes are."""
        from onnx import numpy_helper

        for name in dict.fromkeys(i for node in self.nodes for i in node.input if i in held):
            array = numpy_helper.to_array(_tensor(held[name]))
            if array.dtype.kind == "f" and array.shape[-2:] == (self.op.n_in, 1) and (array == 1).all():
                return name
        raise GraphError(f"block {self.block}: its sizes are not in the graph")

    def _describe(self, held: dict) -> None:
        """Names of the body, its form, and its constants, one for every use."""
        self.names = {actual: formal for formal, actual in self.inputs.items()}
        taken = set(self.inputs)
        self.names |= {name: f"{part}_out" if part in taken else part for part, name in self.outputs.items()}
        self.form, self.constants = [tuple(self.inputs)], []
        for node in self.nodes:
            for name in node.output:
                self.names.setdefault(name, f"value_{len(self.names)}")
            read = []
            for name in node.input:
                self.constants += [_tensor(held[name])] if name in held else []
                read.append("constant" if name in held else self.names[name] if name else "")
            attributes = tuple(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
            made = tuple(self.names[name] for name in node.output)
            self.form.append((node.op_type, _stage(node), attributes, tuple(read), made))
        self.held = held
        self.form.append(tuple((t.data_type, len(t.dims)) for t in self.constants))

    def function(self, names: list[str], opsets: list):
        """The body as an onnx.FunctionProto.

        Args:
            names: of the constants, one for every use; tables are attributes.
            opsets: of the operators.
        """
        from onnx import AttributeProto, NodeProto, helper

        nodes, uses = [], iter(names)
        for name, tensor in dict(zip(names, self.constants)).items():
            node = helper.make_node("Constant", [], [name], name=f"match/{name}")
            if name.startswith("table"):
                node.attribute.append(AttributeProto(name="value", ref_attr_name=name, type=AttributeProto.TENSOR))
            else:
                node.attribute.append(helper.make_attribute("value", tensor))
            nodes.append(node)
        for k, node in enumerate(self.nodes):
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{_stage(node)}/{node.op_type}_{k + 1}"
            copy.input[:] = [next(uses) if n in self.held else self.names[n] if n else "" for n in node.input]
            copy.output[:] = [self.names[n] for n in node.output]
            nodes.append(copy)
        outputs = [self.names[name] for name in self.outputs.values()]
        tables = [name for name in dict.fromkeys(names) if name.startswith("table")]
        return helper.make_function(DOMAIN, NAME, list(self.inputs), outputs, nodes, opsets, tables)

    def call(self, names: list[str]):
        """The step's one node.

        Args:
            names: see `function`.
        """
        from onnx import helper

        tables = {name: tensor for name, tensor in zip(names, self.constants) if name.startswith("table")}
        return helper.make_node(
            NAME, list(self.inputs.values()), list(self.outputs.values()), domain=DOMAIN,
            name=f"block{self.block}.merge/{NAME}", **PLUGIN, **self.op.attributes, **tables,
        )  # fmt: skip


def _stage(node) -> str:
    """"match" or "merge"."""
    return stages.of_node(node.name).partition(".")[2]


def _low_outputs(graph, places: dict[int, Boundary]) -> None:
    """In a typed graph, a Cast that all readers of a step's tokens read becomes part of the step; a Reshape before it goes behind it."""
    made_by = {o: n for n in graph.node for o in n.output}
    for block, place in places.items():
        chain, name = [], place.x_out
        while True:
            readers = [n for n in graph.node if name in n.input]
            if len(readers) != 1 or readers[0].op_type not in ("Reshape", "Cast"):
                break
            chain.append(readers[0])
            name = readers[0].output[0]
            if readers[0].op_type == "Cast":
                break
        if not chain or chain[-1].op_type != "Cast" or place.x_out not in made_by:
            continue
        cast, between, source = chain[-1], chain[:-1], made_by[place.x_out]
        final = cast.output[0]
        wide = f"{place.x_out}.{cast.name.rpartition('_')[2]}.wide"
        source.output[list(source.output).index(place.x_out)] = wide
        cast.input[0], cast.output[0], cast.name = wide, place.x_out, f"block{block}.merge/Cast_{place.x_out}"
        if between:
            between[-1].output[0] = final
        else:
            _rename_input(graph, final, place.x_out)
        nodes = [n for n in graph.node if n.output[0] != place.x_out]
        nodes.insert(next(i for i, n in enumerate(nodes) if wide in n.output) + 1, cast)
        _replace(graph.node, nodes)
        known = {place.x_out, wide, final, *(o for n in between for o in n.output)}
        _replace(graph.value_info, [v for v in graph.value_info if v.name not in known])
        made_by = {o: n for n in graph.node for o in n.output}


def _rename_input(graph, old: str, new: str) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def _put_calls(graph, steps: list) -> None:
    """Each step's nodes are replaced by its call, which stands where the last of them stood."""
    inside = {n.output[0] for nodes, _ in steps for n in nodes}
    place = {n.output[0]: i for i, n in enumerate(graph.node)}
    last = {max((n.output[0] for n in nodes), key=place.get): call for nodes, call in steps}
    nodes = []
    for node in graph.node:
        key = node.output[0]
        nodes += [last[key]] if key in last else [] if key in inside else [node]
    gone = {o for nodes_, _ in steps for n in nodes_ for o in n.output} - {o for _, call in steps for o in call.output}
    outside = {i for n in nodes for i in n.input} | {o.name for o in graph.output}
    if gone & outside:
        raise GraphError(f"values inside a reduction are read outside: {', '.join(sorted(gone & outside)[:3])}")
    _replace(graph.value_info, [v for v in graph.value_info if v.name not in gone])
    _replace(graph.node, nodes)


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


def _tensor(constant):
    """An onnx.TensorProto of a small constant or an onnx_ir one."""
    from onnx import TensorProto
    from onnx_ir.serde import serialize_tensor

    tensor = TensorProto()
    tensor.CopyFrom(constant if isinstance(constant, TensorProto) else serialize_tensor(constant))
    tensor.ClearField("name")
    return tensor


def _replace(field, items) -> None:
    """Put items, some of which may lie in the field itself, in the place of all that a repeated field holds."""
    copies = [type(i).FromString(i.SerializeToString()) for i in items]
    del field[:]
    field.extend(copies)
