"""Int8 files: linear layers quantised on photos, the rest in fp16 or on CPUs in float32, decisions in float32; refusals; an engine of one."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from tokexport.export.graph import stages
from tokexport.export.graph.precision import write_as
from tokexport.export.inspection import inspect
from tokexport.export.reducers import TABLE as METHODS
from tokexport.tools.demo import samples

from tokexport import UsageError, build_engine, export_onnx, quantize, verify

from ..cases import mostly_slow


@pytest.fixture(scope="module")
def quantised(exported, tmp_path_factory):
    """quantised(target, **what `exported` takes) -> the int8 file, made once."""
    files, folder = {}, tmp_path_factory.mktemp("int8")

    def make(target="tensorrt", **options):
        key = target, str(options)
        if key not in files:
            files[key] = folder / f"{len(files)}.onnx"
            quantize(exported("tiny_vit", **options), files[key], calibration=samples.sample_photos(), target=target)
        return files[key]

    return make


BY_METHOD = pytest.mark.parametrize("method", METHODS)


@BY_METHOD
def test_linear_layers_are_int8_and_decisions_float32(method, method_cases, quantised):
    _check_types(quantised(method=method, **method_cases[method]))


TARGETS = {"cpu": TensorProto.FLOAT, "tensorrt": TensorProto.FLOAT16}  # and the type of what is not int8


@pytest.mark.parametrize("batch", [1, 3])
def test_so_they_are_with_a_fixed_batch(batch, quantised):
    _check_types(quantised(batch=batch, method="tome", r=8))


@BY_METHOD
def test_so_they_are_for_cpus_with_biases_behind_them(method, method_cases, quantised):
    path = quantised("cpu", method=method, **method_cases[method])
    _check_types(path, "cpu")
    model = onnx.load(path)
    values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    reader = {i: n for n in model.graph.node for i in n.input}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and values.get(node.input[0], np.zeros(1)).ndim == 2:
            assert 60 < np.abs(values[node.input[0]].astype(int)).max() <= 64, (
                "two products of u8 and it fit in 16 bits"
            )
        if node.op_type == "Gemm" and stages.of_node(node.name).rpartition(".")[2] in ("attn", "mlp"):
            bias = next((values[i] for i in reader[node.output[0]].input if i in values), None)
            assert len(node.input) == 2 and reader[node.output[0]].op_type == "Add" and bias.any(), node.name
    onnx.checker.check_model(model, full_check=True)


def test_for_tensorrt_biases_stay_inside(quantised):
    model = onnx.load(quantised(method="tome", r=8))
    shapes = {i.name: list(i.dims) for i in model.graph.initializer}
    biases = [n.input[2] for n in model.graph.node if n.op_type == "Gemm" and len(n.input) == 3]
    assert len(biases) >= 4 * 6 and {shapes[b][0] for b in biases} == {1}


@BY_METHOD
def test_onnxruntime_multiplies_in_int8(method, method_cases, quantised, tmp_path):
    """All four products of every block, with trained biases; the same file for TensorRT runs in floats there."""
    options = {"method": method, **method_cases[method]}
    assert _products(quantised("cpu", **options), tmp_path) == (4 * 6, [])
    int8, floats = _products(quantised("tensorrt", **options), tmp_path)
    assert int8 == 0 and len(floats) == 4 * 6


def _products(path, folder):
    """Products of attention and MLP in ONNX Runtime's optimised graph: how many in int8, and the names of those in floats."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level, settings.optimized_model_filepath = 3, str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "optimised.onnx").graph
    weights = {i.name for i in graph.initializer}
    weights |= {o for n in graph.node if set(n.input) & weights and n.op_type == "DequantizeLinear" for o in n.output}
    weights |= {o for n in graph.node if set(n.input) & weights and n.op_type == "Cast" for o in n.output}
    products = [n for n in graph.node if stages.of_node(n.name).rpartition(".")[2] in ("attn", "mlp", "")]
    floats = [
        n.name
        for n in products
        if n.op_type in ("Gemm", "FusedGemm", "MatMul", "FusedMatMul")
        and n.input[1] in weights
        and "head" not in n.name
    ]
    return sum(
        n.op_type in ("QGemm", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul") for n in graph.node
    ), floats


def test_openvino_multiplies_in_int8(quantised):
    ov = pytest.importorskip("openvino", reason="openvino is not installed")
    path, kinds = quantised("cpu", method="tome", r=8), Counter()
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        if info["layerType"].astype(str) == "FullyConnected":
            kinds[info["runtimePrecision"].astype(str)] += 1
    assert kinds["i8"] + kinds["u8"] == 4 * 6, kinds


def test_one_form_does_not_go_where_the_other_is_wanted(exported, quantised, tmp_path):
    plain, photos, path = exported("tiny_vit", method="tome", r=8), samples.sample_photos(), tmp_path / "a.onnx"
    with pytest.raises(UsageError, match="int8 for CPUs.*needs the int8 file for tensorrt"):
        build_engine(quantised("cpu", method="tome", r=8), tmp_path / "a.plan", builder="rtx", capabilities=("86",))
    with pytest.raises(UsageError, match="target portable: wanted cpu or tensorrt"):
        quantize(plain, path, calibration=photos, target="portable")
    write_as(plain, tmp_path / "typed.onnx", "fp32", target="tensorrt")
    with pytest.raises(UsageError, match="is for tensorrt: wanted a portable file, or one for cpu"):
        quantize(tmp_path / "typed.onnx", path, calibration=photos, target="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["typed.onnx"]


def _check_types(path, target="tensorrt"):
    model, found = onnx.load(path), inspect(path)
    p = found.provenance
    assert (p.precision, p.target, p.calibration) == ("int8", target, 2)
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
        kinds[made[n.input[1]].input[0]] == TensorProto.INT8 and types[n.output[0]] == TARGETS[target] for n in linear
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


@pytest.mark.parametrize("target, runtime", [("cpu", "ort"), ("cpu", "openvino"), ("tensorrt", "ort")])
@BY_METHOD
def test_it_passes_its_own_tolerance_and_not_that_of_fp16(target, runtime, method, method_cases, quantised):
    """Not with eight-bit weights in OpenVINO, where sums saturate on processors without VNNI."""
    report = verify(quantised(target, method=method, **method_cases[method]), samples.sample_photos(), runtime=runtime)
    assert report.passed and report.precision == "int8" and report.outputs[0].max_rel > 8e-3, report.summary()


@pytest.fixture(scope="module")
def pixels(tiny, schedule_of, tmp_path_factory):
    """pixels(target) -> an int8 file that takes uint8 images, and its twin that takes normalised ones, made once."""
    files, folder, loaded = {}, tmp_path_factory.mktemp("pixels"), tiny("tiny_vit")

    def make(target):
        for form in ("uint8", "float32") if target not in files else ():
            plain, path = folder / f"{form}.onnx", folder / f"{form}_{target}.onnx"
            export_onnx(loaded, schedule_of(loaded.module, 8), plain, batch=1, input=form, force=True)
            quantize(plain, path, calibration=samples.sample_photos(), target=target)
            files.setdefault(target, []).append(path)
        return files[target]

    return make


@pytest.mark.parametrize("target, runtime", [("cpu", "ort"), ("cpu", "openvino"), ("tensorrt", "ort")])
def test_one_that_takes_pixels_passes_its_own_tolerance(target, runtime, pixels):
    path, _ = pixels(target)
    provenance = inspect(path).provenance
    assert (provenance.input, provenance.precision, provenance.calibration) == ("uint8-nhwc", "int8", 2)
    report = verify(path, samples.sample_photos(), runtime=runtime)
    assert report.passed and report.precision == "int8", report.summary()


@pytest.mark.parametrize("target", TARGETS)
def test_pixels_calibrate_to_the_scales_of_normalised_images(target, pixels):
    """So the quantizer was fed what the file takes; that it is one way or the other is no matter of the scales."""
    scales = []
    for path in pixels(target):
        initializers = onnx.load(path).graph.initializer
        scales.append([onnx.numpy_helper.to_array(i) for i in initializers if "_scale" in i.name])
    ours, theirs = (np.sort(np.concatenate([v.astype(np.float64).ravel() for v in side])) for side in scales)
    assert ours.shape == theirs.shape and len(ours) > 24
    assert np.abs(ours / theirs - 1).max() < 5e-3


def test_a_wrong_scale_is_found(quantised, tmp_path):
    model = onnx.load(quantised(method="tome", r=8))
    scales = [i for i in model.graph.initializer if i.name.startswith("blocks.3") and "_scale" in i.name]
    for scale in scales:
        scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float16(4), scale.name))
    onnx.save(model, tmp_path / "planted.onnx")
    assert len(scales) >= 4 and not verify(tmp_path / "planted.onnx", samples.sample_photos()).passed


