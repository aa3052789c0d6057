"""`tokexport rates`."""

from __future__ import annotations

import click

MODELS = {  # width, patch size; the images are 224 x 224 and the MLP is four times as wide in all
    "deit_tiny": (192, 16),
    "deit_small": (384, 16),
    "deit_base": (768, 16),
    "mae_base": (768, 16),
    "mae_large": (1024, 16),
    "mae_huge": (1280, 14),
}


@click.command("rates")
@click.option("--list", "listed", is_flag=True, help="Show the published lists (what is done without it, too).")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON on stdout.")
def command(listed, as_json):
    """List the keep counts that were published with DiffRate: name, MACs of the model they reduce, tokens after each block.

    tokexport onnx --method diffrate --rates deit_small@2.9
    """
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
