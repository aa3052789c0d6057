"""The page of a bundle: its proof in Node and in a real browser, where a flipped weight fails; a photo and its token map."""

import html
import json
import os
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image
from tokexport.engines.bundle.manifest import read_manifest
from tokexport.engines.bundle.proof import to_input
from tokexport.engines.bundle.write import write_bundle
from tokexport.engines.images import read_image
from tokexport.engines.web import write
from tokexport.tools.cli import group

from tokexport import UsageError

NODE_VARIABLE = "TOKEXPORT_ONNXRUNTIME_NODE"
PAGE = Path(write.__file__).parent / "page"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five photos of smooth noise, of odd sizes."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(5)
    for i, size in enumerate([(70, 91), (64, 64), (33, 120), (300, 200), (90, 40)]):
        small = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def plain(exported, photos, tmp_path_factory):
    """A bundle without a page."""
    return write_bundle(exported("tiny_vit"), tmp_path_factory.mktemp("web") / "bundle", images=photos).path


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """A folder that looks like onnxruntime-web's package: nothing in it runs."""
    dist = tmp_path_factory.mktemp("npm") / "dist"
    dist.mkdir()
    for name in write.RUNTIME:
        (dist / name).write_text("// not the real one")
    return dist.parent


def flipped(bundle, folder):
    """A copy of a bundle whose file has another weight."""
    shutil.copytree(bundle, folder)
    path = folder / read_manifest(folder).file.name
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda i: len(i.raw_data))
    array = numpy_helper.to_array(weight).copy()
    array.flat[7] = -array.flat[7] + 1
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)
    return folder


def test_a_page_is_plain_files_beside_the_bundle(plain, runtime, tmp_path):
    bundle = shutil.copytree(plain, tmp_path / "bundle")
    (tmp_path / "dense.onnx").write_bytes(b"dense")
    write.add_page(bundle, runtime=runtime)
    write.add_page(bundle, runtime=runtime, dense=tmp_path / "dense.onnx")  # replaces the first
    names = sorted(str(p.relative_to(bundle / "web")) for p in (bundle / "web").rglob("*") if p.is_file())
    assert names == sorted(["decisions.pb", "dense.onnx", *write.PAGE, *(f"ort/{n}" for n in write.RUNTIME)])
    text = "".join((bundle / "web" / name).read_text() for name in write.PAGE)
    assert "http://" not in text and "https://" not in text  # nothing comes from elsewhere
    assert not list(tmp_path.glob("**/.tokexport*"))
    assert CliRunner().invoke(group, ["verify", str(bundle)]).exit_code == 0  # a bundle with a page is still one


def test_decisions_behind_a_file_are_outputs_of_it(plain):
    """The bytes that the page adds are merged by protobuf: the file is the same, and gives its decisions as well."""
    manifest = read_manifest(plain)
    content = (plain / manifest.file.name).read_bytes()
    model = onnx.load_from_string(content + write.decisions_of(manifest))
    inner = [name for step in manifest.decisions for name in step.parts.values()]
    assert [o.name for o in model.graph.output] == [*(o.name for o in manifest.outputs), *inner] and inner
    assert len(model.graph.node) == len(onnx.load_from_string(content).graph.node)


def test_what_no_page_can_be_made_of(plain, exported, photos, tmp_path, monkeypatch):
    monkeypatch.setenv(write.VARIABLE, str(tmp_path))
    file = str(exported("tiny_vit"))
    (tmp_path / "vit.plan").touch()
    for options, text in (
        ([file, "--web"], f"onnxruntime-web is not in {tmp_path}: fetch it"),
        ([file, "--dense", file], "--dense is of the page"),
        ([file, "--web", "--dense", str(tmp_path / "none.onnx")], "no such file"),
    ):
        arguments = ["bundle", *options, "-o", str(tmp_path / "out"), "--images", str(photos)]
        result = CliRunner().invoke(group, arguments)
        assert isinstance(result.exception, UsageError) and text in str(result.exception)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="this is an engine"):
        write.check_web(True, dense=None)


