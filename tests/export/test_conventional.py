"""Portable files are conventional ONNX: other tools take them. What TensorRT likes better is in files for TensorRT alone."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from tokexport.export.graph import checks, stages
from tokexport.export.graph.conventional import lower_opset
from tokexport.export.graph.for_tensorrt import PARAMETERS
from tokexport.export.graph.precision import write_as
from tokexport.export.inspection import inspect
from tokexport.export.plan import Signals
from tokexport.export.provenance import TARGETS
from tokexport.export.reducers import matching, tome
from tokexport.export.step import Step

from tokexport import UsageError, export_onnx

from ..cases import mostly_slow


def _parameter_shapes(model) -> set[int]:
    """How many axes biases of linear layers and parameters of LayerNormalization have; a step adds columns and rows of its own."""
    ranks = {i.name: len(i.dims) for i in model.graph.initializer}
    return {
        ranks[n.input[i]]
        for n in model.graph.node
        for i in PARAMETERS.get(n.op_type, ())
        if len(n.input) > i and n.input[i] in ranks and not stages.in_fp32(n.name)
    }


def _without_shape(model) -> list[str]:
    """Values that a node makes and of which the file does not say type and shape."""
    known = {v.name for v in (*model.graph.value_info, *model.graph.output) if v.type.tensor_type.HasField("shape")}
    return [o for n in model.graph.node for o in n.output if o and o not in known]


@pytest.mark.fast_methods("none", "tome", "diffrate", "pitome", "evit")
def test_a_portable_file_is_conventional(options, exported, batch=None):
    model = onnx.load(exported("tiny_vit", batch=batch, **options))
    assert _parameter_shapes(model) == {1} and _without_shape(model) == [] and model.ir_version == 9
    assert inspect(exported("tiny_vit", batch=batch, **options)).provenance.target == "portable"
    onnx.checker.check_model(model, full_check=True)


@pytest.fixture(scope="module")
def prepared(exported, tmp_path_factory):
    """prepared(batch, options) -> the file as ONNX Runtime's own preparation for quantising leaves it, made once."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    files, folder = {}, tmp_path_factory.mktemp("prepared")

    def prepare(batch, options):
        key = batch, str(options)
        if key not in files:
            files[key] = folder / f"{len(files)}.onnx"
            # Its symbolic part does not read the batch_dims of GatherND (1.32): a file for more images has all its shapes without it.
            quant_pre_process(exported("tiny_vit", batch=batch, **options), files[key], skip_symbolic_shape=batch != 1)
        return files[key]

    return prepare


@pytest.mark.fast_methods("none", "tome", "diffrate", "pitome", "evit")
def test_symbolic_shape_inference_takes_it(options, exported):
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    model = onnx.load(exported("tiny_vit", batch=1, **options))
    inferred = SymbolicShapeInference.infer_shapes(model, auto_merge=False, guess_output_rank=False)
    assert _without_shape(inferred) == []


@pytest.mark.fast_methods("none", "tome")
@pytest.mark.parametrize("batch", [1, None])
def test_preparation_for_quantising_and_the_converter_to_fp16_take_it(
    batch, options, exported, prepared, run_onnx, golden, relative, tmp_path
):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path, image = exported("tiny_vit", batch=batch, **options), golden.image[1:2].numpy()
    wanted = run_onnx(path, image)
    got = _run(prepared(batch, options), image)
    assert relative(got["logits"], wanted["logits"]) <= 1e-4 and (got["sources"] == wanted["sources"]).all()
    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), tmp_path / "half.onnx")
    assert _cosine(_run(tmp_path / "half.onnx", image)["logits"], wanted["logits"]) > 0.5  # its matching is in fp16 too


@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_quantizer_of_onnxruntime_takes_it(per_channel, options, exported, prepared, run_onnx, golden, tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    images = iter([{"image": golden.image[i : i + 1].numpy()} for i in (0, 1)])

    class Reader(CalibrationDataReader):
        def get_next(self):
            return next(images, None)

    quantize_static(prepared(1, options), tmp_path / "q.onnx", Reader(), per_channel=per_channel)
    assert sum(n.op_type == "DequantizeLinear" for n in onnx.load(tmp_path / "q.onnx").graph.node) > 24
    image = golden.image[1:2].numpy()
    wanted = run_onnx(exported("tiny_vit", batch=1, **options), image)
    assert _cosine(_run(tmp_path / "q.onnx", image)["logits"], wanted["logits"]) > 0.5  # it quantises the matching too


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, None])
def test_onnxslim_takes_it(batch, options, exported, run_onnx, golden, relative, tmp_path):
    import onnxslim

    path, image = exported("tiny_vit", batch=batch, **options), golden.image[1:2].numpy()
    onnx.save(onnxslim.slim(str(path)), tmp_path / "slim.onnx")
    got, wanted = _run(tmp_path / "slim.onnx", image), run_onnx(path, image)
    assert relative(got["logits"], wanted["logits"]) <= 1e-4 and (got["sources"] == wanted["sources"]).all()


