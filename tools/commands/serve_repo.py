"""`tokexport serve-repo`."""

from __future__ import annotations

import click


@click.command("serve-repo")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@click.option("-o", "--output", required=True, metavar="DIR", help="The repository to write.")
@click.option(
    "--backend", metavar="NAME", help="onnxruntime, openvino or python; of an engine tensorrt.  [default: onnxruntime]"
)
@click.option(
    "--device", type=click.Choice(["cpu", "gpu"]), help="Where it runs.  [default: gpu for engines, else cpu]"
)
@click.option("--instances", type=int, default=1, show_default=True, metavar="N", help="Copies of each model.")
@click.option("--threads", default=0, show_default=True, help="Threads of the runtime; 0 for its own choice.")
@click.option("--max-batch", "most", type=int, metavar="N", help="Images of a batch.  [default: what it takes, or 16]")
@click.option(
    "--latency", metavar="JSON", help="What `bench --json` printed: by it batch sizes and waiting are chosen."
)
@click.option("--kserve", is_flag=True, help="Also a manifest for KServe.")
@click.option("--storage", metavar="URI", help="With --kserve: where the repository will be.  [default: pvc://models]")
@click.option("--allow-host-code", is_flag=True, help="Serve an engine that carries native code of a plugin.")
@click.option("--force", is_flag=True, help="Replace a repository that is there.")
@click.option("--json", "as_json", is_flag=True, help="What was written as JSON on stdout.")
def command(bundles, output, as_json, **choices):
    """Write a Triton model repository of BUNDLES: photo in (of a file made with --input uint8: pixels in), answer out, requests put together in batches.

    tokexport serve-repo vit-bundle -o repository --kserve
    """
    from ...engines.serving.repository import ServeOptions, write_repository
    from ..show.terminal import console, print_json, stages

    out = console()
    with stages(out) as progress:
        progress("writing the repository")
        served = write_repository(list(bundles), output, options=ServeOptions(**choices))
    for model in served:
        what = "photos as they lie on disk"
        if model.input != "photo":
            what = f"the file's own input {model.input!r}, pixels that the client has decoded and resized"
        b = model.batching
        batch = f"up to {b.most}" if b.most else "one size"
        words = (
            f"; prefers {', '.join(map(str, b.preferred))}, waits {b.delay_us / 1e3:g} ms at most"
            if b.preferred
            else ""
        )
        out.print(f"{model.name}: takes {what}; {model.backend.name}", markup=False)
        out.print(f"  batches: {batch}{words} ({b.origin})", markup=False)
    out.print(f"serve it: tritonserver --model-repository={output}", markup=False)
    if as_json:
        print_json({"path": str(output), "models": [model.to_json() for model in served]})
