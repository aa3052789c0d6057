"""Portable files are conventional ONNX: other tools take them. What TensorRT likes better is in files for TensorRT alone."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tokexport import UsageError, export_onnx
from tokexport.export.graph import checks, stages
from tokexport.export.graph.for_tensorrt import PARAMETERS
from tokexport.export.graph.precision import write_as
from tokexport.export.inspection import inspect
from tokexport.export.provenance import TARGETS


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


def test_a_portable_file_is_conventional(options, exported, batch=None):
    model = onnx.load(exported("tiny_vit", batch=batch, **options))
    assert _parameter_shapes(model) == {1} and _without_shape(model) == [] and model.ir_version == 9
    assert inspect(exported("tiny_vit", batch=batch, **options)).provenance.target == "portable"
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("batch", [1, None])
def test_other_tools_take_it(batch, options, exported, tmp_path):
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = exported("tiny_vit", batch=batch, **options)
    quant_pre_process(path, tmp_path / "prepared.onnx", skip_symbolic_shape=True)
    assert len(onnx.load(tmp_path / "prepared.onnx").graph.node) > 50


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
    assert all((np.squeeze(numpy_helper.to_array(i)) == np.squeeze(values[i.name])).all() for i in rows.graph.initializer)
    logits = [run_onnx(tmp_path / f"{name}.onnx", golden.image)["logits"] for name in ("portable", "rows")]
    assert (logits[0] == logits[1]).all()


@pytest.mark.parametrize("target", TARGETS)
def test_the_exporter_writes_for_a_target(target, tiny, schedule_of, tmp_path):
    loaded = tiny("tiny_vit")
    result = export_onnx(loaded, schedule_of(loaded.module, 8), tmp_path / "v.onnx", target=target)
    assert result.provenance == inspect(tmp_path / "v.onnx").provenance and result.provenance.target == target
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
