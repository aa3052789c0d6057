"""Engines of TensorRT-RTX, built without a GPU, of files with tokens and patches as outputs, and of files that take pixels."""

import onnx
import pytest
from tokexport.engines.tensorrt.sidecar import read_sidecar
from tokexport.export.graph.precision import write_as
from tokexport.export.outputs import row_of
from tokexport.tools.demo import samples

from tokexport import build_engine, export_onnx, verify

from ..cases import METHODS, mostly_slow

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: engine builds need it (no GPU)")
RTX = {"builder": "rtx", "capabilities": ("86",)}
EVERYTHING = {"emit": "pooled,tokens,patches", "dropped": "zero"}
FORMS = {"float32": (3, 64, 64), "uint8": (64, 64, 3), "uint8-nchw": (3, 64, 64)}  # of the input, and one image's axes


@pytest.fixture(scope="module")
def written(tiny, schedule_of, tmp_path_factory):
    """written(method, **what `export_onnx` takes) -> path of a file of tiny_vit, made once."""
    made, folder, loaded = {}, tmp_path_factory.mktemp("outputs"), tiny("tiny_vit")

    def write(method, **asked):
        key = method, str(sorted(asked.items()))
        if key not in made:
            schedule = schedule_of(loaded.module, method=method, **METHODS[method].tiny)
            made[key] = export_onnx(loaded, schedule, folder / f"{len(made)}.onnx", **asked).path
        return made[key]

    return write


@pytest.mark.parametrize("precision", mostly_slow(["fp32", "fp16", "bf16"], "fp16"))
@pytest.mark.parametrize("method", mostly_slow(METHODS, "tome"))
def test_an_engine_gives_every_output_that_its_file_gives(method, precision, written, tmp_path):
    path = written(method, batch=1, **EVERYTHING)
    engine = build_engine(path, tmp_path / "v.plan", precision=precision, **RTX).engine
    assert engine == read_sidecar(tmp_path / "v.plan") and engine.precision == precision
    names = ("logits", "tokens", "sizes", "sources", "positions", "patches", "honesty", "mask")
    assert engine.output_names == engine.provenance.outputs == names
    shapes = {o.name: tuple(d.dim_value for d in o.type.tensor_type.shape.dim) for o in onnx.load(path).graph.output}
    for tensor in engine.outputs:
        assert tensor.type == ("int64" if row_of(tensor.name).whole else "float32"), tensor
        assert tensor.shape == shapes[tensor.name], tensor


def test_so_it_does_of_inner_blocks_and_planes_with_any_batch(written, tmp_path):
    path = written("tome", batch=None, emit="tokens,patches", layers="1,-2", layout="nchw")
    engine = build_engine(path, tmp_path / "v.plan", precision="fp16", profile=(1, 2, 4), **RTX).engine
    kinds = ("tokens", "sizes", "sources", "positions", "patches", "honesty")
    assert engine.output_names == tuple(f"{kind}_{block}" for block in (1, 4) for kind in kinds)
    assert all(tensor.shape[0] is None for tensor in engine.outputs)
    assert next(t for t in engine.outputs if t.name == "patches_1").shape == (None, 64, 8, 8)


@pytest.mark.parametrize("batch", mostly_slow([1, None], 1))
@pytest.mark.parametrize("precision", mostly_slow(["fp32", "fp16", "bf16"], "fp16"))
@pytest.mark.parametrize("form", [form for form in FORMS if form != "float32"])
def test_an_engine_takes_pixels(form, precision, batch, written, tmp_path):
    engine = build_engine(
        written("tome", batch=batch, input=form), tmp_path / "v.plan", precision=precision, **RTX
    ).engine
    (image,) = engine.inputs
    assert image.type == "uint8" and image.shape == (batch, *FORMS[form]) and engine.needs == ("uint8_input",)
    assert engine.profile == (None if batch else (1, 8, 32)) and engine.precision == precision


def test_an_int8_engine_takes_pixels(written, tmp_path):
    ask = {"precision": "int8", "calibration": samples.sample_photos(), **RTX}
    engine = build_engine(written("tome", batch=1, input="uint8"), tmp_path / "v.plan", **ask).engine
    assert engine.precision == "int8" and engine.layers["MATRIX_MULTIPLY"]["INT8"] == 24
    assert engine.inputs[0].type == "uint8"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("form", ["uint8", "uint8-nchw"])
def test_the_form_for_tensorrt_computes_the_same(form, precision, written, tmp_path):
    """What the parser is handed, judged in ONNX Runtime; TensorRT takes no other operation on pixels than a cast."""
    path = tmp_path / "typed.onnx"
    write_as(written("tome", batch=1, input=form), path, precision, target="tensorrt")
    readers = [node.op_type for node in onnx.load(path).graph.node if "image" in node.input]
    assert readers == ["Cast"]
    report = verify(path, samples.sample_photos())
    assert report.passed, report.summary()
