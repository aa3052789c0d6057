"""Embedding: the same rows whatever the images come from, broken images in a table, and a killed run that goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image
from tokexport.engines import data, decode
from tokexport.engines.embed.estimate import estimate
from tokexport.engines.embed.folder import read_embedding
from tokexport.engines.embed.local import embed
from tokexport.engines.embed.options import EmbedOptions
from tokexport.engines.files import inspect_file
from tokexport.engines.images import load_images
from tokexport.engines.outputs import probabilities
from tokexport.engines.predict import outputs_of
from tokexport.export.errors import EngineError
from tokexport.tools.cli import group

from tokexport import UsageError

SUBPROCESS = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twenty-three photos of odd sizes in a folder with folders, in the order in which they are listed."""
    folder, random = tmp_path_factory.mktemp("many"), np.random.default_rng(3)
    names = [f"{i:02d}.png" for i in range(9)] + [f"b/{i:02d}.jpg" for i in range(9)] + [f"ü/{i}.png" for i in range(5)]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        small.resize((60 + 7 * i, 100 - 2 * i), Image.Resampling.BICUBIC).save(folder / name)
    (folder / "notes.txt").write_text("no photo")
    (folder / ".hidden").mkdir()
    shutil.copy(folder / "00.png", folder / ".hidden" / "00.png")
    return folder, names


@pytest.fixture(scope="module")
def parquet(photos, tmp_path_factory):
    """The same photos as two parquet files, with the columns of Hugging Face datasets, in row groups of four."""
    folder, (root, names) = tmp_path_factory.mktemp("parquet"), photos
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for i, part in enumerate((names[:13], names[13:])):
        rows = pa.array([{"bytes": (root / name).read_bytes(), "path": name} for name in part], kind)
        label = pa.array([len(name) % 10 for name in part])
        pq.write_table(pa.table({"image": rows, "label": label}), folder / f"{i}.parquet", row_group_size=4)
    return folder


def rows_of(folder):
    """All rows of an embedding, as arrays by column."""
    table = pq.read_table(folder / "parts")
    array = lambda c: np.array(c.to_pylist(), object if pa.types.is_string(c.type) else None)
    return {name: array(table[name]) for name in table.column_names}


