"""The measurements of tune, under a clock that is set: predictions that hold, and a choice that is compared at the same time."""

import json

import numpy as np
import pytest
from PIL import Image
from tokexport.engines.measure.latency_model import CurveKey, LatencyCurves
from tokexport.engines.measure.timing import Ratio
from tokexport.engines.search.candidate_times import FileTime, TimedFiles, key_of
from tokexport.export.files import read_model, write_model
from tokexport.export.inspection import inspect
from tokexport.export.provenance import store
from tokexport.tools import tune_test

from tokexport import export_onnx, load_model

STEP = 0.02  # milliseconds of a reduction


def cost(schedule) -> float:
    return sum(n + 2 * m for n, m in schedule.tokens_per_block()) / 100 + STEP * len(schedule.steps)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    counts = tuple(range(1, 200))
    key = CurveKey("a processor", "ort", "1", "0", "fp32", 1, 1, "")
    made = LatencyCurves(key, counts, tuple(n / 100 for n in counts), tuple(n / 50 for n in counts))
    monkeypatch.setattr(tune_test, "curves_of", lambda *args, **options: made)
    monkeypatch.setattr("tokexport.engines.search.candidate_times.keep_steps", lambda curves, steps: None)

    def times(self, schedules, dense, seconds=None):
        ms = {key_of(s): cost(s) for s in [dense, *schedules]}
        ratio = lambda v: Ratio(*[ms[key_of(dense)] / v] * 3)
        return {k: FileTime(v, ratio(v)) for k, v in ms.items()}

    monkeypatch.setattr(TimedFiles, "times", times)
    monkeypatch.setattr(TimedFiles, "path_of", lambda self, schedule: self.folder / "none")


def test_predictions_of_a_machine_that_is_as_the_model_says_are_exact(capsys):
    assert tune_test.main(["prediction", "--model", "vit_tiny_patch16_224"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == 6 and result["worst"] < 1e-9 and result["steps_ms"]["tome"] == pytest.approx(STEP)
    assert max(row["off_without_steps"] for row in result["rows"]) < 0
    assert max(abs(row["off_by_macs"]) for row in result["rows"]) > 0.01


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(1)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((70, 70)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_the_choice_is_compared_with_one_r_at_the_same_time(exported, photos, tmp_path, capsys):
    """A file with r = 8 itself, between r = 7 and r = 9, is as far from the dense model as they are on average."""
    source, path = exported("tiny_vit", r=8, batch=1), tmp_path / "tuned.onnx"
    table = {"runtime": "ort", "dtype": "fp32", "batch": 1, "threads": 1, "rows": [{"name": "tome", "chosen": True}]}
    proto, weights = read_model(source)
    provenance = inspect(source).provenance
    store(proto, provenance.__class__(**{**vars(provenance), "tuning": table}))
    write_model(proto, weights, path)
    tune_test.main(["choice", str(path), "--images", str(photos), "--r", "2,7,9"])
    result = json.loads(capsys.readouterr().out)
    low, high, share = result["between"]
    assert (low, high) == (7, 9) and 0.4 < share < 0.6 and result["photos"] == 4
    assert abs(result["over_tome"]) < 0.5 and result["holds"] == (result["over_tome"] <= 2 * result["standard_error"])
    assert tune_test.main(["choice", str(path), "--images", str(photos), "--r", "9,10"]) == 2
    assert "which lies between none of" in capsys.readouterr().err
    assert tune_test.main(["choice", str(source), "--images", str(photos)]) == 2
    assert "was not written by `tokexport tune`" in capsys.readouterr().err


def test_learned_counts_are_compared_with_published_ones_at_the_cost_of_each(photos, tmp_path, capsys):
    """The published counts are at no distance from themselves; counts that keep every token are the dense model."""
    loaded = load_model("vit_tiny_patch16_224", {"img_size": 64, "embed_dim": 24})
    every = {"prune_kept": (17,) * 12, "merge_kept": (17,) * 12}
    results = []
    for rates in ("deit_small@2.9", every):
        schedule = loaded.schedule("diffrate", rates=rates)
        path = export_onnx(loaded, schedule, tmp_path / f"{len(results)}.onnx", simplify=False).path
        assert tune_test.main(["rates", str(path), "--images", str(photos)]) == 0
        results.append(json.loads(capsys.readouterr().out))
    same, dense = results
    assert same["learned_over_published"] == 1 and same["standard_error"] == 0 and same["photos"] == 4
    assert (
        same["macs_ratio"]["learned"] == same["macs_ratio"]["published"] > 1.2 == 1.2 * dense["macs_ratio"]["learned"]
    )
    assert dense["learned_over_published"] < 1e-3 < dense["error"]["published"] / same["error"]["published"]
