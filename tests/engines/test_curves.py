"""The latency model and its curves: the staircase, the fit, the cache, half blocks that compute what a block does, `bench --curve`."""

import contextlib
import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from tokexport.engines.measure import curves, latency_model
from tokexport.engines.measure.latency_model import CurveKey, LatencyCurves, LatencyModel, staircase, token_counts
from tokexport.export.errors import EngineError
from tokexport.export.graph.half_blocks import write_half_blocks
from tokexport.export.models import as_plain
from tokexport.export.reference import attend
from tokexport.tools.cli import group

from tokexport import Schedule, UsageError

KEY = CurveKey("a processor", "ort", "1", "0", "fp32", 1, 1, "64 wide")


def stairs(n: int) -> float:
    """A runtime that computes eight rows at a time: it knows multiples of 8 only, and half a step more behind each."""
    return -(-n // 8) * 8.0


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def curves_for(time, counts) -> LatencyCurves:
    return LatencyCurves(KEY, tuple(counts), tuple(time(n) for n in counts), tuple(2 * time(n) for n in counts))


def test_counts_are_multiples_of_eight_and_those_behind_them_and_the_models_own():
    counts = token_counts(197)
    assert {n % 8 for n in counts} == {0, 1, 5} and 197 in counts and 200 in counts and 193 in counts
    assert counts == sorted(set(counts)) and len(counts) <= 15 and min(counts) >= 8
    assert token_counts(5) == [5, 8] and 257 in token_counts(257) and max(token_counts(64)) == 64


def test_the_staircase_is_read_as_it_was_measured():
    counts = token_counts(257)
    times = tuple(map(stairs, counts))
    assert all(staircase(tuple(counts), times, n=n) == pytest.approx(stairs(n)) for n in range(17, 258))
    straight = tuple(float(n) for n in counts)
    assert all(staircase(tuple(counts), straight, n=n) == pytest.approx(n) for n in range(9, 258))
    assert 0 < staircase(tuple(counts), straight, n=1) <= 1 + 1e-9


def test_prediction_is_exact_for_a_machine_that_is_as_the_model_says():
    made = curves_for(stairs, token_counts(65))
    dense = Schedule("none", 65, 1, 6)
    fit_on, other = (Schedule.parse("tome", n_tokens=65, depth=6, r=r) for r in (8, [3, 9, 0, 11, 2, 5]))
    real = lambda s: 1.07 * (sum(stairs(n) + 2 * stairs(m) for n, m in s.tokens_per_block()) + 3.5 * len(s.steps))
    model = LatencyModel.of_dense(made, dense, ms=real(dense)).fitted(fit_on, ms=real(fit_on))
    assert model.scale == pytest.approx(1.07) and model.steps["tome"] == pytest.approx(3.5)
    assert model.predict(other) == pytest.approx(real(other)) and model.predict(dense) == pytest.approx(real(dense))
    with pytest.raises(UsageError, match="latency of evit: no file of it has been timed"):
        model.predict(Schedule.parse("evit", n_tokens=65, depth=6, at=(1, 3)))


def test_a_reduction_never_costs_less_than_nothing():
    made, fit_on = curves_for(stairs, token_counts(65)), Schedule.parse("tome", n_tokens=65, depth=6, r=8)
    assert LatencyModel(made, 1.0, {}).fitted(fit_on, ms=1e-3).steps["tome"] == 0


@pytest.mark.parametrize("half", ["attention", "mlp"])
@pytest.mark.parametrize("batch", [1, 2])
def test_half_blocks_compute_what_the_blocks_do(half, batch, tiny, tmp_path):
    plain = as_plain(tiny("tiny_vit").module)
    n_blocks = write_half_blocks(plain, half, tmp_path / "half.onnx", n_tokens=17, batch=batch)
    tokens = torch.from_numpy(np.random.default_rng(0).standard_normal((batch, 17, 64)).astype(np.float32))
    session = ort.InferenceSession(str(tmp_path / "half.onnx"), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"image": tokens.reshape(-1, 64).numpy()})
    with torch.no_grad():
        for block in plain.blocks()[:n_blocks]:
            x = block.mlp(block.norm2(tokens))
            tokens = (
                attend(block, tokens).x
                if half == "attention"
                else tokens + (x if block.gamma2 is None else x * block.gamma2)
            )
    assert n_blocks == 6 and np.abs(out - tokens.reshape(-1, 64).numpy()).max() < 1e-4


