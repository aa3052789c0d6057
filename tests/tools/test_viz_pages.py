"""viz --features and viz --html: what they show, in a browser too, and what they refuse."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tokexport.export.inspection import inspect
from tokexport.tools.cli import group
from tokexport.tools.show.features import components

from tokexport import UsageError, export_onnx

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


def run(*args):
    out = CliRunner().invoke(group, list(map(str, args)))
    if out.exception is not None and not isinstance(out.exception, (SystemExit, UsageError)):
        raise out.exception
    return out


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "<b>a photo.png"
    small = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    small.resize((90, 70), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    """EViT, whose tokens are fused and go, on pixels, with patches."""
    loaded, path = tiny("tiny_vit"), tmp_path_factory.mktemp("viz") / "v.onnx"
    schedule = loaded.schedule("evit", at="1,3", fuse=False)
    export_onnx(loaded, schedule, path, emit="pooled,patches", input="uint8", simplify=False)
    return path


def test_features_are_drawn_beside_the_dense_ones(file, photo, tmp_path):
    out = run("viz", file, photo, "--features", "-o", tmp_path / "f.png")
    assert out.exit_code == 0, out.output
    with Image.open(tmp_path / "f.png") as image:
        assert image.width > 4 * 448 and image.height > 448
        pixels = np.asarray(image)
    dense, reduced = (pixels[100:400, at : at + 300].astype(int) for at in (12 + 460 + 50, 12 + 2 * 460 + 50))
    assert dense.std() > 20 and (dense != reduced).any()


def test_components_are_those_of_the_text_book():
    random = np.random.default_rng(0)
    axis = np.zeros(5)
    axis[2] = 1
    features = random.standard_normal((200, 1)) * 9 * axis + random.standard_normal((200, 5)) * 0.1
    colours = components(features)(features)
    assert colours.shape == (200, 3) and colours.min() == 0 and colours.max() == 1
    assert np.corrcoef(colours[:, 0].argsort().argsort(), features[:, 2].argsort().argsort())[0, 1] > 0.99


def test_the_page_stands_alone_and_holds_every_block(file, photo, tmp_path):
    page = tmp_path / "p.html"
    assert run("viz", file, photo, "--html", page).exit_code == 0
    text, schedule = page.read_text(), inspect(file).provenance.schedule
    assert not re.findall(
        r"(?:src|href)\s*=|https?://|@import", re.sub(r"data:image/png;base64,[\w+/=]+|image\.src = ", "", text)
    )
    assert "<b>a photo" not in text, "a name is no markup"
    data = json.loads(re.search(r"<script id=data type=application/json>(.*?)</script>", text, re.S)[1])
    assert [s["tokens"] for s in data["states"]] == [65, *(n for _, n in schedule.tokens_per_block())]
    maps = data["photos"][0]["maps"]
    assert maps[0] == list(range(64)) and len(maps) == 3 and all(len(m) == 64 for m in maps)
    assert [sum(t < 0 for t in m) for m in maps] == [0, 65 - schedule.steps[0].n_out, 65 - schedule.steps[1].n_out]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_draws_the_page(file, photo, tmp_path):
    page = tmp_path / "p.html"
    assert run("viz", file, photo, "--html", page).exit_code == 0
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    dom = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    last = inspect(file).provenance.schedule.n_final
    assert f">behind block 5: {last} tokens</output>" in dom
    assert f"{last - 1} of 64 patch tokens, {65 - last} patches are gone</figcaption>" in dom


def test_what_contradicts_itself_is_refused(file, photo, exported, tmp_path):
    plain = exported("tiny_vit")
    for args, words in (
        ([file, photo, "--html", tmp_path / "p.html", "--features"], "leave out -o, --features"),
        ([file, photo, "--html", tmp_path / "p.png"], "ends in .html"),
        ([file, photo, "-o", tmp_path / "p.html"], "ends in .png"),
        ([file, photo, "--features", "--at", "1"], "leave one of them out"),
        ([file, photo, "--checkpoint", "w.pt"], "for --features only"),
        ([plain, photo, "--features", "-o", tmp_path / "f.png"], "made with patches in emit"),
    ):
        assert words in str(run("viz", *args).exception), args
    assert not list(tmp_path.iterdir())
