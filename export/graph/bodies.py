"""The nodes of a step, cut out of a graph: the body that all steps of a model share, and the call that stands for each (see `calls`)."""

from __future__ import annotations

from typing import NamedTuple

from ...kernels.token_reduce import DOMAIN, NAME, VERSION, Reduction
from ..errors import GraphError
from . import stages

PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}  # by which TensorRT's parser finds the plugin


class Boundary(NamedTuple):
    """Names of the values that go into and come out of one step; of those that a method does not have there is none."""

    x: str
    signal: str
    x_out: str
    size_out: str
    log_size: str


class Body:
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
        self.inputs = {"x": place.x, "signal": place.signal}
        self.nodes, self.copied = [], set()
        for name in self.outputs.values():
            self._visit(name, made_by, held)
        if op.has_size and "size" not in self.inputs:  # before the first block that merges, sizes are a constant
            self.inputs["size"] = self._ones(held)
        if op.has_size != ("size" in self.inputs):
            raise GraphError(f"block {block}: its reduction reads {self.inputs['size']} too")
        self._describe({name: tensor for name, tensor in held.items() if name not in self.inputs.values()})

    def _visit(self, name: str, made_by: dict, held: dict) -> None:
        """Take the node that makes a value, behind those that it reads: an order that does not hang on the graph's."""
        node = made_by.get(name)
        if not name or name in self.inputs.values() or name in held or node is None or node in self.nodes:
            return
        if stages.of_node(node.name) not in (f"block{self.block}.match", f"block{self.block}.merge"):
            if node.op_type != "Cast" or node.input[0] not in self.inputs.values():
                if self.inputs.setdefault("size", name) != name:
                    raise GraphError(f"block {self.block}: its reduction reads {name} too")
                return
            self.copied.add(name)  # a Cast that others read as well
        for read in node.input:
            self._visit(read, made_by, held)
        self.nodes.append(node)

    def _ones(self, held: dict) -> str:
        """The name of the constant that the first sizes are."""
        from onnx import numpy_helper

        for name in dict.fromkeys(i for node in self.nodes for i in node.input if i in held):
            array = numpy_helper.to_array(tensor_of(held[name]))
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
                self.constants += [tensor_of(held[name])] if name in held else []
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
        return helper.make_function(
            DOMAIN, NAME, list(self.inputs), outputs, nodes, opset_imports=opsets, attributes=tables
        )

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
    """ "match" or "merge"."""
    return stages.of_node(node.name).partition(".")[2]


def lower_outputs(graph, places: dict[int, Boundary]) -> None:
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
        replace_items(graph.node, nodes)
        to = next(a.i for a in cast.attribute if a.name == "to")
        for value in graph.value_info:
            if value.name in (place.x_out, *(o for n in between for o in n.output)):
                value.type.tensor_type.elem_type = to
        made_by = {o: n for n in graph.node for o in n.output}


def _rename_input(graph, old: str, new: str) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def put_calls(graph, steps: list) -> None:
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
    replace_items(graph.value_info, [v for v in graph.value_info if v.name not in gone])
    replace_items(graph.node, nodes)


def constant_names(bodies: list) -> list[str]:
    """A name for every use of a constant: table_1, ... where blocks differ, constant_1, ... where they are alike.

    Uses that have the same values in every block share a name.
    """
    known: dict[tuple, str] = {}
    for same in zip(*(body.constants for body in bodies)):
        key = tuple(tensor.SerializeToString(deterministic=True) for tensor in same)
        kind = "table" if len(set(key)) > 1 else "constant"
        known.setdefault(key, f"{kind}_{sum(name.startswith(kind) for name in known.values()) + 1}")
    return [
        known[tuple(t.SerializeToString(deterministic=True) for t in same)]
        for same in zip(*(b.constants for b in bodies))
    ]


def tensor_of(constant):
    """An onnx.TensorProto of a small constant or an onnx_ir one."""
    from onnx import TensorProto
    from onnx_ir.serde import serialize_tensor

    tensor = TensorProto()
    tensor.CopyFrom(constant if isinstance(constant, TensorProto) else serialize_tensor(constant))
    tensor.ClearField("name")
    return tensor


def replace_items(field, items) -> None:
    """Put items, some of which may lie in the field itself, in the place of all that a repeated field holds."""
    copies = [type(i).FromString(i.SerializeToString()) for i in items]
    del field[:]
    field.extend(copies)
