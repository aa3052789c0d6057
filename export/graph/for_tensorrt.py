"""What TensorRT takes, and likes better than other tools do: passes over a finished graph, of files for TensorRT and of every build."""

from __future__ import annotations

from collections import defaultdict

# Parameters that are added along the last axis, by operator: their places among its inputs.
PARAMETERS = {"Gemm": (2,), "LayerNormalization": (1, 2)}


def adapt_to_tensorrt(proto, weights: dict) -> None:
    """Bring a finished graph into the form that TensorRT takes, and likes.

    Args:
        proto: onnx.ModelProto without its large weights, changed in place.
        weights: those, {name: onnx_ir tensor}, changed in place.
    """
    cast_pixels_first(proto)
    widen_parameters(proto, weights)


def cast_pixels_first(proto) -> None:
    """Cast uint8 images before they are transposed: TensorRT takes uint8 as an input, and no operation on it but a Cast.

    Other runtimes do better with a Transpose of a quarter of the bytes, so that is how files are exported.

    Args:
        proto: onnx.ModelProto, changed in place.
    """
    import onnx

    graph = proto.graph
    pixels = {v.name for v in graph.input if v.type.tensor_type.elem_type == onnx.TensorProto.UINT8}
    for transpose in graph.node:
        if transpose.op_type != "Transpose" or transpose.input[0] not in pixels:
            continue
        between = transpose.output[0]
        readers = [node for node in graph.node if between in node.input]
        if [node.op_type for node in readers] != ["Cast"]:
            continue
        cast = readers[0]
        first, second = (onnx.NodeProto.FromString(node.SerializeToString()) for node in (cast, transpose))
        first.input[0], first.output[0] = transpose.input[0], between
        second.input[0], second.output[0] = between, cast.output[0]
        transpose.CopyFrom(first)
        cast.CopyFrom(second)
        for i in [i for i, value in enumerate(graph.value_info) if value.name == between]:
            del graph.value_info[i]  # it is of another type and shape now


def widen_parameters(proto, weights: dict) -> None:
    """Shape [C] to [1, C] for biases of Gemm and both parameters of LayerNormalization: TensorRT then needs no broadcast layers.

    The operators take either by their definition, but shape inference and quantizers of other tools expect [C]. A parameter that
    something else reads too keeps its shape.

    Args:
        proto: onnx.ModelProto without its large weights, changed in place.
        weights: those, {name: onnx_ir tensor}, changed in place.
    """
    import onnx_ir

    places = defaultdict(set)
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            places[name].add(i in PARAMETERS.get(node.op_type, ()))
    alone = {name for name, fits in places.items() if fits == {True}}
    for tensor in proto.graph.initializer:
        if tensor.name in alone and len(tensor.dims) == 1:
            tensor.dims.insert(0, 1)
    for name, tensor in weights.items():
        if name in alone and len(tensor.shape) == 1:
            weights[name] = onnx_ir.tensor(tensor.numpy().reshape(1, -1), dtype=tensor.dtype, name=name)
