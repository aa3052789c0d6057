"""From what a file says of itself back to the model it was made from."""

from __future__ import annotations

from pathlib import Path

from .errors import UsageError
from .provenance import Provenance


def rebuild(
    provenance: Provenance, path: Path, checkpoint: str | Path | None = None, predictor: str | Path | None = None
):
    """The model a file was made from, loaded. Raises: UsageError when its weights cannot be found or are not the same."""
    from .models.load import load_model

    weights, source = provenance.weights, {}
    if checkpoint or weights["source"] == "checkpoint":
        source["checkpoint"] = checkpoint or _found(weights["file"], path, "--checkpoint")
    elif weights["source"] == "pretrained":
        source["pretrained"] = True
    else:
        source["seed"] = weights["seed"]
    if predictor or weights.get("predictor"):
        source["predictor"] = predictor or _found(weights["predictor"], path, "--predictor")
    if "checkpoint" in source:
        source |= {"weights": weights.get("set"), "pos_grid": tuple(weights["pos_grid"]) if "pos_grid" in weights else None}
    loaded = load_model(provenance.model, provenance.model_kwargs, **source)
    if loaded.weights["sha256"] != weights["sha256"]:
        raise UsageError(
            f"weights are not those {path} was made from: SHA-256 is {loaded.weights['sha256'][:16]}..., wanted "
            f"{weights['sha256'][:16]}... ({', '.join(f'{k} {v}' for k, v in source.items())})"
        )
    return loaded


def _found(said: str, path: Path, option: str) -> Path:
    """A file of weights where it was when the file at path was made, or beside it."""
    found = next((p for p in (Path(said), path.parent / Path(said).name) if p.exists()), None)
    if found is None:
        raise UsageError(
            f"{path} was made from {said}, which is not there (nor beside the file): give it with {option}"
        )
    return found
