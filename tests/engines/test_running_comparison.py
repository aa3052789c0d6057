"""A comparison of many images: read ahead, in whole runs, as sums and the worst few, in memory that does not grow."""

import math
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from tokexport.engines import prefetch
from tokexport.engines.parity.compare import KEPT
from tokexport.engines.parity.sums import CostSum
from tokexport.engines.parity.verify import _chunk_size
from tokexport.engines.parity.worst import Worst
from tokexport.tools.demo import samples

from tokexport import Schedule, UsageError, verify

from .test_parity import EVIT, TOME, compared


def test_progress_goes_up_to_one(exported):
    seen = []
    photos = [samples.sample_photos()[0]] * 40
    verify(exported("tiny_vit", **EVIT), photos, bisect=True, progress=lambda text, share: seen.append((text, share)))
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1 and len(set(shares)) >= 4
    assert any("comparing image 33 of 40" in text for text, _ in seen) and any("stages" in text for text, _ in seen)


@pytest.mark.parametrize(
    "pixels, batches, size",
    [(32, [None], 32), (224, [None], 8), (518, [None, None], 4), (224, [1, 3], 9), (518, [64], 64)],
)
def test_images_are_compared_in_whole_runs_of_a_fixed_batch(pixels, batches, size):
    provenance = SimpleNamespace(preprocess=SimpleNamespace(size=(pixels, pixels)))
    assert _chunk_size(provenance, batches) == size


def test_the_worst_are_kept_and_no_more():
    worst = Worst(3)
    assert not worst
    for i, badness in enumerate([1.0, 5.0, math.nan, 2.0, 5.0, 0.0]):
        worst.add((badness,), i)
    assert worst.items() == [2, 1, 4] and worst


def test_of_many_images_the_worst_are_told():
    values = np.ones((3 * KEPT, 2), np.float32)
    values[KEPT] = 2
    comparison = compared(values, np.ones_like(values))
    assert len(comparison.images()) == KEPT and comparison.images()[0].index == KEPT
    assert comparison.verdicts == {"equal": 3 * KEPT - 1, "flipped": 0, "failed": 1}


def test_photos_are_read_ahead_in_order_and_within_bounds():
    loaded, main = [], threading.current_thread()

    def load(items):
        assert threading.current_thread() is not main
        loaded.append(items[0])
        return sum(items)

    chunks = prefetch.read_ahead(range(10), load, chunk=3, ahead=2)
    assert next(chunks) == (0, 3)
    for _ in range(100):
        if len(loaded) == 3:
            break
        time.sleep(0.01)
    assert sorted(loaded) == [0, 3, 6], "the one given out and two ahead"
    assert list(chunks) == [(3, 12), (6, 21), (9, 9)]


def test_a_photo_that_cannot_be_read_is_told_when_its_turn_comes(exported, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="cannot be read as an image"):
        verify(exported("tiny_vit", **TOME), [*[samples.sample_photos()[0]] * 9, tmp_path / "x.png"])
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


MEMORY = """
import resource, sys
import torch
torch.set_num_threads(1)
from tokexport import verify
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 / (1e3 if sys.platform == "darwin" else 1)
assert verify(sys.argv[1], sys.argv[2:18]).passed
few = peak()
report = verify(sys.argv[1], sys.argv[2:18] * 125)
assert report.passed and report.n_images == 2000
print(peak() - few)
"""


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    from tokexport.tools.demo import digits

    from tokexport import export_onnx, load_model

    photos = digits.write_held_out(tmp_path, 16)
    loaded = load_model(digits.MODEL, digits.KWARGS, checkpoint=digits.WEIGHTS)
    few_tokens = {"at": [*range(6)], "keep_rate": (0.3, *[0.9] * 5)}  # soon, so that the reference is quick
    schedule = Schedule.parse(method="evit", depth=12, n_tokens=65, **few_tokens)
    export_onnx(loaded, schedule, tmp_path / "d.onnx", sources=True)
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "d.onnx"), *map(str, photos)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 40, "megabytes; with everything kept it was 62"


def test_cost_is_the_mean_of_all_chunks_and_left_out_where_there_is_no_number():
    a, b = np.float32([[1, 0], [0, 1]]), np.float32([[1, 0], [1, 0]])
    total = CostSum(classes=True)
    for k in range(2):
        total.add(a[k : k + 1], b[k : k + 1])
    assert (total.cost().cosine, total.cost().worst, total.cost().top1) == (0.5, 0, 0.5)
    total.add(a * np.float32(np.nan), b)
    assert total.cost() is None
