"""Models by name or folder, with weights from a file, a hub or a seed; and where the weights came from, for the
provenance."""

from __future__ import annotations

import ast
import difflib
import hashlib
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from .. import preprocess as preprocessing
from ..checkpoints.learned_rates import rates_of_checkpoint
from ..checkpoints.score_heads import HEAD, read_heads
from ..checkpoints.weights import Filled, Source, open_source, read_state
from ..errors import UsageError
from ..provenance import Preprocess
from ..schedule import Schedule
from . import as_plain

DEFAULT = "deit_small_patch16_224"
ACTIVATIONS = ("softmax", "sigmoid", "none")


@dataclass
class LoadedModel:
    """A plain timm ViT in eval mode and how to make it again.

    module: the model.
    name, kwargs: for `load_model`; kwargs are `timm.create_model`'s and norm_eps, the epsilon of all its layer norms.
    weights: {"source": "checkpoint" | "pretrained" | "random", "file" or "seed", "sha256" of all tensors; where they
    were given or
        chosen: "predictor", "set" (of weights in the file), "pos_grid"}.
    notes: what a reader should know, in words.
    preprocess: from a photo to the input.
    heads: tensors of trained score heads (DynamicViT, dTPS), {"0.in_conv.0.weight": ...}; empty when there are none.
    labels: class names of the checkpoint's folder; empty when it has none.
    activation: what makes probabilities of the classifier's outputs: "softmax", "sigmoid" or "none"; None without
    classes.
    learned: tensors of the keep counts that the checkpoint has learned (DiffRate); empty when there are none.
    """

    module: nn.Module
    name: str
    kwargs: dict
    weights: dict
    notes: list[str]
    preprocess: Preprocess
    heads: dict[str, torch.Tensor] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    activation: str | None = None
    learned: dict[str, torch.Tensor] = field(default_factory=dict)

    def schedule(self, method: str, **options) -> Schedule:
        """The schedule of a method for this model, e.g. `loaded.schedule("tome", r=13)`.

        Args:
            method: a name of the reducer table.
            options: the method's own, see `Schedule.parse`; rates="checkpoint" takes those that the checkpoint has learned.
        Raises:
            UsageError: see `Schedule.parse`; the checkpoint has learned no rates.
        """
        if options.get("rates") == "checkpoint":
            options["rates"] = self.rates
            if options["rates"] is None:
                raise UsageError(
                    "rates checkpoint: the weights have learned none: wanted a checkpoint of DiffRate's training"
                )
        return Schedule.parse(method, **as_plain(self.module).size._asdict(), **options)

    @property
    def rates(self) -> dict[str, list[int]] | None:
        """DiffRate's keep counts of the checkpoint, {"prune_kept": [...], "merge_kept": [...]}, or None."""
        return rates_of_checkpoint(self.learned)


def parse_kwargs(pairs: list[str] | tuple[str, ...]) -> dict:
    """["img_size=384", "global_pool=avg"] -> {"img_size": 384, "global_pool": "avg"}.

    Values are Python literals, true and false in any case; else text (none too: timm has pos_embed=none).
    Raises: UsageError for what is no KEY=VALUE, and for options that name weights.
    """
    words = {"true": True, "false": False}
    out = {}
    for pair in pairs:
        key, eq, value = pair.partition("=")
        if not eq or not key.isidentifier():
            raise UsageError(f"model-kwargs {pair!r}: wanted KEY=VALUE, e.g. img_size=384")
        if key.startswith(("checkpoint", "pretrained")):
            raise UsageError(f"model-kwargs {pair!r}: weights are named with checkpoint or pretrained")
        try:
            out[key] = words[value.lower()] if value.lower() in words else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[key] = value
    return out