def _cosine(got, wanted) -> float:
    return float(np.vdot(got, wanted) / (np.linalg.norm(got) * np.linalg.norm(wanted)))


def _run(path, image) -> dict:
    """Outputs by name of a file that another tool wrote."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": image})))


def test_the_reference_implementation_of_onnx_gives_its_numbers(options, exported, run_onnx, golden, relative):
    from onnx.reference import ReferenceEvaluator

    path, image = exported("tiny_vit", batch=1, **options), golden.image[1:2].numpy()
    names = [o.name for o in onnx.load(path).graph.output]
    values = dict(zip(names, ReferenceEvaluator(str(path)).run(None, {"image": image})))
    wanted = run_onnx(path, image)
    assert relative(values["logits"], wanted["logits"]) <= 1e-4 and (values["sources"] == wanted["sources"]).all()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_file_for_tensorrt_has_its_parameters_as_rows(dtype, exported, tmp_path, run_onnx, golden):
    plain = exported("tiny_vit", method="tome", r=8)
    write_as(plain, tmp_path / "portable.onnx", dtype)
    write_as(plain, tmp_path / "rows.onnx", dtype, target="tensorrt")
    portable, rows = (onnx.load(tmp_path / f"{name}.onnx") for name in ("portable", "rows"))
    assert _parameter_shapes(rows) == {2} and inspect(tmp_path / "rows.onnx").provenance.target == "tensorrt"
    assert [n.name for n in rows.graph.node] == [n.name for n in portable.graph.node]
    values = {i.name: numpy_helper.to_array(i) for i in portable.graph.initializer}
    assert all(
        (np.squeeze(numpy_helper.to_array(i)) == np.squeeze(values[i.name])).all() for i in rows.graph.initializer
    )
    logits = [run_onnx(tmp_path / f"{name}.onnx", golden.image)["logits"] for name in ("portable", "rows")]
    assert (logits[0] == logits[1]).all()


@pytest.mark.parametrize("target", TARGETS)
def test_the_exporter_writes_for_a_target(target, tiny, schedule_of, tmp_path):
    loaded = tiny("tiny_vit")
    result = export_onnx(loaded, schedule_of(loaded.module, 8), tmp_path / "v.onnx", target=target)
    written = inspect(tmp_path / "v.onnx").provenance
    assert written.to_json() == result.provenance.to_json() and written.target == target
    assert _parameter_shapes(onnx.load(tmp_path / "v.onnx")) == {2 if target == "tensorrt" else 1}


def test_an_unknown_target_is_refused(tiny, schedule_of, tmp_path):
    loaded = tiny("tiny_vit")
    with pytest.raises(UsageError, match="target phone: wanted one of portable, cpu, tensorrt"):
        export_onnx(loaded, schedule_of(loaded.module, 8), tmp_path / "v.onnx", target="phone")
    assert not any(tmp_path.iterdir())


def test_the_limit_of_a_sort_binds_files_for_tensorrt_only(exported, tiny, schedule_of):
    model, schedule = onnx.load(exported("tiny_vit", 8, 1)), schedule_of(tiny("tiny_vit").module, 8)
    sort = next(n for n in model.graph.node if n.op_type == "TopK")
    k = next(i for i in model.graph.initializer if i.name == sort.input[1])
    k.CopyFrom(numpy_helper.from_array(np.array([4000]), k.name))
    for target in ("portable", "cpu"):
        checks.check_graph(model, schedule, target=target)
    with pytest.raises(UsageError, match="sorts 4000 tokens, more than TensorRT"):
        checks.check_graph(model, schedule, target="tensorrt")
    assert any("k = 4000" in reason for reason in checks.refusals(model.graph))


@pytest.mark.fast_methods("none", "tome")
@pytest.mark.parametrize("opset, ir_version", [(17, 8), (18, 8), (19, 9)])
def test_older_operator_sets_give_the_same_numbers(
    opset, ir_version, options, tiny, schedule_of, exported, run_onnx, golden, relative, tmp_path
):
    loaded, image, batch = tiny("tiny_vit"), golden.image[1:2].numpy(), 1 if opset == 18 else None
    export_onnx(
        loaded, schedule_of(loaded.module, **options), tmp_path / "v.onnx", opset=opset, batch=batch, sources=True
    )
    model = onnx.load(tmp_path / "v.onnx")
    assert model.opset_import[0].version == opset and model.ir_version == ir_version and _without_shape(model) == []
    onnx.checker.check_model(model, full_check=True)
    assert inspect(tmp_path / "v.onnx").provenance.opset == opset
    got, wanted = run_onnx(tmp_path / "v.onnx", image), run_onnx(exported("tiny_vit", batch=batch, **options), image)
    assert relative(got["logits"], wanted["logits"]) <= 1e-5 and (got["sources"] == wanted["sources"]).all()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_gelu_is_spelled_out_for_older_sets(approximate):
    from onnx.reference import ReferenceEvaluator

    value = lambda name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [7])
    node = helper.make_node("Gelu", ["x"], ["y"], name="block0.mlp/Gelu_0", approximate=approximate)
    graph = helper.make_graph([node], "g", [value("x")], [value("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    x = np.linspace(-3, 3, 7, dtype=np.float32)
    (wanted,) = ReferenceEvaluator(model).run(None, {"x": x})
    lower_opset(model, 17)
    onnx.checker.check_model(model, full_check=True)
    assert all(stages.of_node(n.name) == "block0.mlp" and n.op_type != "Gelu" for n in model.graph.node)
    np.testing.assert_allclose(ReferenceEvaluator(model).run(None, {"x": x})[0], wanted, atol=1e-6)


REFUSED = {
    "it has no AffineGrid .embed.; wanted 20 or more": helper.make_node(
        "AffineGrid", ["x", "x"], ["y"], name="embed/A"
    ),
    "its Pad has no input 4 .embed.; wanted 20 or more": helper.make_node("Pad", ["x"] * 4, ["y"], name="embed/P"),
    "its ReduceSum has no other .embed.": helper.make_node("ReduceSum", ["x"], ["y"], name="embed/R", other=1),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_an_older_set_does_not_have_is_told(words):
    value = lambda name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph([REFUSED[words]], "g", [value("x")], [value("y")])
    with pytest.raises(UsageError, match=f"opset 17: {words}"):
        lower_opset(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), 17)


@pytest.mark.parametrize("opset", [16, 24])
def test_other_operator_sets_are_refused(opset, tiny, schedule_of, tmp_path):
    loaded = tiny("tiny_vit")
    with pytest.raises(UsageError, match=f"opset {opset}: wanted 17 to 23"):
        export_onnx(loaded, schedule_of(loaded.module, 8), tmp_path / "v.onnx", opset=opset)


SORTS = [("tiny_vit", 1), ("tiny_vit", None), ("tiny_vit_nocls", 3)]


@pytest.mark.parametrize("kind, batch", mostly_slow(SORTS, ("tiny_vit", None)))
def test_where_many_stay_the_few_that_go_are_sorted(
    kind, batch, tiny, schedule_of, exported, run_onnx, golden, relative, tmp_path, monkeypatch
):
    """Decisions and numbers are the same, and no sort is as long as what stays."""
    monkeypatch.setattr(matching, "MOST_SORTED", 40)
    loaded, image = tiny(kind), golden.image.numpy()
    schedule = schedule_of(loaded.module, 8)
    export_onnx(loaded, schedule, tmp_path / "v.onnx", batch=batch, sources=True)
    largest = max(checks.sort_sizes(onnx.load(tmp_path / "v.onnx").graph).values())
    assert largest <= (8 if kind == "tiny_vit" else schedule.n_tokens // 2)
    usual = exported(kind, 8, batch)
    assert max(checks.sort_sizes(onnx.load(usual).graph).values()) == schedule.n_tokens - 8
    got, wanted = run_onnx(tmp_path / "v.onnx", image), run_onnx(usual, image)
    assert relative(got["logits"], wanted["logits"]) <= 1e-5 and (got["sources"] == wanted["sources"]).all()


@pytest.mark.parametrize("any_batch", [False, True])
@pytest.mark.parametrize("n_prefix, has_class", [(0, False), (2, False), (1, True), (3, True)])
def test_both_ways_of_sorting_decide_alike(n_prefix, has_class, any_batch):
    torch.manual_seed(0)
    for n, r in ((17, 1), (65, 5), (66, 30)):
        metric = torch.nn.functional.normalize(torch.randn(3, n, 8), dim=-1)
        signals = Signals(metric, n_prefix, has_class, metric=metric, any_batch=any_batch)
        step = Step(0, "post_attn", n, n - r, n - r, signal="keys")
        usual, few = (tome.static(replace(signals, many=many), step) for many in (False, True))
        assert torch.equal(usual.keep, few.keep) and torch.equal(usual.src, few.src)
