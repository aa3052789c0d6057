"""Engines on an NVIDIA GPU (marked gpu) and what is said where they cannot run (everywhere)."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokexport.engines import files
from tokexport.engines.measure.jobs import noise
from tokexport.engines.runners import TABLE, RunnerOptions
from tokexport.engines.runners import tensorrt as engine_runner
from tokexport.engines.tensorrt import runtime as trt
from tokexport.engines.tensorrt.build import build_engine
from tokexport.engines.tensorrt.sidecar import Builder, read_sidecar, write_sidecar
from tokexport.export.inspection import inspect
from tokexport.tools.demo import samples

from tokexport import UsageError, open_runner, verify


def open_engine(path, outputs=()):
    """An engine, opened as the table opens it."""
    return engine_runner.open_file(path, TABLE["trt"], RunnerOptions(outputs=outputs))


pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: engine builds need it")
GPU = pytest.mark.skipif(
    not (trt.gpus() and torch.cuda.is_available()), reason="there is no NVIDIA GPU that PyTorch can use"
)
NO_GPU = pytest.mark.skipif(trt.gpus() > 0, reason="what is said where there is no GPU")


@pytest.fixture(scope="module")
def tome(exported):
    return exported("tiny_vit", method="tome", r=8)


@pytest.fixture(scope="module")
def elsewhere(tome, tmp_path_factory):
    """An engine for a GPU that is not here."""
    return build_engine(
        tome,
        tmp_path_factory.mktemp("engine") / "v.plan",
        precision="fp16",
        builder="rtx",
        capabilities=("80",),
        decisions=True,
    ).path


def test_an_engine_gives_its_decisions_when_asked(elsewhere, tome, tmp_path):
    p = inspect(tome).provenance
    assert read_sidecar(elsewhere).output_names == (*p.outputs, *p.decisions) and len(p.decisions) > 6
    found = files.provenance_of(read_sidecar(elsewhere))
    assert found.precision == "fp16" and found.decisions == p.decisions and found.schedule == p.schedule
    plain = build_engine(tome, tmp_path / "p.plan", precision="fp16", builder="rtx", capabilities=("80",)).path
    assert read_sidecar(plain).output_names == p.outputs
    for call in (lambda: verify(plain), lambda: open_engine(plain, p.decisions)):
        with pytest.raises(UsageError, match="trt --decisions"):
            call()


def test_the_stages_of_an_engine_cannot_be_bisected(elsewhere):
    with pytest.raises(UsageError, match="bisect the ONNX file"):
        verify(elsewhere, bisect=True)


@NO_GPU
def test_without_a_gpu_an_engine_is_refused_in_words(elsewhere):
    from click.testing import CliRunner
    from tokexport.tools.cli import group

    for args in (["run", str(elsewhere), str(samples.sample_photos()[0])], ["verify", str(elsewhere)]):
        assert "there is no NVIDIA GPU here: run the ONNX file" in str(CliRunner().invoke(group, args).exception)
    with pytest.raises(UsageError, match="CUDA graphs are of TensorRT engines"):
        with open_runner(read_sidecar(elsewhere).source, cuda_graph=True):
            pass


def test_engines_are_benched_with_each_other_only(elsewhere, tome):
    from click.testing import CliRunner
    from tokexport.tools.cli import group

    for args in (
        [str(elsewhere)],
        [str(elsewhere), str(tome), "--dense", str(elsewhere)],
        [str(tome), "--dense", str(elsewhere)],
    ):
        assert "compared with each other" in str(CliRunner().invoke(group, ["bench", *args]).exception)


@NO_GPU
def test_an_engine_that_cannot_run_is_a_row_with_its_error(elsewhere, exported, tmp_path):
    from click.testing import CliRunner
    from tokexport.tools.cli import group

    dense = build_engine(
        exported("tiny_vit", method="none"), tmp_path / "d.plan", precision="fp16", builder="rtx", capabilities=("80",)
    ).path
    out = CliRunner().invoke(group, ["bench", str(elsewhere), "--dense", str(dense), "--batch", "2", "--json"])
    rows = json.loads(out.stdout)["rows"]
    assert (
        [r["runtime"] for r in rows] == ["trt"] * 2
        and all("no NVIDIA GPU" in r["error"] for r in rows)
        and rows[1]["macs_ratio"] > 1.5
    )


@pytest.mark.parametrize("runtime", ["ort-cuda", "ort-tensorrt"])
@NO_GPU
def test_without_a_gpu_onnxruntimes_gpu_engines_are_refused_in_words(runtime, tome):
    with pytest.raises(UsageError, match=r"tokexport\[gpu\]|no NVIDIA GPU"), open_runner(tome, runtime):
        pass


def _pretend(monkeypatch, capability=(8, 6), cuda=True):
    """A GPU as far as the checks before loading look."""
    monkeypatch.setattr(trt, "gpus", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")


def test_an_engine_for_another_gpu_is_refused(elsewhere, monkeypatch):
    _pretend(monkeypatch, (9, 0))
    with pytest.raises(
        UsageError, match=r"for compute capability 80, this GPU \(A GPU\) has 90: build it with --compute-capability 90"
    ):
        open_engine(elsewhere)


def test_an_engine_of_another_version_is_refused(elsewhere, tmp_path, monkeypatch):
    _pretend(monkeypatch, (8, 0))
    copy = tmp_path / "v.plan"
    copy.write_bytes(elsewhere.read_bytes())
    write_sidecar(copy, replace(read_sidecar(elsewhere), builder=Builder("rtx", "1.0.0.1")))
    with pytest.raises(UsageError, match="was built by TensorRT-RTX 1.0.0.1, here is .*: build it again"):
        open_engine(copy)


def test_a_pytorch_without_cuda_is_named(elsewhere, monkeypatch):
    _pretend(monkeypatch, cuda=False)
    with pytest.raises(UsageError, match="PyTorch .* cannot use the GPU"):
        open_engine(elsewhere)


def test_an_input_that_is_not_finite_is_refused(tome):
    image = np.zeros((1, 3, 64, 64), np.float32)
    image[0, 0, 0, 0] = np.nan
    with open_runner(tome) as runner, pytest.raises(UsageError, match="not finite: 1 of 12288"):
        runner.run({"image": image})


@pytest.fixture(scope="module")
def engine_here(exported, method_cases, tmp_path_factory):
    """engine_here(method, precision) -> engine for the GPU that is here, with decisions; made once."""
    made, folder = {}, tmp_path_factory.mktemp("here")

    def build(method, precision="fp32"):
        if (method, precision) not in made:
            path = exported("tiny_vit", method=method, **method_cases[method])
            made[method, precision] = build_engine(
                path, folder / f"{method}.{precision}.plan", precision=precision, decisions=True
            ).path
        return made[method, precision]

    return build


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("method", ["none", "tome", "evit", "etps", "diffrate", "dtps", "dynamicvit"])
def test_an_engine_is_what_the_reference_is(method, precision, engine_here):
    report = verify(engine_here(method, precision))
    assert report.passed and report.precision == precision, report.summary()


@GPU
@pytest.mark.gpu
def test_a_cuda_graph_gives_the_same_and_tensors_are_not_copied(engine_here):
    path = engine_here("tome")
    image = noise(8, (3, 64, 64))
    with open_runner(path) as plain, open_runner(path, cuda_graph=True) as captured:
        first = plain.run({"image": image})
        for _ in range(3):
            again = captured.run({"image": image})
        assert all((first[k] == again[k]).all() for k in first)
        out = plain.run({"image": torch.from_numpy(image).cuda()})
        assert out["logits"].is_cuda and (out["logits"].cpu().numpy() == first["logits"]).all()
        with pytest.raises(UsageError, match="built for 1 to 32 images"):
            plain.run({"image": np.repeat(image, 5, 0)})


@GPU
@pytest.mark.gpu
def test_an_identical_request_is_a_cache_hit_and_the_inspector_shows_layers(engine_here):
    path = engine_here("tome")
    assert build_engine(read_sidecar(path).source, path, precision="fp32", decisions=True).cached
    assert len(engine_runner.layer_information(path)) > 10


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["ort-cuda", "ort-tensorrt"])
def test_onnxruntime_on_the_gpu_is_what_the_reference_is(runtime, tome):
    import onnxruntime

    if TABLE[runtime].provider not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built without it: pip install onnxruntime-gpu")
    assert verify(tome, runtime=runtime).passed


@GPU
@pytest.mark.gpu
def test_an_engine_is_timed_alone_and_gives_its_memory_back(engine_here):
    path = engine_here("tome")
    image = noise(8, (3, 64, 64))
    with open_runner(path) as first:
        first.run({"image": image})
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    for cuda_graph in (False, True):
        with open_runner(path, cuda_graph=cuda_graph) as runner:
            alone = runner.timer({"image": image})
            assert 0 < sorted(alone() for _ in range(20))[10] < 1
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] >= free - 2**21
