"""The command line as a user meets it: what it writes, what it says, and what it refuses (exit 2, nothing written)."""

import json
import os
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from tokexport.export import reducers

from .. import cases
from ..cases import mostly_slow
from .command_line import TINY, cli

GOLDEN = Path(__file__).parents[1] / "golden"


def test_help_is_there_within_a_third_of_a_second():
    took = []
    for _ in range(3):
        start = time.perf_counter()
        out = cli("--help")
        took.append(time.perf_counter() - start)
    assert out.returncode == 0 and all(name in out.stdout for name in ("onnx", "verify", "inspect", "bench", "demo"))
    assert min(took) < 0.5  # 0.06 s on an idle machine; the bound leaves room for a busy one


def test_every_command_has_help_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    for name in ("onnx", "verify", "inspect", "bench", "demo", "rates"):
        out = cli(name, "--help", env={"PYTHONPATH": str(tmp_path)})
        assert out.returncode == 0, out.stderr


def test_inspect_needs_no_torch_and_reports(vit, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    out = cli("inspect", vit, "--json", env={"PYTHONPATH": str(tmp_path)})
    found = json.loads(out.stdout)
    assert found["tokens"] == [[65 - 8 * i, 57 - 8 * i] for i in range(6)] and found["refusals"] == []
    assert found["provenance"]["weights"]["source"] == "random"
    assert "57 49 41 33 25 17" in cli("inspect", vit).stderr


def test_onnx_json_says_what_was_written(call, tmp_path):
    code, out, _ = call("onnx", *TINY, "--method", "none", "-o", tmp_path / "d.onnx", "--json")
    said = json.loads(out)
    assert code == 0 and said["macs"] == said["macs_dense"] and said["size"] == (tmp_path / "d.onnx").stat().st_size
    assert said["nodes"] == len(onnx.load(tmp_path / "d.onnx").graph.node)
    assert any("random" in n for n in said["notes"])


def test_a_cut_r_is_said(call, tmp_path):
    code, _, err = call("onnx", *TINY, "--r", 25, "-o", tmp_path / "c.onnx")
    assert code == 0 and "cut to half" in err


def test_verify_passes_a_good_file(call, vit):
    code, out, err = call("verify", vit, "--json")
    report = json.loads(out)
    assert code == 0 and report["passed"] and report["decisions"] == 1.0
    assert {o["name"] for o in report["outputs"]} == {"logits", "sources"}


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_verify_runs_on_each_engine_with_a_fixed_batch(call, tmp_path, runtime):
    path = tmp_path / "b3.onnx"
    assert call("onnx", *TINY, "--r", "8:-1", "--batch", 3, "-o", path)[0] == 0
    assert call("verify", path, "--runtime", runtime)[0] == 0


def _changed(path, out, change):
    model = onnx.load(path)
    change({i.name: i for i in model.graph.initializer}, model.graph)
    onnx.save(model, out)
    return out


def _scale(name):
    def change(weights, graph):
        array = onnx.numpy_helper.to_array(weights[name])
        weights[name].CopyFrom(onnx.numpy_helper.from_array(array * np.float32(1.01), name))

    return change


def _drop_log_size(weights, graph):
    node = next(n for n in graph.node if n.op_type == "Log")
    node.op_type = "Neg"


def _other_host(weights, graph):
    node = next(n for n in graph.node if n.op_type == "TopK" and any("src" in o for o in n.output))
    next(a for a in node.attribute if a.name == "largest").i = 0


@pytest.mark.parametrize(
    "fault", [_scale("blocks.2.qkv.weight"), _scale("blocks.4.proj.weight"), _drop_log_size, _other_host]
)
def test_verify_fails_a_wrong_file(call, vit, tmp_path, fault):
    code, out, _ = call("verify", _changed(vit, tmp_path / "wrong.onnx", fault), "--json")
    assert code == 1 and not json.loads(out)["passed"]


def test_verify_finds_the_weights_by_hash(call, tmp_path):
    from tokexport.export.models.load import load_model, parse_kwargs

    model = load_model("vit_tiny_patch16_224", parse_kwargs(TINY[3::2]), seed=3).module
    first, second, path = tmp_path / "w.safetensors", tmp_path / "other.safetensors", tmp_path / "w.onnx"
    save_file(model.state_dict(), first)
    save_file({k: v + 1 for k, v in model.state_dict().items()}, second)
    assert call("onnx", *TINY, "--checkpoint", first, "--r", 4, "-o", path)[0] == 0
    assert call("verify", path)[0] == 0
    code, _, err = call("verify", path, "--checkpoint", second)
    assert code == 2 and "SHA-256" in err
    first.rename(tmp_path / "moved.safetensors")
    code, _, err = call("verify", path)
    assert code == 2 and "give it as checkpoint" in err
    assert call("verify", path, "--checkpoint", tmp_path / "moved.safetensors")[0] == 0


class _Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/tokexport_was_here",))


BAD_OPTIONS = {
    "unknown model": (["--model", "vit_nano", "--r", 8], "unknown model"),
    "windowed model": (["--model", "swin_tiny_patch4_window7_224", "--r", 8], "SwinTransformer"),
    "unknown method": ([*TINY, "--method", "magic"], "magic"),
    "no r": ([*TINY, "--method", "tome"], "--r"),
    "r with none": ([*TINY, "--method", "none", "--r", 8], "--r"),
    "r no number": ([*TINY, "--r", "eight"], "eight"),
    "r negative": ([*TINY, "--r", -1], "negative"),
    "r too large": ([*TINY, "--r", 66], "65"),
    "r list too long": ([*TINY, "--r", "1,1,1,1,1,1,1"], "7 values"),
    "inflection": ([*TINY, "--r", "8:2"], "inflection"),
    "batch": ([*TINY, "--r", 8, "--batch", 0], "--batch"),
    "opset": ([*TINY, "--r", 8, "--opset", 11], "--opset"),
    "kwargs": (["--model-kwargs", "img_size", "--r", 8], "KEY=VALUE"),
    "unknown kwarg": (["--model-kwargs", "colour=3", "--r", 8], "colour"),
    "no checkpoint": ([*TINY, "--r", 8, "--checkpoint", "nowhere.pth"], "no such file"),
    "no blocks": ([*TINY, "--model-kwargs", "depth=0", "--r", 8], "no blocks"),
    "r of many digits": ([*TINY, "--r", "9" * 400], "more tokens"),
    "batch of many digits": ([*TINY, "--r", 8, "--batch", "9" * 20], "--batch"),
    "weights by kwargs": (
        [*TINY, "--model-kwargs", "checkpoint_path=w.pth", "--r", 8],
        "named with checkpoint or pretrained",
    ),
    "block out of range": ([*TINY, "--method", "evit", "--at", "1,6"], "--at"),
    "blocks not in order": ([*TINY, "--method", "etps", "--at", "3,1"], "--at"),
    "default blocks of a small model": ([*TINY, "--method", "dtps"], "--at"),
    "keep rate of 0": ([*TINY, "--method", "evit", "--at", "1", "--keep-rate", "0"], "--keep-rate"),
    "keep rate above 1": ([*TINY, "--method", "dynamicvit", "--at", "1", "--keep-rate", "1.2"], "--keep-rate"),
    "too many keep rates": ([*TINY, "--method", "etps", "--at", "1,3", "--keep-rate", "0.9,0.8,0.7"], "--keep-rate"),
    "a list that grows": ([*TINY, "--method", "dtps", "--at", "1,3", "--keep-rate", "0.5,0.7"], "must not grow"),
    "no rates": ([*TINY, "--method", "diffrate"], "--rates"),
    "rates for another depth": ([*TINY, "--method", "diffrate", "--rates", "deit_small@2.9"], "12 counts"),
    "unknown rates": (["--method", "diffrate", "--rates", "deit_small@9.9"], "deit_small@2.9"),
    "fuse with another method": ([*TINY, "--method", "etps", "--fuse"], "--fuse"),
    "keep rate with tome": ([*TINY, "--r", 8, "--keep-rate", "0.7"], "--keep-rate"),
    "predictor with evit": ([*TINY, "--method", "evit", "--predictor", "x.pth"], "--predictor"),
    "no such predictor": ([*TINY, "--method", "dtps", "--at", "1", "--predictor", "x.pth"], "no such file"),
    "no class token": (
        [
            *TINY,
            "--model-kwargs",
            "class_token=False",
            "--model-kwargs",
            "global_pool=avg",
            "--method",
            "evit",
            "--at",
            "1",
        ],
        "--score mean",
    ),
    "parallel blocks": (["--model", "vit_small_patch16_18x2_224", "--r", 8], "ParallelThingsBlock"),
    "empty output": ([*TINY, "--r", 8, "-o", ""], "-o is empty"),
    "other digits": ([*TINY, "--r", "１３"], "--r"),
    "two weights": ([*TINY, "--r", 8, "--checkpoint", "nowhere.pth", "--pretrained"], "give one of them"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_refused_in_words(call, tmp_path, case):
    args, word = BAD_OPTIONS[case]
    code, _, err = call("onnx", *([] if "-o" in args else ["-o", tmp_path / "x.onnx"]), *args)
    assert code == 2 and word in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def method_arguments(method):
    """A method and its options as typed, with trained score heads where it reads them."""
    layers = {
        "score_head": ["--predictor", GOLDEN / "tps_predictors_tiny.safetensors"],
        "metric_layer": ["--metric", GOLDEN / "second" / "tiny_vit.dtem_linear_f16.safetensors"],
    }
    read = [word for signal in reducers.TABLE[method].signals for word in layers.get(signal, [])]
    return [*cases.METHODS[method].cli, *read]


@pytest.mark.parametrize("batch", mostly_slow([1, "dynamic"], 1))
@pytest.mark.parametrize("method", mostly_slow(reducers.TABLE, "tome", "evit", "diffrate", "dtem"))
def test_every_method_is_exported_inspected_and_verified(call, tmp_path, monkeypatch, method, batch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rates.json").write_text(
        json.dumps({"prune_kept": [65, 60, 50, 42, 34, 20], "merge_kept": [65, 55, 46, 38, 30, 12]})
    )
    code, _, err = call(
        "onnx",
        *TINY,
        "--checkpoint",
        GOLDEN / "tiny_vit.safetensors",
        "--method",
        method,
        *method_arguments(method),
        "--batch",
        batch,
        "--sources",
        "-o",
        "m.onnx",
    )
    assert code == 0, err
    assert json.loads(call("inspect", "m.onnx", "--json")[1])["provenance"]["schedule"]["method"] == method
    for runtime in ("ort", "openvino"):
        report = json.loads(call("verify", "m.onnx", "--runtime", runtime, "--json")[1])
        assert report["passed"] and report["decisions"] in (1.0, None), report


def _wrong_order(weights, graph):
    next(a for n in graph.node if n.op_type == "TopK" for a in n.attribute if a.name == "largest").i = 0


def _wrong_head(weights, graph):
    name = next(n for n in weights if "score_heads" in n and n.endswith("local"))
    weights[name].CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weights[name]), name))


