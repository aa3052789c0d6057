"""The benchmark: rows, errors as rows, the gate, break-even, sweeps, profiles, pictures, and timing that ends when it
is sure.
"""

import json

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from tokexport.engines.measure import bound, jobs, timing
from tokexport.engines.measure import stage_profile as profile
from tokexport.engines.measure.candidates import image_of
from tokexport.engines.measure.latency import LatencyRow, break_even
from tokexport.export.errors import EngineError
from tokexport.export.inspection import inspect
from tokexport.tools.cli import group

from tokexport import UsageError, open_runner

from ..cases import mostly_slow


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
        assert dense["speedup"] == 1 and row["ms_low"] <= row["ms"] <= row["ms_high"] and row["rounds"] >= 5
        p = row["percentiles"]
        assert p["50"] == pytest.approx(row["ms"]) and p["50"] <= p["90"] <= p["95"] <= p["99"]
        assert row["end_to_end_ms"] > 0 and "by the host's clock" in row["timed"]
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
    real = jobs.interleaved_until_precise
    scale = 2.0 if slower else 0.5

    def fake(timers, pairs, **options):
        times = real(timers, pairs, **options)
        for dense, name in pairs:
            times[name] = [t * scale for t in times[dense]]
        return times

    monkeypatch.setattr(jobs, "interleaved_until_precise", fake)
    out = run(tome, "--runtime", "ort", "--batch", "1", "--seconds", "0.1", "--gate")
    assert out.exit_code == slower and ("no faster than dense" in out.stderr) == slower


def test_break_even_is_the_batch_from_which_on_it_is_faster():
    row = lambda batch, speedup: LatencyRow("ort", batch, "f", "tome", 1.5, speedup=speedup)
    even = lambda *rows: break_even([row(*r) for r in rows])["ort", "f"]
    assert even((1, 0.9), (8, 1.2), (64, 1.5)) == 8 and even((1, 1.1), (8, 1.2)) == 1
    assert even((1, 1.1), (8, 0.9), (64, 1.5)) == 64 and even((1, 0.9), (8, 1.0)) is None


def test_timing_ends_when_it_is_precise_and_not_before():
    steady = timing.interleaved_until_precise({"a": lambda: 1.0, "b": lambda: 2.0}, [("a", "b")], seconds=30)
    assert len(steady["a"]) == timing.FEWEST and set(steady["b"]) == {2.0}
    assert timing.half_interval([2.0] * 20, [1.0] * 20) == 0
    noise = np.random.default_rng(0).uniform(1, 2, 40)
    assert timing.half_interval(list(noise), [1.0] * 40) > 0.05 > timing.PRECISION
    many, few = timing.half_interval(list(noise) * 400, [1.0] * 16000), timing.half_interval(list(noise), [1.0] * 40)
    assert many < few / 3


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


