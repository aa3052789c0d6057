"""Triton repositories: what is written, that Triton's own schema takes it, and a real server that answers as Python does."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image
from tokexport.engines.bundle.manifest import Builder, read_manifest
from tokexport.engines.bundle.write import write_bundle
from tokexport.engines.predict import outputs_of
from tokexport.engines.serving import server
from tokexport.engines.serving.batching import Batching, batching_of, read_latencies
from tokexport.engines.serving.client import ServerError, ask, statistics
from tokexport.engines.serving.config import BACKENDS, Instances, model_config
from tokexport.engines.serving.pbtxt import to_pbtxt
from tokexport.engines.serving.repository import ServeOptions, image_code, write_repository
from tokexport.export.errors import EngineError, StorageError
from tokexport.tools.cli import group

from tokexport import UsageError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six photos of odd sizes: JPEG, PNG, grey, with EXIF's turn, transparent."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(8)
    for i, size in enumerate([(70, 91), (64, 64), (33, 120), (120, 100), (100, 100), (81, 80)]):
        small = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        exif = Image.Exif()
        exif[274] = 6 if i == 3 else 1
        (small.convert("L") if i == 2 else small.convert("RGBA") if i == 4 else small).save(
            folder / f"{i}.{'png' if i % 2 == 0 else 'jpg'}", exif=exif
        )
    return folder


@pytest.fixture(scope="module")
def bundles(exported, photos, tmp_path_factory):
    """A bundle of a file for any batch, and its copy by another name."""
    folder = tmp_path_factory.mktemp("bundles")
    write_bundle(exported("tiny_vit"), folder / "any", images=photos, n_images=2)
    shutil.copytree(folder / "any", folder / "other")
    return folder


@pytest.fixture(scope="module")
def repository(bundles, tmp_path_factory):
    """Both bundles as Python models, with batching that waits long enough to be seen."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "latency.json").write_text(json.dumps({"rows": rows_of(bundles / "any", {1: 20.0, 4: 200.0 / 3})}))
    options = ServeOptions(backend="python", threads=1, most=8, latency=folder / "latency.json", kserve=True)
    write_repository([bundles / "any"], folder / "repository", options=options)
    return folder / "repository"


def rows_of(bundle, latencies):
    """Rows of a bench report of a bundle's file."""
    file = f"somewhere/{read_manifest(bundle).file.name}"
    return [{"file": file, "runtime": "ort", "batch": n, "ms": ms} for n, ms in latencies.items()]


def configs(folder):
    return {path.parent.name: path.read_text() for path in sorted(Path(folder).glob("*/config.pbtxt"))}


def test_three_models_of_a_bundle_and_what_is_in_them(repository):
    files = sorted(str(p.relative_to(repository)) for p in repository.rglob("*") if p.is_file())
    model = next(f for f in files if f.endswith(".onnx"))
    assert files == sorted(
        [
            "any/1/empty",
            "any/config.pbtxt",
            "any-prepare/1/model.py",
            "any-prepare/1/preprocess.json",
            "any-prepare/1/tokexport_images.py",
            "any-prepare/config.pbtxt",
            "any-prepare/warmup/photo",
            "any-run/1/model.py",
            model,
            "any-run/config.pbtxt",
            "any-run/warmup/image",
            "kserve.yaml",
            "requirements.txt",
        ]
    )
    text = (repository / "any-run/config.pbtxt").read_text()
    assert "max_batch_size: 8" in text and "preferred_batch_size: [ 4 ]" in text
    assert "max_queue_delay_microseconds: 33333" in text  # half of what the batch of four takes
    assert (repository / "any-run/warmup/image").stat().st_size == 4 * 3 * 64 * 64


def test_image_code_runs_without_tokexport(tmp_path):
    """It is the project's own code with nothing of the project imported."""
    code = image_code()
    assert "from ." not in code and "import tokexport" not in code
    names = {}
    exec(compile(code.replace("from __future__ import annotations", ""), "images", "exec"), names)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(names["UsageError"], match="cannot be read"):
        (tmp_path / "b.png").write_text("x")
        names["read_image"](tmp_path / "b.png")
    assert names["read_image"](tmp_path / "a.png").size == (9, 9)


