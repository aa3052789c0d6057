"""What exported graphs are made of: nothing TensorRT refuses, no more nodes than promised, the same numbers in every engine."""

import onnx
import pytest
from onnx import TensorProto, helper

from tokexport import Schedule, UsageError, export_onnx, load_model, reduce_model
from tokexport.export import checks
from tokexport.export.errors import GraphError

WHY_TENSORRT = "tensorrt_rtx is not installed: node counts of the parsed network and engine builds need it (no GPU)"
# DeiT-S: (r, batch) -> most nodes in the file, most layers in the network TensorRT-RTX parses
BUDGETS = {(None, 1): (230, 390), (13, 1): (450, 800), (13, None): (562, 1000)}
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
    constant = helper.make_node("Constant", [], ["k"], **({"value_ints": [k]} if where == "value_ints" else {"value": tensor}))
    return _graph(constant, node)


BODY = _graph(_node("Relu"))
CLEAN = {
    "Relu": _graph(_node("Relu")), "ScatterElements": _graph(_node("ScatterElements", "xxx")),
    "ScatterND": _graph(_node("ScatterND", "xxx", reduction="none")), "TopK at the limit": _topk(3840, "initializer"),
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
    "TopK": (_topk(4000, "initializer"), "k = 4000, at most 3840"),
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


@pytest.mark.parametrize("batch", [1, 3, None])
@pytest.mark.parametrize("kind, r", [("tiny_vit", None), ("tiny_vit", 8), ("tiny_vit_nocls", 8), ("tiny_vit_distilled", 8)])
def test_an_exported_graph_is_static_and_valid(kind, r, batch, exported, tiny, schedule_of):
    model = onnx.load(exported(kind, r, batch))
    schedule = schedule_of(tiny(kind).module, r)
    assert checks.refusals(model.graph) == [] and checks.attention_tokens(model) == [n for n, _ in schedule.tokens_per_block()]
    onnx.checker.check_model(model, full_check=True)
    first = [v.type.tensor_type.shape.dim[0] for v in (*model.graph.input, *model.graph.output)]
    assert all(d.dim_value == batch if batch else d.dim_param for d in first)
    assert [o.name for o in model.graph.output] == ["logits", "sources"]


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


@pytest.mark.parametrize("other", [{"depth": 5}, {"depth": 7}, {"n_tokens": 66}, {"n_tokens": 64}, {"n_prefix": 0}, {"n_prefix": 2}], ids=str)
def test_a_schedule_of_another_model_is_wrong_use(other, tiny, tmp_path):
    schedule = Schedule.parse(8, **{"depth": 6, "n_tokens": 65, "n_prefix": 1, **other})
    with pytest.raises(UsageError, match="schedule"):
        reduce_model(tiny("tiny_vit").module, schedule)
    with pytest.raises(UsageError, match="schedule"):
        export_onnx(tiny("tiny_vit"), schedule, tmp_path / "vit.onnx", batch=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch", [1, None])
@pytest.mark.parametrize("kind", ["tiny_vit", "tiny_vit_nocls", "tiny_vit_distilled"])
@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_every_engine_gives_the_references_numbers(engine, kind, batch, exported, run_onnx, tiny, schedule_of, golden, relative):
    if engine == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
    model, image = tiny(kind).module, golden.image[1:]  # the first image of tiny_vit_nocls is a near-tie
    wanted = reduce_model(model, schedule_of(model, 8)).run(image)
    got = run_onnx(exported(kind, 8, batch), image, engine)
    assert relative(got["logits"], wanted.output) <= 1e-4 and (got["sources"] == wanted.sources.numpy()).all()
    assert relative(got["logits"][::-1], wanted.output) > 1e-4, "images are told apart"


@pytest.fixture(scope="module")
def exported_large(tmp_path_factory, schedule_of):
    """exported_large(name, kwargs, r, batch) -> path of a model with random weights, made once."""
    models, made, folder = {}, {}, tmp_path_factory.mktemp("large")

    def export(name, kwargs, r, batch):
        if name not in models:
            models[name] = load_model(name, kwargs)
        if (name, r, batch) not in made:
            made[name, r, batch] = folder / f"{len(made)}.onnx"
            export_onnx(models[name], schedule_of(models[name].module, r), made[name, r, batch], batch=batch)
        return made[name, r, batch]

    return export


@pytest.fixture(scope="module")
def deit(exported_large):
    return lambda r, batch: exported_large("deit_small_patch16_224", {}, r, batch)


@pytest.mark.parametrize("r, batch", BUDGETS, ids=str)
def test_deit_small_keeps_its_budget_of_nodes(r, batch, deit):
    assert len(onnx.load(deit(r, batch)).graph.node) <= BUDGETS[r, batch][0]


@pytest.mark.parametrize("r, batch", BUDGETS, ids=str)
def test_deit_small_keeps_its_budget_of_tensorrt_layers(r, batch, deit):
    *_, network = _parse(deit(r, batch))
    assert BUDGETS[r, batch][0] // 2 < network.num_layers <= BUDGETS[r, batch][1]


def _constant_bytes(path):
    """Bytes of all initializers and Constant nodes."""
    graph = onnx.load(path).graph
    tensors = [*graph.initializer, *(a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.HasField("t"))]
    return sum(len(t.raw_data) or onnx.numpy_helper.to_array(t).nbytes for t in tensors)


def _added(reduced, dense):
    dense = _constant_bytes(dense)
    return (_constant_bytes(reduced) - dense) / dense


@pytest.mark.parametrize("batch", [1, None])
def test_a_reduction_adds_few_constants_to_deit_small(batch, deit):
    assert 0 < _added(deit(13, batch), deit(None, 1)) < ADDED


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, None])
def test_a_reduction_adds_few_constants_at_1370_tokens(batch, exported_large):
    paths = [exported_large("vit_small_patch14_dinov2", {"img_size": 518}, r, 1 if r is None else batch) for r in (55, None)]
    assert checks.attention_tokens(onnx.load(paths[0]))[:2] == [1370, 1315]
    assert 0 < _added(*paths) < ADDED


