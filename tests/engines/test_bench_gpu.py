"""What `make bench-gpu` measures and writes; the figures themselves need a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tokexport.engines.measure import gpu
from tokexport.engines.measure.gpu import MARKS, ModelTimes, break_even, bytes_moved, page, write_page
from tokexport.kernels.token_reduce import Reduction

from tokexport import UsageError

ROWS = [ModelTimes("deit", 64, 4.0e-3, 5.0e-3, 2.0e-3), ModelTimes("deit", 1, 1e-3, 3e-3, 2e-3)]
SMALL = """
import json, sys, torch
from dataclasses import asdict
from tokexport.engines.measure.gpu import model_times
torch.set_num_threads(1)
kwargs = json.loads(sys.argv[1])
rows = model_times(torch.device("cpu"), "vit_tiny_patch16_224", 3, batches=(2,), kwargs=kwargs, rounds=1)
print(json.dumps([asdict(row) for row in rows]))
"""


def test_all_ways_of_a_model_are_timed():
    pytest.importorskip("triton", reason="Triton is not installed (it comes with torch for Linux)")
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    command = [sys.executable, "-W", "ignore", "-c", SMALL, json.dumps(kwargs)]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [ModelTimes(**row) for row in json.loads(run.stdout)]
    assert [row.batch for row in rows] == [2]
    assert all(min(row.dense, row.eager, row.kernels) > 0 for row in rows)
    assert all(row.kernels > row.dense for row in rows)  # an interpreter is no GPU


def test_the_smallest_batch_that_pays_is_found():
    assert break_even(ROWS) == 64
    assert break_even(ROWS[1:]) is None


def test_bytes_are_those_of_the_tensors():
    op = Reduction("pairs", "size_mean", 5, 4, 1, 1, sizes=1, decisions=1)
    tensors = 2 * (5 * 2 * 8 + 5 * 16 + 4 * 16)
    assert bytes_moved(op, 3, width=16, heads=2, head=8, itemsize=2) == 3 * (tensors + 4 * (5 + 8) + 8 * (4 + 2))


def test_the_tables_go_between_their_marks_and_nowhere_else(tmp_path):
    text = page("NVIDIA H100", {"kernel": 1e-4, "eager": 1e-3, "compiled": 4e-4, "copy": 8e-5}, {"deit": ROWS})
    assert "| eager | 1.000 | 0.10 |" in text and "| copy | 0.080 | 1.25 |" in text
    assert "| deit | 64 | 4.00 | 5.00 | 2.00 | 2.00 |" in text and "deit from batch 64" in text
    path = tmp_path / "page.md"
    path.write_text(f"# Before\n{MARKS[0]}\nold\n{MARKS[1]}\n# After\n")
    for _ in range(2):
        write_page(text, path)
        assert path.read_text() == f"# Before\n{MARKS[0]}\n{text}{MARKS[1]}\n# After\n"
    path.write_text("# no marks\n")
    with pytest.raises(UsageError, match="no lines"):
        write_page(text, path)
    assert path.read_text() == "# no marks\n"


def test_the_page_of_the_docs_has_the_marks():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    assert text.count(MARKS[0]) == text.count(MARKS[1]) == 1 and text.index(MARKS[0]) < text.index(MARKS[1])


def test_without_a_gpu_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        gpu.main()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU that PyTorch can use")
def test_one_reduction_is_timed_four_ways():
    times = gpu.reduction_times(torch.device("cuda"), rounds=5)
    assert times.keys() == {"kernel", "eager", "compiled", "copy"} and min(times.values()) > 0
