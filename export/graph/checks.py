"""What a graph must not hold, and whether its token counts are the schedule's. Needs onnx only."""

from __future__ import annotations

from . import stages
from ..errors import GraphError
from ..schedule import Schedule

# Why a TensorRT build fails on these, or is not static.
BANNED = {
    "NonZero": "its output shape depends on the data",
    "Loop": "it is control flow",
    "Scan": "it is control flow",
    "If": "it is control flow",
    "Unique": "its output shape depends on the data",
    "Compress": "its output shape depends on the data",
    "NonMaxSuppression": "its output shape depends on the data",
    "SequenceAt": "TensorRT has no sequences",
    "SequenceConstruct": "TensorRT has no sequences",
}
SCATTERS = ("ScatterElements", "ScatterND", "Scatter")
TOPK_LIMIT = 3840


def refusals(graph) -> list[str]:
    """Reasons, one per node, why a TensorRT build would refuse an onnx.GraphProto; empty when it would not."""
    import numpy as np
    from onnx import numpy_helper

    single = [i for i in graph.initializer if i.data_type == 7 and list(i.dims) in ([], [1])]
    constants = {i.name: numpy_helper.to_array(i) for i in single}
    for node in graph.node:
        for a in node.attribute if node.op_type == "Constant" else ():
            value = {"value_ints": list(a.ints), "value_int": [a.i]}.get(a.name, [])
            value = numpy_helper.to_array(a.t) if a.name == "value" else value
            constants[node.output[0]] = np.reshape(value, -1)
    out = []
    for node in graph.node:
        said = f"{node.op_type} {node.name!r}"
        if node.op_type in BANNED:
            out.append(f"{said}: {BANNED[node.op_type]}")
        if node.op_type in SCATTERS:
            reduction = next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")
            if reduction != "none":
                out.append(f"{said}: a scatter with reduction={reduction!r} (express it as a one-hot matrix product)")
        if node.op_type == "TopK" and node.input[1] in constants:
            k = int(constants[node.input[1]].reshape(-1)[0])
            if k > TOPK_LIMIT:
                out.append(f"{said}: k = {k}, at most {TOPK_LIMIT}")
        if node.domain not in ("", "ai.onnx"):
            out.append(f"{said}: operator of domain {node.domain!r}")
        for a in node.attribute:
            for sub in [a.g] if a.HasField("g") else list(a.graphs):
                out += refusals(sub)
    return out


def attention_tokens(model) -> list[int]:
    """Tokens in the attention of each block of an onnx.ModelProto with shapes, in graph order; -1 where not static.

    It is the softmax over a square matrix in a block's stage "attn"; where that has gone, a single token was left.
    """
    shapes = {
        v.name: [d.dim_value if d.HasField("dim_value") else -1 for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.value_info, *model.graph.output)
    }
    out: dict[str, int] = {}
    for node in model.graph.node:
        stage = stages.of_node(node.name)
        if stage.endswith(".attn"):
            out.setdefault(stage, 1)
            if node.op_type == "Softmax":
                shape = shapes.get(node.output[0], [])
                out[stage] = shape[-1] if len(shape) == 4 and shape[-1] == shape[-2] else -1
    return list(out.values())


def check_graph(model, schedule: Schedule) -> None:
    """Make sure an exported onnx.ModelProto is static, free of banned nodes, and has the schedule's token counts.

    Raises: GraphError that lists everything that is wrong.
    """
    wrong = refusals(model.graph)
    wanted = [n for n, _ in schedule.tokens_per_block()]
    found = attention_tokens(model)
    if found != wanted:
        wrong.append(f"tokens in the attention of each block are {found}, the schedule has {wanted}")
    if wrong:
        raise GraphError(
            "the exported graph is not what was asked for (a defect of tokexport, please report it):\n  "
            + "\n  ".join(wrong)
        )
