"""A checkpoint is read without running any code that is in it."""

import argparse
import os

import numpy as np
import pytest
import torch
from tokexport.export.checkpoints.weights import read_state

from tokexport import UsageError, load_model

from .scripts import ARGS, KWARGS, NAME, model_of


class Calls:
    """Pickled, it calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class State(argparse.Namespace):
    """Pickled, it is a Namespace with a class of its own."""


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "hide",
    [
        lambda call: argparse.Namespace(output_dir=call),
        lambda call: {"lr": call},
        lambda call: State(a=1, b=call),
        lambda call: [call, Calls(eval, "1/0")],
        lambda call: Calls(np.load, "x.npy", None, True),
        lambda call: [torch.nn.Linear(1, 1), call],
    ],
    ids=["in args", "in a dictionary", "own class", "eval", "numpy.load", "module"],
)
def test_a_pickle_that_calls_anything_loads_and_nothing_is_called(hide, zipped, tmp_path):
    state = model_of().state_dict()
    content = {"model": state, "args": hide(Calls(os.mkdir, str(tmp_path / "ran")))}
    torch.save(content, tmp_path / "vit.pth", _use_new_zipfile_serialization=zipped)
    loaded = load_model(NAME, KWARGS, checkpoint=tmp_path / "vit.pth")
    assert not (tmp_path / "ran").exists() and torch.equal(loaded.module.cls_token, state["cls_token"])


def test_the_values_beside_the_weights_are_not_even_made(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(argparse.Namespace, "__init__", lambda self, **values: made.append(values))
    state = {"w": torch.ones(2)}
    torch.save(
        {"model": state, "args": ARGS, "lr": np.float64(1.0), "small": np.float32(2.0), "n": np.int64(3)},
        tmp_path / "vit.pth",
    )
    assert torch.equal(read_state(tmp_path / "vit.pth")["w"], state["w"]) and made == []
    torch.save({"model": ARGS, "w": 1}, tmp_path / "args.pth")
    with pytest.raises(UsageError, match="holds no state dict .*it has: model, w"):
        load_model(NAME, KWARGS, checkpoint=tmp_path / "args.pth")
    assert made == []


def test_a_dictionary_that_holds_itself_is_refused(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "vit.pth")
    with pytest.raises(UsageError, match="holds no state dict"):
        read_state(tmp_path / "vit.pth")


def test_names_that_are_no_files_give_one_sentence(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    torch.save({"net": {"w": torch.ones(1)}}, tmp_path / "latest")
    assert read_state(tmp_path / "latest").keys() == {"w"}
    for name, said in [
        ("folder.pth", "is a directory, wanted a file"),
        ("x" * 5000 + ".pth", "no such file"),
        ("a\0b.pth", "no such file"),
    ]:
        with pytest.raises(UsageError, match=said):
            read_state(tmp_path / name)
