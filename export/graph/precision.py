"""Precision is decided in the graph: TensorRT 11 and TensorRT-RTX build strongly typed networks, without flags for it.

A typed file has its trunk (embedding, attention, MLP, head) in a low type; decisions, sizes and merging stay in float32
(see `stages`), and so do the input and the outputs. A Cast stands only where a value goes from one to the other, once
for each value. Which type a precision has is said by its row of `precisions.TABLE`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from .. import precisions
from ..errors import UsageError
from ..files import read_model, write_model
from ..provenance import of_model, store
from . import calls, stages
from .for_tensorrt import adapt_to_tensorrt


def graph_precisions() -> tuple[str, ...]:
    """Precisions that a float32 graph can be converted to, float32 itself among them; int8 takes calibration too."""
    return tuple(
        name for name, row in precisions.TABLE.items() if row.in_file and row.product_type == row.tensorrt_type
    )


def convert(proto, weights: dict, precision: str):
    """A float32 graph of tokexport in another precision.

    Args:
        proto: onnx.ModelProto without its large weights.
        weights: those, {name: onnx_ir tensor}.
        precision: one of `graph_precisions`.
    Returns:
        (onnx.ModelProto, weights) as they came in.
    Raises:
        UsageError: the nodes have no stages, the graph is typed already, or a weight is more than the low type can
        hold.
    """
    import onnx

    low = onnx.TensorProto.DataType.Value(precisions.get(precision).onnx_type)
    return (proto, weights) if low == onnx.TensorProto.FLOAT else _TypedGraph(proto, weights, low).result()


def write_as(path: Path, output: Path, precision: str, *, target: str | None = None) -> int:
    """Write a file of tokexport in another precision, for another target, or both.

    Args:
        path: of the file; a float32 one, or in the precision already.
        output: written aside and renamed, whatever is there.
        precision: one of `graph_precisions`, or the file's own.
        target: one of `provenance.TARGETS`; None: the file's own.
    Returns:
        Its bytes.
    Raises:
        UsageError: as `convert`.
    """
    proto, weights = read_model(path)
    provenance = of_model(proto, str(path))
    if precision != provenance.precision:
        as_asked = lambda p, w: convert(p, w, precision)
        proto, weights = calls.converted(proto, weights, as_asked, provenance.file_schedule)
    if target == "tensorrt":
        adapt_to_tensorrt(proto, weights)
    store(proto, replace(provenance, precision=precision, target=target or provenance.target))
    return write_model(proto, weights, output)


class _TypedGraph:
    """One pass over a float32 graph that gives each node the type of its stage.

    Node by node, in order: float32 constants that it reads are converted, values that were made in the other type are
    cast (`_read`); what it makes is noted as being of its type, and cast back where a caller reads it (`_write`).

    Example: `x = MatMul(a, w)` in block0.attn and `_, i = TopK(x)` in block0.match, of a float32 input a, become in
    fp16 `a.fp16 = Cast(a)`, `x = MatMul(a.fp16, w.fp16)`, `x.fp32 = Cast(x)`, `_, i = TopK(x.fp32)`.
    """

    def __init__(self, proto, weights: dict, low: int):
        import onnx

        self.high, self.low = onnx.TensorProto.FLOAT, low
        self.types = _value_types(proto, weights)  # of the float32 graph
        if {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, low} & set(self.types.values()):
            raise UsageError("the graph has fp16 or bf16 in it already: give the float32 file")
        if not all(stages.of_node(n.name) for n in proto.graph.node):
            raise UsageError(
                "the graph's nodes do not say what part of the model they are: make the file again with this version"
            )
        self.model = onnx.ModelProto()
        self.model.CopyFrom(proto)
        self.small = {i.name: i for i in self.model.graph.initializer}
        self.large = weights
        self.outputs = {o.name for o in self.model.graph.output}
        self.made_in = {v.name: self.high for v in self.model.graph.input}  # the type each value is in
        self.copies: dict[tuple[str, int], str] = {}  # (value, type) -> its name in that type, where it is not its own
        self.nodes: list = []
        self.new_small: dict = {}
        self.new_large: dict = {}

    def result(self) -> tuple:
        """(onnx.ModelProto, weights) in the low type."""
        for node in self.model.graph.node:
            wanted = self.high if stages.in_fp32(node.name) else self.low
            for i, name in enumerate(node.input):
                node.input[i] = self._read(name, wanted, stages.of_node(node.name))
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == self.high:
                    attribute.i = wanted
            self.nodes.append(node)
            for i, name in enumerate(node.output):
                node.output[i] = self._write(name, wanted, stages.of_node(node.name))
        self.new_small |= {name: self.small[name] for name in self.outputs if name in self.small}
        del self.model.graph.value_info[:]
        _replace(self.model.graph.node, _turned_products(self.nodes, set(self.copies.values())))
        _replace(self.model.graph.initializer, list(self.new_small.values()))
        return with_shapes(self.model, self.new_large), self.new_large

    def _read(self, name: str, wanted: int, stage: str) -> str:
        """The name under which a node of this type and stage reads a value."""
        is_float = self.types.get(name) == self.high
        if name in self.small or name in self.large:
            return self._constant(name, wanted if is_float else None)
        if not is_float:
            return name
        if (name, wanted) not in self.copies and self.made_in[name] != wanted:
            self._cast(name, self._name_in(name, wanted), wanted, stage)
        return self.copies.get((name, wanted), name)

    def _write(self, name: str, made_in: int, stage: str) -> str:
        """The name under which a node makes a value; what callers read is cast to float32 and keeps its name."""
        if self.types.get(name) != self.high:
            return name
        self.made_in[name] = made_in
        if name not in self.outputs or made_in == self.high:
            return name
        low_name = self._name_in(name, made_in)
        self._cast(low_name, name, self.high, stage, of=name)
        self.copies[name, self.high] = name
        return low_name

    def _name_in(self, name: str, wanted: int) -> str:
        return self.copies.setdefault((name, wanted), f"{name}.{_short_name(wanted)}")

    def _cast(self, source: str, result: str, to: int, stage: str, of: str = "") -> None:
        from onnx import helper

        self.nodes.append(helper.make_node("Cast", [source], [result], name=f"{stage}/Cast_{of or source}", to=to))

    def _constant(self, name: str, wanted: int | None) -> str:
        """The name of a constant in a type, its own in float32 or when it is none of floats (None)."""
        store = self.new_large if name in self.large else self.new_small
        if wanted != self.low:
            store[name] = self.large[name] if name in self.large else self.small[name]
            return name
        new_name = self._name_in(name, wanted)
        if new_name not in store:
            store[new_name] = self._converted(name, new_name)
        return new_name

    def _converted(self, name: str, new_name: str):
        """A float32 constant in the low type: an onnx_ir tensor for a large one, else an onnx.TensorProto."""
        import ml_dtypes
        import numpy as np
        import onnx_ir
        from onnx import numpy_helper
        from onnx_ir.serde import serialize_tensor

        array = self.large[name].numpy() if name in self.large else numpy_helper.to_array(self.small[name])
        dtype = onnx_ir.DataType(self.low).numpy()
        limit, largest = float(ml_dtypes.finfo(dtype).max), float(np.abs(array).max(initial=0))
        if largest > limit:
            raise UsageError(
                f"weight {name} has values up to {largest:.3g}, more than {_short_name(self.low)} can hold "
                f"({limit:g}): use bf16"
            )
        tensor = onnx_ir.tensor(array.astype(dtype), name=new_name)
        return tensor if name in self.large else serialize_tensor(tensor)


def _short_name(onnx_type: int) -> str:
    """What the first precision with this type is called: "fp32", "fp16", "bf16"."""
    import onnx

    type_name = onnx.TensorProto.DataType.Name(onnx_type)
    return next(name for name, row in precisions.TABLE.items() if row.onnx_type == type_name)


def _turned_products(nodes: list, casts: set[str]) -> list:
    """Products A^T B of which B has just been cast, as (B^T A)^T; B is cast once more for it where others read it too.

    TensorRT-RTX 1.7 cannot build the first form (a check in its Myelin, tactic.cpp:2418, fails), nor the second of a B that
    is gathered from as well (for the honesty map); what is built is the same sum. Both can go when a newer TensorRT-RTX builds
    `test_every_method_is_built_in_every_precision` and `test_an_engine_gives_every_output_that_its_file_gives` without.
    """
    from onnx import helper

    out, makers = [], {output: node for node in nodes for output in node.output}
    n_readers = Counter(name for node in nodes for name in node.input)
    for node in nodes:
        attributes = {a.name: a.i for a in node.attribute}
        turned = attributes.get("transA") and not attributes.get("transB")
        if node.op_type == "Gemm" and turned and len(node.input) == 2 and node.input[1] in casts:
            name, a, b = node.output[0], *node.input
            if n_readers[b] > 1 and makers[b].op_type == "Cast":
                source, to = makers[b].input[0], makers[b].attribute[0].i
                b = f"{name}.own"
                out.append(helper.make_node("Cast", [source], [b], name=f"{node.name}_own", to=to))
            out.append(helper.make_node("Gemm", [b, a], [f"{name}.T"], name=node.name, transA=1))
            node = helper.make_node("Transpose", [f"{name}.T"], [name], name=f"{node.name}_T", perm=[1, 0])
        out.append(node)
    return out


def _replace(field, items: list) -> None:
    """Put items, some of which may lie in the field itself, in the place of all that a repeated field holds."""
    copies = [type(i).FromString(i.SerializeToString()) for i in items]
    del field[:]
    field.extend(copies)


def _value_types(proto, weights: dict) -> dict[str, int]:
    """Element type of every value of a graph."""
    graph = with_shapes(proto, weights).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {i.name: i.data_type for i in graph.initializer}
    return types | {name: int(tensor.dtype) for name, tensor in weights.items()}


def with_shapes(proto, weights: dict):
    """The model with types and shapes of all values inferred, the large weights standing in as inputs meanwhile.

    Args:
        proto: onnx.ModelProto.
        weights: those that are not in it.
    """
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
