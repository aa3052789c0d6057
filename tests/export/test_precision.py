"""Typed files: the trunk in fp16 or bf16, decisions and sizes in float32, few casts, and the same results."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from tokexport.export.errors import EngineError
from tokexport.export.graph import precision, stages
from tokexport.export.inspection import inspect
from tokexport.export.reducers import TABLE as METHODS
from tokexport.tools.demo import samples

from tokexport import UsageError, export_onnx, verify

from ..cases import mostly_slow

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
CASTS = 6  # most casts in a block with a reduction: metric or score, size, tokens in, tokens out, ...


def types_of(model):
    found = {
        v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    return {**found, **{i.name: i.data_type for i in model.graph.initializer}}


def wrong_types(model, low):
    """Nodes whose floats are not what their stage asks for; casts are the borders."""
    types, wrong = types_of(model), []
    for node in model.graph.node:
        wanted = TensorProto.FLOAT if stages.in_fp32(node.name) else low
        floats = {types[n] for n in (*node.input, *node.output) if types.get(n) in (TensorProto.FLOAT, low)}
        if node.op_type != "Cast" and floats - {wanted}:
            wrong.append(node.name)
    return wrong


@pytest.mark.parametrize("batch", mostly_slow([1, None], None))
@pytest.mark.parametrize("dtype", LOW)
def test_every_stage_has_its_type(dtype, batch, options, typed):
    model = onnx.load(typed(dtype, batch, **options))
    assert (
        wrong_types(model, LOW[dtype]) == [] and inspect(typed(dtype, batch, **options)).provenance.precision == dtype
    )
    assert all(
        v.type.tensor_type.elem_type in (TensorProto.FLOAT, TensorProto.INT64)
        for v in (*model.graph.input, *model.graph.output)
    )
    parts = {stages.of_node(n.name).rpartition(".")[2] for n in model.graph.node}
    assert {"embed", "attn", "mlp", "head"} <= parts and ("match" in parts) == (options["method"] != "none")
    if dtype == "fp16":
        onnx.checker.check_model(model, full_check=True)


def test_a_wrong_type_is_seen(typed):
    model = onnx.load(typed("fp16", 1, method="tome", r=8))
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    softmax.name = "block0.match/Softmax"
    assert wrong_types(model, TensorProto.FLOAT16) == ["block0.match/Softmax"]


def test_casts_are_few_and_none_is_undone(options, typed):
    model = onnx.load(typed("fp16", **options))
    plain = onnx.load(typed("fp32", **options))
    casts = [n for n in model.graph.node if n.op_type == "Cast"]
    made = {o: n for n in casts for o in n.output}
    assert not [n.name for n in casts if n.input[0] in made], "a cast of a cast"
    assert len({(n.input[0], n.attribute[0].i) for n in casts}) == len(casts), "one value cast twice"
    steps = len(inspect(typed("fp16", **options)).provenance.schedule.steps)
    beside = 2 if steps else 4  # the map of tokens of a dense file is made of its tokens
    assert len(model.graph.node) - len(plain.graph.node) <= beside + CASTS * steps


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_fp16_passes_its_own_tolerance_and_not_that_of_float32(runtime, options, typed, run_onnx, golden, relative):
    path = typed("fp16", **options)
    report = verify(path, runtime=runtime)
    assert report.passed and report.precision == "fp16", report.summary()
    assert report.outputs[0].max_rel > 1e-5, "rounding is to be seen"


@pytest.mark.fast_methods("none", "tome", "diffrate", "pitome")
def test_bf16_runs_in_openvino_and_is_refused_by_onnxruntime(options, typed):
    report = verify(typed("bf16", **options), runtime="openvino")
    assert report.passed and report.outputs[0].max_rel > 1e-4, report.summary()
    with pytest.raises(UsageError, match="no bf16 operators"):
        verify(typed("bf16", **options), runtime="ort")


def _planted(path, tmp_path, change):
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, tmp_path / "planted.onnx")
    return verify(tmp_path / "planted.onnx")


def test_a_fault_in_fp16_is_still_found(typed, tmp_path):
    path = typed("fp16", method="tome", r=8)

    def transposed(graph):
        weight = next(i for i in graph.initializer if i.name.startswith("blocks.3.proj.weight"))
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).T.copy(), weight.name))

    def unbarred(graph):
        """The bar that keeps B rows from merging, lifted."""
        for i in graph.initializer:
            if (
                i.data_type == TensorProto.FLOAT
                and i.name.startswith("floats")
                and (onnx.numpy_helper.to_array(i) == -8).any()
            ):
                i.CopyFrom(onnx.numpy_helper.from_array(np.zeros_like(onnx.numpy_helper.to_array(i)), i.name))

    assert verify(path).passed
    assert not _planted(path, tmp_path, transposed).passed
    try:  # rows that are not there: one runtime refuses to fetch them, another gives what lies in memory
        report = _planted(path, tmp_path, unbarred)
    except (EngineError, UsageError) as e:
        assert "ONNX Runtime failed" in str(e)
    else:
        assert not report.passed and "no plan" in report.summary()


def test_an_overflow_is_found(typed, tmp_path):
    """Values that fp16 cannot hold make infinities, which verify tells."""
    path = tmp_path / "big.onnx"
    model = onnx.load(typed("fp16", method="tome", r=8))
    weight = next(i for i in model.graph.initializer if i.name.startswith("blocks.3.mlp.fc1.weight"))
    weight.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float16(60000 / 8), weight.name)
    )
    onnx.save(model, path)
    assert not verify(path).passed


def _parts(path):
    """A file as `precision.convert` takes it."""
    import onnx_ir

    model = onnx.load(path)
    large = [i for i in model.graph.initializer if len(i.raw_data) > 4096]
    weights = {i.name: onnx_ir.serde.deserialize_tensor(i) for i in large}
    for i in large:
        model.graph.initializer.remove(i)
    return model, weights


def test_what_cannot_be_converted_is_said(typed):
    import onnx_ir

    model, weights = _parts(typed("fp32", method="tome", r=8))
    assert precision.convert(model, weights, "fp32") == (model, weights)
    again = precision.convert(model, weights, "fp16")
    with pytest.raises(UsageError, match="already"):
        precision.convert(*again, "bf16")
    with pytest.raises(UsageError, match="more than fp16 can hold"):
        precision.convert(
            model, {**weights, "patch.weight": onnx_ir.tensor(weights["patch.weight"].numpy() * 1e7)}, "fp16"
        )
    model.graph.node[0].name = "Conv_0"
    with pytest.raises(UsageError, match="make the file again"):
        precision.convert(model, weights, "fp16")


def test_an_export_in_a_precision_is_the_file_that_is_converted(tiny, schedule_of, typed, tmp_path):
    loaded = tiny("tiny_vit")
    export_onnx(loaded, schedule_of(loaded.module, 8), tmp_path / "h.onnx", sources=True, dtype="fp16")
    (one, first), (two, second) = _parts(tmp_path / "h.onnx"), _parts(typed("fp16", method="tome", r=8))
    assert [n.SerializeToString() for n in one.graph.node] == [n.SerializeToString() for n in two.graph.node]
    assert first.keys() == second.keys() and all((first[k].numpy() == second[k].numpy()).all() for k in first)
    assert inspect(tmp_path / "h.onnx").provenance == inspect(typed("fp16", method="tome", r=8)).provenance


def test_the_command_writes_what_the_function_writes(tmp_path, typed):
    from click.testing import CliRunner
    from tokexport.tools.cli import group

    out = tmp_path / "v.onnx"
    args = ["onnx", "--model", "vit_tiny_patch16_224", "--method", "evit", "--dtype", "bf16", "-o", str(out)]
    for kwarg in ("img_size=64", "patch_size=8", "embed_dim=64", "num_heads=2", "depth=10"):
        args += ["--model-kwargs", kwarg]
    assert CliRunner().invoke(group, args).exit_code == 0
    assert inspect(out).provenance.precision == "bf16"
    assert CliRunner().invoke(group, [*args, "--dtype", "fp8", "--force"]).exit_code == 2


def matmul_flops(model, low):
    """Multiply-accumulates of matrix products: in the low type, in all."""
    shapes = {
        v.name: [d.dim_value or 1 for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    shapes |= {i.name: list(i.dims) for i in model.graph.initializer}
    types, total = types_of(model), {True: 0, False: 0}
    for node in model.graph.node:
        if node.op_type in ("Gemm", "MatMul"):
            inner = shapes[node.input[0]][0 if any(a.name == "transA" and a.i for a in node.attribute) else -1]
            total[types[node.input[0]] == low] += int(np.prod(shapes[node.output[0]])) * inner
    return total[True], sum(total.values())


@pytest.mark.parametrize("method", mostly_slow([m for m in METHODS if m != "none"], "tome"))
def test_deit_small_in_fp16_is_mostly_fp16_and_hardly_larger(method, deit, tmp_path):
    precision.write_as(deit(method, 1), tmp_path / "fp16.onnx", "fp16")
    low, total = matmul_flops(onnx.load(tmp_path / "fp16.onnx"), TensorProto.FLOAT16)
    assert low >= 0.9 * total > 0
    layers = parsed_layers(deit(method, 1))
    assert layers < parsed_layers(tmp_path / "fp16.onnx") <= 1.15 * layers


def parsed_layers(path):
    trt = pytest.importorskip(
        "tensorrt_rtx", reason="tensorrt_rtx is not installed: layers of the parsed network need it (no GPU)"
    )
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, builder.logger)
    form = path.with_suffix(".tensorrt.onnx")
    precision.write_as(path, form, inspect(path).provenance.precision, target="tensorrt")
    assert parser.parse_from_file(str(form))
    return network.num_layers


@pytest.mark.parametrize("method", mostly_slow(["tome", "evit", "dtps", "diffrate"], "tome"))
def test_dinov2_on_real_photos_agrees_in_fp16(method, dinov2, dinov2_how, tmp_path):
    precision.write_as(dinov2(method, **dinov2_how[method]), tmp_path / "d.onnx", "fp16")
    report = verify(tmp_path / "d.onnx", samples.sample_photos())
    assert report.passed and report.outputs[0].cosine >= 0.9995, report.summary()


def test_a_new_precision_is_one_row(tiny, schedule_of, tmp_path, monkeypatch):
    """A toy precision is exported, verified and built into an engine, in this process, with no other change."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: building an engine needs it (no GPU)")
    from dataclasses import replace

    from tokexport.engines.tensorrt import build, child
    from tokexport.export import precisions

    from tokexport import build_engine

    row = replace(precisions.TABLE["fp16"], name="fp16-loose", output_limit=1e-1, help="fp16 with looser limits")
    monkeypatch.setitem(precisions.TABLE, row.name, row)
    loaded, path = tiny("tiny_vit"), tmp_path / "v.onnx"
    export_onnx(loaded, schedule_of(loaded.module, 8), path, batch=1, dtype=row.name)
    assert inspect(path).provenance.precision == row.name
    assert wrong_types(onnx.load(path), TensorProto.FLOAT16) == []
    report = verify(path)
    assert report.passed and report.precision == row.name and report.outputs[0].max_rel > 1e-5
    monkeypatch.setattr(build, "run_child", lambda task, progress: (child.build(task, lambda **message: None), ()))
    engine = build_engine(path, builder="rtx", capabilities=("86",)).engine
    assert engine.precision == row.name and engine.layers["CONVOLUTION"] == {"HALF": 1}
    monkeypatch.delitem(precisions.TABLE, row.name)
    with pytest.raises(UsageError, match="precision 'fp16-loose'"):
        inspect(path)


def test_a_value_that_callers_and_float32_stages_read_is_cast_once(typed):
    """An output of the trunk that a float32 stage reads too is read where it is float32 already."""
    plain = typed("fp32", 1, method="tome", r=8)
    model = onnx.load(plain)
    name = next(
        n for n in model.graph.node if n.op_type == "LayerNormalization" and n.name.startswith("block3")
    ).output[0]
    shape = next(v for v in model.graph.value_info if v.name == name)
    model.graph.output.append(shape)
    reader = onnx.helper.make_node("Identity", [name], ["again"], name="block3.match/Identity")
    index = next(i for i, n in enumerate(model.graph.node) if name in n.output)
    model.graph.node.insert(index + 1, reader)
    converted, weights = precision.convert(model, {}, "fp16")
    casts = [n for n in converted.graph.node if n.op_type == "Cast" and name in (*n.input, *n.output)]
    assert len(casts) == 1 and list(casts[0].output) == [name] and wrong_types(converted, TensorProto.FLOAT16) == []
    assert next(n for n in converted.graph.node if n.name == reader.name).input[0] == name
    onnx.checker.check_model(converted, full_check=True)
