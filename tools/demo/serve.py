"""From a model to answers over HTTP, on this machine: `python -m tokexport.tools.demo.serve DIR`.

A small ViT that knows handwritten digits is exported with ToMe, bundled with its proof, written as a Triton repository and
served on the loopback; photos are sent to it and its answers compared with Python's. The server is the one of
`engines/serving/server`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from ...export.errors import EngineError, FailureError, UsageError
from . import digits

PHOTOS, MODEL = 24, "digits"


def run(folder: Path) -> None:
    """Export, bundle, serve and ask; prints what it does.

    Args:
        folder: for the repository; what an earlier run has left in it is replaced.
    Raises:
        UsageError: there is no server, or a package is missing.
        EngineError: the server failed, or its answers are not Python's.
    """
    from ...engines.serving.repository import ServeOptions, write_repository
    from ...engines.serving.server import find_server, serving

    find_server()  # known before a minute is spent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        photos = digits.write_held_out(Path(name) / "photos", PHOTOS)
        bundle = _bundle(Path(name), photos)
        shutil.rmtree(folder / "bundle", ignore_errors=True)
        shutil.copytree(bundle, folder / "bundle" / MODEL)
        options = ServeOptions(backend="python", threads=1, force=True)
        write_repository([bundle], folder / "repository", options=options)
        click.echo(f"{folder}/repository: a Triton model repository of {folder}/bundle/{MODEL}")
        with serving(folder / "repository") as address:
            click.echo(
                f"a Triton server is ready at {address}, for this process alone; asking it about {PHOTOS} photos"
            )
            _ask(address, bundle, photos)
    click.echo(f"by yourself: tritonserver --model-repository={folder}/repository (docs/serving.md)")


def _bundle(folder: Path, photos: list[Path]) -> Path:
    """The digits model with ToMe, exported, verified and bundled with its proof."""
    from ... import export_onnx, load_model
    from ...engines.bundle.write import write_bundle

    loaded = load_model(digits.MODEL, digits.KWARGS, checkpoint=digits.WEIGHTS)
    result = export_onnx(loaded, loaded.schedule("tome", r=4), folder / f"{MODEL}.onnx")
    return write_bundle(result.path, folder / MODEL, images=photos).path


def _ask(address: str, bundle: Path, photos: list[Path]) -> None:
    """Send every photo in a request of its own, all at once. Raises: EngineError when an answer is not Python's."""
    import numpy as np

    from ...engines.bundle.target import file_of
    from ...engines.predict import outputs_of
    from ...engines.serving.client import ask, statistics

    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda path: ask(address, MODEL, {"photo": [path.read_bytes()]})["logits"], photos))
    seconds = time.perf_counter() - start
    wanted = outputs_of(file_of(bundle), photos, runtime="ort", progress=lambda stage: None)
    logits = np.concatenate(answers)
    difference = float(np.abs(logits - wanted).max() / np.abs(wanted).max())
    right = sum(int(path.parent.name) == best for path, best in zip(photos, logits.argmax(1)))
    batches = ", ".join(f"{count} of {size}" for size, count in sorted(statistics(address, f"{MODEL}-run").items()))
    click.echo(
        f"{len(photos)} answers in {seconds:.2f} s; {right} digits are right; from Python's by {difference:.1e} at most"
    )
    click.echo(f"batches that the server ran (its warm-up too): {batches}")
    if difference > 1e-5:
        raise EngineError(f"the server's answers are not Python's: {difference:.1e} of the largest logit apart")


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1] if len(sys.argv) > 1 else "serve-demo-out"))
    except (UsageError, FailureError) as e:
        click.echo(f"Error: {e}", err=True)
        sys.exit(2 if isinstance(e, UsageError) else 3)