ENGINE = Builder("rtx", "1.7.1", (), False)
CASES = {  # backend, batching, device, whether labels are known
    "onnxruntime": ("onnxruntime", Batching(16, (4, 8), 500, ""), "gpu", True),
    "openvino": ("openvino", Batching(8, (), 0, ""), "cpu", False),
    "python": ("python", Batching(8, (8,), 100, ""), "cpu", True),
    "tensorrt": ("tensorrt", Batching(32, (8,), 900, ""), "gpu", True),
    "fixed": ("tensorrt", Batching(0, (), 0, ""), "gpu", False),
}


def message_of(text):
    """A configuration as Triton's own message. Skipped without tritonclient (pip install --no-deps tritonclient)."""
    pb = pytest.importorskip("tritonclient.grpc.model_config_pb2", exc_type=ImportError)
    text_format = pytest.importorskip("google.protobuf.text_format")
    return text_format.Parse(text, pb.ModelConfig())


def config_of(case, bundles):
    name, batching, device, labels = CASES[case]
    manifest = read_manifest(bundles / "any")
    if case == "fixed":
        one = lambda entries: tuple(replace(entry, shape=(1, *entry.shape[1:])) for entry in entries)
        manifest = replace(manifest, inputs=one(manifest.inputs), outputs=one(manifest.outputs))
    if labels:
        manifest = replace(manifest, labels=tuple(f'a "name" {i}' for i in range(10)))
    if name == "tensorrt":
        manifest = replace(manifest, kind="engine", builder=ENGINE)
    return to_pbtxt(
        model_config(
            "the-model", manifest, backend=BACKENDS[name], batching=batching, instances=Instances(2, device, 3)
        )
    )


@pytest.mark.parametrize("case", CASES)
def test_every_configuration_is_one_of_tritons_messages(case, bundles):
    name, batching, device, labels = CASES[case]
    config = message_of(config_of(case, bundles))
    assert config.name == "the-model" and config.max_batch_size == batching.most
    assert config.platform == "tensorrt_plan" if name == "tensorrt" else config.backend == name
    batch = [] if batching.most else [1]
    assert list(config.input[0].dims) == [*batch, 3, 64, 64] and config.input[0].name == "image"
    assert [list(o.dims) for o in config.output] == [[*batch, 10], [*batch, 65]]
    assert list(config.dynamic_batching.preferred_batch_size) == list(batching.preferred)
    assert config.HasField("dynamic_batching") == (batching.most > 0)
    group = config.instance_group[0]
    assert group.count == 2 and group.kind == {"gpu": group.KIND_GPU, "cpu": group.KIND_CPU}[device]
    assert bool(config.output[0].label_filename) == labels and config.version_policy.latest.num_versions == 1
    assert [w.batch_size for w in config.model_warmup] == [1, *batching.preferred]


def test_the_repository_holds_tritons_messages(repository):
    for name, text in configs(repository).items():
        assert message_of(text).name == name
    steps = message_of(configs(repository)["any"]).ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["any-prepare", "any-run"]
    with pytest.raises(Exception, match="no field named|has no field"):
        message_of('name: "x"\nmax_batchsize: 3\n')


def test_batches_follow_from_what_was_measured():
    assert batching_of(None, None) == Batching(16, (), 0, batching_of(None, None).origin)
    assert batching_of(1, None).most == 0
    profile = batching_of(None, (1, 8, 32))
    assert (profile.most, profile.preferred, profile.delay_us) == (32, (8,), 0)
    measured = batching_of(None, (1, 8, 32), latencies={1: 2.0, 8: 6.0, 16: 13.0, 64: 1.0})
    assert (measured.most, measured.preferred, measured.delay_us) == (32, (8,), 3000)  # 64 is none of the profile's
    alone = batching_of(None, None, latencies={1: 2.0, 8: 20.0})  # a batch gains nothing: nobody waits
    assert (alone.most, alone.preferred, alone.delay_us) == (8, (), 0)
    with pytest.raises(UsageError, match="largest batch 64: the file takes 1 to 32"):
        batching_of(None, (1, 8, 32), most=64)
    with pytest.raises(UsageError, match="batches of 4"):
        batching_of(4, None, most=8)


