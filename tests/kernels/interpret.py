"""Runs the Triton kernels on the CPU, in a process of its own: Triton decides whether it interprets when it is imported.

usage: python interpret.py CASES RESULTS. CASES: a list of {"op", "x", "signal", "size", "whole"[, "check"]} (torch.save); whole: also apply.
RESULTS: of each case its outputs by name and "value", the cosines; or the text of the ValueError.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from tokexport.kernels.token_reduce import Reduction
from tokexport.kernels.triton import launch


def run(case: dict) -> dict | str:
    """One case."""
    op, size = Reduction(**case["op"]), case["size"]
    try:
        if case["whole"]:
            return launch.token_reduce(op, case["x"], signal=case["signal"], size=size, check=case.get("check", True))
        return launch.decide(op, case["x"], signal=case["signal"])._asdict()
    except ValueError as e:
        return str(e)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save([run(case) for case in torch.load(sys.argv[1])], sys.argv[2])