def same(a, b, atol=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        if a[name].dtype.kind == "f":
            assert np.allclose(a[name], b[name], atol=atol)
        else:
            assert np.array_equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def whole(exported, photos, tmp_path_factory):
    """The embedding of the folder in one part, with logits and the three likeliest classes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    options = EmbedOptions(columns=("logits", "class", "score", "classes", "scores", "sources"), top=3, threads=1)
    report = embed(exported("tiny_vit"), photos[0], output=out, options=options)
    assert report.computed == 23 and report.manifest.broken == 0
    return out


def test_rows_are_what_the_file_gives(whole, exported, photos):
    root, names = photos
    rows = rows_of(whole)
    wanted = outputs_of(exported("tiny_vit"), [root / n for n in names], runtime="ort", progress=lambda s: None)
    assert rows["index"].tolist() == list(range(23)) and rows["path"].tolist() == names
    assert np.allclose(rows["logits"], wanted, atol=1e-5)
    best = np.argsort(-wanted, axis=1, kind="stable")[:, :3]
    assert np.array_equal(rows["classes"], best) and np.array_equal(rows["class"], best[:, 0])
    assert np.allclose(rows["scores"], np.take_along_axis(probabilities(wanted), best, 1), atol=1e-5)
    assert np.allclose(rows["score"], rows["scores"][:, 0])
    schema = pq.read_schema(whole / "parts" / "part-000000.parquet")
    assert schema.field("logits").metadata[b"shape"] == b"10" and rows["sources"].shape == (23, 65)
    manifest = read_embedding(whole)
    assert manifest.complete and manifest.images == 23 and [c.name for c in manifest.columns] == schema.names


def test_list_and_parquet_give_the_rows_of_the_folder(whole, exported, photos, parquet, tmp_path):
    root, names = photos
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{os.path.relpath(root / n, tmp_path)}\n\n" for n in names))
    options = EmbedOptions(columns=("class", "score", "logits"), part_size=5, workers=2, threads=1)
    for source, name in ((listing, "list"), (parquet, "parquet")):
        report = embed(exported("tiny_vit"), source, output=tmp_path / name, options=options)
        assert len(list((tmp_path / name / "parts").iterdir())) == 5 == report.manifest.n_parts
        rows = rows_of(tmp_path / name)
        if name == "list":
            rows["path"] = np.array([os.path.relpath(tmp_path / p, root) for p in rows["path"]], object)
        same(rows, {k: v for k, v in rows_of(whole).items() if k in rows})


def test_slices_are_those_of_the_whole(photos, parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "STRIDE", 4)
    monkeypatch.setattr(data, "AT_ONCE", 3)
    for path in (photos[0], parquet):
        images = data.open_data(path, tmp_path / "listing")
        every = list(images.items())
        assert [i.index for i in every] == list(range(images.images)) and images.images == 23
        for start, stop in ((0, 1), (3, 9), (11, 15), (12, 14), (22, 23), (20, 99), (23, 25)):
            assert list(images.items(start, stop)) == every[start:stop]


def test_names_of_rows_without_names(photos, tmp_path):
    root, names = photos
    for i in range(2):
        rows = pa.array([(root / name).read_bytes() for name in names[:3]])
        pq.write_table(pa.table({"n": [1, 2, 3], "photo": rows}), tmp_path / f"{i}.parquet", row_group_size=2)
    items = list(data.open_data(tmp_path, tmp_path / "listing").items(2, 5))
    assert [i.name for i in items] == ["0.parquet#2", "1.parquet#0", "1.parquet#1"]


def test_model_input_is_that_of_one_photo_to_the_bit(exported, photos):
    root, names = photos
    preprocess = inspect_file(exported("tiny_vit")).provenance.preprocess
    items = [data.ImageItem(i, name, root / name) for i, name in enumerate(names)]
    chunk = decode.decode(items, preprocess)
    wanted = load_images([root / n for n in names], preprocess)
    assert np.array_equal(decode.model_input(chunk.pixels, preprocess), wanted)


@pytest.fixture
def damaged(photos, tmp_path):
    """A folder of five photos, one cut short, one that is text; and a list with a path that leads nowhere."""
    root, names = photos
    folder = tmp_path / "damaged"
    folder.mkdir()
    for name in names[:5]:
        shutil.copy(root / name, folder)
    (folder / "01.png").write_bytes((root / "01.png").read_bytes()[:200])
    (folder / "03.png").write_text("hello")
    (tmp_path / "list.txt").write_text("damaged/00.png\nnowhere.png\ndamaged/02.png\n")
    return folder


def test_broken_images_go_to_the_errors_table(exported, damaged, tmp_path):
    arguments = [
        "embed",
        str(exported("tiny_vit")),
        "--images",
        str(damaged),
        "-o",
        str(tmp_path / "out"),
        "--part-size",
        "2",
    ]
    result = CliRunner().invoke(group, [*arguments, "--json"])
    assert result.exit_code == 1 and "2 of 5 images gave nothing" in result.stderr
    assert json.loads(result.stdout)["broken"] == 2
    errors = pq.read_table(tmp_path / "out" / "errors").to_pylist()
    assert [(e["index"], e["path"]) for e in errors] == [(1, "01.png"), (3, "03.png")]
    assert all(e["path"] in e["error"] for e in errors)
    assert rows_of(tmp_path / "out")["index"].tolist() == [0, 2, 4]
    again = CliRunner().invoke(group, arguments)
    assert again.exit_code == 1 and "there already" in again.stderr


def test_a_path_that_leads_nowhere_is_a_broken_image(exported, damaged, tmp_path):
    report = embed(exported("tiny_vit"), damaged.parent / "list.txt", output=tmp_path / "out")
    assert report.manifest.broken == 1
    assert pq.read_table(tmp_path / "out" / "errors")["path"].to_pylist() == ["nowhere.png"]


def test_outputs_that_are_not_finite_have_no_row(exported, photos, tmp_path, monkeypatch):
    from tokexport.engines.embed.job import EmbedJob

    real = EmbedJob.outputs

    def outputs(self, runner, chunk):
        values = real(self, runner, chunk)
        values["logits"][[i.name == "05.png" for i in chunk.items]] = np.nan
        return values

    monkeypatch.setattr(EmbedJob, "outputs", outputs)
    embed(exported("tiny_vit"), photos[0], output=tmp_path / "out")
    (error,) = pq.read_table(tmp_path / "out" / "errors").to_pylist()
    assert error["path"] == "05.png" and "not finite" in error["error"]
    assert 5 not in rows_of(tmp_path / "out")["index"]


def test_a_killed_run_goes_on(exported, photos, tmp_path):
    """SIGKILL in the middle: finished parts are kept and not computed again, nothing is left over, all rows are there."""
    root, names = photos
    listing, out = tmp_path / "list.txt", tmp_path / "out"
    listing.write_text("".join(f"{root / n}\n" for n in names) * 80)
    arguments = [
        str(exported("tiny_vit")),
        "--images",
        str(listing),
        "-o",
        str(out),
        "--part-size",
        "46",
        "--workers",
        "1",
    ]
    command = [sys.executable, "-m", "tokexport", "embed", *arguments, "--threads", "1"]
    process = subprocess.Popen(command, env=SUBPROCESS, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list((out / "parts").glob("part-*")) if out.exists() else True:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in (out / "parts").glob("part-*")}
    assert 1 <= len(before) < 40 and not read_embedding(out).complete
    report = embed(exported("tiny_vit"), listing, output=out, options=EmbedOptions(part_size=46, threads=1))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert report.computed == 23 * 80 - 46 * len(before) and report.manifest.complete
    assert rows_of(out)["index"].tolist() == list(range(23 * 80))
    assert not list((out / "parts").glob(".*"))
    while members(process.pid):  # the decoding process sees by itself that its parent is gone
        time.sleep(0.01)


def members(session: int) -> list[str]:
    """Processes of a session that still run."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            alive.append(stat.parent.name)
    return alive


def test_no_more_is_decoded_than_is_needed(exported, photos):
    """Flat memory: while the first chunk is worked on, only a few more have been taken from the data."""
    taken = []

    def items():
        for i in range(10_000):
            taken.append(i)
            yield data.ImageItem(i, "x", photos[0] / photos[1][0])

    preprocess = inspect_file(exported("tiny_vit")).provenance.preprocess
    for workers in (0, 2):
        taken.clear()
        with decode.Decoder(preprocess, workers) as decoder:
            chunks = decoder.chunks(items(), 4)
            assert next(chunks).pixels.shape == (4, 64, 64, 3)
            assert len(taken) <= 4 * (1 + decode.AHEAD * workers)
            chunks.close()


def test_a_decoder_that_dies_is_an_error(exported, photos):
    preprocess = inspect_file(exported("tiny_vit")).provenance.preprocess
    items = (data.ImageItem(i, "x", photos[0] / photos[1][0]) for i in range(1000))
    with decode.Decoder(preprocess, 1) as decoder:
        chunks = decoder.chunks(items, 1)
        next(chunks)
        for process in list(decoder._pool._processes.values()):
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="decoding process was killed"):
            list(chunks)