def load_model(
    name: str | None = None,
    kwargs: dict | None = None,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    seed: int = 0,
    predictor: str | Path | None = None,
    weights: str | None = None,
    pos_grid: tuple[int, int] | None = None,
    preprocess: dict | None = None,
    activation: str | None = None,
) -> LoadedModel:
    """A plain timm ViT, filled: with a checkpoint's weights, pretrained ones, or random ones from the seed.

    Args:
        name: any timm model name, hf-hub:ORG/NAME or local-dir:DIR. None: the checkpoint's folder says it, else DeiT-S.
        kwargs: for `timm.create_model` (img_size, num_classes, ...); norm_eps: the epsilon of all layer norms.
        checkpoint: a file in any layout of `checkpoints.layouts`, or a folder of transformers or timm; it runs no code.
        pretrained: take the weights of the model's hub (or of local-dir's folder).
        seed: of random weights, where there is neither.
        predictor: file of score heads (DynamicViT, dTPS).
        weights: name of the set of weights in the checkpoint; None for what the framework that wrote it takes.
        pos_grid: (rows, columns) of the checkpoint's position embedding; None to guess them, which is said.
        preprocess: in place of the model's own: mean, std, interpolation, crop_pct, size (height, width; as img_size).
        activation: "softmax", "sigmoid" or "none"; None for the folder's, sigmoid for one class, else softmax.
    Raises:
        UsageError: an unknown model or option, no plain ViT, a checkpoint that does not fit or cannot be read.
    """
    source = open_source(name, checkpoint, pretrained)
    if source.file is None and (weights is not None or pos_grid is not None):
        raise UsageError("weights and pos_grid speak of a checkpoint: give one, or leave them out")
    name, kwargs = _named(name, kwargs, source, preprocess or {})
    heads = read_heads(read_state(predictor, "predictor"), str(predictor)) if predictor else {}
    model = _plain_model(name, kwargs, pretrained=pretrained and source.file is None, seed=seed)
    filled = _filled(model, source, pretrained, seed=seed, weights=weights, pos_grid=pos_grid)
    heads = _chosen_heads(heads, filled, predictor)
    state = {**model.state_dict(), **{HEAD + k: v for k, v in heads.items()}}
    origin = filled.record | ({"predictor": str(predictor)} if predictor else {}) | {"sha256": hash_weights(state)}
    return LoadedModel(
        model.eval().requires_grad_(False),
        source.name or name,
        kwargs=kwargs,
        weights=origin,
        notes=filled.notes,
        preprocess=_preprocess(model, source, preprocess or {}, filled.notes),
        heads=heads,
        labels=source.folder.labels if len(source.folder.labels) == model.num_classes else (),
        activation=_activation(model, source, activation, filled.notes),
        learned=filled.learned,
    )


def _plain_model(name: str, kwargs: dict, *, pretrained: bool, seed: int) -> nn.Module:
    """The model, a plain ViT; nothing is downloaded for one that cannot be reduced."""
    model = _create(name, kwargs, False, seed)
    as_plain(model)  # refuses by name what cannot be reduced
    return _create(name, kwargs, True, seed) if pretrained else model


def _chosen_heads(heads: dict, filled: Filled, predictor: str | Path | None) -> dict[str, torch.Tensor]:
    """Score heads of the predictor's file, else the checkpoint's."""
    if heads and filled.heads:
        filled.notes.append(f"score heads are taken from {predictor}, not from the checkpoint")
    return heads or filled.heads


def _filled(model: nn.Module, source: Source, pretrained: bool, *, seed: int, weights, pos_grid) -> Filled:
    """What filling the model brought; its record says where the weights came from."""
    if source.file is not None:
        filled = source.fill(model, weights, pos_grid)
        return replace(filled, record={"source": source.kind, "file": source.words, **filled.record})
    if pretrained:
        file = (model.pretrained_cfg or {}).get("hf_hub_id") or model.pretrained_cfg.get("architecture")
        return Filled([], record={"source": "pretrained", "file": file})
    note = f"the weights are random (seed {seed}): give checkpoint or pretrained for a model that means something"
    return Filled([note], record={"source": "random", "seed": seed})


