"""The free bound of a reduced file: the same graph with the same token counts, its rows merely cut off. No matching
can beat it.

It is made from the file itself: whatever the stages `match` and `merge` of a step compute goes, the first rows that
the step leaves are kept, and where attention adds the logarithm of token sizes it adds a constant row of the same
shape. So the bound has the file's own precision, batch and layout, and needs neither the model nor its weights'
source. What it computes is of no use; how long it takes is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...export.errors import GraphError, UsageError
from ...export.files import read_model, write_model
from ...export.graph import stages
from ...export.inspection import Inspection
from ...export.schedule import Step

CUT = "Cut"  # what the names of new nodes begin with
SIZES = (1.0, 2.0)  # token sizes in turn: not all alike, or a runtime would take the addition of their logarithm out


def write_bound(inspection: Inspection, path: Path) -> Path:
    """Write the bound of a reduced file.

    Args:
        inspection: of the reduced ONNX file.
        path: where the bound goes; what is there is replaced.
    Returns:
        The path. The file has the first output only and no provenance: runtimes run it, tokexport's other commands
        refuse it.
    Raises:
        UsageError: nothing is reduced in the file.
        GraphError: the graph has no stages that could be cut.
    """
    import onnx

    if not inspection.provenance.file_schedule.steps:
        raise UsageError(f"{inspection.path} is dense: it has no bound but itself")
    proto, weights = read_model(inspection.path)
    graph = proto.graph
    del graph.output[1:], proto.metadata_props[:]
    nodes, constants = _cut_nodes(graph, inspection)
    read = {name for node in nodes for name in node.input}
    kept = [i for i in (*graph.initializer, *constants) if i.name in read]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    write_model(proto, {name: tensor for name, tensor in weights.items() if name in read}, path)
    onnx.checker.check_model(str(path))
    return path


class _Value(NamedTuple):
    """Type (of onnx.TensorProto) and shape (None where free) of a value."""

    type: int
    shape: tuple


@dataclass
class _Cut:
    """One step: the names its nodes make, and the tokens it starts from. width: channels of a token."""

    step: Step
    made: set[str]
    tokens: str
    value: _Value
    width: int

    @property
    def prefix(self) -> str:
        """What the new values are called."""
        return f"block{self.step.block}.cut"

    def leaves(self, value: _Value) -> bool:
        """Whether a value is the step's remaining tokens: rows [B n_out, C] or [B, n_out, C]."""
        if value.shape[-1:] != (self.width,):
            return False
        return len(value.shape) == 2 or len(value.shape) == 3 and value.shape[1] == self.step.n_out

    def nodes(self, name: str, value: _Value) -> list:
        """Nodes that cut the first n_out rows of each image off, in the layout and the type of the value they replace.

        Args:
            name: of the value they give.
            value: type and shape of what they replace.
        """
        from onnx import helper

        single = self.value.shape == (self.step.n_in, self.width)
        node = lambda kind, inputs, output, **options: helper.make_node(
            kind, inputs, [output], name=f"block{self.step.block}.merge/{CUT}{kind}_{output}", **options
        )
        chain, current, new = [], self.tokens, iter(f"{self.prefix}.{name}.{i}" for i in range(4))
        if not single and len(self.value.shape) == 2:
            chain.append(node("Reshape", [current, f"{self.prefix}.images"], current := next(new)))
        bounds = [f"{self.prefix}.{key}" for key in ("first", "last", "axis0" if single else "axis1")]
        chain.append(node("Slice", [current, *bounds], current := next(new)))
        if not single and len(value.shape) == 2:
            chain.append(node("Reshape", [current, f"{self.prefix}.rows"], current := next(new)))
        if value.type != self.value.type:
            chain.append(node("Cast", [current], current := next(new), to=value.type))
        chain[-1].output[0] = name
        return chain

    def constants(self) -> list:
        """What the nodes read besides the tokens."""
        from onnx import TensorProto, helper

        ints = {"first": [0], "last": [self.step.n_out], "axis0": [0], "axis1": [1]}
        ints |= {"images": [-1, self.step.n_in, self.width], "rows": [-1, self.width]}
        return [helper.make_tensor(f"{self.prefix}.{k}", TensorProto.INT64, [len(v)], v) for k, v in ints.items()]


