"""What exported graphs are made of: nothing TensorRT refuses, no more nodes than promised, the same numbers in every engine."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tokexport.export import reducers
from tokexport.export.errors import GraphError
from tokexport.export.graph import checks
from tokexport.export.graph.precision import write_as
from tokexport.export.inspection import inspect
from tokexport.export.models.learned_layers import learned_layers

from tokexport import Schedule, UsageError, export_onnx, reduce_model

from .. import cases
from ..cases import mostly_slow

WHY_TENSORRT = "tensorrt_rtx is not installed: node counts of the parsed network and engine builds need it (no GPU)"
# DeiT-S: (method, batch) -> most nodes in the file, most layers in the network TensorRT-RTX parses
BUDGETS = {(m, batch): most for m, case in cases.METHODS.items() for batch, most in case.budgets.items()}
ADDED = 0.03  # of the weights: what the constants of a reduction may take


def _graph(*nodes, initializers=()):
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    return helper.make_graph(list(nodes), "g", [value("x")], [value("y")], list(initializers))


def _node(op, inputs=("x",), outputs=("y",), **attributes):
    return helper.make_node(op, list(inputs), list(outputs), name=f"the_{op}", **attributes)


def _topk(k, where):
    """A TopK of k rows, its k an initializer or the output of a Constant node."""
    tensor, node = helper.make_tensor("k", TensorProto.INT64, [1], [k]), _node("TopK", ("x", "k"), ("y", "i"), axis=0)
    if where == "initializer":
        return _graph(node, initializers=[tensor])
    constant = helper.make_node(
        "Constant", [], ["k"], **({"value_ints": [k]} if where == "value_ints" else {"value": tensor})
    )
    return _graph(constant, node)


BODY = _graph(_node("Relu"))
CLEAN = {
    "Relu": _graph(_node("Relu")),
    "ScatterElements": _graph(_node("ScatterElements", "xxx")),
    "ScatterND": _graph(_node("ScatterND", "xxx", reduction="none")),
    "TopK at the limit": _topk(3840, "initializer"),
    "ai.onnx": _graph(_node("Relu", domain="ai.onnx")),
}
REFUSED = {
    **{op: (_graph(_node(op)), "depends on the data") for op in ("NonZero", "Unique", "Compress", "NonMaxSuppression")},
    **{op: (_graph(_node(op)), "sequences") for op in ("SequenceAt", "SequenceConstruct")},
    "If": (_graph(_node("If", then_branch=BODY, else_branch=BODY)), "control flow"),
    "Loop": (_graph(_node("Loop", body=BODY)), "control flow"),
    "Scan": (_graph(_node("Scan", body=BODY, num_scan_inputs=1)), "control flow"),
    "ScatterElements": (_graph(_node("ScatterElements", "xxx", reduction="add")), "reduction='add'"),
    "ScatterND": (_graph(_node("ScatterND", "xxx", reduction="mul")), "reduction='mul'"),
    "TopK": (_topk(4000, "initializer"), "k = 4000, TensorRT and TensorRT-RTX take at most 3840"),
    "Gelu": (_graph(_node("Gelu", domain="com.microsoft")), "domain 'com.microsoft'"),
    "Mystery": (_graph(_node("Mystery", domain="tokexport")), "domain 'tokexport'"),
}


@pytest.mark.parametrize("name", CLEAN)
def test_what_tensorrt_takes_is_not_refused(name):
    assert checks.refusals(CLEAN[name]) == []


@pytest.mark.parametrize("op", REFUSED)
def test_what_tensorrt_refuses_is_found_and_named(op):
    graph, said = REFUSED[op]
    (reason,) = checks.refusals(graph)
    assert said in reason and op in reason and f"'the_{op}'" in reason


@pytest.mark.parametrize("where", ["value_ints", "value"])
def test_the_k_of_a_topk_is_found_in_a_constant_node_too(where):
    assert checks.refusals(_topk(3840, where)) == []
    (reason,) = checks.refusals(_topk(4000, where))
    assert "k = 4000" in reason


def test_a_nested_graph_is_searched():
    inner = _graph(_node("Loop", body=REFUSED["ScatterND"][0]))
    reasons = checks.refusals(_graph(_node("If", then_branch=inner, else_branch=BODY)))
    assert [r.split()[0] for r in reasons] == ["If", "Loop", "ScatterND"]


def test_every_banned_node_has_a_test():
    assert set(checks.BANNED) <= set(REFUSED)


def _assert_static_and_valid(path, schedule, batch):
    model = onnx.load(path)
    assert checks.refusals(model.graph) == [] and checks.attention_tokens(model) == [
        n for n, _ in schedule.tokens_per_block()
    ]
    onnx.checker.check_model(model, full_check=True)
    first = [v.type.tensor_type.shape.dim[0] for v in (*model.graph.input, *model.graph.output)]
    assert all(d.dim_value == batch if batch else d.dim_param for d in first)
    assert [o.name for o in model.graph.output] == ["logits", "sources"]


@pytest.mark.parametrize("batch", mostly_slow([1, 3, None], 1, None))
@pytest.mark.parametrize("kind", ["tiny_vit_nocls", "tiny_vit_distilled"])
def test_an_exported_graph_is_static_and_valid(kind, batch, exported, tiny, schedule_of):
    _assert_static_and_valid(exported(kind, 8, batch), schedule_of(tiny(kind).module, 8), batch)


@pytest.mark.parametrize("batch", mostly_slow([1, 3, None], 1, None))
def test_the_graph_of_every_method_is_static_and_valid(options, batch, exported, tiny, schedule_of):
    _assert_static_and_valid(
        exported("tiny_vit", batch=batch, **options), schedule_of(tiny("tiny_vit").module, **options), batch
    )


def test_every_method_is_exported_here(method_cases):
    assert {name.split()[0] for name in method_cases} == {m for m, _ in BUDGETS} == set(reducers.TABLE)


def _batches(model):
    """Wrong things about the batch of a graph for any: reshapes that hold a number of images, values that do not say "batch" first."""
    graph = model.graph
    constants = {
        i.name: numpy_helper.to_array(i).tolist() for i in graph.initializer if i.data_type == TensorProto.INT64
    }
    constants |= {
        n.output[0]: list(a.ints) or numpy_helper.to_array(a.t).tolist()
        for n in graph.node
        if n.op_type == "Constant"
        for a in n.attribute
    }
    wrong = []
    for node in graph.node:
        if node.op_type == "Reshape" and constants.get(node.input[1], [0])[0] != -1:
            wrong.append(f"{node.name} to {constants.get(node.input[1])}")
        if node.op_type in ("Expand", "Tile", "ConstantOfShape", "Shape"):
            wrong.append(f"{node.name} has a shape")
    dims = [(v.name, v.type.tensor_type.shape.dim[0]) for v in (*graph.input, *graph.output)]
    return wrong + [f"{name} is for {d.dim_value}" for name, d in dims if d.dim_param != "batch"]


def test_a_graph_for_any_batch_holds_no_number_of_images(options, exported, run_onnx, golden, relative):
    path, alone = exported("tiny_vit", **options), exported("tiny_vit", batch=1, **options)
    assert _batches(onnx.load(path)) == []
    image = torch.cat([golden.image, golden.image[:2].flip(-1)])
    wanted = run_onnx(alone, image)
    for n in (1, 3, 5):
        got = run_onnx(path, image[:n])
        assert relative(got["logits"], wanted["logits"][:n]) <= 1e-5 and (got["sources"] == wanted["sources"][:n]).all()
    assert len({w.tobytes() for w in wanted["logits"]}) == 5, "images are told apart"


def test_a_number_of_images_in_a_graph_is_seen(exported):
    assert "image is for 1" in _batches(onnx.load(exported("tiny_vit", batch=1))) and _batches(
        onnx.load(exported("tiny_vit", batch=3))
    )
    model = onnx.load(exported("tiny_vit"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 65, 64]), "traced"))
    model.graph.node.append(_node("Reshape", ("rows", "traced")))
    assert _batches(model) == ["the_Reshape to [2, 65, 64]"]


def test_other_token_counts_than_the_schedules_are_an_error(exported, tiny, schedule_of):
    model, vit = onnx.load(exported("tiny_vit", 8, 1)), tiny("tiny_vit").module
    checks.check_graph(model, schedule_of(vit, 8))
    for other in (schedule_of(vit, 7), schedule_of(vit, None), schedule_of(vit, [8, 8, 8])):
        with pytest.raises(GraphError, match=r"are \[65, 57, 49, 41, 33, 25\], the schedule has \[65"):
            checks.check_graph(model, other)


def test_a_banned_node_and_wrong_counts_are_told_together(exported, tiny, schedule_of):
    model = onnx.load(exported("tiny_vit", 8, 1))
    model.graph.node.append(_node("NonZero", ("logits",), ("where",)))
    with pytest.raises(GraphError, match="(?s)NonZero 'the_NonZero'.*tokens in the attention"):
        checks.check_graph(model, schedule_of(tiny("tiny_vit").module, 7))


@pytest.mark.parametrize(
    "other", [{"depth": 5}, {"depth": 7}, {"n_tokens": 66}, {"n_tokens": 64}, {"n_prefix": 0}, {"n_prefix": 2}], ids=str
)
def test_a_schedule_of_another_model_is_wrong_use(other, tiny, tmp_path):
    schedule = Schedule.parse("tome", r=8, **{"depth": 6, "n_tokens": 65, "n_prefix": 1, **other})
    with pytest.raises(UsageError, match="schedule"):
        reduce_model(tiny("tiny_vit").module, schedule)
    with pytest.raises(UsageError, match="schedule"):
        export_onnx(tiny("tiny_vit"), schedule, tmp_path / "vit.onnx", batch=1)
    assert list(tmp_path.iterdir()) == []


ENGINES = pytest.mark.parametrize("runtime", ["ort", "openvino"])


@pytest.fixture
def check_engine(exported, run_onnx, tiny, schedule_of, golden, relative):
    """check_engine(runtime, kind, batch, **options): an runtime's outputs are the reference's."""

    def check(runtime, kind, batch, **options):
        if runtime == "openvino":
            pytest.importorskip("openvino", reason="openvino is not installed")
        loaded, image = tiny(kind), golden.image[1:]  # the first image of tiny_vit_nocls is a near-tie
        schedule = schedule_of(loaded.module, **options)
        wanted = reduce_model(loaded.module, schedule, learned_layers(loaded, schedule)).run(image)
        got = run_onnx(exported(kind, batch=batch, **options), image, runtime)
        assert relative(got["logits"], wanted.output) <= 1e-4 and (got["sources"] == wanted.sources.numpy()).all()
        assert relative(got["logits"][::-1], wanted.output) > 1e-4, "images are told apart"

    return check


@ENGINES
@pytest.mark.parametrize("batch", [1, None])
@pytest.mark.parametrize("kind", ["tiny_vit_nocls", "tiny_vit_distilled"])
def test_every_engine_gives_the_references_numbers(runtime, kind, batch, check_engine):
    check_engine(runtime, kind, batch, r=8)


@ENGINES
@pytest.mark.parametrize("batch", [1, None])
def test_every_engine_runs_every_method(runtime, options, batch, check_engine):
    check_engine(runtime, "tiny_vit", batch, **options)


@pytest.mark.parametrize("method, batch", mostly_slow(BUDGETS, ("none", 1), ("tome", 1), ("tome", None)))
def test_deit_small_keeps_its_budget_of_nodes(method, batch, deit):
    assert len(onnx.load(deit(method, batch)).graph.node) <= BUDGETS[method, batch][0]


@pytest.mark.parametrize("method, batch", mostly_slow(BUDGETS, ("none", 1), ("tome", 1), ("tome", None)))
def test_deit_small_keeps_its_budget_of_tensorrt_layers(method, batch, deit):
    *_, network = _parse(deit(method, batch))
    assert BUDGETS[method, batch][0] // 2 < network.num_layers <= BUDGETS[method, batch][1]


def _constant_bytes(path):
    """Bytes of all initializers and Constant nodes."""
    graph = onnx.load(path).graph
    tensors = [
        *graph.initializer,
        *(a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.HasField("t")),
    ]
    return sum(len(t.raw_data) or onnx.numpy_helper.to_array(t).nbytes for t in tensors)


def _added(reduced, dense):
    dense = _constant_bytes(dense)
    return (_constant_bytes(reduced) - dense) / dense


@pytest.mark.parametrize("batch", mostly_slow([1, None], 1))
@pytest.mark.parametrize(
    "method",
    mostly_slow([m for m, r in reducers.TABLE.items() if m != "none" and "score_head" not in r.signals], "tome"),
)  # score heads are weights themselves
def test_a_reduction_adds_few_constants_to_deit_small(method, batch, deit):
    assert 0 < _added(deit(method, batch), deit("none", 1)) < ADDED


@pytest.mark.slow
def test_a_reduction_adds_few_constants_at_1370_tokens(exported_large):
    paths = [exported_large("vit_small_patch14_dinov2", {"img_size": 518}, 1, r=r) for r in (55, None)]
    assert checks.attention_tokens(onnx.load(paths[0]))[:2] == [1370, 1315]
    assert 0 < _added(*paths) < ADDED


def test_many_constants_are_counted(tmp_path):
    sizes = {}
    for n in (1000, 1040):
        tensors = [
            helper.make_tensor(name, TensorProto.FLOAT, [k], [0.0] * k) for name, k in (("a", 900), ("b", n - 900))
        ]
        graph = _graph(
            helper.make_node("Constant", [], ["b"], value=tensors[1]),
            _node("Add", ("x", "b")),
            initializers=tensors[:1],
        )
        onnx.save(helper.make_model(graph), tmp_path / f"{n}.onnx")
        sizes[n] = tmp_path / f"{n}.onnx"
    assert _added(sizes[1040], sizes[1000]) == 0.04 > ADDED


def _parse(path):
    """The file, in the form a build gives it, as TensorRT-RTX parses it: the module, builder, parser (all must live) and network."""
    trt = pytest.importorskip("tensorrt_rtx", reason=WHY_TENSORRT)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, builder.logger)
    form = path.with_suffix(".tensorrt.onnx")
    write_as(path, form, inspect(path).provenance.precision, target="tensorrt")
    parsed = parser.parse_from_file(str(form))
    form.unlink()
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    return trt, builder, parser, network


def _build(path, side, batch):
    """The serialized engine for two kinds of GPU, neither of which is needed; a free batch is built for 1, 8 and 32 images."""
    trt, builder, _, network = _parse(path)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 2
    for i, capability in enumerate((trt.ComputeCapability.SM86, trt.ComputeCapability.SM89)):
        assert config.set_compute_capability(capability, i)
    if batch is None:
        profile = builder.create_optimization_profile()
        profile.set_shape("image", *((n, 3, side, side) for n in (1, 8, 32)))
        config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


@pytest.mark.parametrize("batch", [1, None])
@pytest.mark.parametrize("method", mostly_slow(reducers.TABLE, "tome"))
def test_tensorrt_builds_an_engine_of_deit_small(method, batch, deit):
    path = deit(method, batch)
    assert onnx.load(path, load_external_data=False).opset_import[0].version == 20
    engine = _build(path, 224, batch)
    assert engine is not None and engine.nbytes > 0.9 * path.stat().st_size


def test_tensorrt_refuses_what_the_checks_refuse(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason=WHY_TENSORRT)
    value = lambda name, shape, kind=TensorProto.FLOAT: helper.make_tensor_value_info(name, kind, shape)
    node = helper.make_node("ScatterElements", ["x", "i", "u"], ["y"], axis=0, reduction="add")
    graph = helper.make_graph(
        [node],
        "g",
        [value("x", [4, 2]), value("i", [3, 2], TensorProto.INT64), value("u", [3, 2])],
        [value("y", [4, 2])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "scatter.onnx")
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    network = builder.create_network(0)
    assert not trt.OnnxParser(network, builder.logger).parse_from_file(str(tmp_path / "scatter.onnx"))
