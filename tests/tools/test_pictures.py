"""viz, eval and the offline demo: real labelled images, a model trained here, and what its pictures show."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tokexport.engines.measure import evaluate, labels
from tokexport.export.errors import EngineError
from tokexport.export.inspection import inspect
from tokexport.tools.cli import group
from tokexport.tools.demo import digits, samples
from tokexport.tools.show import draw

from tokexport import UsageError, export_onnx, load_model


def run(*args):
    out = CliRunner().invoke(group, list(map(str, args)))
    if out.exception is not None and not isinstance(out.exception, (SystemExit, UsageError)):
        raise out.exception
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory, schedule_of):
    path = tmp_path_factory.mktemp("digits") / "tome.onnx"
    loaded = load_model(digits.MODEL, digits.KWARGS, checkpoint=digits.WEIGHTS)
    export_onnx(loaded, schedule_of(loaded.module, 4), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    assert len(digits.write_held_out(folder)) == 450
    return folder


def test_the_weights_are_small_and_good(model, data):
    assert digits.WEIGHTS.stat().st_size + digits.HEADS.stat().st_size < 2e6
    rows = json.loads(run("eval", model, "--images", data, "--json").stdout)["rows"]
    assert [r["name"] for r in rows] == [str(model), "reference, tome", "reference, dense"]
    assert (
        rows[2]["top1"] >= 0.97
        and rows[0]["top1"] == rows[1]["top1"] >= 0.95
        and all(r["top1"] <= r["top5"] <= 1 for r in rows)
    )


def test_accuracy_can_be_low(model, data, tmp_path):
    """Labels that are wrong by one."""
    for folder in data.iterdir():
        (tmp_path / str((int(folder.name) + 1) % 10)).symlink_to(folder)
    rows = json.loads(run("eval", model, "--images", tmp_path, "--limit", 50, "--no-reference", "--json").stdout)[
        "rows"
    ]
    assert len(rows) == 1 and rows[0]["top1"] < 0.1


def test_folders_name_classes_by_number_label_or_order(model, tmp_path):
    names = [f"class_{c}" for c in "abcdefghij"]
    assert labels._class_indices(["3", "7"], 10, labels=(), folder=tmp_path) == {"3": 3, "7": 7}
    assert labels._class_indices(names, 10, labels=(), folder=tmp_path) == {n: i for i, n in enumerate(names)}

    assert labels._class_indices(["two"], 10, labels=("zero", "one", "two"), folder=tmp_path) == {"two": 2}
    with pytest.raises(UsageError, match="has 2 folders .*the model 10 classes"):
        labels._class_indices(["a", "b"], 10, labels=(), folder=tmp_path)


def test_a_limit_is_spread_over_the_classes(model, data):
    images = labels.labelled(data, 10, limit=20)
    assert len(images) == 20 and len({label for _, label in images}) == 10


def test_lists_and_parquet_have_the_accuracy_of_the_folder(model, data, tmp_path):
    """Also with a limit; a class that is missing or none of the file's is told."""
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    images = labels.labelled(data, 10, limit=40)
    (tmp_path / "list.txt").write_text("".join(f"{path.resolve()}\t{label}\n" for path, label in images))
    cells = {"image": [path.read_bytes() for path, _ in images], "label": [label for _, label in images]}
    pq.write_table(pa.table(cells), tmp_path / "some.parquet", row_group_size=7)
    wanted = evaluate.evaluate(model, images)[0].hits
    assert 0 < wanted.top1 <= 40 and wanted.images == 40
    for name in ("list.txt", "some.parquet"):
        assert evaluate.evaluate(model, tmp_path / name)[0].hits == wanted
        few = run("eval", model, "--images", tmp_path / name, "--limit", 10, "--no-reference", "--json")
        assert json.loads(few.stdout)["rows"][0]["images"] == 10
    for line, words in (("", "does not say the class"), ("\t10", "says class '10'"), ("\tcat", "says class 'cat'")):
        (tmp_path / "bad.txt").write_text(f"{images[0].path.resolve()}{line}\n")
        with pytest.raises(UsageError, match=words):
            evaluate.evaluate(model, tmp_path / "bad.txt")


def test_counts_of_shards_add_up(model, data):
    """Each image is in one shard, and the sum is the accuracy of all."""
    images = labels.labelled(data, 10, limit=23)
    options = {"reference": True, "dense": True}
    whole = evaluate.evaluate(model, images, **options)
    shards = [evaluate.evaluate(model, images, shard=i, shards=3, **options) for i in range(3)]
    assert [s[0].hits.images for s in shards] == [8, 8, 7] and evaluate.added(shards) == whole
    assert [evaluate.Accuracy.from_json(json.loads(json.dumps(a.to_json()))) for a in whole] == whole
    assert evaluate.evaluate(model, images[:1], shard=1, shards=2)[0].hits == evaluate.Hits(), "a shard may be empty"
    with pytest.raises(UsageError, match="of the same models"):
        evaluate.added([whole, whole[:1]])
    with pytest.raises(UsageError, match="shard 3 of 3: wanted 0 to 2"):
        evaluate.evaluate(model, images, shard=3, shards=3)


def test_hits_are_counted_among_the_likeliest():
    logits = np.float32([[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]])
    assert evaluate._hits("f", logits, np.array([6, 4])) == evaluate.Hits(2, 1, 2)
    assert evaluate._hits("f", logits, np.array([1, 5])) == evaluate.Hits(2, 0, 0)
    with pytest.raises(EngineError, match="not finite"):
        evaluate._hits("f", np.full_like(logits, np.nan), np.array([1, 5]))


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_every_engine_has_the_same_accuracy(runtime, model, data):
    out = run("eval", model, "--images", data, "--limit", 37, "--runtime", runtime, "--json")
    rows = json.loads(out.stdout)["rows"]
    assert rows[0]["top1"] == rows[1]["top1"]


