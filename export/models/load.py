"""Models by name, with weights from a file, timm's hub or a seed; and where the weights came from, for the provenance."""

from __future__ import annotations

import ast
import difflib
import hashlib
import logging
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..checkpoints import formats
from . import as_plain
from ..errors import UsageError
from ..schedule import Schedule


@dataclass
class LoadedModel:
    """A plain timm ViT in eval mode and how to make it again.

    module: the model. name, kwargs: for `timm.create_model`. weights: {"source": "checkpoint" | "pretrained" | "random",
    "file" or "seed", "predictor" when there is such a file, "sha256" of all tensors}. notes: what a reader should know, in words.
    heads: tensors of trained score heads (DynamicViT, dTPS), {"0.in_conv.0.weight": ...}; empty when there are none.
    """

    module: nn.Module
    name: str
    kwargs: dict
    weights: dict
    notes: list[str]
    heads: dict[str, torch.Tensor] = field(default_factory=dict)

    def schedule(self, method: str, **options) -> Schedule:
        """The schedule of a method for this model, e.g. `loaded.schedule("tome", r=13)`.

        Args:
            method: a name of the reducer table.
            options: the method's own, see `Schedule.parse`.
        Raises:
            UsageError: see `Schedule.parse`.
        """
        return Schedule.parse(method, **as_plain(self.module).size._asdict(), **options)


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
            raise UsageError(f"--model-kwargs {pair!r}: wanted KEY=VALUE, e.g. img_size=384")
        if key.startswith(("checkpoint", "pretrained")):
            raise UsageError(f"--model-kwargs {pair!r}: weights are named with --checkpoint FILE or --pretrained")
        try:
            out[key] = words[value.lower()] if value.lower() in words else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[key] = value
    return out


def load_model(
    name: str = "deit_small_patch16_224",
    kwargs: dict | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    seed: int = 0,
    predictor: str | Path | None = None,
) -> LoadedModel:
    """Make a plain timm ViT and fill it.

    name: any timm model name. kwargs: for `timm.create_model` (img_size, num_classes, ...). checkpoint: .safetensors, .pth or .pt,
    loaded strictly, never running code in it; files of DeiT, EViT, DynamicViT, dTPS, MAE, ... as their authors wrote them (see `formats`).
    pretrained: take timm's weights from its hub. Neither: random weights from `seed`. predictor: file of score heads (DynamicViT, dTPS).
    Raises: UsageError for an unknown model or option, a model that is no plain ViT, a checkpoint that does not fit or holds code.
    """
    if checkpoint and pretrained:
        raise UsageError("--checkpoint and --pretrained both name the weights: give one of them")
    kwargs, notes = dict(kwargs or {}), []
    state = (
        read_checkpoint(checkpoint) if checkpoint else None
    )  # before the model is made: a wrong file is known at once
    heads = formats.read_heads(read_checkpoint(predictor, "predictor"), str(predictor)) if predictor else {}
    model = _create(name, kwargs, False, seed)
    as_plain(model)  # refuses by name what cannot be reduced
    if pretrained:  # only now: nothing is downloaded for a model that cannot be used
        model = _create(name, kwargs, True, seed)
    if state is not None:
        found = formats.convert(state, model.state_dict(), model.patch_embed.num_patches)
        notes += found.notes + fill(model, found.state, str(checkpoint))
        weights = {"source": "checkpoint", "file": str(checkpoint)}
        if heads and found.heads:
            notes.append(f"score heads are taken from {predictor}, not from the checkpoint")
        heads = heads or found.heads
    elif pretrained:
        weights = {"source": "pretrained", "file": (model.pretrained_cfg or {}).get("hf_hub_id") or name}
    else:
        weights = {"source": "random", "seed": seed}
        notes.append(
            f"the weights are random (seed {seed}): give --checkpoint FILE or --pretrained for a model that means something"
        )
    if predictor:
        weights["predictor"] = str(predictor)
    state = {**model.state_dict(), **{formats.HEAD + k: v for k, v in heads.items()}}
    return LoadedModel(
        model.eval().requires_grad_(False), name, kwargs, {**weights, "sha256": hash_weights(state)}, notes, heads
    )


def _create(name: str, kwargs: dict, pretrained: bool, seed: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3, 0.6)
        raise UsageError(
            f"unknown model {name!r}: wanted a timm model name{', e.g. ' + ', '.join(near) if near else ''}"
        )
    if not -(2**63) <= seed < 2**64:
        raise UsageError(f"--seed {str(seed)[:24]}: wanted a number of 64 bits, e.g. 0")
    torch.manual_seed(seed)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the hub's log of every retry
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as e:
        raise UsageError(f"model {name} does not take these --model-kwargs: {e}") from None
    except Exception as e:
        if pretrained:
            raise UsageError(
                f"--pretrained: weights of {name} could not be had ({type(e).__name__}: {_line(e)}); "
                f"give the file with --checkpoint instead"
            ) from None
        raise UsageError(f"model {name} cannot be made with {kwargs}: {type(e).__name__}: {_line(e)}") from None
    finally:
        logging.disable(level)


def _line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [""])[0].split(". ")[0][:200]


class NotRead:
    """Stands in a checkpoint for the values beside its tensors that training scripts leave there: nothing of them is made or called."""

    def __new__(cls, *values):
        return super().__new__(cls)

    def __init__(self, *values):
        pass

    def __setstate__(self, values):
        pass


