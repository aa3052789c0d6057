"""Folders of weights: which model they are of, its labels and preprocessing, from config.json as Hugging Face or timm
write it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError
from .transformers_configs import model_of

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pth",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".npz")


@dataclass(frozen=True)
class Folder:
    """A folder of weights.

    weights: the file of them (an index of shards too). model, kwargs: for `timm.create_model`; None without a
    config.json.
    labels: class names, or none. processor: preprocessor_config.json of transformers, or {}. data: pretrained_cfg of
    timm, or {}.
    activation: of the classifier, when the config names it. source: in words, for the summary.
    """

    weights: Path
    model: str | None = None
    kwargs: dict = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    processor: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    activation: str | None = None
    source: str = ""


def read_json(path: Path) -> dict:
    """A JSON object of a folder. Raises: UsageError when it is none."""
    try:
        if path.stat().st_size > 2**26:
            raise ValueError
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError
    except (ValueError, RecursionError, OSError):
        raise UsageError(f"{path}: is no JSON object, or damaged") from None
    return value


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder. Raises: UsageError for none, or several."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    kinds = [[p for p in files if p.suffix == s] for s in SUFFIXES]
    first = next((k for k in kinds if k), [])
    if len(first) != 1:
        names = (
            f"{len(first)} ({', '.join(p.name for p in first[:4])}): name one"
            if first
            else f"none of {', '.join(WEIGHTS[:4])}, ..."
        )
        raise UsageError(f"checkpoint {folder}: wanted one file of weights in the folder, there is {names}")
    return first[0]


def read_folder(folder: Path) -> Folder:
    """What a folder of weights holds. Raises: UsageError for no weights, or a config of a model that is not known."""
    config_path = folder / "config.json"
    weights = weights_in(folder)
    if not config_path.is_file():
        return Folder(weights)
    config = read_json(config_path)
    if (
        "architecture" in config
        or isinstance(config.get("pretrained_cfg"), dict)
        and "architecture" in config["pretrained_cfg"]
    ):
        return _timm(weights, config)
    if "model_type" not in config:
        raise UsageError(
            f"{config_path}: has no model_type (transformers) and no architecture (timm): give the model's name too"
        )
    found = model_of(config, str(config_path))
    processor = (
        read_json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").is_file() else {}
    )
    return Folder(
        weights,
        found.name,
        kwargs=found.kwargs,
        labels=found.labels,
        processor=processor,
        data={},
        activation=found.activation,
        source=f"Hugging Face {config['model_type']}",
    )


def _timm(weights: Path, config: dict) -> Folder:
    """Of timm's save_for_hf, in its form of today or the flat one before."""
    data = config["pretrained_cfg"] if isinstance(config.get("pretrained_cfg"), dict) else config
    kwargs = dict(config.get("model_args") or {})
    size = data.get("input_size")
    if isinstance(size, list) and len(size) == 3:
        if data.get("fixed_input_size", True):
            kwargs.setdefault("img_size", size[1] if size[1] == size[2] else tuple(size[1:]))
        if size[0] != 3:
            kwargs.setdefault("in_chans", size[0])
    for key in ("num_classes", "global_pool"):
        if config.get(key, data.get(key)) is not None:
            kwargs.setdefault(key, config.get(key, data.get(key)))
    names = config.get("label_names") or config.get("labels") or data.get("label_names") or ()
    words = config.get("label_descriptions") or data.get("label_descriptions") or {}
    labels = tuple(str(words.get(n, n)) for n in names) if isinstance(names, list) else ()
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    name = config.get("architecture") or data.get("architecture")
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise UsageError(f"{weights.parent / 'config.json'}: its architecture is no name of a timm model")
    return Folder(weights, name, kwargs=kwargs, labels=labels, processor={}, data=data, activation=None, source="timm")


def hub_folder(name: str) -> Path:
    """The folder of a repository `hf-hub:ORG/NAME[@REVISION]`, downloaded into the hub's cache.

    Raises: UsageError where no hub is reached and the cache has it not.
    """
    repository, _, revision = name.split(":", 1)[1].partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UsageError(f"model {name[:80]!r}: wanted hf-hub:ORG/NAME")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UsageError("hf-hub: needs the package huggingface_hub: pip install huggingface_hub") from None
    get = lambda file: Path(hf_hub_download(repository, file, revision=revision or None))
    try:
        folder = get("config.json").parent
        for file in ("preprocessor_config.json", *WEIGHTS):
            try:
                path = get(file)
            except Exception:  # not in the repository, or not reached: the last file decides
                continue
            if file.endswith(".index.json"):
                for shard in sorted(set(read_json(path).get("weight_map", {}).values())):
                    get(shard)
            if file in WEIGHTS:
                return folder
    except UsageError:
        raise
    except Exception as e:
        raise UsageError(
            f"model {name}: the hub was not reached, or has no such repository ({type(e).__name__}): "
            "give a downloaded folder with checkpoint"
        ) from None
    raise UsageError(
        f"model {name}: the hub has no weights of it that are known, or was not reached: give a folder with checkpoint"
    )
