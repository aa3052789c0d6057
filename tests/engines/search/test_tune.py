"""`tokexport tune`: the candidates, the strength that a budget asks for, errors, the choice under a fake clock, and what is refused."""

import hashlib
import json
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tokexport.engines.measure.latency_model import CurveKey, LatencyCurves
from tokexport.engines.measure.timing import Ratio
from tokexport.engines.search import image_errors, tune
from tokexport.engines.search.budget import Budget
from tokexport.engines.search.candidate_times import FileTime, TimedFiles, key_of
from tokexport.engines.search.photos import SearchPhotos
from tokexport.engines.search.variants import TunedModel, spread_r, strength_for, stretched, variants
from tokexport.export import macs, reducers
from tokexport.export.inspection import inspect
from tokexport.export.reducers import diffrate_rates
from tokexport.export.step import ModelSize
from tokexport.tools.cli import group

from tokexport import Schedule, UsageError

DEIT = TunedModel(ModelSize(197, 1, 12), 384, True, True)
TINY = ["--model", "vit_tiny_patch16_224", *(f"--model-kwargs={k}={v}" for k, v in {
    "img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4, "num_classes": 10}.items())]  # fmt: skip


def cost(schedule) -> float:
    """Milliseconds on a machine that is as the latency model says: tokens, and 0.5 a reduction."""
    return sum(n + 2 * m for n, m in schedule.tokens_per_block()) / 100 + 0.5 * len(schedule.steps) / 100


def test_every_method_of_the_table_has_variants_or_a_reason():
    full = TunedModel(ModelSize(197, 1, 12), 384, True, True, ("score_head", "metric_layer"))
    made, left_out = variants(full)
    assert {v.method for v in made} == set(reducers.TABLE) - {"none"} and not left_out and 15 <= len(made) <= 30
    made, left_out = variants(DEIT)
    assert {line.split()[0] for line in left_out} == {"dtps", "dynamicvit", "dtem"}
    assert not {"dtps", "dynamicvit", "dtem"} & {v.method for v in made}


def test_a_model_without_a_class_token_sorts_by_mean_attention():
    made, _ = variants(TunedModel(ModelSize(64, 0, 6), 64, False, False))
    evit = next(v for v in made if v.method == "evit")
    assert evit.options(0.3)["score"] == "mean" and not any("last block free" in v.name for v in made)


@pytest.mark.parametrize("target", [0.9, 0.66, 0.5])
def test_the_strength_is_the_least_within_the_budget(target):
    dense, fits = cost(Schedule("none", 197, 1, 12)), None
    for variant in variants(DEIT)[0]:
        fits = lambda s: cost(s) <= dense * target
        strength, schedule = strength_for(variant, DEIT.size, fits)
        assert fits(schedule), variant.name
        weaker = strength - 1 if variant.whole else strength * 0.98
        options = {k: v for k, v in variant.options(weaker).items() if v is not None}
        other = Schedule.parse(variant.method, n_tokens=197, depth=12, **options)
        assert other.steps == schedule.steps or not fits(other), variant.name


def test_r_is_spread_evenly_and_the_last_block_takes_half():
    values = spread_r(8.25, 12, n_patches=196, last_is_free=True)
    assert (
        set(values[:-1]) <= {8, 9}
        and sum(values[:11]) == round(8.25 * 11)
        and values[-1] == (196 - sum(values[:11])) // 2
    )
    assert set(spread_r(8, 12, n_patches=196, last_is_free=False)) == {8}
    assert min(spread_r(90, 12, n_patches=196, last_is_free=True)) >= 0


def test_lists_are_stretched_in_proportion():
    counts = diffrate_rates.published()["deit_small"]["2.9"]
    assert stretched(counts, 1.0, size=DEIT.size)[:2] == (counts.prune_kept, counts.merge_kept)
    assert set(stretched(counts, 0.0, size=DEIT.size).merge_kept) == {197}
    assert min(stretched(counts, 50.0, size=DEIT.size).merge_kept) == 2


def test_budgets_know_when_they_are_met():
    assert Budget("speedup", 2.0).most_ms(30) == 15 and Budget("latency_ms", 20).most_ms(30) == 20
    assert Budget("macs", 1e9).fits(1e9, 10**9, dense_ms=1) and not Budget("macs", 1e9).fits(0.1, 10**9 + 1, dense_ms=1)
    assert Budget("speedup", 2.0).off(16, dense_ms=30) and Budget("speedup", 2.0).off(12, dense_ms=30)
    assert not Budget("speedup", 2.0).off(14.9, dense_ms=30)
    assert Budget("speedup", 2.0).met(15.1, dense_ms=30) and not Budget("speedup", 2.0).met(15.5, dense_ms=30)
    for wrong in (("speedup", 1.0), ("speedup", float("nan")), ("latency_ms", 0), ("macs", -1)):
        with pytest.raises(UsageError, match=wrong[0]):
            Budget(*wrong)


def test_errors_are_zero_for_equal_outputs_and_grow_with_distance():
    x = np.random.default_rng(0).standard_normal((5, 10))
    assert image_errors.divergence(x, x).max() < 1e-12 and image_errors.one_minus_cosine(x, 3 * x).max() < 1e-12
    p, q = np.array([[0.7, 0.3]]), np.array([[0.5, 0.5]])
    wanted = 0.7 * np.log(0.7 / 0.5) + 0.3 * np.log(0.3 / 0.5)
    assert image_errors.divergence(np.log(p) + 5, np.log(q)) == pytest.approx(wanted)
    assert image_errors.one_minus_cosine(np.array([[1.0, 0]]), np.array([[1.0, 1]])) == pytest.approx(1 - 0.5**0.5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six photos of smooth noise, in two folders named by class."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    for i in range(6):
        (folder / str(i % 2)).mkdir(exist_ok=True)
        small = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((80, 70)).save(folder / str(i % 2) / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Where files are kept that several tests export."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture
def clock(monkeypatch, files):
    """A machine on which every file takes what `cost` says, times what is set for its method (`clock["evit"] = 1.2`)."""
    factors: dict[str, float] = {}
    counts = tuple(range(1, 66))
    key = CurveKey("a processor", "ort", "1", "0", "fp32", 1, 1, "64 wide")
    steps = dict.fromkeys(reducers.TABLE, 0.005)
    made = LatencyCurves(key, counts, tuple(n / 100 for n in counts), tuple(n / 50 for n in counts), steps)
    monkeypatch.setattr(tune, "curves_of", lambda *args, **options: made)

    def times(self, schedules, dense, seconds=None):
        slow = {key_of(s): cost(s) * factors.get(s.method, 1.0) for s in [dense, *schedules]}
        first = slow[key_of(dense)]
        return {k: FileTime(ms, Ratio(first / ms, first / ms, first / ms)) for k, ms in slow.items()}

    export = TimedFiles.path_of

    def path_of(self, schedule):
        """Each file is exported once for all tests."""
        name = hashlib.sha256(f"{self.loaded.weights['sha256']} {key_of(schedule)}".encode()).hexdigest()
        path = files / f"{name[:16]}.onnx"
        if not path.exists():
            shutil.copy(export(self, schedule), path)
        return path

    monkeypatch.setattr(TimedFiles, "times", times)
    monkeypatch.setattr(TimedFiles, "path_of", path_of)
    return factors


def run(loaded, photos, path, budget, **settings):
    paths = sorted(photos.glob("*/*.png"))
    labels = [int(p.parent.name) for p in paths] if settings.pop("labels", False) else None
    return tune.tune(loaded, SearchPhotos(paths, labels), path, budget, settings=tune.TuneSettings(**settings))


def test_the_choice_is_the_least_error_within_the_budget(tiny, photos, clock, tmp_path):
    report = run(tiny("tiny_vit"), photos, tmp_path / "a.onnx", Budget("speedup", 1.4), labels=True)
    chosen, dense = report.chosen, cost(Schedule("none", 65, 1, 6))
    assert report.passed and report.measure == "KL" and report.images == 6
    real = [r for r in report.rows if not r.further]
    assert chosen.distance == min(r.distance for r in real if r.reaches) and chosen.over_best == 0
    assert dense / 1.4 * 0.97 <= chosen.measured_ms <= dense / 1.4 * 1.01
    assert (
        chosen.measured_ms == pytest.approx(chosen.predicted_ms) and sum(r.measured_ms is not None for r in real) == 3
    )
    assert all(r.accuracy is not None and 0 <= r.same <= 1 for r in real) and report.dense_accuracy is not None
    stored = inspect(report.path).provenance
    assert stored.tuning["budget"] == {"kind": "speedup", "value": 1.4} and len(stored.tuning["rows"]) == len(
        report.rows
    )
    assert stored.schedule.method == chosen.method
    assert tuple(m for _, m in stored.schedule.tokens_per_block()) == chosen.tokens
    further = [r.macs_ratio for r in report.rows if r.further]
    assert min(further) < chosen.macs_ratio < max(further) and len(report.worst[0].sources) == 64


def test_the_same_seed_draws_the_same_images_and_makes_the_same_choice(tiny, photos, clock, tmp_path):
    choose = lambda name, seed: run(
        tiny("tiny_vit"), photos, tmp_path / name, Budget("speedup", 1.4), methods=("tome",), limit=3, seed=seed
    )
    first, again, other = choose("a.onnx", 1), choose("b.onnx", 1), choose("c.onnx", 2)
    assert first.rows == again.rows and first.rows != other.rows and first.images == 3


def test_what_is_slower_than_predicted_is_solved_for_again(tiny, photos, clock, tmp_path):
    """All files take a tenth longer than their half blocks say: the strength grows until they are within the budget."""
    clock.update(dict.fromkeys(reducers.TABLE, 1.1), none=1.0)
    report = run(tiny("tiny_vit"), photos, tmp_path / "a.onnx", Budget("latency_ms", 8.0), methods=("tome", "evit"))
    assert report.passed and report.chosen.measured_ms <= 8.0 * 1.01
    assert any("solved for again" in note for note in report.notes)
    slower = run(tiny("tiny_vit"), photos, tmp_path / "b.onnx", Budget("latency_ms", 8.8), methods=("tome", "evit"))
    assert slower.chosen.macs_ratio < report.chosen.macs_ratio


def test_a_budget_of_macs_is_counted(tiny, photos, clock, tmp_path):
    loaded = tiny("tiny_vit")
    dense = macs.count(inspect_dims(loaded), Schedule("none", 65, 1, 6))
    report = run(loaded, photos, tmp_path / "a.onnx", Budget("macs", dense * 0.7), methods=("tome", "evit"))
    assert report.passed and report.chosen.macs <= dense * 0.7 and {r.method for r in report.rows} == {"tome", "evit"}


def test_a_choice_that_is_no_faster_is_told(tiny, photos, clock, tmp_path):
    report = run(tiny("tiny_vit"), photos, tmp_path / "a.onnx", Budget("macs", 9e6), methods=("tome",))
    told = lambda speedup: replace(report, rows=(replace(report.chosen, speedup=speedup),)).words()[0]
    assert "no faster than the dense model" in told(0.99) and "no faster" not in told(1.2)
    assert report.budget.reached_words(1.0, 9_500_000, dense_ms=1.0) == "9.5 M"


def inspect_dims(loaded):
    from tokexport.export.models import as_plain

    return as_plain(loaded.module).dims


def test_a_budget_that_nothing_reaches_names_the_nearest_and_writes_nothing(tiny, photos, clock, tmp_path):
    report = run(tiny("tiny_vit"), photos, tmp_path / "a.onnx", Budget("speedup", 50))
    assert not report.passed and not list(tmp_path.iterdir())
    (words,) = report.words()
    assert "No candidate reaches 50 times" in words and report.nearest.name in words
    assert report.nearest.predicted_ms == min(r.predicted_ms for r in report.rows)


def test_a_budget_that_the_dense_model_meets_reduces_nothing(tiny, photos, clock, tmp_path):
    report = run(tiny("tiny_vit"), photos, tmp_path / "a.onnx", Budget("latency_ms", 1000))
    assert report.passed and inspect(report.path).provenance.schedule.method == "none"
    assert "Nothing is reduced" in report.words()[0]


def test_features_are_compared_by_cosine_and_have_no_labels(clock, photos, tmp_path):
    from tokexport import load_model

    from ...cases import KWARGS

    loaded = load_model("vit_tiny_patch16_224", {**KWARGS, "num_classes": 0})
    report = run(loaded, photos, tmp_path / "a.onnx", Budget("speedup", 1.3), methods=("tome",))
    assert report.measure == "1 - cosine" and report.chosen.same is None
    with pytest.raises(UsageError, match="labels: the model has no classes"):
        run(loaded, photos, tmp_path / "b.onnx", Budget("speedup", 1.3), labels=True)


def test_one_image_is_enough_and_tells_no_two_apart(tiny, photos, clock, tmp_path):
    report = run(tiny("tiny_vit"), photos, tmp_path / "a.onnx", Budget("speedup", 1.4), methods=("tome",), limit=1)
    assert report.passed and json.dumps(report.to_json(), allow_nan=False) and "one image" in report.words()[-1]
    assert "worst" not in inspect(report.path).provenance.tuning


def test_an_interrupt_waits_for_the_end_of_a_trace(monkeypatch):
    from tokexport.export.graph import trace

    def export(*args, **options):
        signal.raise_signal(signal.SIGINT)
        ended.append("traced")
        return SimpleNamespace(run_decompositions=None)

    ended = []
    monkeypatch.setattr("torch.export.export", export)
    monkeypatch.setattr("torch.onnx.export", lambda program, **options: ended.append("translated"))
    monkeypatch.setattr(trace.ops, "translations", dict)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell ignores it for what runs in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            trace.translate(None, ())
        assert ended == ["traced", "translated"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_leaves_nothing_behind(tiny, photos, clock, tmp_path, monkeypatch):
    def interrupted(self, schedules, dense, seconds=None):
        assert list(tmp_path.glob(".tokexport-*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(TimedFiles, "times", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny("tiny_vit"), photos, tmp_path / "a.onnx", Budget("speedup", 1.4), methods=("tome",))
    assert not list(tmp_path.iterdir())


def cli(*args):
    return CliRunner().invoke(group, ["tune", *map(str, args)])


@pytest.fixture
def tiny_args(golden):
    return [*TINY, "--checkpoint", golden.folder / "tiny_vit.safetensors"]


def test_the_command_writes_file_page_and_json(tiny_args, photos, clock, tmp_path):
    page = tmp_path / "page.html"
    out = cli(*tiny_args, "--images", photos, "--labels", "--speedup", "1.3", "--methods", "tome,evit", "-o", tmp_path / "a.onnx",
              "--report", page, "--json")  # fmt: skip
    assert out.exit_code == 0, (out.output, out.exception)
    data = json.loads(out.stdout)
    assert data["passed"] and data["budget"] == {"kind": "speedup", "value": 1.3} and data["dense_accuracy"] is not None
    html = page.read_text()
    assert html.count("<circle") > 5 and "<polyline" in html and html.count("data:image/png;base64") == 6
    assert "http" not in html and all(word in html for word in data["rows"][0]["name"].split(", "))


def test_the_command_ends_with_one_when_nothing_reaches_the_budget(tiny_args, photos, clock, tmp_path):
    out = cli(
        *tiny_args,
        "--images",
        photos / "0",
        "--speedup",
        "40",
        "-o",
        tmp_path / "a.onnx",
        "--report",
        tmp_path / "p.html",
    )
    assert out.exit_code == 1 and "The nearest is" in out.stderr and not (tmp_path / "a.onnx").exists()


BAD = {
    "no budget": (["--images", "PHOTOS"], "no budget given"),
    "two budgets": (["--images", "PHOTOS", "--speedup", "2", "--macs", "1M"], "--speedup and --macs given"),
    "no speedup": (["--images", "PHOTOS", "--speedup", "0.9"], "--speedup 0.9: wanted a speedup above 1"),
    "macs": (["--images", "PHOTOS", "--macs", "many"], "--macs 'many'"),
    "no images": (["--images", "EMPTY", "--speedup", "1.3"], "has no image"),
    "no photo": (["--images", "TEXT", "--speedup", "1.3"], "cannot be read as an image"),
    "labels": (["--images", "PHOTOS/0", "--labels", "--speedup", "1.3"], "has no folders"),
    "method": (["--images", "PHOTOS/0", "--methods", "tom", "--speedup", "1.3"], "unknown method 'tom'"),
    "dense": (["--images", "PHOTOS/0", "--methods", "none", "--speedup", "1.3"], "--methods none: it reduces nothing"),
    "heads": (["--images", "PHOTOS/0", "--methods", "dtps", "--speedup", "1.3"], "trained layers are not there"),
    "rates": (
        ["--images", "PHOTOS/0", "--rates", "deit_small@2.9", "--speedup", "1.3"],
        "counts for a model with 6 blocks",
    ),
    "rates alone": (
        ["--images", "PHOTOS/0", "--rates", "x", "--methods", "tome", "--speedup", "1.3"],
        "are DiffRate's",
    ),
    "rates file": (["--images", "PHOTOS/0", "--rates", "x.json", "--speedup", "1.3"], "no such file"),
    "runtime": (["--images", "PHOTOS/0", "--runtime", "trt", "--speedup", "1.3"], "unknown runtime"),
    "limit": (["--images", "PHOTOS/0", "--limit", "0", "--speedup", "1.3"], "--limit 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error_and_nothing_is_written(name, tiny_args, photos, clock, tmp_path):
    arguments, words = BAD[name]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    places = {"PHOTOS/0": photos / "0", "PHOTOS": photos, "EMPTY": tmp_path / "empty", "TEXT": tmp_path / "text.png"}
    out = cli(*tiny_args, *(places.get(a, a) for a in arguments), "-o", tmp_path / "a.onnx")
    assert isinstance(out.exception, UsageError) and words in str(out.exception), (out.exception, out.output)
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "text.png"}
