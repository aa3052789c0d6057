"""`tokexport run`."""

from __future__ import annotations

import click

from ..options import runtime_option


@click.command("run")
@click.argument("file")
@click.argument("images", nargs=-1, required=True)
@runtime_option()
@click.option("--json", "as_json", is_flag=True, help="The results as JSON on stdout.")
def command(file, images, runtime, as_json):
    """Run FILE (an ONNX file or an engine) on IMAGES (files or folders).

    Prints the five likeliest classes of each, or the image most like it when the model has no classes.
    """
    from ...engines.outputs import heading
    from ...engines.predict import ImageClasses, predict
    from ...engines.runners import runtime_for
    from ..show.terminal import console, print_json, stages

    row = runtime_for(file, runtime)
    out = console()
    with stages(out) as progress:
        predictions = predict(file, list(images), runtime=runtime, progress=progress)
    if as_json:
        print_json({"file": str(file), "runtime": row.name, "images": [p.to_json() for p in predictions]})
        return
    first = predictions[0]
    if isinstance(first, ImageClasses) and (first.n_classes == 1 or first.activation in ("sigmoid", "none")):
        out.print(heading(first.activation, first.n_classes), markup=False)
    for prediction in predictions:
        out.print(prediction.image, style="bold", markup=False)
        if isinstance(prediction, ImageClasses):
            for line in prediction.lines:
                out.print(f"  {line}", markup=False)
        elif prediction.nearest:
            out.print(f"  nearest {prediction.nearest}, cosine {prediction.cosine:.4f}", markup=False)
        else:
            words = f"{prediction.values} features, length {prediction.length:.4g}; give more images to compare"
            out.print(f"  {words}", markup=False)
