"""Int8 files: linear layers of attention and MLP between QuantizeLinear and DequantizeLinear.

Scales are measured on photos (ONNX Runtime's quantizer): one an activation, one an output channel for weights, all
symmetric, as TensorRT wants them. Embedding, decisions, merging and head are left alone.

What makes a runtime multiply in int8 differs, so a file is for one of two:
- cpu: the rest stays float32, and a bias is an Add behind its product. With a float bias inside, or an fp16 rest, ONNX Runtime
  dequantizes and multiplies floats; with an int32 bias, which it takes too, OpenVINO refuses the file. Weights have seven bits:
  processors with AVX2 or AVX-512 but no VNNI add two products of 8 bits in 16, and both runtimes let the sum saturate there.
- tensorrt: the rest is fp16, biases stay inside.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..export.errors import EngineError, MissingPackageError, UsageError
from ..export.files import aside, check_output, read_model, write_model
from ..export.graph import calls, passes, precision, stages
from ..export.graph.for_tensorrt import adapt_to_tensorrt
from ..export.inspection import Inspection, inspect
from ..export.provenance import store
from .images import find_images
from .inputs import load_inputs

STAGES = ("attn", "mlp")
TARGETS = ("cpu", "tensorrt")
LEAST_OPSET = 19  # in which DequantizeLinear gives float16, as the rest of a file for TensorRT is


def quantize(
    path: str | Path,
    output: str | Path,
    *,
    calibration: str | Path | Sequence[str | Path],
    target: str,
    force: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Inspection:
    """Write an fp32 file of tokexport as an int8 one.

    Args:
        path: of the fp32 file.
        output: where the int8 file goes; it is written aside and renamed.
        calibration: images or folders that the scales are measured on; tens to hundreds like those the model will see.
        target: what will run it, "cpu" or "tensorrt".
        force: replace what is at output.
        progress: called with the name of each stage.
    Returns:
        What the new file is.
    Raises:
        UsageError: no fp32 file, one for another target, images that cannot be read, or a path that cannot be written.
        EngineError, StorageError: ONNX Runtime's quantizer or the disk failed; nothing is written.
    """
    inspection, output = inspect(path), check_output(output, force, [path])
    _check_target(inspection, target)
    photos, layers = find_images(calibration), _linear(inspection.path)
    if not layers:
        raise UsageError(f"{path} has no linear layers in attention or MLP: int8 has nothing to quantise")
    progress(f"calibrating on {len(photos)} image{'s' * (len(photos) > 1)}")
    with aside(output, beside=(".data",)) as new:
        original = read_model(inspection.path)

        def convert(proto, weights):
            source, raw = inspection.path, new.parent / "quantized.onnx"
            if proto is not original[0]:  # the quantizer knows plain operators only
                source = new.parent / "plain.onnx"
                write_model(proto, weights, source)
            _insert_scales(replace(inspection, path=source), raw, layers, photos, target=target)
            progress("writing")
            return _for_target(*read_model(raw), target)

        proto, weights = calls.converted(*original, convert, inspection.provenance.file_schedule)
        passes.set_least_ir_version(proto)
        store(proto, replace(inspection.provenance, precision="int8", target=target, calibration=len(photos)))
        write_model(proto, weights, new)
    return inspect(output)


def _for_target(proto, weights: dict, target: str) -> tuple:
    """A file as the quantizer leaves it, in the form that its runtime multiplies in int8: (onnx.ModelProto, weights)."""
    _name_by_stage(proto.graph)
    if target == "cpu":
        _separate_biases(proto.graph)
        return precision.with_shapes(proto, weights), weights
    proto, weights = precision.convert(proto, weights, "fp16")
    adapt_to_tensorrt(proto, weights)
    return proto, weights


def _check_target(inspection: Inspection, target: str) -> None:
    own, dtype = inspection.provenance.target, inspection.provenance.precision
    if dtype != "fp32":
        raise UsageError(f"{inspection.path} is {dtype} already: int8 needs the fp32 file it could be made from")
    if target not in TARGETS:
        raise UsageError(f"target {target}: wanted {' or '.join(TARGETS)}, what will run the int8 file")
    if own not in ("portable", target):
        raise UsageError(f"{inspection.path} is for {own}: wanted a portable file, or one for {target}")
    opset = inspection.provenance.opset
    if target == "tensorrt" and opset < LEAST_OPSET:
        raise UsageError(
            f"{inspection.path} has opset {opset}: int8 for tensorrt wants {LEAST_OPSET} or more, since DequantizeLinear gives "
            f"no float16 before"
        )


def _insert_scales(inspection: Inspection, output: Path, layers: list[str], photos: list[Path], *, target: str) -> None:
    """Write a file with the named layers between quantizing nodes, their scales measured on photos."""
    try:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    except ImportError:
        raise MissingPackageError("onnxruntime", "cpu", "int8") from None
    try:
        with _quiet():
            quantize_static(
                inspection.path,
                output,
                _reader(photos, inspection),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Gemm"],
                nodes_to_quantize=layers,
                per_channel=True,
                reduce_range=target == "cpu",
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                use_external_data_format=inspection.size > 2**30,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,  # biases stay as they are
                    "OpTypesToExcludeOutputQuantization": ["Gemm"],
                    "QDQDisableWeightAdjustForInt32Bias": True,
                },
            )
    except (UsageError, OSError, MemoryError):
        raise
    except Exception as e:
        raise EngineError(
            f"{inspection.path} could not be quantised ({type(e).__name__}: {' '.join(str(e).split())[:300]})"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's advice about a pre-processing that exported files do not need."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def _linear(path: Path) -> list[str]:
    """Names of the products with a weight in attention and MLP."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    weights = {i.name for i in graph.initializer if len(i.dims) == 2}
    return [
        n.name
        for n in graph.node
        if n.op_type == "Gemm" and n.input[1] in weights and stages.of_node(n.name).rpartition(".")[2] in STAGES
    ]


def _reader(photos: list[Path], inspection: Inspection):
    """The photos, preprocessed, one run's worth at a time, as ONNX Runtime's quantizer reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    size = inspection.batch or 1

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.starts = iter(range(0, len(photos), size))

        def get_next(self):
            start = next(self.starts, None)
            if start is None:
                return None
            image = load_inputs(photos[start : start + size], inspection.provenance)
            short = size - len(image)
            return {"image": np.concatenate([image, np.repeat(image[-1:], short, 0)]) if short else image}

    return Reader()


def _separate_biases(graph) -> None:
    """The bias of every product of dequantized values as an Add behind it."""
    from onnx import helper

    dequantized = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Gemm" and len(node.input) == 3 and dequantized.issuperset(node.input[:2]):
            bias, name = node.input.pop(), node.output[0]
            node.output[0] = f"{name}.product"
            label = f"{stages.of_node(node.name)}/Add_{name}"
            nodes.append(helper.make_node("Add", [node.output[0], bias], [name], name=label))
    _replace_nodes(graph, nodes)


def _name_by_stage(graph) -> None:
    """Quantizing nodes get the stage of the layer that reads them, and stand before it."""
    made = {n.output[0]: n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    nodes = []

    def put(name, stage):
        node = made.pop(name, None)
        if node is not None:
            put(node.input[0], stage)
            node.name = f"{stage}/{node.op_type}_{name}"
            nodes.append(node)

    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            for name in node.input:
                put(name, stages.of_node(node.name))
            nodes.append(node)
    _replace_nodes(graph, nodes)


def _replace_nodes(graph, nodes: list) -> None:
    """Put nodes, some of which lie in the graph, in the place of all that it has."""
    import onnx

    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)