def _cut_nodes(graph, inspection: Inspection) -> tuple[list, list]:
    """The nodes that remain and those that replace the steps, in order; and the constants that the new ones read."""
    values = {
        v.name: _Value(v.type.tensor_type.elem_type, tuple(d.dim_value or None for d in v.type.tensor_type.shape.dim))
        for v in graph.value_info
    }
    cuts = [_cut_of(graph, step, values, inspection) for step in inspection.provenance.file_schedule.steps]
    home = {name: cut for cut in cuts for name in cut.made}
    live = _live_names(graph, home)
    nodes, constants = [], [tensor for cut in cuts for tensor in cut.constants()]
    for node in graph.node:
        if not live.intersection(node.output):
            continue
        if node.output[0] not in home:
            nodes.append(node)
            continue
        for name in live.intersection(node.output):
            value = values.get(name)
            if value is None:
                raise GraphError(f"{inspection.path}: the shape of {name} is not in the file")
            if home[name].leaves(value):
                nodes += home[name].nodes(name, value)
            else:
                constants.append(_constant(name, value))
    return _without_casts(nodes, graph.output[0].name), constants


def _cut_of(graph, step: Step, values: dict[str, _Value], inspection: Inspection) -> _Cut:
    """What a step makes and starts from. Raises: GraphError when its nodes or its tokens are not in the graph."""
    width, stage = inspection.provenance.dims["width"], f"block{step.block}"
    inside = [n for n in graph.node if stages.of_node(n.name) in (f"{stage}.match", f"{stage}.merge")]
    made = {name for node in inside for name in node.output}
    layouts = ((step.n_in, width), (None, width), (None, step.n_in, width), (inspection.batch, step.n_in, width))
    # Whoever merges reads the tokens, unless the match stage has gathered them already.
    for node in sorted(inside, key=lambda n: stages.of_node(n.name), reverse=True):
        for name in node.input:
            if name not in made and name in values and values[name].shape in layouts:
                return _Cut(step, made, name, values[name], width)
    raise GraphError(f"{inspection.path}: block {step.block} has no tokens that could be cut off")


def _live_names(graph, home: dict[str, _Cut]) -> set[str]:
    """Names that the first output depends on, when each step depends on nothing but the tokens it starts from."""
    maker = {name: node for node in graph.node for name in node.output}
    live, names = set(), [graph.output[0].name]
    while names:
        name = names.pop()
        if name in live or not name:
            continue
        live.add(name)
        if name in home:
            names.append(home[name].tokens)
        elif name in maker:
            names += maker[name].input
    return live


def _without_casts(nodes: list, output: str) -> list:
    """Nodes less the pairs of casts there and back that a step in float32 leaves between tokens of another type."""
    maker = {name: node for node in nodes for name in node.output}
    same: dict[str, str] = {}
    for node in nodes:
        before = maker.get(node.input[0]) if node.op_type == "Cast" else None  # to float32; this one is back
        if before is not None and before.op_type == "Cast" and f"/{CUT}" in before.name and node.output[0] != output:
            same[node.output[0]] = before.input[0]
    nodes = [node for node in nodes if node.output[0] not in same]
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = same.get(name, name)
    read = {name for node in nodes for name in node.input} | {output}
    return [node for node in nodes if read.intersection(node.output)]


def _constant(name: str, value: _Value):
    """A constant in the place of sizes (SIZES in turn) or positions (0, 1, 2, ...), of one image."""
    import math

    from onnx import TensorProto, helper

    shape = [n or 1 for n in value.shape]
    count = math.prod(shape)
    whole = value.type in (TensorProto.INT64, TensorProto.INT32)
    numbers = list(range(count)) if whole else [SIZES[i % len(SIZES)] for i in range(count)]
    return helper.make_tensor(name, value.type, shape, numbers)
