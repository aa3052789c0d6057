"""The benchmark: rows, errors as rows, the gate, break-even, sweeps, profiles, pictures, and timing that ends when it is sure."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from tokexport import UsageError
from tokexport.engines.measure import stage_profile as profile
from tokexport.export.inspection import inspect
from tokexport.engines.measure import bench, timing
from tokexport.tools.cli import group


@pytest.fixture(scope="module")
def tome(exported):
    return exported("tiny_vit", method="tome", r=8)


def run(*args):
    out = CliRunner().invoke(group, ["bench", *map(str, args)])
    if out.exception is not None and not isinstance(out.exception, (SystemExit, UsageError)):
        raise out.exception
    return out


def test_a_row_has_latency_throughput_and_a_headline_against_dense(tome):
    out = run(tome, "--runtime", "ort,torch", "--batch", "1,2", "--seconds", "0.3", "--json")
    rows = json.loads(out.stdout)["rows"]
    assert out.exit_code == 0 and [(r["runtime"], r["batch"]) for r in rows[::2]] == [
        ("ort", 1),
        ("ort", 2),
        ("torch", 1),
        ("torch", 2),
    ]
    for dense, row in zip(rows[::2], rows[1::2]):
        assert dense["speedup"] == 1 and row["ms_20"] <= row["ms"] <= row["ms_80"] and row["rounds"] >= 5
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
        assert row["quotient"] == pytest.approx(row["speedup"] / row["macs_ratio"]) and row["macs_ratio"] > 1.5


def test_a_file_that_fails_is_a_row_with_its_error(tome, tmp_path, monkeypatch):
    model = onnx.load(tome)
    node = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
    node.op_type = "Relu"  # which takes one input, not three
    onnx.save(model, tmp_path / "broken.onnx")
    out = run(
        tome, tmp_path / "broken.onnx", "--runtime", "ort", "--batch", "1", "--seconds", "0.2", "--json", "--gate"
    )
    rows = json.loads(out.stdout)["rows"]
    assert out.exit_code == 1 and "cannot load" in rows[-1]["error"] and "speedup" in rows[1]
    assert "failed" in run(tmp_path / "broken.onnx", "--runtime", "ort", "--batch", "1", "--seconds", "0.2").stderr


@pytest.mark.parametrize("slower", [True, False])
def test_the_gate_lets_no_slower_file_through(slower, tome, monkeypatch):
    """Each run of the reduced file takes twice, or half, of the dense one's time by the clock that is read."""
    real = bench.until_sure
    scale = 2.0 if slower else 0.5

    def fake(calls, pairs, seconds):
        times = real(calls, pairs, seconds)
        for dense, name in pairs:
            times[name] = [t * scale for t in times[dense]]
        return times

    monkeypatch.setattr(bench, "until_sure", fake)
    out = run(tome, "--runtime", "ort", "--batch", "1", "--seconds", "0.1", "--gate")
    assert out.exit_code == slower and ("no faster than dense" in out.stderr) == slower


def test_break_even_is_the_batch_from_which_on_it_is_faster():
    row = lambda batch, speedup: {"runtime": "ort", "file": "f", "method": "tome", "batch": batch, "speedup": speedup}
    even = lambda *rows: bench.break_even([row(*r) for r in rows])["ort", "f"]
    assert even((1, 0.9), (8, 1.2), (64, 1.5)) == 8 and even((1, 1.1), (8, 1.2)) == 1
    assert even((1, 1.1), (8, 0.9), (64, 1.5)) == 64 and even((1, 0.9), (8, 1.0)) is None


def test_timing_ends_when_it_is_sure_and_not_before():
    steady = timing.until_sure({"a": lambda: None, "b": lambda: None}, [], 30)
    assert len(steady["a"]) == timing.LEAST
    assert timing._unsure([2.0] * 20, [1.0] * 20) == 0
    noise = np.random.default_rng(0).uniform(1, 2, 40)
    assert timing._unsure(list(noise), [1.0] * 40) > 0.05 > timing.SURE
    assert timing._unsure(list(noise) * 400, [1.0] * 16000) < timing._unsure(list(noise), [1.0] * 40) / 3


def test_a_sweep_exports_each_value_and_shows_agreement(tome, tmp_path):
    out = run(
        tome,
        "--sweep",
        "r=0,4,8",
        "--runtime",
        "ort",
        "--batch",
        "2",
        "--seconds",
        "0.2",
        "--json",
        "--plot",
        tmp_path / "s.png",
    )
    rows = json.loads(out.stdout)["rows"][1:]
    assert (
        out.exit_code == 0
        and [r["value"] for r in rows] == ["0", "4", "8"]
        and rows[0]["cosine"] == pytest.approx(1, abs=1e-6)
    )
    assert (
        rows[0]["macs_ratio"] < rows[1]["macs_ratio"] < rows[2]["macs_ratio"]
        and rows[2]["cosine"] < 1
        and 0 <= rows[2]["top1"] <= 1
    )
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "s.png").stat().st_size > 10_000


def test_a_keep_rate_is_swept_too(exported):
    out = run(
        exported("tiny_vit", method="evit", at=(1, 3, 4)),
        "--sweep",
        "keep-rate=0.9,0.5",
        "--runtime",
        "ort",
        "--batch",
        "1",
        "--seconds",
        "0.1",
    )
    assert out.exit_code == 0 and "cosine to dense" in out.stderr and "0.9" in out.stderr


@pytest.mark.parametrize("runtime", profile.RUNTIMES)
def test_a_profile_is_of_the_models_parts(runtime, tome):
    times = profile.stage_times(tome, runtime, bench.noise(inspect(tome), 2), rounds=3)
    assert {f"block{b}.{p}" for b in range(6) for p in ("attn", "match", "merge", "mlp")} <= set(times)
    parts = profile.by_part(times)
    assert (
        parts["attention"] > 0 and parts["matching"] > 0 and sum(parts.values()) == pytest.approx(sum(times.values()))
    )
    assert parts["rest"] < 0.5 * sum(parts.values())


def test_the_command_profiles_and_draws(tome, tmp_path):
    out = run(
        tome,
        "--runtime",
        "ort",
        "--batch",
        "1",
        "--seconds",
        "0.2",
        "--profile",
        "--json",
        "--plot",
        tmp_path / "b.png",
    )
    found = json.loads(out.stdout)["profiles"]
    assert [p["file"] for p in found] == ["dense, batch dynamic, fp32", str(tome)] and found[1]["parts"]["merging"] > 0
    assert (tmp_path / "b.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "args, words",
    [
        (["--sweep", "q=1,2"], "r=0,8,13"),
        (["--sweep", "r="], "r=0,8,13"),
        (["--sweep", "keep_rate=0.5"], "has no keep_rate"),
        (["--sweep", "r=500"], "the model has 65"),
        (["--images", "x"], "goes with --sweep"),
        (["--plot", "b.jpg"], "ends in .png"),
        (["--runtime", "trt9"], "unknown runtime"),
    ],
)
def test_bad_use_is_one_error(args, words, tome, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run(tome, *args)
    assert isinstance(out.exception, UsageError) and words in str(out.exception) and list(tmp_path.iterdir()) == []
