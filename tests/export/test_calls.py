"""Reductions as nodes: the same numbers as the plain file's, one body for all blocks, and the plain file back."""

from collections import Counter

import numpy as np
import onnx
import pytest
from tokexport.export.errors import GraphError, UsageError
from tokexport.export.graph import calls
from tokexport.export.graph.precision import write_as
from tokexport.export.inspection import inspect

from tokexport import export_onnx, verify

CASES = {
    "tome": ("tiny_vit", "tome", {"r": 8}, None),
    "tome, one image": ("tiny_vit", "tome", {"r": 8}, 1),
    "tome without a class token": ("tiny_vit_nocls", "tome", {"r": 8}, 1),
    "tome without sizes in the attention": ("tiny_vit", "tome", {"r": 8, "prop_attn": False}, 2),
    "evit": ("tiny_vit", "evit", {"at": (1, 3, 4)}, 1),
    "etps": ("tiny_vit", "etps", {"at": (1, 3, 4)}, None),
    "diffrate": ("tiny_vit", "diffrate", {"rates": {"prune_kept": [60, 64, 50, 58, 40, 65], "merge_kept": [55, 60, 45, 52, 38, 60]}}, None),
}  # fmt: skip
CALLS = {"evit": 3, "etps": 3, "diffrate": 3}  # of ToMe six; DiffRate's other steps fold nothing


@pytest.fixture(scope="module")
def called(tiny, tmp_path_factory):
    """called(case) -> path of a file with calls, made once."""
    folder, paths = tmp_path_factory.mktemp("calls"), {}

    def export(name, **options):
        if name not in paths:
            kind, method, asked, batch = CASES[name]
            paths[name] = folder / f"{len(paths)}.onnx"
            loaded = tiny(kind)
            export_onnx(loaded, loaded.schedule(method, **asked), paths[name], batch=batch, plugin=True, **options)
        return paths[name]

    return export


def run(path, images, outputs=()):
    """Outputs of a file for as many images as it takes, inner values behind them."""
    import onnxruntime

    model = onnx.load(path)
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in outputs
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    batch = session.get_inputs()[0].shape[0]
    return session.run(None, {"image": images[: batch if isinstance(batch, int) else None]})


def call_nodes(path):
    return [n for n in onnx.load(path).graph.node if n.op_type == "TokenReduce"]


@pytest.mark.parametrize("name", CASES)
def test_every_reduction_is_one_call_and_inlining_gives_the_same_numbers(name, called, golden, tmp_path):
    path, images = called(name), golden.image.numpy()
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    nodes = call_nodes(path)
    assert len(nodes) == CALLS.get(CASES[name][1], 6) and len(model.functions) == 1
    body, attributes = model.functions[0], [{a.name for a in n.attribute} for n in nodes]
    assert all(set(body.attribute) <= names for names in attributes)
    assert {n.name.partition("/")[0] for n in body.node} == {"match", "merge"}
    n_calls, n_nodes = calls.inline_file(path, tmp_path / "flat.onnx")
    flat = onnx.load(tmp_path / "flat.onnx")
    assert n_calls == len(nodes) and n_nodes == len(flat.graph.node) and not flat.functions
    assert {o.domain for o in flat.opset_import} == {""} and not call_nodes(tmp_path / "flat.onnx")
    decisions = inspect(path).provenance.decisions
    assert inspect(tmp_path / "flat.onnx").provenance == inspect(path).provenance
    for ours, theirs in zip(run(path, images, decisions), run(tmp_path / "flat.onnx", images, decisions), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["tome", "diffrate", "etps"])
def test_a_file_with_calls_is_the_flat_file_bit_for_bit(name, called, exported, golden):
    kind, method, asked, batch = CASES[name]
    flat = exported(kind, batch=batch, gather_from=0, method=method, **asked)
    (ours,), theirs = run(called(name), golden.image.numpy()), run(flat, golden.image.numpy())[0]
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["tome", "tome without a class token", "evit", "diffrate"])
@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_verify_passes_and_reads_the_calls_decisions(name, runtime, called):
    report = verify(called(name), runtime=runtime)
    assert report.passed and report.decisions == 1.0


@pytest.mark.parametrize("name", ["tome", "tome, one image", "evit"])
def test_what_goes_into_and_comes_out_of_a_call_has_a_shape(name, called):
    from tokexport.engines.measure.bound import write_bound

    model = onnx.load(called(name))
    known = {v.name for v in model.graph.value_info}
    assert known >= {name for n in call_nodes(called(name)) for name in (*n.input, *n.output)} - {
        i.name for i in model.graph.initializer
    }
    bound = write_bound(inspect(called(name)), called(name).with_suffix(".bound.onnx"))
    assert not call_nodes(bound) and np.isfinite(run(bound, np.zeros((2, 3, 64, 64), np.float32))[0]).all()


