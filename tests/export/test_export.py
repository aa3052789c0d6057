"""What is refused before a file is made, and what makes a graph unfit to be judged."""

import onnx
import pytest
from tokexport.export.errors import GraphError
from tokexport.export.graph import checks
from tokexport.export.graph import export as graph_export
from tokexport.export.models import as_plain

from tokexport import UsageError, export_onnx


def test_a_batch_that_memory_cannot_hold_is_refused_before_anything_is_made(tiny, tmp_path, monkeypatch):
    loaded = tiny("tiny_vit")
    schedule = loaded.schedule("tome", r=8)
    monkeypatch.setattr(graph_export, "StaticViT", None)  # nothing is traced
    monkeypatch.setattr(graph_export, "memory_bytes", lambda: 4 * 10**9)
    with pytest.raises(
        UsageError, match="^batch 99999: tracing would take some [0-9]+ GB .*has 4 GB: give a smaller batch"
    ):
        export_onnx(loaded, schedule, tmp_path / "v.onnx", batch=99999)
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_grows_with_the_batch_and_holds_the_images(tiny):
    loaded = tiny("tiny_vit")
    plain, schedule = as_plain(loaded.module), loaded.schedule("tome", r=8)
    one = graph_export.tracing_bytes(plain, schedule, batch=1)
    assert one > 4 * 3 * 64 * 64 and graph_export.tracing_bytes(plain, schedule, batch=1000) == 1000 * one
    assert graph_export.memory_bytes() > 2**28


@pytest.mark.parametrize(
    "wrong, said", [({"opset": 12}, "opset 12"), ({"dtype": "fp8"}, "precision 'fp8'"), ({"batch": 0}, "batch 0")]
)
def test_wrong_requests_speak_of_arguments(wrong, said, tiny, tmp_path):
    loaded = tiny("tiny_vit")
    with pytest.raises(UsageError, match=f"^{said}: wanted"):
        export_onnx(loaded, loaded.schedule("none"), tmp_path / "v.onnx", **wrong)


DECISIONS = {
    "tome": ("block0.keep", "block0.src", "block0.target"),
    "evit": ("block1.order",),
    "etps": ("block1.order", "block1.dst"),
    "dynamicvit": ("block1.order",),
}


@pytest.mark.parametrize("method", DECISIONS)
def test_a_decision_that_lost_a_part_is_an_error_of_the_export(method, tiny):
    options = {"r": [8]} if method == "tome" else {"at": [1]}
    schedule, names = tiny("tiny_vit").schedule(method, **options), DECISIONS[method]
    checks.check_decisions(names, schedule)
    for missing in names:
        with pytest.raises(GraphError, match="block [01]: wh(ich rows stay|ere folded rows go) is not in the graph"):
            checks.check_decisions(tuple(n for n in names if n != missing), schedule)


def test_an_export_that_drops_a_decision_writes_nothing(tiny, tmp_path, monkeypatch):
    """As when a simplifier replaces the value that holds it."""
    finish = graph_export.passes.finish

    def renaming(*args, **how):
        graph = finish(*args, **how)
        for node in graph.proto.graph.node:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    names[i] = name.replace("block1.dst", "renamed")
        return graph

    monkeypatch.setattr(graph_export.passes, "finish", renaming)
    loaded = tiny("tiny_vit")
    with pytest.raises(GraphError, match="block 1: where folded rows go"):
        export_onnx(loaded, loaded.schedule("etps", at=[1]), tmp_path / "v.onnx", batch=1)
    assert list(tmp_path.iterdir()) == []


def test_what_a_scatter_with_a_reduction_meets_is_said_by_runtime():
    node = lambda op: onnx.helper.make_node(op, ["x", "x", "x"], ["y"], name="s", reduction="add")
    reason = lambda op: checks.refusals(onnx.helper.make_graph([node(op)], "g", [], []))[0]
    assert "TensorRT from 10 routes it to a bundled plugin (no BF16, no INT8, a fusion barrier)" in reason(
        "ScatterElements"
    )
    assert "TensorRT-RTX and TensorRT up to 9 refuse it" in reason("ScatterElements")
    assert "every TensorRT refuse it" in reason("ScatterND")


def test_a_sort_that_tensorrt_cannot_do_is_wrong_use(tiny):
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("TopK", ["x", "k"], ["y", "i"], name="sort")],
        "g",
        [],
        [],
        [onnx.helper.make_tensor("k", onnx.TensorProto.INT64, [1], [4000])],
    )
    with pytest.raises(UsageError, match="sorts 4000 tokens, more than TensorRT and TensorRT-RTX can .3840."):
        checks.check_graph(onnx.helper.make_model(graph), tiny("tiny_vit").schedule("none"), target="tensorrt")


def test_a_file_holds_no_path_of_the_machine_that_made_it(exported):
    model = onnx.load(exported("tiny_vit"))
    assert not any(node.metadata_props for node in model.graph.node)
    assert str(graph_export.__file__).rpartition("/")[0].encode() not in model.SerializeToString()
