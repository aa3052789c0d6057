"""`tokexport run`."""

from __future__ import annotations

import click

from ...export.errors import UsageError

TOP = 5


@click.command("run")
@click.argument("file")
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--runtime",
    default="ort",
    show_default=True,
    metavar="ENGINE",
    help="Of an ONNX file: ort, ort-cuda, ort-tensorrt, openvino or torch (the eager reference).",
)
@click.option("--json", "as_json", is_flag=True, help="The results as JSON on stdout.")
def command(file, images, runtime, as_json):
    """Run FILE (an ONNX file or an engine) on IMAGES (files or folders).

    Prints the five likeliest classes of each, or the image most like it when the model has no classes.
    """
    import numpy as np

    from ...engines.images import find_images
    from ...engines.files import inspect_file
    from ...engines.files import is_engine
    from ...engines.runners import require
    from ..show.terminal import console, print_json, stages

    if not is_engine(file):
        require(runtime)
    provenance = inspect_file(file).provenance
    paths = find_images(list(images))
    out = console()
    with stages(out) as progress:
        values = _run(file, paths, runtime, provenance, progress)
    if not np.isfinite(values).all():
        raise UsageError(
            f"{file} gives values that are not finite"
            + (": fp16 may be too small for this model, try bf16 or fp32" if provenance.precision == "fp16" else "")
        )
    known = len(provenance.labels) == values.shape[1]
    label = lambda i: provenance.labels[i] if known else f"class {i}"
    rows = _classes(paths, values, label) if provenance.outputs[0] == "logits" else _nearest(paths, values)
    if as_json:
        print_json({"file": str(file), "runtime": runtime, "images": rows})
        return
    for row in rows:
        out.print(row["image"], style="bold", markup=False)
        for found in row.get("top", ()):
            out.print(f"  {found['probability']:6.1%}  {found['label']}", markup=False)
        if "nearest" in row:
            out.print(
                f"  nearest {row['nearest']}, cosine {row['cosine']:.4f}"
                if row["nearest"]
                else f"  {values.shape[1]} features, length {row['length']:.4g}; give more images to compare",
                markup=False,
            )


def _run(file, paths, runtime, provenance, progress):
    """Output [images, values], a batch at a time."""
    import numpy as np

    from ...engines.images import load_images
    from ...engines.runners import in_batches, open_runner

    done = []
    progress("opening the file")
    with open_runner(file, runtime) as runner:
        size = runner.inputs["image"][0] or 8
        for start in range(0, len(paths), size):
            progress(f"image {start + 1} of {len(paths)}")
            part = load_images(paths[start : start + size], provenance.preprocess)
            done.append(in_batches(runner, part)[provenance.outputs[0]])
    return np.concatenate(done)


def _classes(paths, logits, label) -> list[dict]:
    import numpy as np

    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    top = np.argsort(-p, axis=1, kind="stable")[:, :TOP]
    return [
        {
            "image": str(path),
            "top": [{"class": int(i), "label": label(i), "probability": float(p[k, i])} for i in top[k]],
        }
        for k, path in enumerate(paths)
    ]


def _nearest(paths, features) -> list[dict]:
    import numpy as np

    length = np.linalg.norm(features, axis=1)
    cosine = features @ features.T / np.maximum(np.outer(length, length), 1e-30)
    np.fill_diagonal(cosine, -np.inf)
    best = cosine.argmax(1)
    alone = len(paths) == 1
    return [
        {
            "image": str(path),
            "length": float(length[k]),
            "nearest": None if alone else str(paths[best[k]]),
            "cosine": None if alone else float(cosine[k, best[k]]),
        }
        for k, path in enumerate(paths)
    ]