# argparse's options (DeiT, MAE, EViT, DynamicViT), paths among them (trained by submitit), numpy's learning rates (DynamicViT's optimizer)
NOT_READ = tuple(
    (NotRead, name)
    for name in (
        "argparse.Namespace",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "numpy.dtype",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
    )
)
WRAPPERS = ("model", "net", "state_dict")  # net: TPS


def read_checkpoint(path: str | Path, what: str = "checkpoint") -> dict[str, torch.Tensor]:
    """State dict of a .safetensors, .pth or .pt file, unwrapped from {"model": ...}, {"net": ...} or {"state_dict": ...}; no code is run.

    Averaged weights beside it (model_ema) are not taken, as its authors' evaluation does not. what: its part, for errors.
    Raises: UsageError when there is no such file, it is damaged, of another kind, or would run code.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UsageError(f"{what} {path}: {'is a directory, wanted a file' if os.path.isdir(path) else 'no such file'}")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise UsageError(
            f"{what} {path}: ends in {path.suffix or 'nothing'}, wanted .safetensors, .pth or .pt "
            f"(a file that torch.save wrote may be renamed)"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            with torch.serialization.safe_globals(list(NOT_READ)):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"{what} {path}: refused, it holds Python objects that would run code on loading (or is damaged); "
            f"save its tensors alone: torch.save(model.state_dict(), ...) or safetensors"
        ) from None
    except Exception as e:
        raise UsageError(f"{what} {path}: cannot be read as {path.suffix} ({type(e).__name__}: {_line(e)})") from None
    for _ in range(4):  # not for ever: a dictionary of a hostile file may hold itself
        state = (
            next((state[k] for k in WRAPPERS if isinstance(state.get(k), dict)), state)
            if isinstance(state, dict)
            else state
        )
    plain = lambda v: (
        isinstance(v, torch.Tensor) and v.layout is torch.strided and v.device.type == "cpu" and not v.is_quantized
    )
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) and plain(v) for k, v in state.items()):
        found = ", ".join(str(k)[:40] for k in list(state)[:8]) if isinstance(state, dict) else type(state).__name__
        raise UsageError(
            f"{what} {path}: holds no state dict (a dictionary of plain tensors by name); found: {found or 'nothing'}"
        )
    return {k.removeprefix("module."): v.detach() for k, v in state.items()}


def fill(model: nn.Module, state: dict[str, torch.Tensor], said: str) -> list[str]:
    """Load a state dict strictly; position embeddings of another grid are resized as timm does. Returns notes.

    Raises: UsageError that lists every missing and unexpected key and every tensor of another shape.
    """
    own, notes, state = model.state_dict(), [], dict(state)
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    pos = state.get("pos_embed")
    if not missing and not unexpected and pos is not None and pos.shape != own["pos_embed"].shape:
        state["pos_embed"], note = _resized_positions(model, pos)
        notes += note
    shapes = [
        f"{k} is {tuple(state[k].shape)}, wanted {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    wrong = [
        f"{title} ({len(keys)}): {', '.join(keys)}"
        for title, keys in (("missing keys", missing), ("unexpected keys", unexpected), ("other shapes", shapes))
        if keys
    ]
    if wrong:
        raise UsageError(
            f"checkpoint {said} does not fit this model:\n  " + "\n  ".join(wrong) + "\n" + _hint(missing, unexpected)
        )
    broken = [k for k, v in state.items() if not v.is_floating_point() or not v.isfinite().all()]
    if broken:
        raise UsageError(
            f"checkpoint {said}: tensors that are not finite floating-point numbers: {', '.join(broken[:5])}"
            + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
        )
    model.load_state_dict(state)
    return notes


def _hint(missing: list[str], unexpected: list[str]) -> str:
    if "fc_norm.weight" in unexpected and "norm.weight" in missing:
        return "it was trained with average pooling (MAE fine-tuned): give --model-kwargs global_pool=avg"
    if any(k.startswith("head_dist.") for k in unexpected):
        return "it has a distillation token: give its --model, e.g. deit_small_distilled_patch16_224"
    if any(k.endswith(".ls1.gamma") for k in unexpected):
        return "it has LayerScale: give its --model, e.g. deit3_small_patch16_224, or --model-kwargs init_values=1e-5"
    if missing == ["head.bias", "head.weight"] and not unexpected:
        return "it has no classifier: give --model-kwargs num_classes=0"
    return "give the --model and --model-kwargs it was trained with (e.g. num_classes, img_size)"


def _resized_positions(model: nn.Module, pos: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    from timm.layers import resample_abs_pos_embed

    own, prefix = model.pos_embed, 0 if model.no_embed_class else model.num_prefix_tokens
    side = round((pos.shape[1] - prefix) ** 0.5) if pos.ndim == 3 and pos.shape[1] > prefix else 0
    if pos.ndim != 3 or pos.shape[-1] != own.shape[-1] or side * side != pos.shape[1] - prefix:
        return pos, []
    grid = model.patch_embed.grid_size
    pos = resample_abs_pos_embed(pos.float(), new_size=list(grid), num_prefix_tokens=prefix)
    return pos, [f"position embedding resized from {side}x{side} to {grid[0]}x{grid[1]} patches, as timm does"]


def hash_weights(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of all tensors of a state dict, in order of name."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
