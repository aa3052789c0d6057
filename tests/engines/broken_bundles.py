"""Bundles whose manifest or proof is not what it should be."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file
from tokexport.engines.bundle.folder import sha256_of


def changed(folder, edit):
    """Change a proof's tensors, and what the manifest says of the file."""
    tensors = load_file(folder / "proof.safetensors")
    edit(tensors)
    save_file(tensors, folder / "proof.safetensors")
    values = json.loads((folder / "tokexport.json").read_text())
    values["proof"]["file"].update(
        sha256=sha256_of(folder / "proof.safetensors"), size=(folder / "proof.safetensors").stat().st_size
    )
    (folder / "tokexport.json").write_text(json.dumps(values))


def other_decision(tensors, margin):
    """A token of the first image that stays in block 1 is said to have been folded."""
    host = tensors["host.block1"]
    row = next(r for r in range(3, host.shape[1]) if host[0, r] == r and np.isfinite(tensors["margin.block1"][0, 0, r]))
    host[0, row] = host[0, host[0] != np.arange(host.shape[1])][0]
    tensors["margin.block1"][0, 0, row] = margin


BROKEN = {
    "[9, 0]": (lambda v: v.update(format=[9, 0]), "format 9"),
    "need": (lambda v: v.update(needs=["telepathy"]), "telepathy"),
    "a way out": (lambda v: v["file"].update(name="../x.onnx"), "plain name"),
    "labels": (lambda v: v.update(labels=["a"]), "1 of 10 classes"),
    "size": (lambda v: v["preprocessing"].update(size=[30, 30]), "does not give what the input takes"),
    "hash": (lambda v: v["file"].update(sha256="0" * 64), "SHA-256"),
    "bytes": (lambda v: v["file"].update(size=5), "wanted 5"),
    "field": (lambda v: v.pop("activation"), "'activation' is missing"),
    "kind": (lambda v: v.update(classes="ten"), "wanted a whole number"),
    "filter": (lambda v: v["preprocessing"].update(interpolation="psychic"), "not known"),
    "counts": (lambda v: v["decisions"][0].update(n_kept=10**9), "do not fit"),
}
