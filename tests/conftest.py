"""Fixtures of all tests: golden data, tiny models, exported files (each made once), ONNX runs and the one numeric comparison."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

from .cases import DEIT, KWARGS, METHOD_CASES, METHODS, TINY

GOLDEN = Path(__file__).parent / "golden"
FAST_FIRST = (
    "test_house",
    "test_schedule",
    "test_counts",
    "test_rates",
    "test_ops",
    "test_load",
    "test_static_forms",
    "test_graph",
    "test_golden",
)
LONG_NEXT = ("test_readme", "test_registry")  # before the rest, so that two workers end together


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    """A test with an argument `options` runs for every row of METHOD_CASES; it is what `schedule_of` and `exported` take. Rows of
    variants are slow; marked `fast_methods("tome", ...)`, all rows but those are.
    """
    if "options" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("fast_methods")
        fast = METHODS if mark is None else mark.args
        slow = lambda name: () if name in fast else pytest.mark.slow
        rows = [
            pytest.param({"method": name.split()[0], **options}, id=name, marks=slow(name))
            for name, options in METHOD_CASES.items()
        ]
        metafunc.parametrize("options", rows)


def pytest_collection_modifyitems(items):
    """Quick files first, then the longest; tests marked slow last in their file, else in their order."""
    rank = {name: i for i, name in enumerate((*FAST_FIRST, *LONG_NEXT))}
    items.sort(
        key=lambda item: (
            rank.get(item.path.stem, len(rank)),
            str(item.path),
            item.get_closest_marker("slow") is not None,
        )
    )


@pytest.fixture(scope="session")
def method_cases():
    """METHOD_CASES itself."""
    return METHOD_CASES


@pytest.fixture(scope="session")
def golden():
    """Data of the authors' code: case(name) -> (json, arrays), units -> (json, arrays), image [3, 3, 64, 64]."""
    arrays = lambda name: dict(np.load(GOLDEN / f"{name}.npz"))
    read = lambda name: json.loads((GOLDEN / f"{name}.json").read_text())
    return SimpleNamespace(
        case=lambda name: (read(name), arrays(name)),
        units=(read("units"), arrays("units")),
        image=torch.from_numpy(arrays("inputs_tiny")["x"]),
        folder=GOLDEN,
    )


@pytest.fixture(scope="session")
def tiny_layers(shared):
    """A file of trained layers for the tiny models: score heads for three stages, metric layers for six blocks."""
    from safetensors.torch import load_file, save_file

    parts = ("tps_predictors_tiny.safetensors", "second/tiny_vit.dtem_linear_f16.safetensors")
    layers = {k: v for part in parts for k, v in load_file(GOLDEN / part).items()}
    return shared(["layers", *parts], lambda path: save_file(layers, path), "layers.safetensors")


@pytest.fixture(scope="session")
def tiny(tiny_layers):
    """tiny(kind) -> LoadedModel with the golden weights: tiny_vit, tiny_vit_nocls or tiny_vit_distilled."""
    from tokexport import load_model

    made = {}

    def load(kind):
        if kind not in made:
            name, kwargs = TINY[kind]
            made[kind] = load_model(
                name,
                {**KWARGS, **kwargs},
                checkpoint=GOLDEN / f"{kind}.safetensors",
                predictor=tiny_layers,
            )
        return made[kind]

    return load


@pytest.fixture(scope="session")
def schedule_of():
    """schedule_of(module, r, ...) -> Schedule with the counts of a timm model: ToMe's r, or method=... and its options, or nothing."""
    from tokexport.export import reducers
    from tokexport.export.models import as_plain

    from tokexport import Schedule

    def schedule(module, r=None, prop_attn=None, method=None, **options):
        method = method or ("none" if r is None else "tome")
        prop_attn = None if r is None or method not in reducers.takers("prop_attn") else prop_attn
        return Schedule.parse(method, **as_plain(module).size._asdict(), r=r, prop_attn=prop_attn, **options)

    return schedule


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """shared(key, write, name) -> path of the file that write(path) makes for a key (JSON values), once for all workers.

    What it writes beside the file goes with it. Two workers that want it at the same moment both write it, and the first keeps it.
    """
    base = tmp_path_factory.getbasetemp()
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    folder = (base if worker == "main" else base.parent) / "shared"

    def file(key, write, name="model.onnx"):
        place = folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
        if not place.exists():
            aside = folder / worker
            shutil.rmtree(aside, ignore_errors=True)  # of a test that failed while it wrote
            aside.mkdir(parents=True)
            write(aside / name)
            try:
                aside.rename(place)
            except OSError:  # the other worker was first
                shutil.rmtree(aside)
        return place / name

    return file


