"""A ladder: rungs that equal their own exports bit for bit over one file of weights, what picks among them, and what is refused."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from tokexport.engines import ladder as ladders
from tokexport.engines.bundle.manifest import FileEntry
from tokexport.engines.ladder_manifest import Ladder, Rung, read_ladder
from tokexport.engines.ladder_write import LadderSettings, SharedWeights, write_ladder
from tokexport.export.files import read_model
from tokexport.tools import load_test
from tokexport.tools.cli import group

from tokexport import UsageError, export_onnx, open_ladder, open_runner

RS = (0, 4, 8)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A ladder of the tiny model: its folder."""
    loaded, folder = tiny("tiny_vit"), tmp_path_factory.mktemp("ladders") / "ladder"
    schedules = [(f"r={r}", loaded.schedule("tome", r=r)) for r in reversed(RS)]
    write_ladder(loaded, schedules, folder, settings=LadderSettings(seconds=0.2))
    return folder


@pytest.fixture(scope="module")
def own(tiny, tmp_path_factory):
    """The same schedules, each exported alone."""
    loaded, folder = tiny("tiny_vit"), tmp_path_factory.mktemp("own")
    return [export_onnx(loaded, loaded.schedule("tome", r=r), folder / f"{r}.onnx", batch=1).path for r in RS]


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_every_rung_is_its_own_export_bit_for_bit(runtime, made, own, golden):
    image = golden.image.numpy()[:1]
    for r, single, rung in zip(RS, own, read_ladder(made).rungs, strict=True):
        outputs = []
        for path in (single, made / rung.file.name):
            with open_runner(path, runtime, threads=1) as runner:
                outputs.append(runner.run({"image": image})["logits"])
        assert rung.label == f"r={r}" and np.array_equal(*outputs)
        same = [{i.name: i for i in onnx.load(path).graph.initializer} for path in (single, made / rung.file.name)]
        bits = lambda tensors: {k: onnx.numpy_helper.to_array(v).tobytes() for k, v in tensors.items()}
        assert bits(same[0]) == bits(same[1])
        nodes = [
            [n.SerializeToString() for n in onnx.load(p, load_external_data=False).graph.node]
            for p in (single, made / rung.file.name)
        ]
        assert nodes[0] == nodes[1]


def test_weights_are_there_once(made, own):
    ladder, single = read_ladder(made), own[-1]
    read = {name: t.nbytes for name, t in read_model(single)[1].items()}
    assert sum(read.values()) <= ladder.weights.size < 1.05 * single.stat().st_size
    assert {p.name for p in made.iterdir()} == {"ladder.json", *(f.name for f in ladder.files)}
    assert all(r.file.size < 0.2 * single.stat().st_size for r in ladder.rungs)  # graphs of a tiny model


def test_equal_bytes_share_a_place_and_others_do_not(tmp_path):
    with SharedWeights(tmp_path / "w") as shared:
        first, second, large = shared._place(b"a" * 300), shared._place(b"b" * 300), shared._place(b"c" * 5000)
        assert shared._place(b"a" * 300) == first != second and second % 64 == 0 and large % 4096 == 0
    data = (tmp_path / "w").read_bytes()
    assert data[first : first + 300] == b"a" * 300 and data[large:] == b"c" * 5000


def test_the_manifest_says_what_each_rung_costs(made):
    ladder = read_ladder(made)
    assert [r.error for r in ladder.rungs] == sorted(r.error for r in ladder.rungs) and ladder.rungs[0].error == 0
    assert (
        ladder.rungs[0].speedup == 1
        and ladder.rungs[0].macs_ratio == 1
        and ladder.measure == "KL"
        and ladder.images == 0
    )
    assert all(a.macs > b.macs and a.tokens > b.tokens for a, b in zip(ladder.rungs, ladder.rungs[1:]))
    data = json.loads((made / "ladder.json").read_text())
    assert data["format"] == [1, 0] and data["needs"] == [] and data["provenance"]["schedule"]["method"] == "tome"


def ladder_of(*times: float) -> Ladder:
    entry = FileEntry("a", "0", 1)
    rungs = tuple(
        Rung(FileEntry(f"{i}.onnx", "0", 1), f"{i}", "tome", (9 - i,), 90 - i, 1 + i, ms, 1.0, 0.0)
        for i, ms in enumerate(times)
    )
    return Ladder(
        version="0", weights=entry, rungs=rungs, runtime="ort", processor="p", threads=1, dtype="fp32", batch=1, measure="KL",
        images=0, provenance={},
    )  # fmt: skip


def test_the_rung_with_the_most_tokens_within_the_budget_is_picked():
    ladder = ladder_of(20.0, 12.0, 10.0)
    assert [ladder.pick(b) for b in (None, 25, 20, 19.9, 11, 10, 3, -1)] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert ladder_of(20.0, 9.0, 10.0).pick(5) == 1  # the fastest, where none is within it
    assert ladder.pick(15, times=(14.0, 12.0, 10.0)) == 0
    with pytest.raises(UsageError, match="rungs: there are none"):
        ladder_of()


