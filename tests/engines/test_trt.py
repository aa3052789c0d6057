"""Engines of TensorRT-RTX, built without a GPU for GPUs that are named; what fails is said, nothing is written."""

import json
import signal
import subprocess
import sys
import time

import onnx
import pytest
from onnx import TensorProto, helper
from tokexport.engines.tensorrt import child as build_child
from tokexport.engines.tensorrt import process
from tokexport.engines.tensorrt import runtime as trt
from tokexport.engines.tensorrt.sidecar import read_sidecar
from tokexport.export.reducers import TABLE as METHODS
from tokexport.tools.cli import main

from tokexport import BuildError, StorageError, UsageError, build_engine, export_onnx, load_model

from ..cases import mostly_slow

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: engine builds need it (no GPU)")
GPUS = ("86", "89")
RTX = {"builder": "rtx", "capabilities": GPUS}
KINDS = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
NO_GPU = pytest.mark.skipif(trt.gpus() > 0, reason="what is said where there is no GPU")


@pytest.fixture(scope="module")
def tome(exported):
    return exported("tiny_vit", method="tome", r=8)


@pytest.mark.parametrize("batch", mostly_slow([1, None], 1))
@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("method", mostly_slow(METHODS, "none", "tome", "evit"))
def test_every_method_is_built_in_every_precision(method, precision, batch, exported, method_cases, tmp_path):
    path = exported("tiny_vit", batch=batch, method=method, **method_cases[method])
    result = build_engine(path, tmp_path / "v.plan", precision=precision, **RTX)
    found = read_sidecar(result.path)
    assert found == result.engine and not result.cached and found.size == result.path.stat().st_size > 300_000
    assert (
        found.precision == precision
        and found.builder.name == "rtx"
        and found.compute_capability == GPUS
        and found.gpu is None
    )
    assert found.profile == (None if batch else (1, 8, 32)) and found.batch == batch
    products = found.layers["MATRIX_MULTIPLY"]
    assert max(products, key=products.get) == KINDS[precision] and found.layers["CONVOLUTION"] == {KINDS[precision]: 1}
    if method != "none":
        assert set(found.layers["TOPK"]) == {"FLOAT"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.plan", "v.plan.json"]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, None])
def test_tome_on_deit_small_is_built_in_fp16(batch, tmp_path, schedule_of):
    loaded = load_model("deit_small_patch16_224")
    export_onnx(loaded, schedule_of(loaded.module, 13), tmp_path / "v.onnx", batch=batch)
    said = []
    result = build_engine(
        tmp_path / "v.onnx",
        precision="fp16",
        **RTX,
        opt_level=2,
        workspace=2**30,
        progress=lambda stage, share: said.append((stage, share)),
    )
    assert result.path == tmp_path / "v.plan" and 40e6 < result.engine.size < 100e6
    assert any(stage.startswith("building") for stage, _ in said) and all(0 <= share <= 1 for _, share in said)


def test_a_typed_file_keeps_its_precision(tiny, schedule_of, tmp_path):
    loaded = tiny("tiny_vit")
    export_onnx(loaded, schedule_of(loaded.module, 8), tmp_path / "h.onnx", dtype="fp16")
    assert build_engine(tmp_path / "h.onnx", **RTX).engine.precision == "fp16"
    with pytest.raises(UsageError, match="fp16 already"):
        build_engine(tmp_path / "h.onnx", tmp_path / "b.plan", precision="bf16", **RTX)


def test_an_identical_request_is_answered_by_the_engine_that_is_there(tome, tmp_path):
    ask = lambda **more: build_engine(tome, tmp_path / "v.plan", **{"precision": "fp16", **RTX, **more})
    first, when = ask(), (tmp_path / "v.plan").stat().st_mtime_ns
    again = ask()
    assert again.cached and again.engine == first.engine and (tmp_path / "v.plan").stat().st_mtime_ns == when
    for other in (
        {"precision": "bf16"},
        {"capabilities": ("89",)},
        {"profile": (1, 2, 4)},
        {"opt_level": 1},
        {"workspace": 2**30},
        {"decisions": True},
    ):
        with pytest.raises(UsageError, match="exists"):
            ask(**other)
    assert (tmp_path / "v.plan").stat().st_mtime_ns == when
    (tmp_path / "v.plan").write_bytes(b"cut")
    with pytest.raises(UsageError, match="exists"):
        ask()
    again = ask(force=True)
    assert not again.cached and read_sidecar(tmp_path / "v.plan").request == first.engine.request


def test_an_input_is_never_replaced_by_its_engine(exported, tmp_path):
    path = tmp_path / "v.bin"
    path.write_bytes(exported("tiny_vit", method="tome", r=8).read_bytes())
    with pytest.raises(UsageError, match="files that are read"):
        build_engine(path, path, precision="fp16", force=True, **RTX)
    with pytest.raises(UsageError, match="wanted another suffix"):
        build_engine(path, tmp_path / "other.onnx", precision="fp16", **RTX)


def test_a_label_that_the_layers_belie_is_refused():
    layers = {"MATRIX_MULTIPLY": {"HALF": 40, "FLOAT": 30}, "CONVOLUTION": {"HALF": 1}}
    build_child.check_label(layers, "fp16")
    for wrong in ("fp32", "tf32", "bf16"):
        with pytest.raises(BuildError, match="not " + wrong):
            build_child.check_label(layers, wrong)
    with pytest.raises(BuildError, match="not fp16"):
        build_child.check_label({"MATRIX_MULTIPLY": {"HALF": 40}, "CONVOLUTION": {"FLOAT": 1}}, "fp16")
    with pytest.raises(BuildError, match="none"):
        build_child.check_label({}, "fp16")


def _cli(capsys, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["tokexport", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, capsys.readouterr()


def test_the_command_builds_and_inspect_prints_it(tome, tmp_path, capsys, monkeypatch):
    code, out = _cli(
        capsys,
        monkeypatch,
        "trt",
        tome,
        "-o",
        tmp_path / "v.plan",
        "--bf16",
        "--compute-capability",
        "8.6,sm120",
        "--batch",
        "1:2:4",
        "--workspace",
        "1GiB",
        "--json",
    )
    data = json.loads(out.out)
    assert code == 0 and data["engine"]["precision"] == "bf16" and data["engine"]["compute_capability"] == ["86", "120"]
    code, out = _cli(capsys, monkeypatch, "inspect", tmp_path / "v.plan")
    assert code == 0 and all(
        word in out.err for word in ("TensorRT-RTX", "bf16", "86, 120", "1 to 4, best at 2", "tome")
    )
    code, out = _cli(capsys, monkeypatch, "inspect", tmp_path / "v.plan", "--json")
    assert json.loads(out.out)["sha256"] == data["engine"]["sha256"]


def test_a_dry_run_reports_and_writes_nothing(tome, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out = _cli(capsys, monkeypatch, "trt", tome, "--fp16", "--dry-run", "-o", "v.plan")
    assert code == 0 and "takes the file" in out.err and "HALF" in out.err and list(tmp_path.iterdir()) == []
    (tmp_path / "v.plan").write_text("an engine of before")
    assert _cli(capsys, monkeypatch, "trt", tome, "--fp16", "--dry-run", "-o", "v.plan")[0] == 0


@pytest.mark.parametrize("output, words", [(".", "is a directory"), ("none/v.plan", "no directory"), ("", "is empty")])
def test_a_dry_run_refuses_an_output_that_cannot_be(output, words, tome, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out = _cli(capsys, monkeypatch, "trt", tome, "--dry-run", "-o", output)
    assert code == 2 and words in out.err and list(tmp_path.iterdir()) == []


BAD = {
    "unknown builder": (["--builder", "trt9"], "builder 'trt9'"),
    "unknown gpu": (["--compute-capability", "90"], "knows 75"),
    "a gpu twice": (["--compute-capability", "86,8.6"], "each once"),
    "not a gpu": (["--compute-capability", "fast"], "knows 75"),
    "batch upside down": (["--batch", "8:1:32"], "smallest:best:largest"),
    "batch of two": (["--batch", "1:8"], "smallest:best:largest"),
    "batch of none": (["--batch", "0:1:2"], "smallest:best:largest"),
    "level": (["--opt-level", "9"], "0 to 5"),
    "workspace": (["--workspace", "lots"], "4GiB"),
    "more memory than there is": (["--workspace", "999999999999GiB"], "4GiB"),
    "timing cache": (["--timing-cache", "x"], "no such cache"),
    "version": (["--version-compatible"], "TensorRT's"),
    "two precisions": (["--int8", "--fp16"], "--fp16 --int8: an engine has one precision"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_error_and_nothing_is_written(name, tome, tmp_path, capsys, monkeypatch):
    args, word = BAD[name]
    if "--compute-capability" not in args:
        args = [*args, "--compute-capability", "86"]
    monkeypatch.chdir(tmp_path)
    code, out = _cli(
        capsys, monkeypatch, "trt", tome, "-o", "v.plan", *([] if "--builder" in args else ["--builder", "rtx"]), *args
    )
    assert code == 2 and word in out.err and out.err.startswith("Error: ") and list(tmp_path.iterdir()) == []


@NO_GPU
def test_without_a_gpu_one_must_be_named(tome, tmp_path, capsys, monkeypatch):
    code, out = _cli(capsys, monkeypatch, "trt", tome, "-o", tmp_path / "v.plan", "--builder", "rtx")
    assert code == 2 and "no GPU here" in out.err and "compute-capability 75" in out.err


def test_a_package_that_is_missing_is_named(monkeypatch, tome):
    monkeypatch.setattr(trt.importlib.util, "find_spec", lambda name: None)
    for runtime, extra in (("rtx", "rtx"), ("tensorrt", "trt"), ("auto", "rtx")):
        with pytest.raises(UsageError, match=rf"tokexport\[{extra}\]"):
            trt.choose(runtime)


def test_auto_takes_tensorrt_only_with_a_gpu(monkeypatch):
    monkeypatch.setattr(trt.importlib.util, "find_spec", lambda name: object())
    for gpus, wanted in ((0, "rtx"), (1, "tensorrt")):
        monkeypatch.setattr(trt, "gpus", lambda: gpus)
        assert trt.choose("auto") == wanted


def test_a_batch_that_a_file_does_not_have_is_refused(exported, tmp_path):
    path = exported("tiny_vit", batch=3, method="tome", r=8)
    with pytest.raises(UsageError, match="is for batch 3"):
        build_engine(path, tmp_path / "v.plan", **RTX, profile=(1, 2, 3))
    with pytest.raises(UsageError, match="is for batch 1: batch 1:2:4"):
        build_engine(
            exported("tiny_vit", batch=1, method="tome", r=8),
            tmp_path / "v.plan",
            builder="rtx",
            capabilities=GPUS,
            profile=(1, 2, 4),
        )


def _scatter(tome, path):
    """The tiny model with a scatter that adds behind its output, as the authors' ToMe has them."""
    model = onnx.load(tome)
    rows = helper.make_tensor("rows", TensorProto.INT64, [1, 1], [0])
    model.graph.initializer.append(rows)
    model.graph.node.append(
        helper.make_node(
            "ScatterElements", ["logits", "rows", "logits"], ["more"], name="block2.merge/Scatter", reduction="add"
        )
    )
    onnx.save(model, path)


@pytest.mark.parametrize("command", [["trt", "--dry-run"], ["trt", "--compute-capability", "86"]])
def test_a_scatter_with_a_reduction_is_refused_with_the_way_out(command, tome, tmp_path, capsys, monkeypatch):
    path = tmp_path / "scatter.onnx"
    _scatter(tome, path)
    code, out = _cli(capsys, monkeypatch, *command, path)
    assert (
        code == 2
        and "block2.merge/Scatter" in out.err
        and "one-hot matrix product" in out.err
        and not (tmp_path / "scatter.plan").exists()
    )
    code, out = _cli(capsys, monkeypatch, "inspect", path)
    assert "REFUSED" in out.err and "one-hot matrix product" in out.err


def test_what_the_parser_refuses_is_named_with_its_block(tome, tmp_path):
    """A node that passes our own check and not TensorRT's."""
    model = onnx.load(tome)
    model.graph.node.append(helper.make_node("StringNormalizer", ["logits"], ["more"], name="block4.mlp/Odd"))
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(BuildError, match=r"block4\.mlp/Odd \(block4, mlp\)"):
        build_engine(tmp_path / "odd.onnx", tmp_path / "v.plan", **RTX)
    assert [p.name for p in tmp_path.iterdir()] == ["odd.onnx"]


def test_a_build_that_is_terminated_leaves_nothing(deit, tmp_path):
    args = [
        sys.executable,
        "-m",
        "tokexport",
        "trt",
        str(deit("none", 1)),
        "-o",
        str(tmp_path / "v.plan"),
        "--fp16",
        "--builder",
        "rtx",
        "--compute-capability",
        "86",
    ]
    process = subprocess.Popen(args, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while (
        not list(tmp_path.glob(".tokexport-*/typed.onnx")) and time.monotonic() < deadline
    ):  # what lies aside while it builds
        time.sleep(0.02)
    assert list(tmp_path.iterdir()) and process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143 and list(tmp_path.iterdir()) == []


CHILDREN = {  # a builder that ends badly, as a shell script; $fd is where its messages go
    "crash": ("kill -SEGV $$", r"signal 11 \(SIGSEGV\)"),
    "out of memory": ("kill -KILL $$", r"signal 9 \(SIGKILL, perhaps for want of memory\)"),
    "exit": ("echo oh no; exit 3", "ended with 3 and gave no result: oh no"),
    "silence": ("exit 0", "ended with 0 and gave no result"),
    "torn message": ("""printf '{"log": ["ERROR", "no memo' > $fd; kill -ABRT $$""", r"signal 6 \(SIGABRT\)"),
    "torn result": ("""printf '{"result": {"version": "1.7' > $fd; kill -SEGV $$""", r"signal 11 \(SIGSEGV\)"),
    "rubbish": ("""printf '\\377\\0\\n[1]\\n' > $fd; exit 1""", "ended with 1"),
    "its own words": ("""echo '{"log": ["ERROR", "bad tactic"]}' > $fd; kill -SEGV $$""", "SIGSEGV.*\n  bad tactic"),
}


@pytest.mark.parametrize("ending", CHILDREN)
def test_a_builder_that_dies_is_one_error_and_nothing_is_written(ending, tome, tmp_path, monkeypatch):
    script, words = CHILDREN[ending]
    fake, folder = tmp_path / "python", tmp_path / "out"
    folder.mkdir()
    fake.write_text(f"#!/bin/sh\nfor last; do :; done; fd=/proc/self/fd/$last\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(fake))
    with pytest.raises(BuildError, match=words):
        build_engine(tome, folder / "v.plan", **RTX)
    assert list(folder.iterdir()) == []


def test_a_full_disk_while_an_engine_is_written_is_the_disks_error(tome, tmp_path, monkeypatch):
    """A limit on the size of files, which the building process inherits."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(StorageError, match="File too large"):
            build_engine(tome, tmp_path / "v.plan", **RTX)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
