"""Operators with one PyTorch meaning and one exact ONNX form.

`torch.onnx` chooses nodes for ordinary tensor code as it sees fit: a strided slice becomes 30 TensorRT layers, an indexed row a
GatherND with a Reshape on both sides. The operators here are `torch.library` custom operators, so the exporter finds in
`translations()` exactly the nodes that are wanted. Eager PyTorch runs the same code, which is what the tests compare.

Matrices are [N, C], or [B, N, C] for a batch; an index of rows is an int64 column [K, 1] or [B, K, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FLOAT = 1  # onnx.TensorProto.FLOAT
LARGEST_TABLE = 2**15  # elements of a constant that `one_hot` is looked up in

_TRANSLATE: dict = {}


def translations() -> dict:
    """The `custom_translation_table` of `torch.onnx.export`: operator overload -> function that emits its ONNX nodes."""
    return dict(_TRANSLATE)


def _operator(fake, onnx):
    """Register a function as operator `tokexport::NAME` with its shape function and its ONNX form."""

    def register(fn):
        op = torch.library.custom_op(f"tokexport::{fn.__name__}", fn, mutates_args=())
        op.register_fake(fake)
        _TRANSLATE[getattr(torch.ops.tokexport, fn.__name__).default] = onnx
        op.__doc__ = fn.__doc__
        return op

    return register


def _ox():
    from onnxscript import opset20

    return opset20


def _ints(*values):
    return _ox().Constant(value_ints=list(values))


def _int32s(values):
    import numpy as np
    import onnx_ir

    return _ox().Constant(
        value=onnx_ir.tensor(np.array(values, dtype=np.int32))
    )  # TensorRT casts int64 in a layer of its own


def _swapped(x):
    order = list(range(len(x.shape)))
    order[-1], order[-2] = order[-2], order[-1]
    return _ox().Transpose(x, perm=order)


def _column(x, n):
    return (*x.shape[:-2], n, 1)


def _array_onnx(dtype):
    def emit(values, shape):
        import numpy as np
        import onnx_ir

        return _ox().Constant(value=onnx_ir.tensor(np.array(values, dtype=dtype).reshape(shape)))

    return emit


@_operator(fake=lambda values, shape: torch.empty(shape), onnx=_array_onnx("float32"))
def floats(values: list[float], shape: list[int]) -> Tensor:
    """A float32 constant; a tensor made in the traced code would be lifted, copied and detached node by node. ONNX: an initializer.

    Args:
        values: in row-major order.
        shape: of the tensor.
    """
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


@_operator(fake=lambda values, shape: torch.empty(shape, dtype=torch.int64), onnx=_array_onnx("int64"))
def ints(values: list[int], shape: list[int]) -> Tensor:
    """An int64 constant. ONNX: an initializer.

    Args:
        values: in row-major order.
        shape: of the tensor.
    """
    return torch.tensor(values, dtype=torch.int64).reshape(shape)


@_operator(fake=lambda mask: torch.empty(mask.shape), onnx=lambda mask: _ox().Cast(mask, to=FLOAT))
def to_float(mask: Tensor) -> Tensor:
    """1.0 where a bool tensor is true, else 0.0. ONNX: Cast."""
    return mask.to(torch.float32)


@_operator(
    fake=lambda x, index: x.new_empty((*index.shape[:-1], x.shape[-1])),
    onnx=lambda x, index: _ox().GatherND(x, index, batch_dims=len(index.shape) - 2),
)
def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows x[index]. ONNX: GatherND.

    Args:
        x: [.., N, C].
        index: [.., K, 1].
    Returns:
        [.., K, C].
    """
    return torch.gather(x, -2, index.expand(*index.shape[:-1], x.shape[-1]))


@_operator(
    fake=lambda table, index: table.new_empty((*index.shape[:-1], table.shape[-1])),
    onnx=lambda table, index: _ox().GatherND(table, index),
)
def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Rows of one table for every image. ONNX: GatherND.

    Args:
        table: [M, D].
        index: [.., K, 1].
    Returns:
        [.., K, D].
    """
    return table[index[..., 0]]


_compared = False  # whether `one_hot` is exported as a comparison whatever its size


@contextmanager
def compared_one_hots() -> Iterator[None]:
    """Every `one_hot` is exported as Equal and Cast while the block runs: the nodes of all steps of a model are then alike."""
    global _compared
    before, _compared = _compared, True
    try:
        yield
    finally:
        _compared = before


def _one_hot_onnx(index, columns, width):
    import numpy as np
    import onnx_ir

    if _compared or len(columns) * width > LARGEST_TABLE:
        named = np.full([1] * (len(index.shape) - 1) + [width], -1, np.int64)
        named[..., columns] = np.arange(len(columns))
        return _ox().Cast(_ox().Equal(index, _ox().Constant(value=onnx_ir.tensor(named))), to=FLOAT)
    table = np.zeros((len(columns), width), np.float32)
    table[np.arange(len(columns)), columns] = 1
    return _ox().GatherND(_ox().Constant(value=onnx_ir.tensor(table)), index)


@_operator(fake=lambda index, columns, width: torch.empty((*index.shape[:-1], width)), onnx=_one_hot_onnx)
def one_hot(index: Tensor, columns: list[int], width: int) -> Tensor:
    """float32 rows with a 1 in one column, else 0.

    ONNX: GatherND of a constant table, or Equal and Cast where that would have more than LARGEST_TABLE elements (`compared_one_hots`).

    Args:
        index: [.., R, 1]; the 1 of a row is in column columns[index].
        columns: unique.
        width: number of columns.
    Returns:
        [.., R, width].
    """
    at = torch.tensor(columns, device=index.device)[index[..., 0]]
    return torch.zeros(*at.shape, width, device=index.device).scatter_(-1, at[..., None], 1.0)


@_operator(
    fake=lambda x, rows: x.new_empty((*x.shape[:-2], len(rows), x.shape[-1])),
    onnx=lambda x, rows: _ox().Gather(x, _int32s(rows), axis=-2),
)
def fixed_rows(x: Tensor, rows: list[int]) -> Tensor:
    """Rows known when the graph is made. ONNX: Gather (a strided Slice costs TensorRT 30 layers).

    Args:
        x: [.., N, C].
        rows: their numbers.
    Returns:
        [.., len(rows), C].
    """
    return x.index_select(-2, torch.tensor(rows, device=x.device))


@_operator(
    fake=lambda x, k, largest: (x.new_empty(_column(x, k)), x.new_empty(_column(x, k), dtype=torch.int64)),
    onnx=lambda x, k, largest: _ox().TopK(x, _ints(k), axis=-2, largest=int(largest), sorted=1),
)
def top_rows(x: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The largest or smallest of a column, sorted; of equals, the lower index first. ONNX: TopK.

    Args:
        x: [.., N, 1].
        k: how many.
        largest: or smallest.
    Returns:
        Values and indices [.., k, 1].
    """
    order = torch.sort(x, dim=-2, descending=largest, stable=True)
    return order.values.narrow(-2, 0, k).clone(), order.indices.narrow(-2, 0, k).clone()


