"""What a graph must not hold, and whether its token counts are the schedule's. Needs onnx only."""

from __future__ import annotations

from ..errors import GraphError, UsageError
from ..reducers.matching import MOST_SORTED
from ..schedule import Schedule
from . import stages

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
# What a reduction in a scatter meets, by runtime and version.
SCATTER_WORDS = {
    "ScatterElements": "TensorRT-RTX and TensorRT up to 9 refuse it; TensorRT from 10 routes it to a bundled plugin (no BF16, no INT8, "
    "a fusion barrier)",
    "ScatterND": "TensorRT-RTX and every TensorRT refuse it",
    "Scatter": "TensorRT-RTX and every TensorRT refuse it",
}


def refusals(graph, functions: frozenset[tuple[str, str]] = frozenset(), *, sorts_any: bool = False) -> list[str]:
    """Reasons, one per node, why TensorRT-RTX or a TensorRT would refuse a graph; empty when none would.

    Args:
        graph: onnx.GraphProto, or the onnx.FunctionProto that is the body of a node.
        functions: (domain, name) of the functions that nodes may call.
        sorts_any: leave their limit of rows that one node may sort out; other runtimes have none.
    """
    reasons, sorts = [], sort_sizes(graph)
    for node in graph.node:
        what = f"{node.op_type} {node.name!r}"
        if node.op_type in BANNED:
            reasons.append(f"{what}: {BANNED[node.op_type]}")
        if node.op_type in SCATTERS:
            reduction = next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")
            if reduction != "none":
                reasons.append(
                    f"{what}: a scatter with reduction={reduction!r} (express it as a one-hot matrix product): "
                    f"{SCATTER_WORDS[node.op_type]}"
                )
        k = sorts.get(node.output[0], 0) if node.output else 0
        if k > MOST_SORTED and not sorts_any:
            reasons.append(f"{what}: k = {k}, TensorRT and TensorRT-RTX take at most {MOST_SORTED}")
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in functions:
            reasons.append(f"{what}: operator of domain {node.domain!r}")
        for a in node.attribute:
            for sub in [a.g] if a.HasField("g") else list(a.graphs):
                reasons += refusals(sub, functions, sorts_any=sorts_any)
    return reasons


def model_refusals(model) -> list[str]:
    """`refusals` of an onnx.ModelProto: of its graph and of the functions that it calls."""
    functions = frozenset((f.domain, f.name) for f in model.functions)
    return [reason for graph in (model.graph, *model.functions) for reason in refusals(graph, functions)]


def sort_sizes(graph) -> dict[str, int]:
    """k of every TopK of an onnx.GraphProto whose k is a constant, by the name of its first output."""
    import numpy as np
    from onnx import TensorProto, numpy_helper

    single = [
        i for i in getattr(graph, "initializer", ()) if i.data_type == TensorProto.INT64 and list(i.dims) in ([], [1])
    ]
    constants = {i.name: numpy_helper.to_array(i) for i in single}
    for node in graph.node:
        for a in node.attribute if node.op_type == "Constant" else ():
            if a.ref_attr_name:  # of a function: every call has its own
                continue
            value = {"value_ints": list(a.ints), "value_int": [a.i]}.get(a.name, [])
            value = numpy_helper.to_array(a.t) if a.name == "value" else value
            constants[node.output[0]] = np.reshape(value, -1)
    sorts = [n for n in graph.node if n.op_type == "TopK" and n.input[1] in constants]
    return {n.output[0]: int(constants[n.input[1]].reshape(-1)[0]) for n in sorts}


def attention_tokens(model, tail_rows: int | None = None) -> list[int]:
    """Tokens in the attention of each block of an onnx.ModelProto with shapes, in graph order; -1 where not static.

    It is the softmax over a square matrix in a block's stage "attn"; where that has gone, a single token was left.

    Args:
        model: onnx.ModelProto with shapes.
        tail_rows: rows of that matrix in the last block, which is then not square (see `tail`); None for a square one.
    """
    shapes = {
        v.name: [d.dim_value if d.HasField("dim_value") else -1 for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.value_info, *model.graph.output)
    }
    shape_of: dict[str, list[int]] = {}
    for node in model.graph.node:
        stage = stages.of_node(node.name)
        if stage.endswith(".attn"):
            shape_of.setdefault(stage, [1, 1, tail_rows or 1, 1])
            if node.op_type == "Softmax":
                shape_of[stage] = shapes.get(node.output[0], [])
    counts, last = [], next(reversed(shape_of), None)
    for stage, shape in shape_of.items():
        rows = tail_rows if stage == last else None
        counts.append(shape[-1] if len(shape) == 4 and shape[-2] == (rows or shape[-1]) else -1)
    return counts


def check_graph(
    model, schedule: Schedule, n_blocks: int | None = None, *, target: str = "portable", tail_rows: int | None = None
) -> None:
    """Make sure an exported graph is static, free of banned nodes, and has the schedule's token counts.

    Args:
        model: onnx.ModelProto with shapes.
        schedule: it was made under.
        n_blocks: blocks that are in it, None for all.
        target: what it is written for.
        tail_rows: see `attention_tokens`.
    Raises:
        UsageError: it is for TensorRT, and a block sorts more tokens than TensorRT can.
        GraphError: lists everything else that is wrong.
    """
    largest = max(sort_sizes(model.graph).values(), default=0)
    if largest > MOST_SORTED and target == "tensorrt":
        raise UsageError(
            f"a block sorts {largest} tokens, more than TensorRT and TensorRT-RTX can ({MOST_SORTED}): give a smaller image "
            f"or a larger patch, or write it for another target"
        )
    wrong = refusals(model.graph, sorts_any=target != "tensorrt")
    wanted = [n for n, _ in schedule.tokens_per_block()][:n_blocks]
    tokens = attention_tokens(model, tail_rows)
    if tokens != wanted:
        wrong.append(f"tokens in the attention of each block are {tokens}, the schedule has {wanted}")
    _refuse(wrong)


def check_decisions(names: tuple[str, ...], schedule: Schedule) -> None:
    """Make sure that every decision can be read back from an exported graph.

    Args:
        names: of decisions that are in the graph: block3.order, block3.dst, ...
        schedule: it was made under.
    Raises:
        GraphError: lists the parts that are missing.
    """
    wrong = []
    for step in schedule.steps:
        if step.n_in == 1:  # of one token nothing is left to decide
            continue
        parts = {name.partition(".")[2] for name in names if name.startswith(f"block{step.block}.")}
        if "order" not in parts and not {"keep", "src"} <= parts:
            wrong.append(
                f"block {step.block}: which rows stay is not in the graph ({', '.join(sorted(parts)) or 'nothing'})"
            )
        if step.n_folded and step.n_out == step.n_kept and not parts & {"dst", "target"}:
            wrong.append(f"block {step.block}: where folded rows go is not in the graph")
    _refuse(wrong)


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise GraphError(
            "the exported graph is not what was asked for (a defect of tokexport, please report it):\n  "
            + "\n  ".join(wrong)
        )