def test_a_run_goes_to_the_rung_that_its_time_allows(made, golden, monkeypatch):
    images = golden.image.numpy()
    with open_ladder(made, "ort", threads=1, measure=False) as ladder:
        ladder.times = (20.0, 12.0, 10.0)
        assert [ladder.pick(b).label for b in (None, 25, 13, 1)] == ["r=0", "r=0", "r=4", "r=8"]
        assert ladder.pick(25, images=2).label == "r=4"  # two runs of one image: 12.5 each
        outputs = [ladder.run(images, budget_ms=b)["logits"] for b in (None, 40, 1)]
        runs = [ladder.runner(i).run({"image": images[:1]})["logits"] for i in range(3)]
        for row, place in zip(outputs, (0, 1, 2)):
            assert row.shape == (3, 10) and np.array_equal(row[:1], runs[place])
        for wrong in (float("nan"), "fast"):
            with pytest.raises(UsageError, match="budget_ms"):
                ladder.run(images, budget_ms=wrong)
        seconds = iter([0.003, 0.002, 0.001])
        assert ladder.measure(lambda runner: lambda s=next(seconds): s) == pytest.approx((3, 2, 1))
        assert ladder.pick(2.5).label == "r=4"
    with pytest.raises(UsageError, match="closed"):
        ladder.run(images)


def test_rungs_that_share_weights_compute_the_same(made, golden):
    image = golden.image.numpy()[:1]
    with open_ladder(made, threads=1, measure=False) as apart, open_ladder(made, threads=1, share=True) as shared:
        assert shared.times != apart.times  # stored times are not of shared weights
        for place in range(3):
            a, b = (ladder.runner(place).run({"image": image})["logits"] for ladder in (apart, shared))
            assert np.abs(a - b).max() < 1e-5
    with pytest.raises(UsageError, match="share_weights: OpenVINO"):
        open_ladder(made, "openvino", share=True)


def test_under_load_the_ladder_steps_down_and_every_request_is_answered(made):
    """Real requests on loopback; which rung serves is decided by times that are set, not by the clock of a busy machine."""
    with open_ladder(made, threads=1, measure=False) as ladder:
        ladder.times = (20.0, 12.0, 1.0)
        server = load_test.Server(ladder, None, target=0.05)
        assert [server.place(waited) for waited in (0.0, 0.01, 0.02, 1.0)] == [0, 1, 2, 2]
        for item in range(3):
            server.waiting.put(item)
        assert server.place(0.0) == 2 and load_test.Server(ladder, 1, target=0.05).place(1.0) == 1
        server.socket.close()
        rows = load_test.measured(ladder, loads=[0.2], target_ms=1e6, seconds=0.5)
    assert [r.policy for r in rows] == ["ladder", "r=0", "r=4", "r=8"]
    assert all(r.unanswered == 0 and r.within == 1 and r.requests >= 1 for r in rows)
    assert rows[1].shares == {"r=0": 1, "r=4": 0, "r=8": 0} and rows[3].error > rows[1].error == 0


def test_the_load_test_refuses_what_it_cannot_do(made, tmp_path, capsys):
    for arguments, words in (
        ([tmp_path, "--target-ms", "9"], "has no ladder.json"),
        ([made, "--target-ms", "9", "--load", "none"], "--load 'none'"),
        ([made, "--target-ms", "9", "--seconds", "1e9"], "--seconds"),
    ):
        assert load_test.main(list(map(str, arguments))) == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, measured", [({}, False), ({"processor": "another"}, True), ({"runtime": "openvino"}, True)]
)
def test_times_of_another_machine_are_measured_again(change, measured, copied, monkeypatch):
    data = json.loads((copied / "ladder.json").read_text())
    (copied / "ladder.json").write_text(json.dumps({**data, **change}))
    calls = []
    monkeypatch.setattr(ladders.OpenLadder, "measure", lambda self: calls.append(1))
    open_ladder(copied, "ort", threads=1).close()
    assert bool(calls) == measured


def damage(folder, what):
    manifest = folder / "ladder.json"
    data = json.loads(manifest.read_text())
    if what == "cut weights":
        with open(folder / "weights.data", "r+b") as file:
            file.truncate(1000)
    elif what == "no rung":
        (folder / "rung1.onnx").unlink()
    elif what == "no json":
        manifest.write_text("{")
    elif what == "newer":
        manifest.write_text(json.dumps({**data, "format": [2, 0]}))
    elif what == "a path":
        data["weights"]["name"] = "../weights.data"
        manifest.write_text(json.dumps(data))
    elif what == "twice":
        data["rungs"][1]["file"]["name"] = "rung0.onnx"
        manifest.write_text(json.dumps(data))
    elif what == "foreign need":
        manifest.write_text(json.dumps({**data, "needs": ["magic"]}))
    elif what == "link":
        (folder / "weights.data").rename(folder / "w")
        (folder / "weights.data").symlink_to("w")


