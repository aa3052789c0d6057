"""The Triton kernels, interpreted on the CPU, against their PyTorch twin: decisions equal, numbers within their type's rounding."""

import pytest
import torch
from tokexport.kernels import twin
from tokexport.kernels.token_reduce import Reduction

FOLDS = ("mean", "squeeze", "sum", "drop")


def case(*counts, **options):
    """A case as data: what `make` in conftest.py is called with."""
    return counts, options


HALF, BRAIN = torch.float16, torch.bfloat16
FAST = {
    "5 tokens": case("pairs", 5, 1, width=32),
    "5 tokens, half": case("pairs", 5, 2, 0, width=128, dtype=HALF),
    "50 tokens": case("pairs", 50, 8, width=48, batch=1),
    "50 tokens, one image, by score": case("pairs", 50, 25, 0, by_score=1, width=72, one=True),
    "50 tokens, fp16": case("pairs", 50, 24, width=64, dtype=HALF, batch=1),
    "50 tokens, bf16": case("pairs", 50, 13, width=64, dtype=BRAIN, batch=1),
    "50 tokens, ties": case("pairs", 50, 20, 2, kind="exact", batch=1),
    "50 tokens, ties, bf16": case("pairs", 50, 20, kind="exact", heads=2, dtype=BRAIN, whole=False),
    "50 tokens, zeros": case("pairs", 50, 20, kind="zeros", batch=1),
    "50 tokens, all alike": case("pairs", 50, 20, kind="alike", batch=1),
    "65 tokens, no class token": case("pairs", 65, 16, 0, by_score=1, batch=1, width=80),
    "65 tokens, 5 prefix": case("pairs", 65, 30, 5, batch=1, width=96, whole=False),
    "65 tokens, pruned": case("pruned", 65, 16, batch=1),
    "171 tokens": case("pairs", 171, 13, width=64, whole=False),
    "171 tokens, ties": case("pairs", 171, 85, kind="exact", whole=False),
    "197 tokens": case("pairs", 197, 13, width=64, heads=6, whole=False),
    "197 tokens, fp16": case("pairs", 197, 98, width=64, dtype=HALF, whole=False),
    **{f"{f}, 5 tokens": case("scored", f, 5, 2, 2 * (f != "drop")) for f in FOLDS},
    **{f"{f}, ties": case("scored", f, 50, 30, 13 * (f != "drop"), kind="exact", batch=1) for f in FOLDS},
    **{f"{f}, fp16": case("scored", f, 50, 30, 20 * (f != "drop"), dtype=HALF, one=True) for f in FOLDS},
    "squeeze, bf16": case("scored", "squeeze", 50, 35, 15, 2, dtype=BRAIN, batch=1),
    "mean, 197 tokens": case("scored", "mean", 197, 138, 40, channels=192, batch=1, whole=False),
}
SLOW = {
    **{
        f"{n} tokens, {r}": case("pairs", n, r, width=64, heads=2, batch=1)
        for n in (171, 197, 257)
        for r in (1, n // 2)
    },
    **{f"257 tokens, {t}": case("pairs", 257, 32, channels=384, width=64, batch=1, dtype=t) for t in (HALF, BRAIN)},
    "257 tokens, ties": case("pairs", 257, 126, 5, kind="exact", width=128),
    "1370 tokens": case("pairs", 1370, 100, width=64, batch=1, whole=False),
    "1370 tokens, ties": case("pairs", 1370, 682, 5, kind="exact", width=64, batch=1, whole=False),
    "1370 tokens, fp16": case("pairs", 1370, 684, width=64, batch=1, dtype=HALF, whole=False),
    **{f"{f}, 197 tokens": case("scored", f, 197, 138, 59 * (f != "drop"), channels=384, batch=1) for f in FOLDS},
    "squeeze, 1370 tokens": case("scored", "squeeze", 1370, 960, 400, channels=256, batch=1, whole=False),
}


REFUSED = {
    "nan in x": (case("pairs", 5, 2, spoilt=("x", torch.nan)), "x has values that are not finite: 1"),
    "inf in keys": (case("pairs", 5, 2, spoilt=("signal", torch.inf)), "signal has values that are not finite: 1"),
    "-inf in sizes": (case("pairs", 5, 2, spoilt=("size", -torch.inf)), "size has values that are not finite: 1"),
    "12 channels": (case("pairs", 5, 2, channels=12), "multiples of 8"),
    "head size 20": (case("pairs", 5, 2, width=20), "multiples of 8"),
    "2056 channels matched": (case("scored", "mean", 5, 2, 2, channels=2056), "at most 2048"),
    "2049 scores": (case("scored", "drop", 2049, 2, 0, channels=8), "at most 2048"),
}
UNCHECKED = {
    "nan in keys": case("pairs", 5, 2, spoilt=("signal", torch.nan), check=False),
    "inf in keys": case("pairs", 5, 2, spoilt=("signal", torch.inf), check=False),
    "nan in scores": case("scored", "squeeze", 5, 2, 2, spoilt=("signal", torch.nan), check=False),
    "nan in x": case("scored", "squeeze", 5, 2, 2, spoilt=("x", torch.nan), check=False),
}


@pytest.fixture(scope="module")
def fast(node, tmp_path_factory):
    return node.in_process("interpret.py", FAST, tmp_path_factory.mktemp("fast"))


@pytest.fixture(scope="module")
def spoilt_results(node, tmp_path_factory):
    cases = {
        **{name: make for name, (make, _) in REFUSED.items()},
        **{f"unchecked {n}": m for n, m in UNCHECKED.items()},
    }
    return node.in_process("interpret.py", cases, tmp_path_factory.mktemp("spoilt"))


@pytest.fixture(scope="module")
def slow(node, tmp_path_factory):
    return node.in_process("interpret.py", SLOW, tmp_path_factory.mktemp("slow"))


@pytest.mark.parametrize("name", FAST)
def test_kernels_decide_and_compute_what_the_twin_does(node, fast, name):
    node.assert_equals_twin(*fast[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_kernels_are_the_twin_on_many_tokens(node, slow, name):
    node.assert_equals_twin(*slow[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_do_not_take_is_refused_in_words(spoilt_results, name):
    assert isinstance(spoilt_results[name][1], str) and REFUSED[name][1] in spoilt_results[name][1]


@pytest.mark.parametrize("name", UNCHECKED)
def test_unchecked_values_that_are_no_numbers_still_give_rows_of_the_input(spoilt_results, name):
    made, came = spoilt_results[f"unchecked {name}"]
    op = Reduction(**made["op"])
    for image in torch.cat([came["keep"], came["src"]], 1)[..., 0].tolist():
        assert len(set(image)) == len(image) and set(image) <= set(range(op.n_in))
    rows = op.first_host + came["dst"]
    assert ((rows >= op.n_prefix) & (rows < op.n_kept)).all()


def test_the_comparison_sees_one_wrong_decision_and_one_wrong_number(node):
    made = node.make("pairs", 50, 13)
    right = twin.token_reduce(Reduction(**made["op"]), made["x"], made["signal"], made["size"])
    node.assert_equals_twin(made, right)
    for name, wrong in (("dst", 1), ("keep", -1), ("x", 1e-3), ("log_size", 1e-3), ("size", 1e-3)):
        spoiled = {**right, name: right[name].clone()}
        spoiled[name].view(-1)[-1] += wrong
        with pytest.raises(AssertionError):
            node.assert_equals_twin(made, spoiled)


def test_nodes_that_cannot_be_are_refused():
    right = Reduction("pairs", "size_mean", 50, 45, 5, 1, sizes=2)
    for wrong in (
        {"select": "all"}, {"fold": "mean"}, {"n_kept": 50}, {"n_folded": 3}, {"n_prefix": 46}, {"n_kept": 20, "n_folded": 30},
        {"sizes": 3}, {"eps": -1.0}, {"decisions": 2}, {"select": "score", "fold": "squeeze"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="TokenReduce"):
            Reduction(**{**right.attributes, **wrong})
