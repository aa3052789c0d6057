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
    from ...engines.outputs import heading
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
    rows = _classes(paths, values, provenance) if provenance.outputs[0] == "logits" else _nearest(paths, values)
    if as_json:
        print_json({"file": str(file), "runtime": runtime, "images": rows})
        return
    if provenance.outputs[0] == "logits" and (values.shape[1] == 1 or provenance.activation in ("sigmoid", "none")):
        out.print(heading(provenance.activation, values.shape[1]), markup=False)
    for row in rows:
        out.print(row["image"], style="bold", markup=False)
        for score in row.get("top", ()):
            out.print(f"  {score['words']}", markup=False)
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


def _classes(paths, logits, provenance) -> list[dict]:
    from ...engines.outputs import class_scores, score_words

    kind, n = provenance.activation, logits.shape[1]
    rows = class_scores(logits, kind, labels=provenance.labels, top=TOP)
    entry = lambda s: {
        "class": s.index,
        "label": s.label,
        "logit": s.logit,
        "probability": s.probability,
        "words": score_words(s, kind, n),
    }
    return [{"image": str(path), "top": [entry(s) for s in row]} for path, row in zip(paths, rows)]


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