@_operator(
    fake=lambda x: (x.new_empty((*x.shape[:-1], 1)), x.new_empty((*x.shape[:-1], 1), dtype=torch.int64)),
    onnx=lambda x: _ox().TopK(x, _ints(1), axis=-1, largest=1, sorted=1),
)
def best_column(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row maximum and its column: x [.., N, M] -> values, indices [.., N, 1]. Of equals, the lower column. ONNX: TopK with k = 1."""
    value = x.amax(-1, keepdim=True)
    return value, (x == value).to(torch.int8).argmax(-1, keepdim=True)


@_operator(
    fake=lambda base, index, values: torch.empty_like(base),
    onnx=lambda base, index, values: _ox().ScatterElements(base, index, values, axis=-2),
)
def put_rows(base: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy of a column with some rows replaced. ONNX: ScatterElements without a reduction.

    Args:
        base: [.., N, 1].
        index: [.., K, 1], unique.
        values: [.., K, 1].
    """
    return base.scatter(-2, index, values)


def _reshape_onnx(x, shape):
    made_by = x.producer()
    if made_by is not None and made_by.op_type == "Reshape":
        x = made_by.inputs[0]
    known = x.shape is not None and all(isinstance(d, int) for d in x.shape)
    return _ox().Identity(x) if known and list(x.shape) == _whole(x, shape) else _ox().Reshape(x, _ints(*shape))


@_operator(fake=lambda x, shape: x.new_empty(_whole(x, shape)), onnx=_reshape_onnx)
def reshape(x: Tensor, shape: list[int]) -> Tensor:
    """x in another shape; a -1 stays one in the graph, where `torch.reshape` leaves the batch it was traced with.

    ONNX: Reshape; one of a Reshape takes what that took, and one that changes nothing is none.

    Args:
        x: any tensor.
        shape: at most one size is -1.
    """
    return x.reshape(shape).clone()


def _whole(x, shape):
    rest = math.prod(d for d in shape if d != -1)
    return [math.prod(x.shape) // rest if d == -1 else d for d in shape]


def _product_shape(a, b, trans_a, trans_b):
    n = a.shape[-1] if trans_a else a.shape[-2]
    return a.new_empty(
        (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), n, b.shape[-2] if trans_b else b.shape[-1])
    )


def _matmul_onnx(a, b, trans_a, trans_b):
    if len(a.shape) == 2:
        return _ox().Gemm(a, b, transA=int(trans_a), transB=int(trans_b))
    return _ox().MatMul(_swapped(a) if trans_a else a, _swapped(b) if trans_b else b)


@_operator(fake=_product_shape, onnx=_matmul_onnx)
def matmul(a: Tensor, b: Tensor, trans_a: bool, trans_b: bool) -> Tensor:
    """a b, either one transposed. ONNX: one Gemm without a batch, else Transpose and MatMul.

    Args:
        a: [.., N, K], or [.., K, N] with trans_a.
        b: [.., K, M], or [.., M, K] with trans_b.
        trans_a, trans_b: which of them.
    Returns:
        [.., N, M].
    """
    return (a.mT if trans_a else a) @ (b.mT if trans_b else b)


def _addmm_onnx(a, b, c, trans_a, trans_b):
    if len(a.shape) == 2:
        return _ox().Gemm(a, b, c, transA=int(trans_a), transB=int(trans_b))
    return _ox().Add(_matmul_onnx(a, b, trans_a, trans_b), c)


@_operator(fake=lambda a, b, c, trans_a, trans_b: _product_shape(a, b, trans_a, trans_b), onnx=_addmm_onnx)
def addmm(a: Tensor, b: Tensor, c: Tensor, trans_a: bool, trans_b: bool) -> Tensor:
    """a b + c. ONNX: one Gemm without a batch, else MatMul and Add.

    Args:
        a, b, trans_a, trans_b: see `matmul`.
        c: broadcastable to [.., N, M].
    """
    return (a.mT if trans_a else a) @ (b.mT if trans_b else b) + c