def _named(name: str | None, kwargs: dict | None, source: Source, stated: dict) -> tuple[str, dict]:
    """The timm model's name and options: what is given, on top of what the folder says."""
    given, folder = dict(kwargs or {}), source.folder
    if stated.get("size") is not None:
        size = tuple(stated["size"])
        both = given.get("img_size", size)
        if size != (tuple(both) if isinstance(both, (list, tuple)) else (both, both)):
            raise UsageError(f"size {size[0]}x{size[1]} and img_size {both} contradict each other: give one of them")
        given["img_size"] = size[0] if size[0] == size[1] else size
    if folder.model is not None and (
        name is None or source.name or name == folder.model or name.startswith("local-dir:")
    ):
        return folder.model, {**folder.kwargs, **given}
    return name or DEFAULT, given


def _preprocess(model: nn.Module, source: Source, stated: dict, notes: list[str]) -> Preprocess:
    out, folder = preprocessing.of_model(model), source.folder
    channels = len(out.mean)
    if folder.processor:
        own = preprocessing.of_transformers(folder.processor, out.size)
        out = own if len(own.mean) == channels else replace(own, mean=out.mean, std=out.std)
    elif folder.data:
        out = preprocessing.of_timm(folder.data, out)
    elif folder.model is not None:
        notes.append(f"the folder has no preprocessor_config.json: photos are prepared as timm does for {folder.model}")
    if channels == 1 and "mean" not in stated and not folder.data:
        notes.append(
            f"photos are read in grey with mean {out.mean[0]:g} and std {out.std[0]:g}: state others with mean and std"
        )
    return preprocessing.with_stated(out, stated)


def _activation(model: nn.Module, source: Source, activation: str | None, notes: list[str]) -> str | None:
    if activation is not None and activation not in ACTIVATIONS:
        raise UsageError(f"activation {activation!r}: wanted one of {', '.join(ACTIVATIONS)}")
    if model.num_classes == 0:
        if activation not in (None, "none"):
            raise UsageError(f"activation {activation}: the model has no classes: leave it out")
        return None
    own = source.folder.activation or ("sigmoid" if model.num_classes == 1 else "softmax")
    if activation is None and model.num_classes == 1 and own == "sigmoid":
        notes.append("the model has one class: its logit is read with a sigmoid (activation states another)")
    return activation or own


def _create(name: str, kwargs: dict, pretrained: bool, seed: int) -> nn.Module:
    """The model; the global random numbers stay where they are."""
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3, 0.6)
        raise UsageError(
            f"unknown model {name!r}: wanted a timm model name{', e.g. ' + ', '.join(near) if near else ''}"
        )
    if not -(2**63) <= seed < 2**64:
        raise UsageError(f"seed {str(seed)[:24]}: wanted a number of 64 bits, e.g. 0")
    options = {k: v for k, v in kwargs.items() if k != "norm_eps"}
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the hub's log of every retry
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as e:
        raise UsageError(f"model {name} does not take these model-kwargs: {e}") from None
    except Exception as e:
        if pretrained:
            raise UsageError(
                f"pretrained: weights of {name} could not be had ({type(e).__name__}: {_line(e)}); "
                f"give the file with checkpoint instead"
            ) from None
        raise UsageError(f"model {name} cannot be made with {kwargs}: {type(e).__name__}: {_line(e)}") from None
    finally:
        logging.disable(level)
    _set_norm_eps(model, kwargs.get("norm_eps"))
    return model


def _set_norm_eps(model: nn.Module, eps: float | None) -> None:
    """Epsilon of every layer norm: timm takes it as part of a layer type, which has no place in a file."""
    if eps is None:
        return
    if not isinstance(eps, (int, float)) or not 0 < eps < 1:
        raise UsageError(f"norm_eps {eps!r}: wanted the epsilon of layer norms, e.g. 1e-6")
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = float(eps)


def _line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [""])[0].split(". ")[0][:200]


def hash_weights(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of all tensors of a state dict, in order of name."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
