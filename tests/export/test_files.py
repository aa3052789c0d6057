"""Files are written aside, weights beside a file are kept with it, and what fails leaves nothing behind."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import onnx
import pytest
from tokexport.export import files
from tokexport.export.files import aside, check_output, read_model, sha256_of, weight_files, write_model

from tokexport import StorageError, UsageError, inspect, quantize


@pytest.fixture
def split(exported, tmp_path, monkeypatch):
    """A file with its weights beside it, as one over 2 GB is written."""
    proto, weights = read_model(exported("tiny_vit", method="tome", r=8))
    with monkeypatch.context() as patch:
        patch.setattr(files, "TWO_GB", 0)
        write_model(proto, weights, tmp_path / "v.onnx")
    return tmp_path / "v.onnx"


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_split_file_is_the_same_model(split, exported):
    whole = exported("tiny_vit", method="tome", r=8)
    inspection = inspect(split)
    assert names(split.parent) == ["v.onnx", "v.onnx.data"]
    assert [p.name for p in inspection.files] == ["v.onnx", "v.onnx.data"]
    assert inspection.size == sum(p.stat().st_size for p in inspection.files)
    assert inspection.provenance == inspect(whole).provenance and inspection.ops == inspect(whole).ops
    (_, first), (_, second) = read_model(split), read_model(whole)
    assert first.keys() == second.keys() and all((first[k].numpy() == second[k].numpy()).all() for k in first)


def test_weights_beside_a_file_are_not_replaced_unasked(exported, split, tmp_path):
    split.unlink()
    with pytest.raises(UsageError, match=r"v\.onnx\.data exists"):
        check_output(tmp_path / "v.onnx", False)
    with pytest.raises(UsageError, match=r"v\.onnx\.data exists"):
        quantize(exported("tiny_vit", method="tome", r=8), tmp_path / "v.onnx", calibration=tmp_path, target="cpu")
    assert check_output(tmp_path / "v.onnx", True) == tmp_path / "v.onnx"
    with pytest.raises(UsageError, match="files that are read"):
        check_output(tmp_path / "v.onnx", True, [tmp_path / "v.onnx.data"])
    (tmp_path / "w.onnx.data").mkdir()
    with pytest.raises(UsageError, match="is a directory"):
        check_output(tmp_path / "w.onnx", True)


def test_a_small_file_takes_the_place_of_a_large_one_and_of_its_weights(split, exported):
    write_model(*read_model(exported("tiny_vit", method="tome", r=8)), split)
    assert names(split.parent) == ["v.onnx"] and inspect(split).size == split.stat().st_size


def test_weights_that_belong_to_another_file_stay(split, exported):
    split.unlink()
    write_model(*read_model(exported("tiny_vit", method="tome", r=8)), split)
    assert names(split.parent) == ["v.onnx", "v.onnx.data"]


def test_a_large_file_takes_the_place_of_a_large_one(split, monkeypatch):
    before = sha256_of(split, split.with_name("v.onnx.data"))
    monkeypatch.setattr(files, "TWO_GB", 0)
    write_model(*read_model(split), split)  # which it reads while it writes
    assert sha256_of(split, split.with_name("v.onnx.data")) == before and inspect(split)


def test_a_kill_between_two_renames_leaves_no_pair_of_which_one_is_old(split, monkeypatch):
    whole = split.with_name("v.onnx.data").read_bytes()

    def killed(source, place):
        raise KeyboardInterrupt

    proto, weights = read_model(split)
    monkeypatch.setattr(files, "TWO_GB", 0)
    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_model(proto, weights, split)
    assert names(split.parent) == ["v.onnx.data"] and split.with_name("v.onnx.data").read_bytes() == whole


def test_weights_that_are_gone_or_cut_are_said(split):
    data = split.with_name("v.onnx.data")
    size = data.stat().st_size
    with open(data, "r+b") as f:
        f.truncate(size - 1)
    with pytest.raises(UsageError, match=rf"has {size - 1} bytes instead of {size}"):
        inspect(split)
    data.unlink()
    for look in (inspect, read_model):
        with pytest.raises(UsageError, match=r"has its weights in v\.onnx\.data, which is not beside it"):
            look(split)


@pytest.mark.parametrize("name", ["../v.onnx.data", "/etc/passwd", "sub/v.onnx.data", "..", "", "link", "sub\\x"])
def test_weights_outside_the_folder_are_refused(name, split):
    model = onnx.load(split, load_external_data=False)
    split.with_name("link").symlink_to("v.onnx.data")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    onnx.save(model, split)
    with pytest.raises(UsageError, match="wanted a plain file in the same folder"):
        inspect(split)


@pytest.mark.parametrize("value", ["-1", "x", "9" * 30, "١"])
def test_weights_at_an_impossible_place_are_refused(value, split):
    model = onnx.load(split, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "offset").value = value
    onnx.save(model, split)
    with pytest.raises(UsageError, match="damaged|instead of"):
        inspect(split)


def test_weights_inside_nodes_and_functions_are_looked_at_too(tmp_path):
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    body = onnx.helper.make_graph([constant], "b", [], [])
    for node in (constant, onnx.helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body)):
        graph = onnx.helper.make_graph([node], "g", [], [])
        model = onnx.helper.make_model(graph)
        with pytest.raises(UsageError, match="plain file"):
            weight_files(model, tmp_path / "v.onnx")
    function = onnx.helper.make_function("d", "f", [], ["c"], [constant], [])
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []), functions=[function])
    with pytest.raises(UsageError, match="plain file"):
        weight_files(model, tmp_path / "v.onnx")


def test_what_lies_aside_takes_its_place_only_when_all_went_well(tmp_path):
    place = tmp_path / "a.txt"
    place.write_text("old")
    with pytest.raises(ZeroDivisionError), aside(place, beside=(".json",)) as new:
        new.write_text("new")
        new.with_name("a.txt.json").write_text("beside")
        raise ZeroDivisionError
    assert names(tmp_path) == ["a.txt"] and place.read_text() == "old"
    with aside(place, beside=(".json",)) as new:
        new.write_text("new")
        (new.parent / "scrap").write_text("stays aside")
        assert place.read_text() == "old"
    assert names(tmp_path) == ["a.txt"] and place.read_text() == "new"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_is_a_storage_error_and_leaves_nothing(code, tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(StorageError, match=r"a\.txt: could not be written .*nothing was left behind"):
        with aside(tmp_path / "a.txt") as new:
            new.write_text("half")
            raise OSError(code, os.strerror(code))
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_a_missing_input_is_no_storage_error(tmp_path):
    with pytest.raises(FileNotFoundError), aside(tmp_path / "a.txt"):
        open(tmp_path / "none")


def test_a_file_that_the_disk_cannot_take_is_exit_code_3(exported, tmp_path):
    """A limit on the size of files, set in the process itself."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); "
        "from pathlib import Path; from tokexport.export.files import read_model, write_model; "
        "from tokexport.tools import cli; "
        "cli.group.main = lambda **_: write_model(*read_model(Path(sys.argv[1])), Path(sys.argv[2])); cli.main()"
    )
    arguments = [str(exported("tiny_vit", method="tome", r=8)), str(tmp_path / "v.onnx")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr.startswith("Error: output") and "File too large" in done.stderr
    assert done.stderr.count("\n") == 1 and names(tmp_path) == []


def test_what_a_killed_process_left_is_removed_a_day_later_and_nothing_else(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from tokexport.export.files import aside\n"
        "with aside(Path(sys.argv[1])) as new: new.write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "a.txt")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(files.ASIDE)
    (tmp_path / f"{files.ASIDE}file").write_text("no folder")
    shutil.copytree(left, tmp_path / "mine")
    (tmp_path / f"{files.ASIDE}link").symlink_to("mine")
    two_days_ago = time.time() - 2 * files.STALE
    for write, wanted in (("a.txt", True), ("b.txt", False)):
        with aside(tmp_path / write) as new:
            new.write_text("whole")
        assert left.exists() is wanted
        for path in tmp_path.iterdir():
            os.utime(path, (two_days_ago, two_days_ago), follow_symlinks=False)
    assert names(tmp_path) == [f"{files.ASIDE}file", f"{files.ASIDE}link", "a.txt", "b.txt", "mine"]
    assert names(tmp_path / "mine") == ["a.txt"]
