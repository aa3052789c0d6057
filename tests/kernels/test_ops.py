"""Every operator of the static graphs: what PyTorch computes and what its ONNX nodes compute."""

import numpy as np
import pytest
import torch
from tokexport.kernels import ops


def _numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tied(*shape):
    """Few different values, so that most are equal to others, bit for bit."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(3)).float()


def _rows(n, k, batch):
    """Unique row numbers [batch, k, 1], in no order."""
    return torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(i))[:k] for i in range(batch)])[
        ..., None
    ]


X, Y = _numbers(4, 9, 5), _numbers(4, 5, 6, seed=1)
# operator -> cases of (tensors with a batch of 4, further arguments, indices of tensors without a batch axis)
CASES = {
    "floats": [((), ([1.0, -0.5, 3.0, 0.0], [2, 2, 1]), ())],
    "ints": [((), ([2, -1, 2**40], [1, 3]), ())],
    "to_float": [((X > 0,), (), ())],
    "take_rows": [((X, _rows(9, 4, 4)), (), ())],
    "look_up": [((_numbers(9, 5), _rows(9, 4, 4)), (), (0,))],
    "one_hot": [((_rows(5, 3, 4),), ([1, 4, 2, 0, 6], 7), ()), ((_rows(200, 3, 4),), ([*range(1, 201)], 300), ())],
    "reshape": [
        ((X,), ([-1, 5],), ()),
        ((X,), ([-1, 3, 15],), ()),
        ((X.mT.contiguous(),), ([-1, 1, 1, 45],), ()),
        ((X.mT,), ([-1, 15],), ()),
    ],
    "fixed_rows": [((X,), ([0, 3, 8],), ()), ((X,), ([5],), ())],
    "top_rows": [
        ((_numbers(4, 9, 1),), (3, True), ()),
        ((_tied(4, 30, 1),), (20, True), ()),
        ((_tied(4, 30, 1),), (12, False), ()),
        ((_tied(4, 9, 1),), (9, True), ()),
    ],
    "best_column": [((X,), (), ()), ((_tied(4, 30, 20),), (), ()), ((torch.zeros(4, 3, 7),), (), ())],
    "put_rows": [((X[..., :1], _rows(9, 4, 4), _numbers(4, 4, 1, seed=2)), (), ())],
    "matmul": [
        ((X, Y), (False, False), ()),
        ((X.mT.contiguous(), Y), (True, False), ()),
        ((X, Y.mT.contiguous()), (False, True), ()),
        ((X.mT.contiguous(), Y.mT.contiguous()), (True, True), ()),
        ((X.mT.contiguous(), torch.ones(5, 1)), (True, False), (1,)),
        ((torch.ones(1, 1, 9), X), (False, False), (0,)),
    ],
    "addmm": [
        ((X, Y, _numbers(4, 9, 6, seed=4)), (False, False), ()),
        ((X.mT.contiguous(), Y, _numbers(4, 9, 1, seed=4)), (True, False), ()),
        ((X, Y.mT.contiguous(), _numbers(4, 9, 6, seed=4)), (False, True), ()),
        ((X.mT.contiguous(), torch.ones(5, 1), torch.ones(1, 1, 1)), (True, False), (1, 2)),
        ((_numbers(1, 1, 9, seed=5), X, _numbers(1, 1, 5, seed=6)), (False, False), (0, 2)),
        ((_numbers(1, 9, 2, seed=7), X, _numbers(4, 2, 1, seed=8)), (True, False), (0,)),
    ],
}
TABLE = [pytest.param(name, case, id=f"{name}-{i}") for name, cases in CASES.items() for i, case in enumerate(cases)]
BATCHED = [p for p in TABLE if p.values[1][0]]  # a constant has no batch
# Without a batch, the first case of each operator is enough for `make test`.
UNBATCHED = [
    pytest.param(name, case, id=f"{name}-{i}", marks=[pytest.mark.slow] if i else [])
    for name, cases in CASES.items()
    for i, case in enumerate(cases)
]


class Call(torch.nn.Module):
    """One operator as a module, to be exported."""

    def __init__(self, name, further):
        super().__init__()
        self.call, self.further = getattr(ops, name), further

    def forward(self, tensors):
        return self.call(*tensors, *self.further)


def _first(case):
    """The case without its batch axis."""
    tensors, further, unbatched = case
    return tuple(
        t.reshape(t.shape[-2:]) if i in unbatched else t[0].contiguous() for i, t in enumerate(tensors)
    ), further


def _run_onnx(name, tensors, further, feeds, dynamic):
    import onnxruntime
    from tokexport.export.graph.trace import translate

    program = translate(Call(name, further), (tensors,), dynamic=dynamic)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    kinds = {n.op_type for n in program.model_proto.graph.node}
    return session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), feeds, strict=True)}), kinds


def _assert_equal(got, wanted):
    """Indices and copied values exactly, computed values within float32 rounding."""
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        assert a.shape == tuple(b.shape) and a.dtype == b.numpy().dtype
        np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=0 if b.dtype == torch.int64 else 1e-5)


def test_every_operator_has_a_case():
    assert set(CASES) == {op.name().split("::")[1] for op in ops.translations()}


@pytest.mark.parametrize("name, case", UNBATCHED)
def test_an_operator_is_its_onnx_form_without_a_batch(name, case):
    tensors, further = _first(case)
    got, kinds = _run_onnx(name, tensors, further, tensors, None)
    _assert_equal(got, getattr(ops, name)(*tensors, *further))
    if name in ("matmul", "addmm"):
        assert kinds == {"Gemm"}, "one node"


@pytest.mark.parametrize("name, case", BATCHED)
def test_an_operator_is_its_onnx_form_for_any_batch(name, case):
    tensors, further, unbatched = case
    dim = torch.export.Dim("batch", min=1)
    dynamic = (tuple(None if i in unbatched else {0: dim} for i in range(len(tensors))),)
    traced = tuple(t if i in unbatched else t[:2] for i, t in enumerate(tensors))
    got, _ = _run_onnx(name, traced, further, tensors, dynamic)
    _assert_equal(got, getattr(ops, name)(*tensors, *further))


@pytest.mark.parametrize("name, case", TABLE)
def test_an_operator_tells_its_shapes_without_computing(name, case):
    for tensors, further in (_first(case), case[:2]):
        torch.library.opcheck(
            getattr(torch.ops.tokexport, name).default,
            (*tensors, *further),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_a_large_one_hot_is_compared_and_a_small_one_looked_up():
    kinds = lambda n, width: _run_onnx(
        "one_hot", (_rows(n, 3, 1)[0],), ([*range(n)], width), (_rows(n, 3, 1)[0],), None
    )[1]
    assert kinds(128, 256) == {"GatherND"} and kinds(128, 257) == {"Equal", "Cast"} and ops.LARGEST_TABLE == 128 * 256


class Reshapes(torch.nn.Module):
    """One after another."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes = shapes

    def forward(self, x):
        for shape in self.shapes:
            x = ops.reshape(x, shape)
        return x + 1


