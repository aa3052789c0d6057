"""The Triton kernels, interpreted on the CPU, against their PyTorch twin: decisions equal, numbers within their type's rounding."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tokexport.kernels import twin
from tokexport.kernels.token_reduce import Reduction

NEAR = 1e-6  # cosines closer than this may be told apart differently by another order of additions
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
FOLDS = ("mean", "squeeze", "sum", "drop")


def pairs(n, r, prefix=1, **options):
    """ToMe on n tokens."""
    return Reduction("pairs", "size_mean", n, n - r, r, prefix, **{"sizes": 2, "decisions": 1, **options})


def scored(fold, n, kept, folded, prefix=1):
    """A method that sorts tokens by a score."""
    eps, sizes = (1e-6 if fold == "squeeze" else 0.0), (2 if fold in ("mean", "drop") else 0)
    return Reduction("score", fold, n, kept, folded, prefix, eps=eps, sizes=sizes, decisions=1)


def random_rows(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact_rows(*shape, seed):
    """Rows of four halves, the rest zeros (-0 in places): length 1, and all products exact, so that most cosines tie."""
    g = torch.Generator().manual_seed(seed)
    place = torch.rand(shape, generator=g).argsort(-1) < 4
    return torch.where(place, 0.5, 0.0) * torch.where(torch.rand(shape, generator=g) < 0.5, -1.0, 1.0)


def inputs(op, kind="random", channels=64, heads=3, width=32, batch=2, dtype=torch.float32, whole=True, one=False):
    """One case: what the node is given. kind: "random", "exact", "zeros" (rows of zeros among exact ones) or "alike" (all equal).

    whole: apply too, which the interpreter takes seconds for. one: the first image, without a batch axis.
    """
    n, seed = op.n_in, op.n_in + op.n_kept
    x = random_rows(batch, n, channels, seed=seed)
    if op.select == "pairs":
        rows = random_rows if kind == "random" else exact_rows
        signal = rows(batch, 1 if kind != "random" else heads, n, width, seed=seed + 1).expand(-1, heads, -1, -1).contiguous()
        if kind in ("zeros", "alike"):
            signal[:, :, :: 3 if kind == "zeros" else 1] = 0 if kind == "zeros" else signal[:, :, :1]
    else:
        signal = random_rows(batch, n, 1, seed=seed + 1)
        if kind != "random":
            signal = signal.round() * random_rows(batch, n, 1, seed=seed + 2).sign().abs()
            signal[:, ::5] = -0.0
            x = exact_rows(batch, n, channels, seed=seed)
        lift = torch.tensor([2.0**20 - 2**8 * i for i in range(op.n_prefix)]).reshape(-1, 1)
        signal[:, : op.n_prefix] += lift
    size = (random_rows(batch, n, 1, seed=seed + 3).abs() * 3 + 1).round() if op.has_size else None
    signal = signal.to(dtype) if op.select == "pairs" else signal
    if one:
        x, size, signal = x[0], None if size is None else size[0], signal[:1] if op.select == "pairs" else signal[0]
    return {"op": op.attributes, "x": x.to(dtype), "signal": signal, "size": size, "whole": whole, "exact": kind != "random"}


def case(*args, **options):
    """`inputs`, made when they are needed."""
    return partial(inputs, *args, **options)


HALF, BRAIN = torch.float16, torch.bfloat16
FAST = {
    "5 tokens": case(pairs(5, 1), width=32),
    "5 tokens, half": case(pairs(5, 2, 0), width=128, dtype=HALF),
    "50 tokens": case(pairs(50, 8), width=48, batch=1),
    "50 tokens, one image, by score": case(pairs(50, 25, 0, by_score=1), width=72, one=True),
    "50 tokens, fp16": case(pairs(50, 24), width=64, dtype=HALF, batch=1),
    "50 tokens, bf16": case(pairs(50, 13), width=64, dtype=BRAIN, batch=1),
    "50 tokens, ties": case(pairs(50, 20, 2), "exact", batch=1),
    "50 tokens, ties, bf16": case(pairs(50, 20), "exact", heads=2, dtype=BRAIN, whole=False),
    "50 tokens, zeros": case(pairs(50, 20), "zeros", batch=1),
    "50 tokens, all alike": case(pairs(50, 20), "alike", batch=1),
    "65 tokens, no class token": case(pairs(65, 16, 0, by_score=1), batch=1, width=80),
    "65 tokens, 5 prefix": case(pairs(65, 30, 5), batch=1, width=96, whole=False),
    "65 tokens, pruned": case(Reduction("pairs", "drop", 65, 49, 0, 1, sizes=1, decisions=1), batch=1),
    "171 tokens": case(pairs(171, 13), width=64, whole=False),
    "171 tokens, ties": case(pairs(171, 85), "exact", whole=False),
    "197 tokens": case(pairs(197, 13), width=64, heads=6, whole=False),
    "197 tokens, fp16": case(pairs(197, 98), width=64, dtype=HALF, whole=False),
    **{f"{f}, 5 tokens": case(scored(f, 5, 2, 0 if f == "drop" else 2)) for f in FOLDS},
    **{f"{f}, ties": case(scored(f, 50, 30, 0 if f == "drop" else 13), "exact", batch=1) for f in FOLDS},
    **{f"{f}, fp16": case(scored(f, 50, 30, 0 if f == "drop" else 20), dtype=HALF, one=True) for f in FOLDS},
    "squeeze, bf16": case(scored("squeeze", 50, 35, 15, 2), dtype=BRAIN, batch=1),
    "mean, 197 tokens": case(scored("mean", 197, 138, 40), channels=192, batch=1, whole=False),
}
SLOW = {
    **{f"{n} tokens, {r}": case(pairs(n, r), width=64, heads=2, batch=1) for n in (171, 197, 257) for r in (1, n // 2)},
    **{f"257 tokens, {t}": case(pairs(257, 32), channels=384, width=64, batch=1, dtype=t) for t in (HALF, BRAIN)},
    "257 tokens, ties": case(pairs(257, 126, 5), "exact", width=128),
    "1370 tokens": case(pairs(1370, 100), width=64, batch=1, whole=False),
    "1370 tokens, ties": case(pairs(1370, 682, 5), "exact", width=64, batch=1, whole=False),
    "1370 tokens, fp16": case(pairs(1370, 684), width=64, batch=1, dtype=HALF, whole=False),
    **{f"{f}, 197 tokens": case(scored(f, 197, 138, 0 if f == "drop" else 59), channels=384, batch=1) for f in FOLDS},
    "squeeze, 1370 tokens": case(scored("squeeze", 1370, 960, 400), channels=256, batch=1, whole=False),
}


def spoilt(field, value, check=True, op=pairs(5, 2), **options):
    """A case with one value that is not finite."""
    made = inputs(op, **options)
    made[field].view(-1)[7] = value
    return {**made, "check": check}


REFUSED = {
    "nan in x": (partial(spoilt, "x", torch.nan), "x has values that are not finite: 1"),
    "inf in keys": (partial(spoilt, "signal", torch.inf), "signal has values that are not finite: 1"),
    "-inf in sizes": (partial(spoilt, "size", -torch.inf), "size has values that are not finite: 1"),
    "12 channels": (case(pairs(5, 2), channels=12), "multiples of 8"),
    "head size 20": (case(pairs(5, 2), width=20), "multiples of 8"),
    "2056 channels matched": (case(scored("mean", 5, 2, 2), channels=2056), "at most 2048"),
    "2049 scores": (case(scored("drop", 2049, 2, 0), channels=8), "at most 2048"),
}
UNCHECKED = {
    "nan in keys": partial(spoilt, "signal", torch.nan, False),
    "inf in keys": partial(spoilt, "signal", torch.inf, False),
    "nan in scores": partial(spoilt, "signal", torch.nan, False, scored("squeeze", 5, 2, 2)),
    "nan in x": partial(spoilt, "x", torch.nan, False, scored("squeeze", 5, 2, 2)),
}


def interpreted(cases, folder):
    """Of every case the inputs and what the kernels give, from one process that interprets them."""
    pytest.importorskip("triton", reason="Triton is not installed (it comes with torch for Linux)")
    made = {name: case() for name, case in cases.items()}
    torch.save(list(made.values()), folder / "cases.pt")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "interpret.py"), "cases.pt", "results.pt"]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return {name: (made[name], came) for name, came in zip(cases, torch.load(folder / "results.pt"))}


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return interpreted(FAST, tmp_path_factory.mktemp("fast"))


@pytest.fixture(scope="module")
def spoilt_results(tmp_path_factory):
    cases = {**{name: make for name, (make, _) in REFUSED.items()}, **{f"unchecked {n}": m for n, m in UNCHECKED.items()}}
    return interpreted(cases, tmp_path_factory.mktemp("spoilt"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return interpreted(SLOW, tmp_path_factory.mktemp("slow"))


def gap(case):
    """The smallest difference of two cosines on which a decision hangs; random ones only."""
    op, x = Reduction(**case["op"]), case["x"]
    if op.select == "pairs":
        unit, p = twin.unit(case["signal"]), op.pairing
        scores = unit[:, p.a_first :: 2] @ unit[:, p.b_first :: 2].mT
        order = scores.amax(-1).sort(-1, descending=True).values
        steps = (order[:, :-1] - order[:, 1:])[:, : op.n_in - op.n_kept]
        best = scores.topk(2, -1).values if p.n_b > 1 else scores.new_tensor([[[1.0, 0.0]]])
        return min(steps.min(), (best[..., 0] - best[..., 1]).min()) if steps.numel() else 1.0
    rows, order = twin.unit(x.reshape(-1, op.n_in, x.shape[-1])[:, None], op.eps), twin.order_score(op, case["signal"].reshape(-1, op.n_in))
    if op.fold in ("sum", "drop"):
        return 1.0
    scores = twin.take(rows, order.src) @ twin.take(rows, order.keep)[:, op.n_prefix :].mT
    best = scores.topk(min(2, scores.shape[-1]), -1).values
    return (best[..., 0] - best[..., -1]).min() if best.shape[-1] > 1 else 1.0


def assert_equals_twin(case, came):
    """Decisions exactly, numbers within the rounding of the tokens' type.

    A random case may hold cosines nearer to each other than float32 tells apart in any order of additions; there, all but a handful of
    decisions are equal, and hosts of equal tokens are.
    """
    op = Reduction(**case["op"])
    wanted = twin.token_reduce(op, case["x"], case["signal"], case["size"])
    near = not case["exact"] and gap(case) < NEAR
    for name, tensor in wanted.items():
        if name not in came:
            assert not case["whole"]
            continue
        assert came[name].dtype == tensor.dtype and came[name].shape == tensor.shape
        if tensor.dtype == torch.int64:
            differ = int((came[name] != tensor).sum())
            assert differ <= (4 if near else 0), f"{name}: {differ} of {tensor.numel()} differ"
        elif not near:
            scale = TOLERANCE[tensor.dtype]
            torch.testing.assert_close(came[name], tensor, rtol=scale, atol=scale)


@pytest.mark.parametrize("name", FAST)
def test_kernels_decide_and_compute_what_the_twin_does(fast, name):
    assert_equals_twin(*fast[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_kernels_are_the_twin_on_many_tokens(slow, name):
    assert_equals_twin(*slow[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_do_not_take_is_refused_in_words(spoilt_results, name):
    assert isinstance(spoilt_results[name][1], str) and REFUSED[name][1] in spoilt_results[name][1]


@pytest.mark.parametrize("name", UNCHECKED)
def test_unchecked_values_that_are_no_numbers_still_give_rows_of_the_input(spoilt_results, name):
    made, came = spoilt_results[f"unchecked {name}"]
    op = Reduction(**made["op"])
    for image in torch.cat([came["keep"], came["src"]], 1)[..., 0].tolist():
        assert len(set(image)) == len(image) and set(image) <= set(range(op.n_in))
    assert ((came["dst"] >= op.n_prefix) & (came["dst"] < op.n_kept)).all()


def test_the_comparison_sees_one_wrong_decision_and_one_wrong_number():
    made = inputs(pairs(50, 13))
    right = twin.token_reduce(Reduction(**made["op"]), made["x"], made["signal"], made["size"])
    assert_equals_twin(made, right)
    for name, wrong in (("dst", 1), ("keep", -1), ("x", 1e-3), ("log_size", 1e-3), ("size", 1e-3)):
        spoiled = {**right, name: right[name].clone()}
        spoiled[name].view(-1)[-1] += wrong
        with pytest.raises(AssertionError):
            assert_equals_twin(made, spoiled)


def test_nodes_that_cannot_be_are_refused():
    for wrong in (
        {"select": "all"}, {"fold": "mean"}, {"n_kept": 50}, {"n_folded": 3}, {"n_prefix": 46}, {"n_kept": 20, "n_folded": 30},
        {"sizes": 3}, {"eps": -1.0}, {"decisions": 2}, {"select": "score", "fold": "squeeze"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="TokenReduce"):
            Reduction(**{**pairs(50, 5).attributes, **wrong})
