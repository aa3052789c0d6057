"""Int8 files: the linear layers of attention and MLP between QuantizeLinear and DequantizeLinear, the rest of the trunk in fp16.

Scales are measured on photos (ONNX Runtime's quantizer): one an activation, one an output channel for weights, all symmetric, as
TensorRT wants them. Embedding, decisions, merging and head are left alone.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Callable

import numpy as np

from ..export.graph import precision, stages
from ..export.errors import MissingPackageError, UsageError
from ..export.inspection import inspect
from ..export.provenance import KEY
from ..export.files import check_output, read_model, write_model
from .images import find_images, load_images

STAGES = ("attn", "mlp")


def quantize(
    path: str | Path,
    images: list[str | Path],
    to: str | Path,
    force: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> int:
    """Write an fp32 file of tokexport as an int8 one; returns its bytes.

    images: files or folders to calibrate on; tens to hundreds like those it will see. to: written aside and renamed.
    Raises: UsageError for a file that is no fp32 file, images that cannot be read, or a path that cannot be written.
    """
    try:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    except ImportError:
        raise MissingPackageError("onnxruntime", "cpu", "--int8") from None
    found, to = inspect(path), check_output(to, force)
    if found.provenance.precision != "fp32":
        raise UsageError(
            f"{path} is {found.provenance.precision} already: int8 needs the fp32 file it could be made from"
        )
    photos = find_images(images)
    progress(f"calibrating on {len(photos)} image{'s' * (len(photos) > 1)}")
    layers = _linear(path)
    if not layers:
        raise UsageError(f"{path} has no linear layers in attention or MLP: int8 has nothing to quantise")
    with tempfile.TemporaryDirectory(prefix=".tokexport-", dir=to.parent) as folder:
        raw = Path(folder) / "quantized.onnx"
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)  # advice about a pre-processing that exported files do not need
        try:
            quantize_static(
                path,
                raw,
                _reader(photos, found),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Gemm"],
                nodes_to_quantize=layers,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                use_external_data_format=found.size > 2**30,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                    "OpTypesToExcludeOutputQuantization": ["Gemm"],
                    "QDQDisableWeightAdjustForInt32Bias": True,
                },
            )  # biases stay as they are
        except UsageError:
            raise
        except Exception as e:
            raise UsageError(
                f"{path} could not be quantised ({type(e).__name__}: {' '.join(str(e).split())[:300]})"
            ) from None
        finally:
            logging.disable(level)
        progress("writing")
        proto, weights = read_model(raw)
        _name_by_stage(proto.graph)
        proto, weights = precision.convert(proto, weights, "fp16")
        made = replace(found.provenance, precision="int8", calibration=len(photos))
        del proto.metadata_props[:]
        proto.metadata_props.add(key=KEY, value=made.to_json())
        return write_model(proto, weights, to)


def _linear(path) -> list[str]:
    """Names of the products with a weight in attention and MLP."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    weights = {i.name for i in graph.initializer if len(i.dims) == 2}
    return [
        n.name
        for n in graph.node
        if n.op_type == "Gemm" and n.input[1] in weights and stages.of_node(n.name).rpartition(".")[2] in STAGES
    ]


def _reader(photos: list[Path], found):
    """The photos, preprocessed, one run's worth at a time."""
    from onnxruntime.quantization import CalibrationDataReader

    size = found.batch or 1

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.starts = iter(range(0, len(photos), size))

        def get_next(self):
            start = next(self.starts, None)
            if start is None:
                return None
            image = load_images(photos[start : start + size], found.provenance.preprocess)
            short = size - len(image)
            return {"image": np.concatenate([image, np.repeat(image[-1:], short, 0)]) if short else image}

    return Reader()


def _name_by_stage(graph) -> None:
    """Quantizing nodes get the stage of the layer that reads them, and stand before it."""
    import onnx

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
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