WORDS = {
    "cut weights": "has 1000 bytes, wanted",
    "no rung": "the ladder is not complete",
    "no json": "is not JSON",
    "newer": "format",
    "a path": "wanted a plain name",
    "twice": "names a file twice",
    "foreign need": "needs magic",
    "link": "is a link",
}


@pytest.mark.parametrize("what", WORDS)
def test_a_damaged_ladder_is_refused_in_words(what, copied):
    damage(copied, what)
    with pytest.raises(UsageError, match=WORDS[what]):
        open_ladder(copied)


def cli(*args):
    return CliRunner().invoke(group, list(map(str, args)))


def test_inspect_shows_it_and_verify_verifies_every_rung(made, copied):
    shown = cli("inspect", made)
    assert shown.exit_code == 0 and all(f"r={r}" in shown.stderr for r in RS)
    assert json.loads(cli("inspect", made, "--json").stdout)["rungs"][1]["label"] == "r=4"
    assert cli("inspect", made / "ladder.json").exit_code == 0
    out = cli("verify", made, "--json")
    assert out.exit_code == 0 and len(json.loads(out.stdout)["files"]) == 3
    with open(copied / "weights.data", "r+b") as file:
        file.seek(5000)
        file.write(b"\x01" * 8)
    changed = cli("verify", copied)
    assert isinstance(changed.exception, UsageError) and "SHA-256 differs" in str(changed.exception)


MODEL = ["--model", "vit_tiny_patch16_224", *(f"--model-kwargs={k}={v}" for k, v in {
    "img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4, "num_classes": 10}.items())]  # fmt: skip


def test_the_command_writes_a_ladder_of_a_sweep(tmp_path):
    args = [
        "ladder",
        *MODEL,
        "--method",
        "evit",
        "--at",
        "1,3",
        "--sweep",
        "keep_rate=1,0.6",
        "--seconds",
        "0.2",
        "-o",
        tmp_path / "l",
    ]
    out = cli(*args, "--json")
    assert out.exit_code == 0, (out.output, out.exception)
    assert [r["label"] for r in json.loads(out.stdout)["rungs"]] == ["keep_rate=1", "keep_rate=0.6"]
    again = cli(*args)
    assert isinstance(again.exception, UsageError) and "exists" in str(again.exception)


def test_the_rungs_of_tune_become_a_ladder(tmp_path):
    row = lambda r, **state: {
        "method": "tome",
        "options": {"r": r},
        "macs_ratio": 1 + r / 10,
        "chosen": False,
        "further": False,
        **state,
    }
    table = {"rows": [row(8, chosen=True), row(2)]}
    (tmp_path / "t.json").write_text(json.dumps(table))
    out = cli("ladder", *MODEL, "--from", tmp_path / "t.json", "--seconds", "0.2", "--json", "-o", tmp_path / "l")
    assert out.exit_code == 0, (out.output, out.exception)
    assert [r["label"] for r in json.loads(out.stdout)["rungs"]] == ["dense", "tome x1.80"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--sweep and --from: wanted one of them"),
        (["--sweep", "r=1", "--from", "x"], "wanted one of them"),
        (["--sweep", "r=1,2", "--method", "evit"], "--sweep r: goes with --method tome"),
        (["--sweep", "r=1,2", "--r", "3"], "is given beside it"),
        (["--sweep", "r=1,-2"], "-2"),
        (["--sweep", "r=8", "--keep-rate", "0.7"], "--keep-rate goes with"),
        (["--from", "missing.json"], "wanted a file that `tokexport tune` wrote"),
        (["--sweep", "r=1,2", "--runtime", "none"], "unknown runtime"),
        (["--sweep", "r=1,2", "--batch", "-1"], "--batch -1"),
        (["--sweep", "r=60,55"], "are the same"),
    ],
)
def test_wrong_use_of_the_command_is_one_clear_error(arguments, words, tmp_path):
    out = cli("ladder", *MODEL, *arguments, "-o", tmp_path / "l")
    assert isinstance(out.exception, UsageError) and words in str(out.exception), (out.exception, out.output)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_ladder_is_not_replaced(tmp_path):
    (tmp_path / "l").mkdir()
    out = cli("ladder", *MODEL, "--sweep", "r=1", "--force", "-o", tmp_path / "l")
    assert isinstance(out.exception, UsageError) and "is no ladder" in str(out.exception)


def test_the_page_tells_every_field():
    page = (Path(__file__).parents[2] / "docs" / "ladder.md").read_text()
    for record, first in ((Ladder, "| field |"), (Rung, "| field of a rung |")):
        lines = page[page.index(first) :].split("\n\n")[0].splitlines()[2:]
        assert [line.split("|")[1].strip().strip("`") for line in lines] == [f.name for f in fields(record)]