@pytest.mark.parametrize("method", mostly_slow(METHODS, "tome"))
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
        quantize(quantised(method="tome", r=8), tmp_path / "a.onnx", calibration=photos, target="cpu")
    with pytest.raises(UsageError, match="no such file or folder"):
        quantize(plain, tmp_path / "a.onnx", calibration=[tmp_path / "none"], target="cpu")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UsageError, match="cannot be read as an image"):
        quantize(plain, tmp_path / "a.onnx", calibration=[tmp_path / "text.png"], target="cpu")
    with pytest.raises(UsageError, match="files that are read"):
        quantize(plain, plain, calibration=photos, target="cpu", force=True)
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


@pytest.mark.parametrize("target", TARGETS)
def test_the_exporter_makes_one_at_once(target, tiny, schedule_of, quantised, tmp_path):
    loaded, photos = tiny("tiny_vit"), samples.sample_photos()
    schedule = schedule_of(loaded.module, 8)
    result = export_onnx(
        loaded, schedule, tmp_path / "v.onnx", dtype="int8", target=target, calibration=photos, sources=True
    )
    inspection = inspect(tmp_path / "v.onnx")
    assert (
        result.provenance == inspection.provenance and result.size == inspection.size and result.path == inspection.path
    )
    assert (
        inspection.ops == inspect(quantised(target, method="tome", r=8)).ops and inspection.provenance.calibration == 2
    )
    for dtype, calibration, words in (("int8", (), "wanted calib too"), ("fp16", photos, "leave calib out")):
        with pytest.raises(UsageError, match=words):
            export_onnx(loaded, schedule, tmp_path / "w.onnx", dtype=dtype, target=target, calibration=calibration)
    with pytest.raises(UsageError, match="int8 for portable: wanted for cpu or for tensorrt .target.: no one form"):
        export_onnx(loaded, schedule, tmp_path / "w.onnx", dtype="int8", calibration=photos)
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
        "--for",
        "cpu",
        "-o",
        str(tmp_path / "v.onnx"),
    ]
    for kwarg in ("img_size=64", "patch_size=8", "embed_dim=64", "num_heads=2", "depth=10"):
        args += ["--model-kwargs", kwarg]
    with pytest.raises(UsageError, match="wanted calib too"):
        CliRunner().invoke(group, args, catch_exceptions=False)
    out = CliRunner().invoke(group, [*args, "--calib", str(samples.sample_photos()[0].parent)])
    assert out.exit_code == 0 and "int8, for cpu" in out.stderr and [p.name for p in tmp_path.iterdir()] == ["v.onnx"]
    assert inspect(tmp_path / "v.onnx").provenance.target == "cpu"
    with pytest.raises(UsageError, match="leave calib out"):
        CliRunner().invoke(group, [*args, "--calib", "x", "--dtype", "fp16", "--force"], catch_exceptions=False)
