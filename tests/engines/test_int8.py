"""Int8 files: linear layers quantised on photos, the rest in fp16, decisions in float32; refusals; an engine of one."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from tokexport.engines.measure.environment import processor
from tokexport.export.graph import stages
from tokexport.export.inspection import inspect
from tokexport.export.reducers import TABLE as METHODS
from tokexport.tools.demo import samples

from tokexport import UsageError, build_engine, export_onnx, quantize, verify


@pytest.fixture(scope="module")
def quantised(exported, tmp_path_factory):
    """quantised(**what `exported` takes) -> the int8 file, made once."""
    made, folder = {}, tmp_path_factory.mktemp("int8")

    def make(**options):
        if str(options) not in made:
            made[str(options)] = folder / f"{len(made)}.onnx"
            quantize(exported("tiny_vit", **options), made[str(options)], calibration=samples.sample_photos())
        return made[str(options)]

    return make


BY_METHOD = pytest.mark.parametrize("method", METHODS)


@BY_METHOD
def test_linear_layers_are_int8_and_decisions_float32(method, method_cases, quantised):
    _check_types(quantised(method=method, **method_cases[method]))


@pytest.mark.parametrize("batch", [1, 3])
def test_so_they_are_with_a_fixed_batch(batch, quantised):
    _check_types(quantised(batch=batch, method="tome", r=8))


def _check_types(path):
    model, found = onnx.load(path), inspect(path)
    assert found.provenance.precision == "int8" and found.provenance.calibration == 2
    kinds = {v.name: v.data_type for v in model.graph.initializer}
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    made = {o: n for n in model.graph.node for o in n.output}
    linear = [
        n
        for n in model.graph.node
        if n.op_type == "Gemm" and all(made.get(i) and made[i].op_type == "DequantizeLinear" for i in n.input[:2])
    ]
    assert len(linear) == 4 * 6 and {stages.of_node(n.name).rpartition(".")[2] for n in linear} == {"attn", "mlp"}
    assert all(
        kinds[made[n.input[1]].input[0]] == TensorProto.INT8 and types[n.output[0]] == TensorProto.FLOAT16
        for n in linear
    )
    zeros = [onnx.numpy_helper.to_array(i) for i in model.graph.initializer if i.name.endswith("_zero_point")]
    assert zeros and not any(z.any() for z in zeros), "TensorRT takes symmetric scales only"
    for node in model.graph.node:
        if stages.in_fp32(node.name) and node.op_type != "Cast":
            assert {types[o] for o in node.output if o in types} <= {
                TensorProto.FLOAT,
                TensorProto.INT64,
                TensorProto.BOOL,
            }, node.name


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
@BY_METHOD
def test_it_passes_its_own_tolerance_and_not_that_of_fp16(runtime, method, method_cases, quantised):
    if runtime == "openvino" and not any("vnni" in name for name in processor().instructions):
        pytest.skip("OpenVINO's int8 products saturate on a processor without VNNI, which this one is")
    report = verify(quantised(method=method, **method_cases[method]), samples.sample_photos(), runtime=runtime)
    assert report.passed and report.precision == "int8" and report.outputs[0].max_rel > 8e-3, report.summary()


def test_a_wrong_scale_is_found(quantised, tmp_path):
    model = onnx.load(quantised(method="tome", r=8))
    scales = [i for i in model.graph.initializer if i.name.startswith("blocks.3") and "_scale" in i.name]
    for scale in scales:
        scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float16(4), scale.name))
    onnx.save(model, tmp_path / "planted.onnx")
    assert len(scales) >= 4 and not verify(tmp_path / "planted.onnx", samples.sample_photos()).passed


@BY_METHOD
def test_an_engine_is_built_of_it(method, quantised, method_cases, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: engine builds need it (no GPU)")
    engine = build_engine(
        quantised(method=method, **method_cases[method]), tmp_path / "v.plan", builder="rtx", capabilities=("86",)
    ).engine
    assert (
        engine.precision == "int8"
        and engine.layers["MATRIX_MULTIPLY"]["INT8"] == 24
        and engine.layers["CONVOLUTION"] == {"HALF": 1}
    )


def test_other_images_are_another_engine(exported, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: engine builds need it (no GPU)")
    ask = {"output": tmp_path / "v.plan", "precision": "int8", "builder": "rtx", "capabilities": ("86",)}
    first, again = (
        build_engine(exported("tiny_vit", method="evit", at=(1, 3, 4)), **ask, calibration=samples.sample_photos())
        for _ in range(2)
    )
    assert first.engine.precision == "int8" and not first.cached and again.cached
    with pytest.raises(UsageError, match="exists"):
        build_engine(exported("tiny_vit", method="evit", at=(1, 3, 4)), **ask, calibration=samples.sample_photos()[:1])


def test_what_cannot_be_quantised_is_said_and_nothing_is_written(exported, quantised, tmp_path):
    plain, photos = exported("tiny_vit", method="tome", r=8), samples.sample_photos()
    with pytest.raises(UsageError, match="int8 already"):
        quantize(quantised(method="tome", r=8), tmp_path / "a.onnx", calibration=photos)
    with pytest.raises(UsageError, match="no such file or folder"):
        quantize(plain, tmp_path / "a.onnx", calibration=[tmp_path / "none"])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UsageError, match="cannot be read as an image"):
        quantize(plain, tmp_path / "a.onnx", calibration=[tmp_path / "text.png"])
    with pytest.raises(UsageError, match="files that are read"):
        quantize(plain, plain, calibration=photos, force=True)
    for precision, calibration, words in (("int8", [], "needs calib"), ("fp16", photos, "calib goes with int8")):
        with pytest.raises(UsageError, match=words):
            build_engine(
                plain,
                tmp_path / "a.plan",
                precision=precision,
                builder="rtx",
                capabilities=("86",),
                calibration=calibration,
            )
    assert [p.name for p in tmp_path.iterdir()] == ["text.png"]


def test_the_exporter_makes_one_at_once(tiny, schedule_of, quantised, tmp_path):
    loaded, photos = tiny("tiny_vit"), samples.sample_photos()
    schedule = schedule_of(loaded.module, 8)
    result = export_onnx(loaded, schedule, tmp_path / "v.onnx", dtype="int8", calibration=photos, sources=True)
    inspection = inspect(tmp_path / "v.onnx")
    assert (
        result.provenance == inspection.provenance and result.size == inspection.size and result.path == inspection.path
    )
    assert inspection.ops == inspect(quantised(method="tome", r=8)).ops and inspection.provenance.calibration == 2
    for dtype, calibration, words in (("int8", (), "wanted calib too"), ("fp16", photos, "leave calib out")):
        with pytest.raises(UsageError, match=words):
            export_onnx(loaded, schedule, tmp_path / "w.onnx", dtype=dtype, calibration=calibration)
    assert [p.name for p in tmp_path.iterdir()] == ["v.onnx"]


def test_the_command_makes_one(tmp_path):
    from click.testing import CliRunner
    from tokexport.tools.cli import group

    args = [
        "onnx",
        "--model",
        "vit_tiny_patch16_224",
        "--method",
        "evit",
        "--dtype",
        "int8",
        "-o",
        str(tmp_path / "v.onnx"),
    ]
    for kwarg in ("img_size=64", "patch_size=8", "embed_dim=64", "num_heads=2", "depth=10"):
        args += ["--model-kwargs", kwarg]
    with pytest.raises(UsageError, match="wanted calib too"):
        CliRunner().invoke(group, args, catch_exceptions=False)
    out = CliRunner().invoke(group, [*args, "--calib", str(samples.sample_photos()[0].parent)])
    assert out.exit_code == 0 and "int8" in out.stderr and [p.name for p in tmp_path.iterdir()] == ["v.onnx"]
    assert inspect(tmp_path / "v.onnx").provenance.calibration == 2
    with pytest.raises(UsageError, match="leave calib out"):
        CliRunner().invoke(group, [*args, "--calib", "x", "--dtype", "fp16", "--force"], catch_exceptions=False)
