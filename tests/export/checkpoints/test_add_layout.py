"""CONTRIBUTING.md's "add a checkpoint layout", followed: one file with a `Layout`, one row of LAYOUTS."""

import pytest
import torch
from safetensors.torch import save_file
from tokexport.export.checkpoints import layouts, prefixes
from tokexport.export.checkpoints.layout import Converted, Layout

from tokexport import UsageError, load_model

NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
TOY = Layout(
    "a toy's ViT",
    ("toy:patch_embed.proj.weight", "toy:norm.weight"),
    lambda state, model: Converted({name.removeprefix("toy:"): value for name, value in state.items()}),
)


def test_a_checkpoint_layout_is_one_row(tmp_path, monkeypatch):
    state = {f"toy:{name}": value for name, value in load_model(NAME, KWARGS, seed=3).module.state_dict().items()}
    path = tmp_path / "toy.safetensors"
    save_file(state, path)
    with pytest.raises(UsageError):
        load_model(NAME, KWARGS, checkpoint=path)
    monkeypatch.setattr(prefixes, "LAYOUTS", (*layouts.LAYOUTS, TOY))
    loaded = load_model(NAME, KWARGS, checkpoint=path)
    assert all(torch.equal(value, state[f"toy:{name}"]) for name, value in loaded.module.state_dict().items())
    assert "a toy's ViT" in str(loaded.weights) + str(loaded.notes)
