"""The options of `onnx` that say what a file takes and gives, as typed."""

import json

import pytest
from click.testing import CliRunner
from tokexport.export.inspection import inspect
from tokexport.tools.cli import group

from tokexport import UsageError

TINY = ["--model", "vit_tiny_patch16_224"]
for pair in ("img_size=32", "patch_size=8", "embed_dim=32", "depth=3", "num_heads=2", "num_classes=5"):
    TINY += ["--model-kwargs", pair]


def run(*args):
    return CliRunner().invoke(group, list(map(str, args)))


def test_a_file_as_typed_says_what_it_takes_and_gives(tmp_path):
    path = tmp_path / "v.onnx"
    asked = ["--emit", "patches,tokens", "--layers", "-2", "--layout", "nchw", "--dropped", "zero", "--input", "uint8"]
    out = run("onnx", *TINY, "--method", "evit", "--at", "1", "--no-fuse", *asked, "-o", path, "--json")
    assert out.exit_code == 0, out.output
    data = json.loads(out.stdout)
    kinds = ["tokens", "sizes", "sources", "positions", "patches", "honesty", "mask"]
    assert data["outputs"] == [f"{k}_1" for k in kinds] and data["input"] == "uint8-nhwc"
    assert data["emission"]["layers"] == [1] == list(inspect(path).provenance.emission.layers)


def test_the_summary_names_every_output(tmp_path):
    out = run(
        "onnx", *TINY, "--method", "tome", "--r", 2, "--sources", "--input", "uint8-nchw", "-o", tmp_path / "v.onnx"
    )
    assert out.exit_code == 0 and "image [dynamic, 3, 32, 32] of uint8 pixels" in out.output
    assert "logits [dynamic, 5], a value" in out.output and "sources [dynamic, 17], for each input token" in out.output


@pytest.mark.parametrize(
    "args, words",
    [
        (["--emit", "pool"], "--emit pool: wanted some of pooled, tokens, patches, sources"),
        (["--layers", "2"], "--layers give tokens or patches"),
        (["--emit", "tokens", "--layers", "2,x"], "--layers '2,x': wanted numbers of blocks"),
        (["--emit", "tokens", "--norm-layers"], "--norm-layers says how layers are given"),
        (["--layout", "nchw"], "add patches to emit"),
        (["--emit", "tokens", "--layers", "7"], "--layers 7: the model has 3 blocks"),
    ],
)
def test_what_does_not_go_together_is_one_line_in_flags(args, words, tmp_path):
    error = run("onnx", *TINY, "--method", "none", *args, "-o", tmp_path / "v.onnx").exception
    assert isinstance(error, UsageError) and words in str(error) and "\n" not in str(error)
    assert not list(tmp_path.iterdir())


def test_inspect_tells_what_the_file_really_takes(tmp_path):
    path = tmp_path / "pixels.onnx"
    assert run("onnx", *TINY, "--method", "tome", "--r", 2, "--input", "uint8", "-o", path).exit_code == 0
    out = run("inspect", path)
    assert "image uint8 [dynamic, 32, 32, 3], pixels as they are (mean" in out.output


def test_a_folder_in_place_of_a_file_says_which_file(tmp_path):
    (tmp_path / "ladder").mkdir()
    (tmp_path / "ladder" / "ladder.json").write_text("{}")
    (tmp_path / "ladder" / "0.onnx").write_text("")
    assert "is a ladder: wanted a file in it, e.g. " in str(run("run", tmp_path / "ladder", tmp_path).exception)


def test_inspect_takes_a_bundle_and_looks_at_its_file(tmp_path):
    from tokexport.engines.bundle.write import write_bundle
    from tokexport.tools.demo import samples

    path = tmp_path / "small.onnx"
    assert run("onnx", *TINY, "--method", "tome", "--r", 2, "-o", path).exit_code == 0
    write_bundle(path, tmp_path / "b", images=samples.sample_photos(), n_images=1)
    wanted, got = (json.loads(run("inspect", place, "--json").stdout) for place in (path, tmp_path / "b"))
    assert got["provenance"] == wanted["provenance"]
    (tmp_path / "b" / "small.onnx").write_bytes(path.read_bytes() + b"\0")
    assert "bytes, wanted" in str(run("inspect", tmp_path / "b").exception)