def test_bad_data_is_one_error(model, exported, dinov2, tmp_path):
    (tmp_path / "empty").mkdir()
    for args, words in (
        ([model, "--images", tmp_path / "none"], "wanted a folder with"),
        ([model, "--images", tmp_path / "empty"], "has no folders"),
        ([model, "--images", tmp_path], "has 1 folders"),
        ([model, "--images", tmp_path, "--limit", 0], "limit 0"),
        ([dinov2("evit"), "--images", tmp_path], "needs a classifier"),
    ):
        assert words in str(run("eval", *args).exception)


@pytest.mark.parametrize("method", ["tome", "evit", "etps", "dtps", "dynamicvit", "diffrate"])
def test_a_picture_shows_what_goes(method, exported, method_cases, tmp_path):
    path = exported("tiny_vit", method=method, **method_cases[method])
    out = run("viz", path, *samples.sample_photos(), "-o", tmp_path / "v.png")
    steps = inspect(path).provenance.schedule.steps
    with Image.open(tmp_path / "v.png") as image:
        assert out.exit_code == 0 and image.width > 448 * (min(len(steps), 4) + 1) and image.height > 2 * 448
    assert isinstance(run("viz", path, *samples.sample_photos(), "-o", tmp_path / "v.png").exception, UsageError), (
        "never replaced unasked"
    )


def test_patches_of_a_token_share_a_colour_and_those_that_are_gone_are_dark():
    pixels = np.random.default_rng(0).integers(100, 255, (448, 448, 3), dtype=np.uint8)
    sources = np.array([0, 0, -1, 3])
    out = np.asarray(draw.draw_sources(Image.fromarray(pixels), (2, 2), sources))
    inner = lambda r, c: out[r * 224 + 4 : r * 224 + 220, c * 224 + 4 : c * 224 + 220].astype(float)
    assert inner(0, 0).std(axis=(0, 1)).max() == 0 and (inner(0, 0)[0, 0] == inner(0, 1)[0, 0]).all(), "one colour"
    assert inner(1, 0).mean() < 90 < inner(1, 1).mean() and inner(1, 1).std() > 20, (
        "gone is dark, alone keeps its texture"
    )


def test_bad_use_of_viz_is_one_error(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo, path = samples.sample_photos()[0], exported("tiny_vit", method="evit", at=(1, 3, 4))
    for args, words in (
        ([exported("tiny_vit", method="none"), photo], "is dense"),
        ([path, photo, "--at", "2"], "these have one: 1, 3, 4"),
        ([path, photo, "-o", "v.jpg"], "ends in .png"),
        ([path, *[photo] * 33], "at most 32"),
        ([path, "none.png"], "no such file"),
    ):
        assert words in str(run("viz", *args).exception) and list(tmp_path.iterdir()) == []


def test_the_demo_replaces_no_files_but_its_own(tmp_path):
    (tmp_path / "digits_tome.onnx").write_text("precious")
    assert "that no demo made" in str(run("demo", "--offline", "-o", tmp_path).exception)
    assert (tmp_path / "digits_tome.onnx").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_models_with_other_classes_are_not_evaluated_together(model, exported, data):
    other = exported("tiny_vit", method="tome", r=8)
    assert run("eval", model, other, "--images", data, "--limit", 5, "--no-reference").exit_code == 0, (
        "ten classes both"
    )
    loaded = load_model(digits.MODEL, {**digits.KWARGS, "num_classes": 5})

    five = data.parent / "five.onnx"
    export_onnx(loaded, loaded.schedule("tome", r=4), five, force=True)
    assert "other classes" in str(run("eval", model, five, "--images", data).exception)


def test_the_folder_of_images_may_be_this_one_but_has_a_name(model, data, monkeypatch):
    monkeypatch.chdir(data)
    assert run("eval", model, "--images", ".", "--limit", 3, "--no-reference").exit_code == 0
    empty = run("eval", model, "--images", "")
    assert empty.exit_code == 2 and "--images is empty" in empty.stderr


def test_names_with_markup_are_printed_as_they_are(model, data, tmp_path):
    path = tmp_path / "[red]d[/b].onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.read_bytes())
    out = run("eval", path, "--images", data, "--limit", 3, "--no-reference")
    assert out.exit_code == 0 and "[red]d[/b].onnx" in out.stderr


def test_training_learns(tmp_path):
    """One short run of the training script's parts: the loss falls, heads have the published shapes."""
    import torch
    from tokexport.export.checkpoints import score_heads
    from tokexport.tools.demo import train_digits

    g = torch.Generator().manual_seed(0)
    net = load_model(digits.MODEL, {**digits.KWARGS, "depth": 10, "embed_dim": 24}, seed=0).module
    x = torch.randn(10, 3, 32, 32, generator=g)
    y = torch.arange(10)
    first = torch.nn.functional.cross_entropy(net(x), y)
    train_digits.train_model(net, x.repeat(4, 1, 1, 1), y.repeat(4), 12, g)
    assert torch.nn.functional.cross_entropy(net(x), y) < first - 0.03
    heads = train_digits.train_heads(net, x, y, 1, g)
    score_heads.check_heads(dict(heads.state_dict()), 24, 3)