def test_many_constants_are_counted(tmp_path):
    sizes = {}
    for n in (1000, 1040):
        tensors = [helper.make_tensor(name, TensorProto.FLOAT, [k], [0.0] * k) for name, k in (("a", 900), ("b", n - 900))]
        graph = _graph(helper.make_node("Constant", [], ["b"], value=tensors[1]), _node("Add", ("x", "b")), initializers=tensors[:1])
        onnx.save(helper.make_model(graph), tmp_path / f"{n}.onnx")
        sizes[n] = tmp_path / f"{n}.onnx"
    assert _added(sizes[1040], sizes[1000]) == 0.04 > ADDED


def _parse(path):
    """The file as TensorRT-RTX parses it: the module, builder, parser (all must live) and network."""
    trt = pytest.importorskip("tensorrt_rtx", reason=WHY_TENSORRT)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    return trt, builder, parser, network


@pytest.mark.parametrize("batch", [1, None])
def test_tensorrt_builds_an_engine_for_gpus_that_are_not_here(batch, exported):
    trt, builder, _, network = _parse(exported("tiny_vit", 8, batch))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 2
    for i, capability in enumerate((trt.ComputeCapability.SM86, trt.ComputeCapability.SM89)):
        assert config.set_compute_capability(capability, i)
    if batch is None:
        profile = builder.create_optimization_profile()
        profile.set_shape("image", *((n, 3, 64, 64) for n in (1, 8, 32)))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None and engine.nbytes > 1_000_000


def test_tensorrt_refuses_what_the_checks_refuse(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason=WHY_TENSORRT)
    value = lambda name, shape, kind=TensorProto.FLOAT: helper.make_tensor_value_info(name, kind, shape)
    node = helper.make_node("ScatterElements", ["x", "i", "u"], ["y"], axis=0, reduction="add")
    graph = helper.make_graph([node], "g", [value("x", [4, 2]), value("i", [3, 2], TensorProto.INT64), value("u", [3, 2])], [value("y", [4, 2])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "scatter.onnx")
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    network = builder.create_network(0)
    assert not trt.OnnxParser(network, builder.logger).parse_from_file(str(tmp_path / "scatter.onnx"))