def test_latencies_are_those_of_the_file_in_its_runtime(bundles, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(
        json.dumps({"rows": [*rows_of(bundles / "any", {1: 3.0, 8: 9.0}), {"file": "x", "runtime": "ort", "batch": 1}]})
    )
    name = read_manifest(bundles / "any").file.name
    assert read_latencies(path, name, "ort") == {1: 3.0, 8: 9.0}
    for wrong, text in (
        (lambda: read_latencies(path, name, "trt"), "no latency of"),
        (lambda: read_latencies(path, "other.onnx", "ort"), "no latency of"),
        (lambda: read_latencies(tmp_path / "none", name, "ort"), "no such file"),
    ):
        with pytest.raises(UsageError, match=text):
            wrong()
    for content in ("[]", "{}", '{"rows": [3]}', "x"):
        path.write_text(content)
        with pytest.raises(UsageError):
            read_latencies(path, name, "ort")


def test_wrong_arguments_are_one_error_and_nothing_is_written(bundles, photos, exported, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "twice" / "any").mkdir(parents=True)
    for file in (bundles / "any").iterdir():
        (tmp_path / "twice" / "any" / file.name).write_bytes(file.read_bytes())
    for names, options, text in (
        ([], [], "BUNDLE"),
        ([photos], [], "has no tokexport.json"),
        ([exported("tiny_vit")], [], "is a file: wanted a bundle"),
        ([tmp_path / "nothing"], [], "no such folder"),
        ([bundles / "any"], ["--backend", "tensorrt"], "wanted onnxruntime or openvino or python"),
        ([bundles / "any"], ["--backend", "python", "--device", "gpu"], "runs on the cpu"),
        ([bundles / "any"], ["--max-batch", "0"], "largest batch 0"),
        ([bundles / "any"], ["--instances", "0"], "instances 0"),
        ([bundles / "any"], ["--kserve", "--storage", "here"], "storage 'here'"),
        ([bundles / "any", tmp_path / "twice" / "any"], [], "two become a model 'any'"),
    ):
        result = CliRunner().invoke(group, ["serve-repo", *map(str, names), "-o", str(out), *options])
        error = result.output if isinstance(result.exception, SystemExit) else str(result.exception)
        assert result.exception and text in error, (names, options, error)
        assert not out.exists() and not list(tmp_path.glob(".tokexport*"))
    damaged = tmp_path / "twice" / "any"
    (damaged / read_manifest(damaged).file.name).write_bytes(b"x")
    with pytest.raises(UsageError, match="bytes, wanted"):
        write_repository([damaged], out)


def test_a_repository_is_replaced_by_force_alone_and_nothing_else_is(bundles, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_repository([bundles / "any"], out)
    with pytest.raises(UsageError, match="exists: give force"):
        write_repository([bundles / "other"], out)
    write_repository([bundles / "other"], out, options=ServeOptions(force=True))
    assert configs(out).keys() == {"other", "other-prepare", "other-run"}
    (out / "thesis").mkdir()
    with pytest.raises(UsageError, match="'thesis', which is no model"):
        write_repository([bundles / "any"], out, options=ServeOptions(force=True))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(StorageError, match="nothing was left"):
        write_repository([bundles / "any"], tmp_path / "other")
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".tokexport*"))


def test_openvino_is_not_given_nodes_that_it_cannot_read(bundles, monkeypatch, tmp_path):
    model = onnx.load(next((bundles / "any").glob("*.onnx")))
    model.functions.add(name="TokenReduce", domain="tokexport")
    monkeypatch.setattr(onnx, "load", lambda *a, **k: model)
    with pytest.raises(UsageError, match="tokexport inline"):
        write_repository([bundles / "any"], tmp_path / "out", options=ServeOptions(backend="openvino"))


