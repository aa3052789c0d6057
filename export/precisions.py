"""The precisions a file or an engine can be in: one row each, with all that other code needs to know of one. Imports no torch.

To add a precision, add a row. Limits are judged by `engines/parity`; how a graph gets its types is `graph/precision`.

TF32 has the mantissa of fp16. For fp16 and bf16 the limits are 16, 32 and 128 times their rounding (2^-11, 2^-8); the most seen on
DINOv2 with real photos is 9, 18 and 75 times. For int8 they are three times the most seen: its scales, not its arithmetic, decide, in either form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True)
class Precision:
    """One precision.

    Attributes:
        name: as typed by a user: "fp32", "tf32", "fp16", "bf16" or "int8".
        onnx_type: name of the `onnx.TensorProto` type that the trunk's tensors have ("FLOAT", "FLOAT16", "BFLOAT16"); an int8 file for
            CPUs has "FLOAT" instead.
        tensorrt_type: name of the `tensorrt.DataType` that the trunk's layers have in a strongly typed network.
        product_type: the same for the products of linear layers ("INT8" in int8).
        in_file: whether an ONNX file can be in it (TF32 is a way to multiply float32, chosen when an engine is built).
        rounding: half a unit in the last place of the type that tokens are kept in between stages, relative.
        output_limit: outputs on equal decisions: largest difference over the image's own largest value.
        near_tie: what a flipped near-tie may give away, by the kind of signal: of a "metric" a cosine, of a "score" a difference of
            logarithms.
        stage_limit: one stage, computed by the reference from the file's own input of it: difference over what the stage adds to
            the tokens; of merging and of the embedding over the tokens themselves, the worst row.
        help: one line for people.
    """

    name: str
    onnx_type: str
    tensorrt_type: str
    product_type: str
    in_file: bool
    rounding: float
    output_limit: float
    near_tie: Mapping[str, float]
    stage_limit: float
    help: str


def _near_tie(metric: float, score: float) -> dict[str, float]:
    return {"metric": metric, "score": score}


TABLE = {
    row.name: row
    for row in (
        Precision(
            "fp32",
            "FLOAT",
            tensorrt_type="FLOAT",
            product_type="FLOAT",
            in_file=True,
            rounding=2.0**-24,
            output_limit=2e-4,
            near_tie=_near_tie(1e-4, 1e-4),
            stage_limit=1e-4,
            help="float32 throughout",
        ),
        Precision(
            "tf32",
            "FLOAT",
            tensorrt_type="FLOAT",
            product_type="FLOAT",
            in_file=False,
            rounding=2.0**-24,
            output_limit=8e-3,
            near_tie=_near_tie(1.6e-2, 6e-2),
            stage_limit=3e-2,
            help="float32, matrix products with TF32's ten bits",
        ),
        Precision(
            "fp16",
            "FLOAT16",
            tensorrt_type="HALF",
            product_type="HALF",
            in_file=True,
            rounding=2.0**-11,
            output_limit=8e-3,
            near_tie=_near_tie(1.6e-2, 6e-2),
            stage_limit=3e-2,
            help="the trunk in fp16; decisions, sizes and merging in float32",
        ),
        Precision(
            "bf16",
            "BFLOAT16",
            tensorrt_type="BF16",
            product_type="BF16",
            in_file=True,
            rounding=2.0**-8,
            output_limit=6e-2,
            near_tie=_near_tie(1.2e-1, 5e-1),
            stage_limit=4e-1,
            help="the trunk in bf16",
        ),
        Precision(
            "int8",
            "FLOAT16",
            tensorrt_type="HALF",
            product_type="INT8",
            in_file=True,
            rounding=2.0**-11,
            output_limit=4e-1,
            near_tie=_near_tie(1.2e-1, 2.5),
            stage_limit=3e-1,
            help="linear layers in int8, the rest of the trunk in fp16, on CPUs in float32",
        ),
    )
}
IN_FILES = tuple(name for name, row in TABLE.items() if row.in_file)


def get(name: str) -> Precision:
    """The row of a precision.

    Args:
        name: of the table.
    Returns:
        Its `Precision`.
    Raises:
        UsageError: there is no such precision.
    """
    if name not in TABLE:
        raise UsageError(f"precision {name!r}: wanted one of {', '.join(TABLE)}")
    return TABLE[name]