def test_another_job_is_refused_and_force_starts_anew(whole, exported, photos, parquet, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    file, options = exported("tiny_vit"), EmbedOptions(columns=("class",))
    with pytest.raises(UsageError, match="another run.*columns"):
        embed(file, photos[0], output=out, options=options)
    with pytest.raises(UsageError, match="another run.*other images"):
        embed(file, parquet, output=out)
    with pytest.raises(UsageError, match="another run.*another file"):
        model = onnx.load(file)
        model.doc_string = "another file"
        onnx.save(model, tmp_path / "other.onnx")
        embed(tmp_path / "other.onnx", photos[0], output=out)
    report = embed(file, photos[0], output=out, options=EmbedOptions(columns=("class",), force=True))
    assert report.computed == 23 and rows_of(out).keys() == {"index", "path", "class"}


def test_two_runs_in_one_folder(exported, photos, tmp_path):
    from tokexport.engines.embed.folder import opened

    with opened(tmp_path / "out", force=False), pytest.raises(UsageError, match="another process"):
        embed(exported("tiny_vit"), photos[0], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()  # nothing was begun


@pytest.mark.parametrize(
    "case, text",
    [
        ("nowhere", "no such file or folder"),
        ("empty", "has no image"),
        ("photo", "single photo"),
        ("binary", "neither text nor parquet"),
        ("blank", "is empty"),
        ("damaged", "cannot be read as parquet"),
        ("columns", "no column of encoded images"),
        ("several", "several columns"),
        ("rows", "has no rows"),
    ],
)
def test_what_is_no_data_is_told_in_one_line(exported, photos, tmp_path, case, text):
    path = tmp_path / "data"
    cell = pa.array([b"x"], pa.binary())
    if case == "empty":
        path.mkdir()
    elif case == "photo":
        path = photos[0] / photos[1][0]
    elif case in ("binary", "blank"):
        path.write_bytes(b"a\0b" if case == "binary" else b"\n\n")
    elif case == "damaged":
        path.write_bytes(b"PAR1 and no more")
    elif case != "nowhere":
        tables = {"columns": {"n": [1]}, "several": {"a": cell, "b": cell}, "rows": {"image": cell[:0]}}
        pq.write_table(pa.table(tables[case]), path)
    result = CliRunner().invoke(
        group, ["embed", str(exported("tiny_vit")), "--images", str(path), "-o", str(tmp_path / "out")]
    )
    assert isinstance(result.exception, UsageError) and text in str(result.exception)
    assert "\n" not in str(result.exception) and not (tmp_path / "out").exists()


def test_wrong_arguments(exported, photos, tmp_path):
    file, out = exported("tiny_vit"), tmp_path / "out"
    for wrong, text in (
        ({"columns": ("features",)}, "'features' is none.*class"),
        ({"top": 11}, "wanted 1 to 10"),
        ({"part_size": 0}, "part size 0"),
        ({"workers": -1}, "workers -1"),
        ({"actors": 2}, "actors 2"),
    ):
        with pytest.raises(UsageError, match=text):
            embed(file, photos[0], output=out, options=EmbedOptions(**wrong))
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").touch()
    with pytest.raises(UsageError, match=r"holds 'thesis.doc'"):
        embed(file, photos[0], output=tmp_path / "full")


def test_estimate_is_worked_out_from_what_is_measured(exported, photos):
    e = estimate(exported("tiny_vit"), photos[0], images=10**8, machines=4, seconds=0.0)
    assert e.measured == 16 and 0 < e.engine_seconds <= e.seconds
    assert e.machine_hours == pytest.approx(1e8 * e.seconds / 16 / 3600) and e.hours == e.machine_hours / 4
    result = CliRunner().invoke(group, ["embed", "x.onnx", "--images", "x", "-o", "out", "--estimate", "5"])
    assert isinstance(result.exception, UsageError) and "--estimate only measures" in str(result.exception)


def test_a_bundle_is_embedded_like_its_file(whole, exported, photos, tmp_path):
    from tokexport.engines.bundle.write import write_bundle

    bundle = write_bundle(exported("tiny_vit"), tmp_path / "bundle", images=[photos[0]], n_images=1).path
    columns = ("logits", "class", "score", "classes", "scores", "sources")
    embed(bundle, photos[0], output=tmp_path / "out", options=EmbedOptions(columns=columns, top=3))
    same(rows_of(tmp_path / "out"), rows_of(whole))
