"""What TensorRT likes better than other tools do: a pass over a finished graph, of files for TensorRT and of every build."""

from __future__ import annotations

from collections import defaultdict

# Parameters that are added along the last axis, by operator: their places among its inputs.
PARAMETERS = {"Gemm": (2,), "LayerNormalization": (1, 2)}


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