def test_inspect_takes_the_calls_as_what_they_are(called):
    inspection = inspect(called("tome"))
    assert not inspection.refusals and inspection.ops["TokenReduce"] == 6
    model = onnx.load(called("tome"))
    del model.functions[:]
    from tokexport.export.graph import checks

    assert any("operator of domain 'tokexport'" in reason for reason in checks.model_refusals(model))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_typed_file_has_calls_that_take_tokens_in_its_type(dtype, called, golden, tmp_path):
    path = tmp_path / "typed.onnx"
    write_as(called("tome"), path, dtype)
    model, low = onnx.load(path), {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[dtype]
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    for node in call_nodes(path):
        assert {types.get(node.input[i], low) for i in (0, 1)} == {low}
        assert types.get(node.input[2], onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT
    assert len(call_nodes(path)) == 6 and inspect(path).provenance.precision == dtype
    calls.inline_file(path, tmp_path / "flat.onnx")
    if dtype == "fp16":  # ONNX Runtime has no bf16 on the CPU
        images = golden.image.numpy()
        np.testing.assert_array_equal(run(path, images)[0], run(tmp_path / "flat.onnx", images)[0])


def test_native_code_gets_the_outputs_that_are_read(called):
    model = onnx.load(called("tome"))
    native = calls.for_native(model)
    nodes = [n for n in native.graph.node if n.op_type == "TokenReduce"]
    assert not native.functions and [len(n.output) for n in nodes] == [3] * 5 + [1]
    values = {a.name: a.i for a in nodes[0].attribute}
    assert (values["sizes"], values["decisions"]) == (2, 0) and not any(n.startswith("table_") for n in values)
    native = calls.for_native(model, ("block2.dst",))
    assert [len(n.output) for n in native.graph.node if n.op_type == "TokenReduce"] == [3, 3, 6, 3, 3, 1]


def test_inlining_refuses_what_has_no_calls(exported, called, tmp_path):
    with pytest.raises(UsageError, match="has no TokenReduce nodes: it is a plain file already"):
        calls.inline_file(exported("tiny_vit"), tmp_path / "flat.onnx")
    with pytest.raises(UsageError, match="is one of the files that are read|exists"):
        calls.inline_file(called("tome"), called("tome"))
    assert not list(tmp_path.iterdir())


def test_bodies_that_differ_are_not_taken_for_one(called):
    model = onnx.load(called("tome"))
    schedule = inspect(called("tome")).provenance.schedule
    flat = calls.inline(model)
    next(n for n in flat.graph.node if n.name.startswith("block2.merge/Div")).op_type = "Mul"
    with pytest.raises(GraphError, match="2 different graphs"):
        calls.wrap(flat, {}, schedule, by_score=False)
    flat = calls.inline(model)
    next(n for n in flat.graph.node if "block3.x_out" in n.output).output[0] = "renamed"
    with pytest.raises(GraphError, match="has no value block3.x_out"):
        calls.wrap(flat, {}, schedule, by_score=False)


def test_wrapping_what_was_inlined_gives_the_calls_back(called):
    model = onnx.load(called("tome"))
    again, _ = calls.wrap(calls.inline(model), {}, inspect(called("tome")).provenance.schedule, by_score=False)
    assert Counter(n.op_type for n in again.graph.node) == Counter(n.op_type for n in model.graph.node)
    assert [n.op_type for n in again.functions[0].node] == [n.op_type for n in model.functions[0].node]


def test_a_method_without_a_node_is_written_as_it_is(tiny, tmp_path):
    loaded = tiny("tiny_vit")
    export_onnx(loaded, loaded.schedule("dynamicvit", at=(1, 3, 4)), tmp_path / "v.onnx", batch=1, plugin=True)
    assert not call_nodes(tmp_path / "v.onnx") and not onnx.load(tmp_path / "v.onnx").functions


def test_an_int8_file_keeps_its_calls(called, golden, tmp_path):
    from tokexport.tools.demo import samples

    from tokexport import quantize

    quantize(called("tome"), tmp_path / "int8.onnx", calibration=samples.sample_photos(), target="tensorrt")
    model, path = onnx.load(tmp_path / "int8.onnx"), tmp_path / "int8.onnx"
    assert len(call_nodes(path)) == 6 and len(model.functions) == 1 and inspect(path).provenance.precision == "int8"
    assert sum(n.op_type == "QuantizeLinear" for n in model.graph.node) >= 24
    calls.inline_file(path, tmp_path / "flat.onnx")
    images = golden.image.numpy()
    np.testing.assert_array_equal(run(path, images)[0], run(tmp_path / "flat.onnx", images)[0])
