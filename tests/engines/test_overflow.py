"""A model that leaves fp16 is told by verify, whatever computes the file."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokexport.engines.parity.overflow import FP16_LIMIT, overflow_words, watch_range

from tokexport import export_onnx, load_model, reduce_model, verify

from ..cases import KWARGS, TINY


@pytest.fixture(scope="module")
def large_checkpoint(golden, tmp_path_factory):
    """The tiny model with values of some 10^5 within block 1's MLP, that its last layer makes small again."""
    state = load_file(golden.folder / "tiny_vit.safetensors")
    scale = 1e5
    for name in ("weight", "bias"):
        state[f"blocks.1.mlp.fc1.{name}"] = state[f"blocks.1.mlp.fc1.{name}"] * scale
    state["blocks.1.mlp.fc2.weight"] = state["blocks.1.mlp.fc2.weight"] / scale
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    save_file(state, path)
    return path


@pytest.mark.parametrize("dtype, passed", [("fp16", False), ("bf16", True)])
def test_openvino_computes_in_float32_and_the_overflow_is_told_all_the_same(dtype, passed, large_checkpoint, tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed")
    name, kwargs = TINY["tiny_vit"]
    loaded = load_model(name, {**KWARGS, **kwargs}, checkpoint=large_checkpoint)
    export_onnx(loaded, loaded.schedule("tome", r=8), tmp_path / "v.onnx", dtype=dtype)
    report = verify(tmp_path / "v.onnx", runtime="openvino")
    assert report.passed == passed, report.summary()
    assert ("overflow, block 1 MLP: values up to" in report.summary()) != passed
    assert ("use bf16" in report.summary()) != passed


def test_values_are_noted_by_stage_and_nothing_stays_hooked(tiny, schedule_of, golden):
    loaded = tiny("tiny_vit")
    reference, largest = reduce_model(deepcopy(loaded.module), schedule_of(loaded.module, 8)), {}
    with watch_range(reference, largest):
        reference.run(golden.image)
    parts = [f"block{i}.{part}" for i in range(6) for part in ("attn", "mlp")]
    assert list(largest) == ["embed", *parts] and all(0 < v < FP16_LIMIT for v in largest.values())
    assert overflow_words(largest) is None
    before = dict(largest)
    reference.run(golden.image * 1e6)
    assert largest == before


@pytest.mark.parametrize("value", [7e4, np.inf])
def test_the_first_stage_that_leaves_the_range_is_named(value):
    largest = {"embed": 3.0, "block0.attn": 65504.0, "block3.attn": value, "block3.mlp": 1e9}
    assert overflow_words(largest).startswith("overflow, block 3 attention: values up to")


def test_a_value_that_is_no_number_counts_as_overflow(tiny, schedule_of, golden):
    loaded = tiny("tiny_vit")
    reference, largest = reduce_model(deepcopy(loaded.module), schedule_of(loaded.module)), {}
    with watch_range(reference, largest):
        reference.run(torch.full_like(golden.image, torch.nan))
    assert overflow_words(largest).startswith("overflow, embedding")