@pytest.fixture
def fake_runtime(monkeypatch):
    """Half blocks that are not exported: their time is that of `stairs` in milliseconds, six blocks in a file. Lists what was opened."""
    opened = []

    class Fake:
        def __init__(self, n, half):
            self.seconds = 6 * stairs(n) * (1 if half == "attention" else 2) / 1e3

        def timer(self, feeds):
            return lambda: self.seconds

    def write(plain, half, path, **options):
        path.touch()
        return 6

    @contextlib.contextmanager
    def open_fake(path, runtime, **options):
        half, n, _ = path.name.split(".")
        opened.append(path.name)
        yield Fake(int(n), half)

    monkeypatch.setattr("tokexport.export.graph.half_blocks.write_half_blocks", write)
    monkeypatch.setattr(curves, "open_runner", open_fake)
    monkeypatch.setattr(curves, "ROUNDS", (1, 1))
    return opened


def test_curves_are_measured_once_and_kept_by_what_they_depend_on(tiny, cache, fake_runtime):
    plain = as_plain(tiny("tiny_vit").module)
    first = curves.curves_of(plain, "ort")
    assert first.attention == pytest.approx([stairs(n) for n in first.tokens])
    assert first.mlp == pytest.approx([2 * stairs(n) for n in first.tokens]) and len(fake_runtime) == 2 * len(
        first.tokens
    )
    curves.keep_steps(first, {"tome": 0.25})
    assert curves.curves_of(plain, "ort").steps == {"tome": 0.25} and len(fake_runtime) == 2 * len(first.tokens)
    for change in ({"batch": 2}, {"threads": 2}, {"fresh": True}):
        before = len(fake_runtime)
        curves.curves_of(plain, "ort", **change)
        assert len(fake_runtime) == before + 2 * len(first.tokens), change


@pytest.mark.parametrize("damage", ["not json", "{}", '{"key": 1}'])
def test_a_damaged_cache_is_measured_again(damage, tiny, cache, fake_runtime):
    plain = as_plain(tiny("tiny_vit").module)
    first = curves.curves_of(plain, "ort")
    (file,) = (cache / "tokexport" / "curves").iterdir()
    file.write_text(damage)
    assert curves.curves_of(plain, "ort") == first and json.loads(file.read_text())["key"]["runtime"] == "ort"


def test_a_cache_that_cannot_be_written_is_done_without(tiny, tmp_path, monkeypatch, fake_runtime):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert curves.curves_of(as_plain(tiny("tiny_vit").module), "ort").tokens


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"runtime": "torch"}, "runtime torch is the eager reference"),
        ({"runtime": "nothing"}, "unknown runtime"),
        ({"runtime": "ort", "batch": 0}, "batch 0"),
    ],
)
def test_what_has_no_curve_is_refused(asked, words, tiny, cache):
    with pytest.raises(UsageError, match=words):
        curves.curves_of(as_plain(tiny("tiny_vit").module), **asked)


def test_bench_draws_the_curve_of_a_files_model(exported, cache, monkeypatch, tmp_path):
    """Half blocks of the tiny model, really exported and timed at few counts."""
    monkeypatch.setattr(curves, "token_counts", lambda n: [8, 16, n])
    monkeypatch.setattr(curves, "SECONDS", 0.01)
    file, picture = exported("tiny_vit", method="tome", r=8), tmp_path / "curve.png"
    run = lambda *more: CliRunner().invoke(
        group, ["bench", str(file), "--curve", "--runtime", "ort", "--batch", "1", *more]
    )
    out = run("--json", "--plot", str(picture))
    (made,) = json.loads(out.stdout)["curves"]
    assert made["tokens"] == [8, 16, 65] and min(*made["attention"], *made["mlp"]) > 0 and picture.stat().st_size > 1000
    assert made["key"]["dtype"] == "fp32" and made["key"]["shape"].startswith("64 wide, 4 heads of 16, MLP 64-256-64")
    assert "attention ms" in run().stderr
    wrong = run("--sweep", "r=0,8")
    assert isinstance(wrong.exception, UsageError) and "--curve is of one FILE" in str(wrong.exception)
    wrong = CliRunner().invoke(group, ["bench", str(file), "--fresh"])
    assert "--fresh goes with --curve" in str(wrong.exception)


def test_a_type_that_the_runtime_has_no_operators_for_is_refused_in_words(tiny, cache, monkeypatch):
    def fail(path, runtime, **options):
        raise EngineError(f"{path}: ONNX Runtime cannot load it: NOT_IMPLEMENTED")

    monkeypatch.setattr(curves, "open_runner", fail)
    monkeypatch.setattr("tokexport.export.graph.half_blocks.write_half_blocks", lambda *args, **options: 6)
    plain = as_plain(tiny("tiny_vit").module)
    with pytest.raises(UsageError, match="dtype bf16: runtime ort cannot run it here .NOT_IMPLEMENTED"):
        curves.curves_of(plain, "ort", dtype="bf16")
    with pytest.raises(EngineError):
        curves.curves_of(plain, "ort")


def test_below_the_first_count_time_falls_no_faster_than_tokens():
    assert latency_model.staircase((8, 16), (8.0, 32.0), n=4) == pytest.approx(4.0)