@pytest.mark.slow
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


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_a_profile_is_of_the_models_parts(runtime, tome):
    times = profile.stage_times(tome, runtime, jobs.noise(2, image_of(inspect(tome))), rounds=3)
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
    profiles = json.loads(out.stdout)["profiles"]
    assert [p["file"] for p in profiles] == ["dense, batch dynamic, fp32", str(tome)]
    assert profiles[1]["parts"]["merging"] > 0
    assert (tmp_path / "b.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "args, words",
    [
        (["--sweep", "q=1,2"], "r=0,8,13"),
        (["--sweep", "r="], "r=0,8,13"),
        (["--sweep", "keep_rate=0.5"], "has no keep_rate"),
        (["--sweep", "r=500"], "the model has 65"),
        (["--images", "x"], "goes with --sweep"),
        (["--processes", "0"], "processes 0"),
        (["--seconds", "0"], "more than 0 seconds"),
        (["--batch", "0"], "wanted batch sizes"),
        (["--plot", "b.jpg"], "ends in .png"),
        (["--runtime", "trt9"], "unknown runtime"),
    ],
)
def test_bad_use_is_one_error(args, words, tome, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run(tome, *args)
    assert isinstance(out.exception, UsageError) and words in str(out.exception) and list(tmp_path.iterdir()) == []


def test_a_runtime_without_a_profiler_says_which_have_one(tome):
    with pytest.raises(UsageError, match="has no profiler: wanted one of ort, openvino"):
        profile.stage_times(tome, "torch", jobs.noise(1, image_of(inspect(tome))))


def test_the_timed_part_does_not_look_at_the_inputs(tome, monkeypatch):
    """Inputs are checked once, before; whole calls, which are timed apart, check them each time."""
    looks = []
    real = np.isfinite
    monkeypatch.setattr(np, "isfinite", lambda *a: looks.append(1) or real(*a))
    feeds = {"image": jobs.noise(1, (3, 64, 64))}
    for runtime in ("ort", "openvino", "torch"):
        with open_runner(tome, runtime, threads=1) as runner:
            timer = runner.timer(feeds)
            looks.clear()
            assert all(timer() > 0 for _ in range(3)) and not looks
            runner.run(feeds)
            assert looks


def test_the_timed_run_computes_what_a_run_does(tome, monkeypatch):
    """OpenVINO's tensors are set once: the timed request gives the same values as `run`."""
    feeds = {"image": jobs.noise(2, (3, 64, 64))}
    with open_runner(tome, "openvino", threads=1) as runner:
        wanted = runner.run(feeds)["logits"]
        request = runner._prepared(feeds)()
        assert any(np.array_equal(value, wanted) for value in request.values())


def test_the_record_names_the_machine_and_the_threads(tome):
    machine = json.loads(run(tome, "--runtime", "ort", "--batch", "1", "--seconds", "0.1", "--json").stdout)["machine"]
    assert machine["threads"] == 1 and machine["cpu"] and machine["versions"]["onnxruntime"]
    assert ("gpus" in machine) == bool(torch.cuda.is_available())


def test_processes_measure_apart_and_their_range_is_told(tome):
    out = run(tome, "--runtime", "ort", "--batch", "1", "--seconds", "0.2", "--processes", "2", "--json")
    dense, row = json.loads(out.stdout)["rows"]
    assert row["processes"] == 2 and row["rounds"] >= 10 and dense["speedup"] == 1
    assert row["ms_low"] <= row["ms"] <= row["ms_high"] and row["speedup_low"] <= row["speedup"] <= row["speedup_high"]


def test_of_several_processes_the_mean_and_the_range_of_medians_is_told():
    from tokexport.engines.measure.bench import _over_processes

    three = [timing.Ratio(1.0, 0.5, 9.0), timing.Ratio(2.0, 1.9, 2.1), timing.Ratio(4.5, 4.0, 5.0)]
    assert _over_processes(three) == (2.5, 1.0, 4.5) and _over_processes(three[:1]) == three[0]


def test_a_measuring_process_that_dies_is_one_error(tome):
    job = jobs.Job("ort", 1, 1, 0.1, (3, -1, 64), (str(tome),), ())
    with pytest.raises(EngineError, match="a process that timed ort ended with 1: .*negative"):
        jobs.measure_in_processes(job, 2)


@pytest.mark.parametrize("batch", mostly_slow([None, 1], None))
def test_the_bound_has_the_counts_and_no_matching(options, batch, exported):
    """Of every method: it runs, and neither a choice nor a scatter is left in it."""
    if options["method"] == "none":
        pytest.skip("nothing is reduced")
    inspection = inspect(exported("tiny_vit", batch=batch, **options))
    path = bound.write_bound(inspection, inspection.path.with_suffix(f".{batch}.bound"))
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"TopK", "ScatterElements", "ScatterND", "GatherND", "Equal", "Where"}
    scores = {n.input[0] for n in model.graph.node if n.op_type == "Softmax"}
    assert len(scores) == inspection.provenance.schedule.depth
    image = jobs.noise(batch or 2, (3, 64, 64))
    with open_runner(path, threads=1) as runner:
        shapes = {k: v.shape for k, v in runner.run({"image": image}).items()}
    assert shapes == {"logits": (len(image), 10)}