@pytest.mark.parametrize(
    "method, fault",
    [("evit", _wrong_order), ("diffrate", _wrong_order), ("dtps", _wrong_head), ("dynamicvit", _wrong_head)],
)
def test_verify_fails_wrong_decisions_of_every_kind(call, tmp_path, monkeypatch, method, fault):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rates.json").write_text(
        json.dumps({"prune_kept": [65, 60, 50, 42, 34, 20], "merge_kept": [65, 55, 46, 38, 30, 12]})
    )
    assert call("onnx", *TINY, "--method", method, *method_arguments(method), "-o", "m.onnx")[0] == 0
    code, out, _ = call("verify", _changed("m.onnx", "wrong.onnx", fault), "--json")
    report = json.loads(out)
    assert code == 1 and report["decisions"] < 1 and any(not f["passed"] for f in report["flips"])


def test_score_heads_must_fit(call, tmp_path):
    from tokexport.export.checkpoints.score_heads import random_heads

    for name, heads in {"wide": random_heads(128, 3, 0), "few": random_heads(64, 2, 0)}.items():
        save_file(heads, tmp_path / f"{name}.safetensors")
    before = sorted(tmp_path.iterdir())
    for args, word in (
        (["--predictor", tmp_path / "wide.safetensors"], "width 128"),
        (["--predictor", tmp_path / "few.safetensors"], "2 stages"),
        (["--checkpoint", GOLDEN / "tiny_vit.safetensors"], "--predictor"),
        (["--predictor", GOLDEN / "tiny_vit.safetensors"], "no score heads"),
    ):
        code, _, err = call("onnx", *TINY, "--method", "dtps", "--at", "1,3,4", *args, "-o", tmp_path / "x.onnx")
        assert code == 2 and word in err and "Traceback" not in err, err
    assert sorted(tmp_path.iterdir()) == before