@pytest.fixture(scope="session")
def exported(tiny, schedule_of, shared):
    """exported(kind, r, batch, prop_attn, gather_from, method, ...) -> path of a tiny model with `sources`, made once.

    r and prop_attn are ToMe's, options of other methods follow their name. gather_from: tokens from which a step is in the gather
    form; None for the exporter's own choice.
    """
    from tokexport.export import apply, reducers

    from tokexport import export_onnx

    def export(kind, r=8, batch=None, prop_attn=True, gather_from=None, method=None, **options):
        loaded = tiny(kind)
        takes_r = method is None or method in reducers.takers("r")
        schedule = schedule_of(loaded.module, r if takes_r else None, prop_attn, method, **options)

        def write(path):
            with pytest.MonkeyPatch.context() as patch:
                for form in apply.GATHER_FROM if gather_from is not None else ():
                    patch.setitem(apply.GATHER_FROM, form, gather_from)
                export_onnx(loaded, schedule, path, batch=batch, sources=True)

        return shared(["tiny", kind, schedule.to_json(), batch, gather_from], write)

    return export


@pytest.fixture(scope="session")
def typed(exported, shared):
    """typed(dtype, batch, method=..., ...) -> path of tiny_vit with `sources` in a precision, made once."""
    from tokexport.export.graph.precision import write_as

    def write(dtype, batch=None, **options):
        plain = exported("tiny_vit", batch=batch, **options)
        return shared(["typed", plain.parent.name, dtype], lambda path: write_as(plain, path, dtype))

    return write


@pytest.fixture(scope="session")
def exported_large(schedule_of, shared):
    """exported_large(name, kwargs, batch, checkpoint, predictor, method and its options) -> path of a large model with `sources`,
    its weights random without a checkpoint; made once."""
    from tokexport import export_onnx, load_model

    models = {}

    def export(name, kwargs, batch, checkpoint=None, predictor=None, sources=False, **options):
        def write(path):
            model = (name, str(kwargs), predictor)
            if model not in models:
                models[model] = load_model(name, kwargs, checkpoint=checkpoint, predictor=predictor)
            schedule = schedule_of(models[model].module, **options)
            export_onnx(models[model], schedule, path, batch=batch, sources=sources)

        key = ["large", name, str(kwargs), batch, checkpoint is not None, predictor is not None, sources, str(options)]
        return shared(key, write)

    return export


@pytest.fixture(scope="session")
def deit(exported_large):
    """deit(method, batch) -> path of DeiT-S at the paper's main setting (DEIT)."""
    return lambda method, batch: exported_large("deit_small_patch16_224", {}, batch, method=method, **DEIT[method])


@pytest.fixture(scope="session")
def dinov2(exported_large, tmp_path_factory):
    """dinov2(method, batch, ...) -> path of DINOv2 ViT-S/14 with its real weights and `sources`; score heads and metric layers, which nobody
    has trained, are random."""
    from safetensors.torch import save_file
    from tokexport.export import reducers
    from tokexport.export.checkpoints.metric_layers import random_layers
    from tokexport.export.checkpoints.score_heads import random_heads
    from tokexport.tools.demo import samples

    folder = tmp_path_factory.mktemp("dinov2")

    def export(method, batch=None, **options):
        checkpoint, heads = samples.dinov2_checkpoint(folder), None
        if {"score_head", "metric_layer"} & set(reducers.get(method).signals):
            heads = folder / "heads.safetensors"
            if not heads.exists():
                save_file(random_heads(384, 3, seed=5) | random_layers(384, 64, n_blocks=12, seed=5), heads)
        return exported_large(samples.MODEL, samples.KWARGS, batch, checkpoint, heads, True, method=method, **options)

    return export


@pytest.fixture(scope="session")
def dinov2_how():
    """A row of options per method for `dinov2`."""
    return DEIT


@pytest.fixture(scope="session")
def run_onnx():
    """run_onnx(path, image, engine) -> outputs by name; a file for fewer images is run as often as needed."""
    from tokexport import open_runner

    def run(path, image, runtime="ort"):
        image = np.asarray(image, dtype=np.float32)
        with open_runner(path, runtime, threads=1) as runner:
            size = runner.inputs["image"][0] or len(image)
            parts = [runner.run({"image": image[i : i + size]}) for i in range(0, len(image), size)]
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    return run


@pytest.fixture(scope="session")
def relative():
    """relative(got, wanted): largest difference over the largest wanted value; infinite for another shape or a value not finite."""

    def difference(got, wanted):
        got, wanted = np.asarray(got, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
        if got.shape != wanted.shape or not np.isfinite(got).all():
            return float("inf")
        return float(np.abs(got - wanted).max(initial=0.0) / max(np.abs(wanted).max(initial=0.0), 1e-30))

    return difference
