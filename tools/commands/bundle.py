"""`tokexport bundle`."""

from __future__ import annotations

import sys

import click


@click.command("bundle")
@click.argument("file")
@click.option("-o", "--output", required=True, metavar="DIR", help="The folder to write.")
@click.option(
    "--images", multiple=True, required=True, metavar="DIR_OR_FILES", help="Photos for the proof; some of them go into it."
)
@click.option("--count", default=4, show_default=True, type=click.IntRange(1, 64), help="Photos in the proof.")
@click.option("--checkpoint", metavar="FILE", help="Where the weights are now; they are checked by hash.")
@click.option("--predictor", metavar="FILE", help="Where the score heads are now (dTPS, DynamicViT).")
@click.option("--runtime", default="ort", show_default=True, metavar="RUNTIME", help="What runs an ONNX file: ort or openvino.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@click.option("--json", "as_json", is_flag=True, help="What was written as JSON on stdout.")
def command(file, output, images, count, checkpoint, predictor, runtime, force, as_json):
    """Pack FILE (an ONNX file or an engine) with what it is and with a proof that needs no PyTorch.

    FILE is verified first; one that fails is not bundled (exit 1). The photos whose decisions are clearest are taken, made smaller:
    do not use photos that must stay where they are. `tokexport verify DIR` runs the proof.

    tokexport bundle vit.onnx -o vit-bundle --images photos/
    """
    from ...engines.bundle.folder import check_place
    from ...engines.files import inspect_file
    from ...engines.images import find_images
    from ..show.terminal import console, print_json, stages

    check_place(output, force=force)
    paths = find_images(list(images))
    inspect_file(file)  # wrong files are known before torch is loaded
    out = console()
    with stages(out) as progress:
        progress("loading torch")
        from ...engines.bundle.write import RefusedError, write_bundle

        try:
            bundle = write_bundle(
                file,
                output,
                images=paths,
                n_images=count,
                runtime=runtime,
                checkpoint=checkpoint,
                predictor=predictor,
                force=force,
                progress=progress,
            )
        except RefusedError as e:
            click.echo(f"Error: {e}", err=True)
            sys.exit(1)
    n = len(bundle.photos)
    lines = [f"{bundle.path}: {bundle.size / 1e6:.1f} MB, {n} photo{'s' * (n != 1)} in the proof: " + ", ".join(p.name for p in bundle.photos)]
    if bundle.unclear:
        lines.append(f"{bundle.unclear} of them with a near-tie, on which runtimes may differ: give more photos to choose from")
    lines.append(f"prove it anywhere: tokexport verify {bundle.path}")
    for line in lines:
        out.print(line, markup=False)
    if as_json:
        print_json(
            {
                "path": str(bundle.path),
                "size": bundle.size,
                "images": n,
                "photos": [str(p) for p in bundle.photos],
                "unclear": bundle.unclear,
            }
        )
