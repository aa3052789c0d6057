"""`reduce_model(..., lowering="triton")` is the reference by other means: interpreted here, on a GPU with `make test-gpu`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokexport.export import lowering, reducers

from tokexport import UsageError, load_model, reduce_model

from .. import cases

NARROW = {"img_size": 64, "patch_size": 8, "embed_dim": 36, "depth": 2, "num_heads": 3, "num_classes": 5}
RUNS = {
    **{name: ("tiny_vit", name.split()[0], options) for name, options in cases.METHOD_CASES.items()},
    "tome, no class token": ("tiny_vit_nocls", "tome", {"r": 8}),
    "tome, plain attention": ("tiny_vit", "tome", {"r": 8, "prop_attn": False}),
    "etps, distilled": ("tiny_vit_distilled", "etps", {"at": (1, 3)}),
    "tome, 12 channels a head": ("narrow", "tome", {"r": 3}),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_layers, golden, tmp_path_factory):
    """name -> {"eager", "triton", "words"} of every row of RUNS."""
    pytest.importorskip("triton", reason="Triton is not installed (it comes with torch for Linux)")
    folder = tmp_path_factory.mktemp("lowering")
    models = {
        kind: {
            "name": name,
            "kwargs": {**cases.KWARGS, **kwargs},
            "checkpoint": str(golden.folder / f"{kind}.safetensors"),
            "predictor": str(tiny_layers),
        }
        for kind, (name, kwargs) in cases.TINY.items()
    }
    models["narrow"] = {"name": "vit_tiny_patch16_224", "kwargs": NARROW}
    wanted = {"models": models, "runs": list(RUNS.values()), "image": golden.image[:1]}
    torch.save(wanted, folder / "cases.pt")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "reduced.py"), "cases.pt", "results.pt"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return dict(zip(RUNS, torch.load(folder / "results.pt")))


@pytest.mark.parametrize("name", RUNS)
def test_kernels_reduce_as_the_reference_does(runs, relative, name):
    eager, triton = runs[name]["eager"], runs[name]["triton"]
    assert len(triton["keep"]) == len(eager["keep"])
    assert all(torch.equal(a, b) for a, b in zip(triton["keep"], eager["keep"]))
    assert torch.equal(triton["sources"], eager["sources"])
    assert relative(triton["size"], eager["size"]) < 1e-5
    assert relative(triton["output"], eager["output"]) < 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_what_no_kernel_takes_is_told(runs, name):
    _, method, _ = RUNS[name]
    words = " ".join(runs[name]["words"])
    if "12 channels" in name:
        assert "head size 12: the kernels take multiples of 8" in words and "block 0, 1" in words
    elif method != "none" and reducers.get(method).node is None:
        assert f"{method} has no kernel" in words
    elif method in ("tome", "etps", "dtps"):
        assert not words


def test_a_model_on_the_cpu_and_an_unknown_lowering_are_refused(tiny, golden, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    loaded = tiny("tiny_vit")
    with pytest.raises(UsageError, match="wanted eager or triton"):
        reduce_model(loaded.module, loaded.schedule("tome", r=8), lowering="cuda")
    pytest.importorskip("triton", reason="Triton is not installed (it comes with torch for Linux)")
    model = reduce_model(loaded.module, loaded.schedule("tome", r=8), lowering="triton")
    with pytest.raises(UsageError, match="runs on an NVIDIA GPU, and the model is on cpu"):
        model(golden.image)
    double = load_model(cases.TINY["tiny_vit"][0], cases.KWARGS)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = reduce_model(double.module.double(), double.schedule("tome", r=8), lowering="triton")
    with pytest.raises(UsageError, match="float64"):
        model(golden.image.double())


def test_triton_that_is_not_installed_is_named(tiny, monkeypatch):
    monkeypatch.setattr(lowering, "find_spec", lambda name: None)
    loaded = tiny("tiny_vit")
    with pytest.raises(UsageError, match=r"tokexport\[kernels\]"):
        reduce_model(loaded.module, loaded.schedule("tome", r=8), lowering="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_reduce_on_a_gpu(tiny, golden, relative, dtype):
    loaded = tiny("tiny_vit")
    module, image = loaded.module.to("cuda", dtype), golden.image.to("cuda", dtype)
    try:
        schedule = loaded.schedule("tome", r=8)
        wanted, came = (
            reduce_model(module, schedule).run(image),
            reduce_model(module, schedule, lowering="triton").run(image),
        )
    finally:
        loaded.module.to("cpu", torch.float32)
    assert relative(came.output.float().cpu(), wanted.output.float().cpu()) < (1e-4 if dtype is torch.float32 else 2e-2)
