"""The measurement from photo files to classes runs, on a tiny model."""

from tokexport.tools.demo import digits
from tokexport.tools.pipeline_test import embed_rate, torch_rate


def test_every_way_is_measured(tmp_path, tiny, exported):
    photos = digits.write_held_out(tmp_path / "photos", limit=3)
    assert len(photos) == 3 and torch_rate(tiny("tiny_vit"), photos) > 0
    for _ in range(2):  # again from the start, not from finished parts
        rate, waits = embed_rate(exported("tiny_vit"), photos, tmp_path, "ort")
        assert rate > 0 and 0 <= waits <= 1
