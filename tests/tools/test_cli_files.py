"""Files at the command line: none of the user's is lost, and what is not ours, does not fit or cannot be compared is refused."""

import json
import os

import onnx
import pytest

from .command_line import TINY, cli


def test_outputs_are_never_lost(call, tmp_path):
    path = tmp_path / "x.onnx"
    path.write_text("mine")
    code, _, err = call("onnx", *TINY, "--r", 8, "-o", path)
    assert code == 2 and "--force" in err and path.read_text() == "mine"
    assert call("onnx", *TINY, "--r", 8, "-o", tmp_path)[0] == 2
    assert call("onnx", *TINY, "--r", 8, "-o", tmp_path / "no" / "x.onnx")[0] == 2
    assert call("onnx", *TINY, "--r", 8, "-o", path, "--force")[0] == 0 and path.stat().st_size > 1000
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    for name, options in (("pipe", ["--force"]), ("dangling", []), ("n" * 251 + ".onnx", [])):
        code, _, err = call("onnx", *TINY, "--r", 8, "-o", tmp_path / name, *options)
        assert code == 2 and "Traceback" not in err, name
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "pipe").is_fifo()


def test_files_that_are_not_ours_are_refused(call, tmp_path, vit):
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "cut.onnx").write_bytes(vit.read_bytes()[:5000])
    model = onnx.load(vit)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    words = {
        "text": "not an ONNX",
        "empty": "not an ONNX",
        "cut": "not an ONNX",
        "bare": "no provenance",
        "missing": "no such file",
    }
    for name, word in words.items():
        for command in ("inspect", "verify"):
            code, _, err = call(command, tmp_path / f"{name}.onnx")
            assert code == 2 and word in err and "Traceback" not in err, (name, command, err)


TAMPERED = {
    "weights": lambda d: d.update(weights={}),
    "options": lambda d: d["schedule"].update(options=[]),
    "depth": lambda d: d["schedule"].update(depth=10**9),
    "dims": lambda d: d.update(dims={}),
    "model": lambda d: d.update(model=5),
    "kwargs": lambda d: d.update(model_kwargs=[]),
    "size": lambda d: d["preprocess"].update(size=[64]),
    "crop": lambda d: d["preprocess"].update(crop="x"),
    "outputs": lambda d: d.update(outputs=["other"]),
    "fewer steps": lambda d: d["schedule"]["steps"].pop(),
    "method": lambda d: d["schedule"].update(method="none"),
    "decisions": lambda d: d.update(decisions=[]),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_provenance_that_does_not_fit_is_refused(call, vit, tmp_path, what):
    model = onnx.load(vit)
    data = json.loads(model.metadata_props[0].value)
    TAMPERED[what](data)
    model.metadata_props[0].value = json.dumps(data)
    onnx.save(model, tmp_path / "t.onnx")
    for command in ("inspect", "verify"):
        code, _, err = call(command, tmp_path / "t.onnx")
        assert code == 2 and "Traceback" not in err, (command, err)


def test_images_must_be_images(call, vit, tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    for said, word in (
        (tmp_path / "a.jpg", "cannot be read"),
        (tmp_path / "empty", "no image"),
        (tmp_path / "none", "no such"),
    ):
        code, _, err = call("verify", vit, "--images", said)
        assert code == 2 and word in err


def test_a_missing_package_names_its_extra(vit, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nf = u.find_spec\nu.find_spec = lambda n, *a: None if n == 'openvino' else f(n, *a)\n"
    )
    out = cli("verify", vit, "--runtime", "openvino", env={"PYTHONPATH": str(tmp_path)})
    assert out.returncode == 2 and "tokexport[cpu]" in out.stderr


def test_bench_compares_like_with_like(call, vit, tmp_path):
    other, fixed = tmp_path / "other.onnx", tmp_path / "b3.onnx"
    assert call("onnx", *TINY, "--model-kwargs", "mlp_ratio=2", "--method", "none", "-o", other)[0] == 0
    assert call("onnx", *TINY, "--r", 8, "--batch", 3, "-o", fixed)[0] == 0
    for args, word in (
        ([vit, "--dense", other], "one model"),
        ([vit, "--dense", vit], "among the files"),
        ([fixed, "--dense", vit, "--batch", "3"], "reduced"),
        ([fixed, "--batch", "1"], "give batch 3"),
        ([vit, "--seconds", "nan"], "seconds nan"),
        ([vit, "--threads", "99999"], "threads 99999"),
    ):
        code, _, err = call("bench", *args)
        assert code == 2 and word in err, err


def test_bench_compares_every_file_with_a_dense_one_of_its_batch(call, vit, tmp_path):
    single = tmp_path / "single.onnx"
    assert call("onnx", *TINY, "--r", 8, "--batch", 1, "-o", single)[0] == 0
    code, out, err = call("bench", vit, single, "--runtime", "ort", "--batch", "1", "--seconds", "0.2", "--json")
    rows = json.loads(out)["rows"]
    assert code == 0 and [r["file"] for r in rows] == [
        "dense, batch dynamic, fp32",
        "dense, batch 1, fp32",
        str(vit),
        str(single),
    ]
    assert [r["speedup"] for r in rows[:2]] == [1.0, 1.0]
    for dense, row in zip(rows[:2], rows[2:]):
        assert row["quotient"] == pytest.approx(row["speedup"] / row["macs_ratio"])
        assert row["speedup"] == pytest.approx(dense["ms"] / row["ms"], rel=0.5)