def test_kserve_manifest(repository):
    yaml = pytest.importorskip("yaml")
    service = yaml.safe_load((repository / "kserve.yaml").read_text())
    assert service["kind"] == "InferenceService" and service["metadata"]["name"] == "repository"
    model = service["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {"name": "triton"} and model["storageUri"] == "pvc://models"
    assert model["resources"]["limits"] == {"cpu": "1", "memory": "4Gi"}


@pytest.fixture(scope="module")
def address(repository, exported, photos, tmp_path_factory):
    """The address of a real server with the repository, and with a file that takes one image and no more.

    Skipped where there is no server to be run."""
    if os.name != "posix":
        pytest.skip("the Triton server is a program of Linux")
    try:
        server.find_server()
    except UsageError as e:
        pytest.skip(str(e))
    folder = tmp_path_factory.mktemp("one")
    write_bundle(exported("tiny_vit", batch=1), folder / "one", images=photos, n_images=1)
    write_repository([folder / "one"], folder / "models", options=ServeOptions(backend="python", threads=1))
    shutil.copytree(repository, folder / "models", dirs_exist_ok=True)
    with server.serving(folder / "models") as address:
        yield address


@pytest.mark.programs
class TestServer:
    """One server for all of them."""

    def test_answers_are_pythons(self, address, photos, exported):
        paths = sorted(photos.iterdir())
        wanted = outputs_of(exported("tiny_vit"), paths, runtime="ort", progress=lambda s: None)
        answer = ask(address, "any", {"photo": [p.read_bytes() for p in paths]})
        assert np.array_equal(answer["logits"], wanted) and answer["sources"].shape == (6, 65)
        assert answer["sources"].dtype == np.int64

    def test_a_file_for_one_image_takes_one_photo(self, address, photos, exported):
        path = sorted(photos.iterdir())[0]
        wanted = outputs_of(exported("tiny_vit", batch=1), [path], runtime="ort", progress=lambda s: None)
        answer = ask(address, "one", {"photo": [path.read_bytes()]}, shapes={"photo": [1]})
        assert np.array_equal(answer["logits"], wanted)

    def test_a_bad_request_gets_an_error_and_the_server_lives(self, address, photos):
        good = sorted(photos.iterdir())[0].read_bytes()
        before = ask(address, "any", {"photo": [good]})["logits"]
        nan = np.full((1, 3, 64, 64), np.nan, np.float32)
        for model, inputs, text in (
            ("any", {"photo": [b"no photo"]}, "cannot be read as an image"),
            ("any", {"photo": [good[:300]]}, "the photo"),
            ("any", {"photo": [good] * 9}, "batch"),
            ("any", {"other": [good]}, "other"),
            ("any-run", {"image": nan}, "not finite"),
            ("any-run", {"image": nan[:, :, :8]}, "shape"),
            ("any-run", {"image": nan.view(np.uint8)}, "expects 'FP32'"),
            ("nothing", {"photo": [good]}, "unknown model"),
        ):
            with pytest.raises(ServerError, match=text):
                ask(address, model, inputs)
        assert np.array_equal(ask(address, "any", {"photo": [good]})["logits"], before)

    def test_requests_are_put_together_and_each_gets_its_own_answer(self, address, photos, exported):
        """Four at once wait for each other and become a batch, in which one that is bad spoils nobody's answer."""
        random = np.random.default_rng(0)
        images = random.normal(size=(24, 1, 3, 64, 64)).astype(np.float32)
        before, start = statistics(address, "any-run"), threading.Barrier(24)

        def one(image):
            start.wait()
            return ask(address, "any-run", {"image": image})["logits"]

        alone = [ask(address, "any-run", {"image": image})["logits"] for image in images]
        with ThreadPoolExecutor(24) as pool:
            together = list(pool.map(one, images))
        runs = statistics(address, "any-run")
        assert any(n > 1 and runs[n] > before.get(n, 0) for n in runs), runs
        assert np.allclose(np.concatenate(together), np.concatenate(alone), atol=1e-5)


@pytest.mark.programs
@pytest.mark.parametrize("case", ["onnxruntime", "openvino", "tensorrt", "unknown field"])
def test_the_server_reads_configurations_of_backends_that_it_has_not(case, bundles, tmp_path):
    """It gets as far as looking for the backend's library; a field that it does not know stops it before."""
    try:
        server.find_server()
    except UsageError as e:
        pytest.skip(str(e))
    text = config_of("onnxruntime" if case == "unknown field" else case, bundles).replace("KIND_GPU", "KIND_CPU")
    place = tmp_path / "models" / "the-model"
    (place / "1").mkdir(parents=True)
    (place / "1" / read_manifest(bundles / "any").file.name).write_bytes(b"x")
    (place / "labels.txt").write_text("x\n")
    (place / "config.pbtxt").write_text(text + "no_such_field: 1\n" * (case == "unknown field"))
    wanted = "no_such_field" if case == "unknown field" else "unable to find backend library"
    with pytest.raises(EngineError, match=wanted), server.serving(tmp_path / "models"):
        pass


def test_the_server_that_is_not_there_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv(server.VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match=f"no Triton server in {tmp_path}"), server.serving(tmp_path):
        pass
    with pytest.raises(ServerError, match="is the server running"):
        ask("http://127.0.0.1:9", "any", {"photo": [b"x"]})