@pytest.mark.parametrize(
    "shapes, nodes",
    [([[-1, 5]], 0), ([[5, 9]], 1), ([[3, 15], [5, 9]], 1), ([[3, 15], [9, 5]], 0), ([[5, 9], [-1, 5]], 0)],
)
def test_a_reshape_that_changes_nothing_leaves_the_graph(shapes, nodes):
    import onnxruntime
    from tokexport.export.graph.trace import translate

    x, module = _numbers(9, 5), Reshapes(shapes)
    proto = translate(module, (x,)).model_proto
    assert sum(n.op_type in ("Reshape", "Identity") for n in proto.graph.node) == nodes
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    _assert_equal(session.run(None, {session.get_inputs()[0].name: x.numpy()}), module(x))


def test_of_equal_values_the_lower_index_wins():
    _, index = ops.top_rows(torch.tensor([[1.0], [2.0], [2.0], [1.0], [2.0]]), 4, True)
    assert index[:, 0].tolist() == [1, 2, 4, 0]
    _, index = ops.top_rows(torch.tensor([[1.0], [2.0], [2.0], [1.0]]), 3, False)
    assert index[:, 0].tolist() == [0, 3, 1]
    _, index = ops.best_column(torch.tensor([[0.0, 3.0, 3.0], [3.0, 3.0, 0.0]]))
    assert index[:, 0].tolist() == [1, 0]


def test_operators_leave_their_inputs_alone():
    base = torch.zeros(5, 1)
    out = ops.put_rows(base, torch.tensor([[3]]), torch.tensor([[7.0]]))
    assert base.abs().sum() == 0 and out[:, 0].tolist() == [0, 0, 0, 7, 0]


def test_the_comparison_sees_a_wrong_index_and_a_wrong_number():
    value, index = ops.top_rows(_tied(9, 1), 4, True)
    for wrong in (
        (value.numpy(), index.numpy()[::-1]),
        (value.numpy() + 1e-3, index.numpy()),
        (value.numpy(), index.numpy().astype(np.int32)),
    ):
        with pytest.raises(AssertionError):
            _assert_equal(wrong, (value, index))
