"""`tokexport rates`."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..options import parse_macs
from .model_options import load, model_options

MODELS = {  # width, patch size; the images are 224 x 224 and the MLP is four times as wide in all
    "deit_tiny": (192, 16),
    "deit_small": (384, 16),
    "deit_base": (768, 16),
    "mae_base": (768, 16),
    "mae_large": (1024, 16),
    "mae_huge": (1280, 14),
}


@click.group("rates", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON on stdout.")
@click.pass_context
def command(context, as_json):
    """DiffRate's keep counts: list those that were published (without a command), or learn them on your own images.

    tokexport onnx --method diffrate --rates deit_small@2.9
    """
    if context.invoked_subcommand is None:
        _list(as_json)


@command.command("learn")
@model_options
@click.option(
    "--images",
    multiple=True,
    required=True,
    metavar="IMAGES",
    help="Photos like those the model will see, some hundreds; files or folders.",
)
@click.option(
    "--labels",
    is_flag=True,
    help="The one folder of --images has a folder for each class, and the classes teach; "
    "default: the model without reduction teaches.",
)
@click.option("--macs", required=True, metavar="2.9G", help="Multiply-accumulates of one image to reach.")
@click.option("--steps", default=90, show_default=True, help="Of the optimizer.")
@click.option("--step-images", default=6, show_default=True, help="Photos in a step.")
@click.option(
    "-o", "--output", default="rates.json", show_default=True, metavar="FILE", help="The counts, for --rates FILE."
)
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout.")
def learn(images, labels, macs, steps, step_images, output, force, as_json, **model):
    """Learn how many tokens each block keeps, by DiffRate's differentiable search; the model's weights stay as they are.

    A search that was stopped goes on where it was (OUTPUT.state). Plain ToMe with one r for all blocks may well do better at the same
    cost: it did on DINOv2 (docs/methods.md).
    """
    from ...export.files import aside, check_output
    from ..show.terminal import bar, console, macs_words, print_json, tokens_words

    target, out = parse_macs(macs), console()
    path = check_output(output, force, [model["checkpoint"], *images], beside=())
    with bar(out) as progress:
        progress("loading torch", 0.0)
        from ...engines.search.photos import find_photos
        from ...engines.search.rates import SearchSettings, learn_rates

        loaded = load(model)
        n_classes = loaded.module.num_classes if labels else None
        photos = find_photos(list(images), n_classes=n_classes, class_names=loaded.labels)
        rates = learn_rates(
            loaded,
            photos.reader(loaded.preprocess),
            n_images=len(photos.paths),
            target=target,
            labels=photos.labels,
            settings=SearchSettings(steps=steps, batch=step_images, seed=model["seed"]),
            resume=f"{path}.state",
            progress=progress,
        )
    with aside(path) as part:
        part.write_text(rates.to_json())
    if as_json:
        print_json({"path": str(path), **asdict(rates)})
        return
    schedule = loaded.schedule("diffrate", rates=str(path))
    out.print(str(path), style="bold", markup=False)
    out.print(f"  MACs     {macs_words(rates.macs, rates.macs_dense)}; asked {rates.target / 1e9:.3f} G", markup=False)
    out.print(f"  tokens   {tokens_words(rates.n_tokens, schedule.tokens_per_block())}", markup=False)
    out.print(f"  distance {rates.loss:.4g} to the teacher, over the last steps; {rates.images} images", markup=False)


def _list(as_json: bool) -> None:
    """Print the published lists: name, MACs of the model they reduce, tokens after each block."""
    from ..show.terminal import console, macs_words, print_json, tokens_words

    rows = _rows()
    if as_json:
        print_json({"rates": rows})
        return
    out = console()
    for row in rows:
        out.print(f"{row['name']:<17}", end="", style="bold", markup=False)
        out.print(macs_words(row["macs"], row["macs_dense"]), markup=False)
        out.print("  " + tokens_words(row["tokens"][0][0], row["tokens"]), markup=False)


def _rows() -> list[dict]:
    from ...export import macs
    from ...export.reducers import diffrate_rates
    from ...export.schedule import Schedule

    rows = []
    for model, lists in diffrate_rates.published().items():
        for cost, (prune, merge, n_tokens) in lists.items():
            name = f"{model}@{cost}"
            schedule = Schedule.parse("diffrate", n_tokens=n_tokens, depth=len(prune), rates=name)
            dims = _dims(*MODELS[model])
            total, dense = macs.count(dims, schedule), macs.count(dims, macs.dense(schedule))
            rows.append(
                {
                    "name": name,
                    "published_gflops": float(cost),
                    "n_tokens": n_tokens,
                    "depth": len(prune),
                    "tokens": schedule.tokens_per_block(),
                    "prune_kept": prune,
                    "merge_kept": merge,
                    "macs": total,
                    "macs_dense": dense,
                    "ratio": dense / total,
                    "notes": list(schedule.notes),
                }
            )
    return rows


def _dims(width: int, patch: int) -> dict:
    """What `PlainViT.dims` says of a classifier for ImageNet-1k at 224 x 224."""
    return {
        "width": width,
        "attn_width": width,
        "mlp": [(width, 4 * width), (4 * width, width)],
        "classes": 1000,
        "channels": 3,
        "heads": 1,
        "patches": (224 // patch) ** 2,
        "patch_values": 3 * patch * patch,
        "pool": "token",
    }
