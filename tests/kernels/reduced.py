"""Runs reduced models eager and with Triton's kernels interpreted on the CPU, in a process of its own (see `interpret.py`).

usage: python reduced.py CASES RESULTS. CASES: {"models": {kind: keyword arguments of `load_model`}, "runs": [(kind, method, options)],
"image": [B, 3, H, W]} (torch.save); RESULTS: for each run {"eager": ..., "triton": ...}, each with output, sources, size and keep, and "words",
the warnings.
"""

import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import torch
from tokexport.export.models.learned_layers import learned_layers

from tokexport import load_model, reduce_model


def run(loaded, method: str, options: dict, image: torch.Tensor) -> dict:
    """One schedule, both ways."""
    schedule, results = loaded.schedule(method, **options), {}
    for lowering in ("eager", "triton"):
        with warnings.catch_warnings(record=True) as words:
            warnings.simplefilter("always")
            model = reduce_model(loaded.module, schedule, learned_layers(loaded, schedule), lowering=lowering)
        out = model.run(image)
        results[lowering] = {"output": out.output, "sources": out.sources, "size": out.size}
        results[lowering]["keep"] = [plan.keep for plan in out.plans]
    return {**results, "words": [str(w.message) for w in words if "PyTorch's operators" in str(w.message)]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = torch.load(sys.argv[1])
    models = {kind: load_model(**arguments) for kind, arguments in cases["models"].items()}
    torch.save([run(models[kind], *rest, cases["image"]) for kind, *rest in cases["runs"]], sys.argv[2])
