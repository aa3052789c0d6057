"""What the tests of the node `TokenReduce` share: cases, the comparison with the twin, and native libraries, built once."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokexport.kernels import twin
from tokexport.kernels.token_reduce import Reduction

HERE = Path(__file__).parent
NEAR = 1e-6  # cosines closer than this may be told apart differently by another order of additions
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def pairs(n, r, prefix=1, **options):
    """ToMe on n tokens."""
    return Reduction("pairs", "size_mean", n, n - r, r, prefix, **{"sizes": 2, "decisions": 1, **options})


def scored(fold, n, kept, folded, prefix=1):
    """A method that sorts tokens by a score."""
    eps, sizes = (1e-6 if fold == "squeeze" else 0.0), (2 if fold in ("mean", "drop") else 0)
    return Reduction("score", fold, n, kept, folded, prefix, eps=eps, sizes=sizes, decisions=1)


def pruned(n, r, prefix=1):
    """ToMe's pairs, of which the r tokens are dropped."""
    return Reduction("pairs", "drop", n, n - r, 0, prefix, sizes=1, decisions=1)


METHODS = {"pairs": pairs, "scored": scored, "pruned": pruned}


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
        signal = (
            rows(batch, 1 if kind != "random" else heads, n, width, seed=seed + 1)
            .expand(-1, heads, -1, -1)
            .contiguous()
        )
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
    return {
        "op": op.attributes,
        "x": x.to(dtype),
        "signal": signal,
        "size": size,
        "whole": whole,
        "exact": kind != "random",
    }


def make(method, *counts, spoilt=None, check=True, chip=80, by_score=0, **options):
    """A case as a table says it: a method and its counts, and options of `inputs`.

    spoilt: (tensor, value), one value of a tensor that is not finite. check: whether the kernels look for such.
    chip: compute capability of the GPU that is none.
    """
    made = inputs(METHODS[method](*counts, **({"by_score": 1} if by_score else {})), **options)
    if spoilt:
        made[spoilt[0]].view(-1)[7] = spoilt[1]
    return {**made, "check": check, "chip": chip}


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
    rows, order = (
        twin.unit(x.reshape(-1, op.n_in, x.shape[-1])[:, None], op.eps),
        twin.order_score(op, case["signal"].reshape(-1, op.n_in)),
    )
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


def in_process(script, cases, folder, *arguments, **environment):
    """Of every case the inputs and what a script beside this file gives for them, from one process of its own.

    Args:
        script: its name; it takes a file of cases, a file for results, and `arguments`.
        cases: name -> (arguments, options) of `make`.
        folder: for the files.
    """
    pytest.importorskip("triton", reason="Triton is not installed (it comes with torch for Linux)")
    made = {name: make(*counts, **options) for name, (counts, options) in cases.items()}
    torch.save(list(made.values()), folder / "cases.pt")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "ignore", str(HERE / script), "cases.pt", "results.pt", *arguments]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return {name: (made[name], came) for name, came in zip(cases, torch.load(folder / "results.pt"))}


@pytest.fixture(scope="session")
def node():
    """make(method, *counts, ...) -> a case; assert_equals_twin(case, outputs by name); in_process(script, cases, folder)."""
    return SimpleNamespace(make=make, assert_equals_twin=assert_equals_twin, in_process=in_process)
