"""`tokexport bundle`."""

from __future__ import annotations

import shlex
import sys

import click

from ...export.errors import UsageError


@click.command("bundle")
@click.argument("file")
@click.option("-o", "--output", required=True, metavar="DIR", help="The folder to write.")
@click.option(
    "--images",
    multiple=True,
    required=True,
    metavar="DIR_OR_FILES",
    help="Photos for the proof; some of them go into it.",
)
@click.option("--count", default=4, show_default=True, type=click.IntRange(1, 64), help="Photos in the proof.")
@click.option("--checkpoint", metavar="FILE|DIR", help="Where the weights are now; they are checked by hash.")
@click.option(
    "--predictor",
    "--metric",
    "predictor",
    metavar="FILE",
    help="Where the trained layers are now: score heads (dTPS, DynamicViT) or metric layers (DTEM).",
)
@click.option(
    "--runtime", default="ort", show_default=True, metavar="RUNTIME", help="What runs an ONNX file: ort or openvino."
)
@click.option("--web", is_flag=True, help="Also a page that runs the proof in a browser and draws token maps.")
@click.option("--dense", metavar="FILE", help="With --web: the dense model's ONNX file, which the page times against.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@click.option("--json", "as_json", is_flag=True, help="What was written as JSON on stdout.")
def command(file, output, images, count, checkpoint, predictor, runtime, web, dense, force, as_json):
    """Pack FILE (an ONNX file or an engine) with what it is and with a proof that needs no PyTorch.

    FILE is verified first; one that fails is not bundled (exit 1). The photos whose decisions are clearest go into the
    proof, made smaller: do not use photos that must stay where they are. `tokexport verify DIR` runs the proof.

    tokexport bundle vit.onnx -o vit-bundle --images photos/
    """
    from ...engines.bundle.folder import check_place
    from ...engines.files import inspect_file
    from ...engines.images import find_images
    from ..show.terminal import bar, console, print_json

    check_place(output, force=force)
    paths = find_images(list(images))
    tail = inspect_file(file).provenance.tail  # wrong files are known before torch is loaded
    _check_web(file, web, dense, tail=tail)
    out = console()
    with bar(out) as progress:
        progress("loading torch", 0.0)
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
    lines = _lines(bundle) + ([_add_page(bundle.path, dense)] if web else [])
    for line in lines:
        out.print(line, markup=False)
    if as_json:
        print_json(
            {
                "path": str(bundle.path),
                "size": bundle.size,
                "images": len(bundle.photos),
                "photos": [str(p) for p in bundle.photos],
                "unclear": bundle.unclear,
            }
        )


def _lines(bundle) -> list[str]:
    """What was written, for people."""
    n = len(bundle.photos)
    names = ", ".join(p.name for p in bundle.photos)
    lines = [f"{bundle.path}: {bundle.size / 1e6:.1f} MB, {n} photo{'s' * (n != 1)} in the proof: {names}"]
    if bundle.unclear:
        lines.append(
            f"{bundle.unclear} of them with a near-tie, on which runtimes may differ: give more photos to choose from"
        )
    lines.append(f"prove it anywhere: tokexport verify {bundle.path}")
    return lines


def _check_web(file: str, web: bool, dense: str | None, *, tail: str) -> None:
    """Raises: UsageError when no page can be made; known before a file is verified."""
    from ...engines.files import is_engine
    from ...engines.web.write import check_web, find_runtime

    if dense is not None and not web:
        raise UsageError("--dense is of the page: wanted --web with it")
    if web:
        check_web(is_engine(file), dense=dense, tail=tail)
        find_runtime()


def _add_page(folder, dense: str | None) -> str:
    """Put the page beside a bundle. Returns: how it is looked at."""
    from ...engines.web.write import add_page

    add_page(folder, dense=dense)
    serve = f"python -m http.server --bind 127.0.0.1 --directory {shlex.quote(str(folder))} 8000"
    return f"in a browser: {serve}, then http://127.0.0.1:8000/web/"


def is_bundle(path: str) -> bool:
    """Whether an argument of `verify` is a bundle, not a folder of photos."""
    from pathlib import Path

    return (Path(path) / "tokexport.json").is_file()


def prove(folders: list[str], runtime: str | None, *, others: tuple, allow_host_code: bool, as_json: bool) -> bool:
    """Run the proofs of bundles and print them.

    Args:
        folders: of the bundles.
        runtime: what runs ONNX files; None for what each was bundled with.
        others: whatever else was asked of `verify`, which a proof cannot take.
        allow_host_code: load engines with native code of a plugin.
        as_json: the reports as JSON on stdout, instead of text.
    Returns:
        Whether all passed.
    Raises:
        UsageError: something else was asked.
    """
    if any(others):
        raise UsageError(f"{folders[0]} is a bundle, which brings its own proof: wanted bundles alone, with --runtime")
    from ...engines.bundle.proof import verify_bundle
    from ..show.terminal import bar, console, print_json

    out, reports = console(), []
    with bar(out) as progress:
        for i, folder in enumerate(folders):
            progress(f"proving {folder}", i / len(folders))
            reports.append(verify_bundle(folder, runtime, allow_host_code=allow_host_code))
    passed = all(r.passed for r in reports)
    if as_json:
        several = {"passed": passed, "files": [r.to_json() for r in reports]}
        print_json(several if len(reports) > 1 else reports[0].to_json())
        return passed
    for report in reports:
        _print(out, report)
    return passed


def _print(out, report) -> None:
    """The report of one bundle for people."""
    for o in report.outputs:
        error = f"{o.error:.1e} (at most {o.limit:.0e})" if o.limit else f"{o.error:.1%} differ"
        own = f", from its own {o.own_error:.1e} (at most {o.own_limit:.0e})" if o.limit else ""
        judged = f"{o.n_judged} of {len(report.images)} images judged"
        out.print(f"{o.name}: from the reference {error}{own}, {judged}", markup=False)
    for image in report.images:
        d = image.difference
        if d is not None:
            word = "a near-tie" if d.explained else "another decision"
            margin = f"margin {d.margin:.1e} (a near-tie: at most {d.limit:.0e})"
            out.print(f"  image {image.index}: {word} in block {d.block}, {d.tokens} tokens, {margin}", markup=False)
        elif image.verdict == "failed":
            pixels = f", the preprocessed photo differs by {image.pixels:.2g} of 255" if image.pixels else ""
            out.print(f"  image {image.index}: failed{pixels}", markup=False)
    for note in report.notes:
        out.print(note, markup=False)
    colour = "green" if report.passed else "red"
    out.print(f"{report.path} on {report.runtime}: {report.summary()}", style=f"bold {colour}", markup=False)