def test_published_rates_are_scaled_to_other_images_and_said(call, tmp_path):
    code, _, err = call(
        "onnx",
        "--model",
        "deit_tiny_patch16_224",
        "--model-kwargs",
        "img_size=160",
        "--method",
        "diffrate",
        "--rates",
        "deit_tiny@0.7",
        "-o",
        tmp_path / "d.onnx",
    )
    assert code == 0 and "for 197 tokens, this model has 101" in err
    (tmp_path / "r.json").write_text(json.dumps({"prune_kept": [0] * 6, "merge_kept": [0] * 6}))
    code, _, err = call(
        "onnx", *TINY, "--method", "diffrate", "--rates", tmp_path / "r.json", "-o", tmp_path / "x.onnx"
    )
    assert code == 2 and "Traceback" not in err


def test_bad_checkpoints_are_refused_whole(call, tmp_path):
    torch.save({"model": _Evil()}, tmp_path / "evil.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    from tokexport.export.models.load import load_model, parse_kwargs

    state = load_model("vit_tiny_patch16_224", parse_kwargs(TINY[3::2])).module.state_dict()
    save_file({**state, "head.bias": torch.full((10,), torch.nan)}, tmp_path / "nan.safetensors")
    torch.save({**state, "head.bias": torch.zeros(10).to_sparse()}, tmp_path / "sparse.pth")
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.pth")
    save_file({"head.weight": torch.zeros(2, 2), "extra": torch.zeros(1)}, tmp_path / "keys.safetensors")
    for name, words in {
        "evil.pth": ["holds no state dict"],
        "cut.safetensors": ["cannot be read"],
        "nan.safetensors": ["not finite", "head.bias"],
        "sparse.pth": ["head.bias is of class torch._utils._rebuild_sparse_tensor"],
        "numbers.pth": ["no state dict"],
        "keys.safetensors": ["of its 80 tensors match", "the file has 0 blocks, the model 6"],
    }.items():
        code, _, err = call("onnx", *TINY, "--r", 8, "--checkpoint", tmp_path / name, "-o", tmp_path / "x.onnx")
        assert code == 2 and all(w in err for w in words), err
    assert not os.path.exists("/tmp/tokexport_was_here") and not (tmp_path / "x.onnx").exists()
