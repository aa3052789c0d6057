"""From what a file says of itself back to the model it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError
from .provenance import Provenance

if TYPE_CHECKING:
    from .models.load import LoadedModel
    from .reference import ReducedViT

FAMILIES = ("timm",)  # whose models can be made again


def rebuild(
    provenance: Provenance,
    path: Path,
    *,
    checkpoint: str | Path | None = None,
    predictor: str | Path | None = None,
) -> LoadedModel:
    """The model a file was made from, loaded.

    Args:
        provenance: of the file.
        path: of the file; weights are looked for beside it too.
        checkpoint: its weights; None for where they were when the file was made.
        predictor: its score heads, in the same way.
    Raises:
        UsageError: the model is of a family that is not known here, or its weights cannot be found or are not the same.
    """
    if provenance.family not in FAMILIES:
        raise UsageError(
            f"{path} was made from a model of {provenance.family[:40]!r}, which this version cannot make again "
            f"({', '.join(FAMILIES)} only): upgrade tokexport"
        )
    from .models.load import load_model

    weights, source = provenance.weights, {}
    if checkpoint or weights["source"] == "checkpoint":
        source["checkpoint"] = checkpoint or _find_weights(weights["file"], path, "checkpoint")
    elif weights["source"] == "pretrained":
        source["pretrained"] = True
    else:
        source["seed"] = weights["seed"]
    if predictor or weights.get("predictor"):
        source["predictor"] = predictor or _find_weights(weights["predictor"], path, "predictor")
    if "checkpoint" in source:
        grid = weights.get("pos_grid")
        source |= {"weights": weights.get("set"), "pos_grid": None if grid is None else tuple(grid)}
    loaded = load_model(provenance.model, provenance.model_kwargs, **source)
    if loaded.weights["sha256"] != weights["sha256"]:
        raise UsageError(
            f"weights are not those {path} was made from: SHA-256 is {loaded.weights['sha256'][:16]}..., wanted "
            f"{weights['sha256'][:16]}... ({', '.join(f'{k} {v}' for k, v in source.items())})"
        )
    return loaded


def reference_of(
    provenance: Provenance,
    path: Path,
    *,
    checkpoint: str | Path | None = None,
    predictor: str | Path | None = None,
) -> ReducedViT:
    """The eager reference of a file: it takes the file's images, as they are, and gives its outputs.

    Args:
        provenance, path, checkpoint, predictor: see `rebuild`.
    Raises:
        UsageError: as `rebuild`.
    """
    from .models.learned_layers import learned_layers
    from .pixels import pixels_of
    from .reference import ReducedViT

    loaded = rebuild(provenance, path, checkpoint=checkpoint, predictor=predictor)
    options = {"emission": provenance.emission, "pixels": pixels_of(provenance.input, provenance.preprocess)}
    schedule = provenance.file_schedule  # a step that the file lacks changes none of its outputs
    return ReducedViT(loaded.module, schedule, learned_layers(loaded, provenance.schedule), **options)


def _find_weights(stored: str, path: Path, argument: str) -> Path:
    """A file of weights where it was when the file at path was made, or beside it."""
    places = (Path(stored), path.parent / Path(stored).name)
    place = next((p for p in places if p.exists()), None)  # a folder of transformers or timm, too
    if place is None:
        raise UsageError(
            f"{path} was made from {stored}, which is not there (nor beside the file): give it as {argument}"
        )
    return place