@pytest.fixture(scope="module")
def node():
    """The program Node and the folder of onnxruntime-node. Skipped where one is missing."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("Node is not installed")
    folder = Path(os.environ.get(NODE_VARIABLE) or Path.home() / ".cache/tokexport/onnxruntime-node")
    for place in (folder / "node_modules/onnxruntime-node", folder):
        if (place / "dist/index.js").is_file():
            return program, str(place)
    pytest.skip(f"the npm package onnxruntime-node is not in {folder} ({NODE_VARIABLE} names another folder)")


def prove(node, bundle):
    done = subprocess.run([node[0], PAGE / "prove.mjs", bundle, node[1]], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.programs
def test_node_runs_the_proof(node, plain, runtime, exported, photos, tmp_path):
    """Of files with and without a class token, and of a method that drops tokens; all photos judged, decisions too."""
    bundles = [shutil.copytree(plain, tmp_path / "tome")]
    for name, file in (
        ("evit", exported("tiny_vit", method="evit", at=(1, 3, 4))),
        ("nocls", exported("tiny_vit_nocls")),
        ("one", exported("tiny_vit", batch=1)),
    ):
        bundles.append(write_bundle(file, tmp_path / name, images=photos).path)
    for bundle in bundles:
        write.add_page(bundle, runtime=runtime)
        code, report = prove(node, bundle)
        assert (code, report["faults"]) == (0, []) and report["judged"] == 4
        assert max(e for image in report["images"] for e in image["errors"].values()) < 1e-5
    assert prove(node, flipped(bundles[0], tmp_path / "flipped"))[0] == 1
    manifest = json.loads((bundles[0] / "tokexport.json").read_text())
    manifest["preprocessing"]["interpolation"] = "nearest"
    (bundles[0] / "tokexport.json").write_text(json.dumps(manifest))
    code, report = prove(node, bundles[0])
    assert code == 1 and "preprocessed photo differs" in report["faults"][0]


@pytest.mark.programs
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_javascript_prepares_photos_as_python_does(node, plain, photos, tmp_path, mode):
    """Every filter, to a step of a pixel."""
    from dataclasses import replace

    cases, wanted = [], []
    for filter_name in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"):
        p = replace(read_manifest(plain).preprocessing, interpolation=filter_name, crop_mode=mode)
        for path in sorted(photos.iterdir()):
            image = read_image(path)
            pixels = list(np.asarray(image).tobytes())
            fields = {
                k: getattr(p, k)
                for k in ("size", "mean", "std", "interpolation", "crop", "crop_mode", "layout", "normalised")
            }
            cases.append([fields, {"height": image.height, "width": image.width, "channels": 3, "pixels": pixels}])
            wanted.append(to_input(image, p).ravel())
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script = f"""
        import {{ readFileSync }} from "node:fs";
        import {{ toInput }} from {json.dumps(str(PAGE / "tokexport.mjs"))};
        const cases = JSON.parse(readFileSync({json.dumps(str(tmp_path / "cases.json"))}));
        console.log(JSON.stringify(cases.map(([p, image]) => Array.from(toInput(image, p)))));
    """
    done = subprocess.run([node[0], "--input-type=module", "-e", script], capture_output=True, text=True, check=True)
    for values, expected in zip(json.loads(done.stdout), wanted, strict=True):
        assert np.abs(np.float32(values) - expected).max() * 0.5 * 255 < 1.001


@pytest.fixture(scope="module")
def chromium():
    """Headless Chromium, of Debian's package. Skipped where there is none."""
    for name in ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return shutil.which(name)
    pytest.skip("Chromium is not installed (Debian: chromium-headless-shell)")


FRAME = """<!doctype html><style>body { margin: 0 } iframe { border: 0; width: 900px; height: 1300px }</style>
<iframe src="web/?%s"></iframe><img src="/hold">
<script>
  const wait = () => {
    const state = document.querySelector("iframe").contentDocument.documentElement.dataset.state;
    if (!state) return setTimeout(wait, 50);
    document.documentElement.dataset.state = state;
    setTimeout(() => fetch("/release"), 300);
  };
  wait();
</script>"""  # the browser looks at a page when all of it is loaded: this one is when the page in it is done


class Handler(SimpleHTTPRequestHandler):
    """A folder, and a page around its page whose picture comes only when it is released."""

    query, released = "", None

    def do_GET(self):
        if self.path == "/frame":
            content = (FRAME % self.query).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        elif self.path in ("/hold", "/release"):
            self.released.set() if self.path == "/release" else self.released.wait(240)
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


def look(chromium, bundle, tmp_path, query=""):
    """(what the page found, its screenshot) of a bundle's page."""
    state = {"query": f"runtime=wasm{query}", "released": threading.Event()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(type("One", (Handler,), state), directory=bundle))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    picture = tmp_path / "page.png"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--timeout=240000",
    ]
    flags += ["--window-size=900,1300", "--dump-dom", f"--screenshot={picture}"]
    try:
        url = f"http://127.0.0.1:{server.server_port}/frame"
        done = subprocess.run([chromium, *flags, url], capture_output=True, text=True, timeout=300)
    finally:
        server.shutdown()
        server.server_close()
    start = done.stdout.find('data-state="')
    assert start > 0, (done.stdout[-2000:], done.stderr[-2000:])
    return json.loads(html.unescape(done.stdout[start + 12 : done.stdout.index('"', start + 12)])), picture


@pytest.mark.programs
def test_a_browser_runs_the_proof_and_draws_a_photo(chromium, plain, exported, photos, tmp_path):
    try:
        write.find_runtime()
    except UsageError as e:
        pytest.skip(str(e))
    bundle = shutil.copytree(plain, tmp_path / "bundle")
    write.add_page(bundle, dense=exported("tiny_vit", method="none"))
    shutil.copy(photos / "3.png", bundle / "web" / "photo.png")
    state, picture = look(chromium, bundle, tmp_path, "&photo=photo.png")
    assert state["report"]["passed"] and state["report"]["judged"] == 4 and state["report"]["provider"] == "wasm"
    assert state["ms"] > 0 and state["dense"] > 0 and len(state["classes"]) == 5
    left = read_manifest(bundle).decisions[-1].n_out
    assert state["map"]["tokens"] == left and 1 < state["map"]["patches"] <= left
    if os.environ.get("TOKEXPORT_SCREENSHOT"):  # to be looked at
        shutil.copy(picture, os.environ["TOKEXPORT_SCREENSHOT"])
    colours = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 500  # the photo is in the picture of the page
    state, _ = look(chromium, flipped(bundle, tmp_path / "flipped"), tmp_path)
    assert not state["report"]["passed"] and "image 0" in state["report"]["faults"][0]