def test_the_bound_is_the_model_with_rows_cut_off(exported, tiny):
    """Eagerly: the rows behind the attention of each block are cut to the schedule's counts."""
    inspection = inspect(exported("tiny_vit", r=8, prop_attn=False))
    path = bound.write_bound(inspection, inspection.path.with_suffix(".cut"))
    model, image = tiny("tiny_vit").module, jobs.noise(2, (3, 64, 64))
    kept = {s.block: s.n_out for s in inspection.provenance.schedule.steps}
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(torch.from_numpy(image))))
        for i, block in enumerate(model.blocks):
            x = x + block.ls1(block.attn(block.norm1(x)))
            x = x[:, : kept.get(i, x.shape[1])]
            x = x + block.ls2(block.mlp(block.norm2(x)))
        wanted = model.forward_head(model.norm(x)).numpy()
    with open_runner(path, threads=1) as runner:
        assert np.abs(runner.run({"image": image})["logits"] - wanted).max() < 1e-5


def test_the_bound_adds_log_sizes_where_the_file_does(exported):
    adds = {}
    for prop_attn in (True, False):
        inspection = inspect(exported("tiny_vit", r=8, batch=1, prop_attn=prop_attn))
        path = bound.write_bound(inspection, inspection.path.with_suffix(".adds"))
        adds[prop_attn] = sum(n.op_type == "Add" for n in onnx.load(path).graph.node)
    assert adds[True] - adds[False] == 5, "every block but the first"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_bound_is_in_the_files_precision(dtype, typed):
    """Between its blocks nothing is cast there and back, though the steps of the file are in float32."""
    inspection = inspect(typed(dtype, method="tome", r=8))
    path = bound.write_bound(inspection, inspection.path.with_suffix(".bound"))
    casts = [n.name for n in onnx.load(path).graph.node if n.op_type == "Cast"]
    assert not any(name.startswith("block") and (".merge/" in name or ".mlp/" in name) for name in casts)
    with open_runner(path, "openvino", threads=1) as runner:
        assert np.isfinite(runner.run({"image": jobs.noise(1, (3, 64, 64))})["logits"]).all()


def test_the_headline_is_speed_over_the_bound(tome):
    """Of two processes that measured the dense file at 8 and 12, the file at 5 and 6, its bound at 4 and 6 seconds."""
    from tokexport.engines.measure.bench import _row
    from tokexport.engines.measure.candidates import Candidate

    candidate = Candidate(inspect(tome), str(tome), "dense", bound="bound")
    measured = lambda dense, file, limit: {"dense": [dense] * 5, str(tome): [file] * 5, "bound": [limit] * 5}
    times = [jobs.Times(t, t, dict.fromkeys(t, "a run"), {}) for t in (measured(8, 5, 4), measured(12, 6, 6))]
    job = jobs.Job("ort", 2, 1, 1.0, (3, 64, 64), (), ())
    row = _row(candidate, job, times)
    assert (row.speedup, row.speedup_low, row.speedup_high) == pytest.approx((1.8, 1.6, 2.0))
    assert (row.bound, row.of_bound, row.of_bound_low, row.of_bound_high) == pytest.approx((2.0, 0.9, 0.8, 1.0))
    assert (row.ms, row.ms_low, row.ms_high, row.rounds) == pytest.approx((5500, 5000, 6000, 10))
    assert row.images_per_second == pytest.approx(2 / 5.5)


def test_the_bound_is_told_where_there_is_one(tome):
    out = run(tome, "--runtime", "ort,torch", "--batch", "1", "--seconds", "0.3", "--bound", "--json")
    _, row, _, eager = json.loads(out.stdout)["rows"]
    assert row["bound"] > 0 and row["of_bound_low"] <= row["of_bound"] <= row["of_bound_high"] and "bound" not in eager
    assert "/ bound" in run(tome, "--runtime", "ort", "--batch", "1", "--seconds", "0.1", "--bound").stderr


def test_a_dense_file_has_no_bound(exported):
    inspection = inspect(exported("tiny_vit", method="none"))
    with pytest.raises(UsageError, match="is dense: it has no bound"):
        bound.write_bound(inspection, inspection.path.with_suffix(".bound"))
