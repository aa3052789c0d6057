"""Fixtures of all tests: golden data, tiny models, exported files (each made once), ONNX runs and the one numeric comparison."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
KWARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4, "num_classes": 10}
TINY = {
    "tiny_vit": ("vit_tiny_patch16_224", {}),
    "tiny_vit_nocls": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "tiny_vit_distilled": ("deit_tiny_distilled_patch16_224", {}),
}
FAST_FIRST = ("test_schedule", "test_ops", "test_load", "test_static_forms", "test_graph", "test_golden")


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Quick files first, tests marked slow last; the order within a file stays."""
    rank = {name: i for i, name in enumerate(FAST_FIRST)}
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, rank.get(item.path.stem, 2.5)))


@pytest.fixture(scope="session")
def golden():
    """Data of the authors' code: case(name) -> (json, arrays), units -> (json, arrays), image [3, 3, 64, 64]."""
    arrays = lambda name: dict(np.load(GOLDEN / f"{name}.npz"))
    read = lambda name: json.loads((GOLDEN / f"{name}.json").read_text())
    return SimpleNamespace(case=lambda name: (read(name), arrays(name)), units=(read("units"), arrays("units")),
                           image=torch.from_numpy(arrays("inputs_tiny")["x"]), folder=GOLDEN)


@pytest.fixture(scope="session")
def tiny():
    """tiny(kind) -> LoadedModel with the golden weights: tiny_vit, tiny_vit_nocls or tiny_vit_distilled."""
    from tokexport import load_model

    made = {}

    def load(kind):
        if kind not in made:
            name, kwargs = TINY[kind]
            made[kind] = load_model(name, {**KWARGS, **kwargs}, checkpoint=GOLDEN / f"{kind}.safetensors")
        return made[kind]

    return load


@pytest.fixture(scope="session")
def schedule_of():
    """schedule_of(module, r, ...) -> Schedule with the counts of a timm model; r None for no reduction."""
    from tokexport import Schedule
    from tokexport.export import vit

    def schedule(module, r, prop_attn=True):
        return Schedule.parse(r or 0, method="none" if r is None else "tome", depth=len(module.blocks), n_tokens=vit.n_tokens(module),
                              n_prefix=module.num_prefix_tokens, prop_attn=prop_attn)

    return schedule


@pytest.fixture(scope="session")
def exported(tiny, schedule_of, tmp_path_factory):
    """exported(kind, r, batch, prop_attn, gather_from) -> path of a tiny model with `sources`, made once.

    gather_from: tokens from which a step is in the gather form; None for the exporter's own choice.
    """
    from tokexport import export_onnx
    from tokexport.export import apply

    made, folder = {}, tmp_path_factory.mktemp("onnx")

    def export(kind, r=8, batch=None, prop_attn=True, gather_from=None):
        key = (kind, str(r), batch, prop_attn, gather_from)
        if key not in made:
            loaded, path = tiny(kind), folder / f"{len(made)}.onnx"
            with pytest.MonkeyPatch.context() as patch:
                for form in apply.GATHER_FROM if gather_from is not None else ():
                    patch.setitem(apply.GATHER_FROM, form, gather_from)
                export_onnx(loaded, schedule_of(loaded.module, r, prop_attn), path, batch=batch, sources=True)
            made[key] = path
        return made[key]

    return export


@pytest.fixture(scope="session")
def run_onnx():
    """run_onnx(path, image, engine) -> outputs by name; a file for fewer images is run as often as needed."""
    from tokexport import open_engine

    def run(path, image, engine="ort"):
        image = np.asarray(image, dtype=np.float32)
        with open_engine(path, engine, threads=1) as runner:
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
