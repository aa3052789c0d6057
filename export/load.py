"""Models by name, with weights from a file, timm's hub or a seed; and where the weights came from, for the provenance."""

from __future__ import annotations

import ast
import difflib
import hashlib
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import vit
from .errors import UsageError


@dataclass
class LoadedModel:
    """A plain timm ViT in eval mode and how to make it again.

    module: the model. name, kwargs: for `timm.create_model`. weights: {"source": "checkpoint" | "pretrained" | "random",
    "file" or "seed", "sha256" of all tensors}. notes: what a reader should know, in words.
    """

    module: nn.Module
    name: str
    kwargs: dict
    weights: dict
    notes: list[str]


def parse_kwargs(pairs: list[str] | tuple[str, ...]) -> dict:
    """["img_size=384", "global_pool=avg"] -> {"img_size": 384, "global_pool": "avg"}; values are Python literals, else text."""
    out = {}
    for pair in pairs:
        key, eq, value = pair.partition("=")
        if not eq or not key.isidentifier():
            raise UsageError(f"--model-kwargs {pair!r}: wanted KEY=VALUE, e.g. img_size=384")
        if key.startswith(("checkpoint", "pretrained")):
            raise UsageError(f"--model-kwargs {pair!r}: weights are named with --checkpoint FILE or --pretrained")
        try:
            out[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[key] = value
    return out


def load_model(name: str = "deit_small_patch16_224", kwargs: dict | None = None, checkpoint: str | Path | None = None,
               pretrained: bool = False, seed: int = 0) -> LoadedModel:
    """Make a plain timm ViT and fill it.

    name: any timm model name. kwargs: for `timm.create_model` (img_size, num_classes, ...). checkpoint: .safetensors, .pth or .pt,
    loaded strictly, never running code in it. pretrained: take timm's weights from its hub. Neither: random weights from `seed`.
    Raises: UsageError for an unknown model or option, a model that is no plain ViT, a checkpoint that does not fit or holds code.
    """
    if checkpoint and pretrained:
        raise UsageError("--checkpoint and --pretrained both name the weights: give one of them")
    kwargs, notes = dict(kwargs or {}), []
    state = read_checkpoint(checkpoint) if checkpoint else None  # before the model is made: a wrong file is known at once
    model = _create(name, kwargs, False, seed)
    vit.check_plain_vit(model)
    if pretrained:  # only now: nothing is downloaded for a model that cannot be used
        model = _create(name, kwargs, True, seed)
    if state is not None:
        notes += fill(model, state, str(checkpoint))
        weights = {"source": "checkpoint", "file": str(checkpoint)}
    elif pretrained:
        weights = {"source": "pretrained", "file": (model.pretrained_cfg or {}).get("hf_hub_id") or name}
    else:
        weights = {"source": "random", "seed": seed}
        notes.append(f"the weights are random (seed {seed}): give --checkpoint FILE or --pretrained for a model that means something")
    return LoadedModel(model.eval().requires_grad_(False), name, kwargs, {**weights, "sha256": hash_weights(model)}, notes)


def _create(name: str, kwargs: dict, pretrained: bool, seed: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3, 0.6)
        raise UsageError(f"unknown model {name!r}: wanted a timm model name{', e.g. ' + ', '.join(near) if near else ''}")
    torch.manual_seed(seed)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the hub's log of every retry
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as e:
        raise UsageError(f"model {name} does not take these --model-kwargs: {e}") from None
    except Exception as e:
        if pretrained:
            raise UsageError(f"--pretrained: weights of {name} could not be had ({type(e).__name__}: {_line(e)}); "
                             f"give the file with --checkpoint instead") from None
        raise UsageError(f"model {name} cannot be made with {kwargs}: {type(e).__name__}: {_line(e)}") from None
    finally:
        logging.disable(level)


def _line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [""])[0].split(". ")[0][:200]


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """State dict of a .safetensors, .pth or .pt file, unwrapped from {"model": ...} or {"state_dict": ...}; no code is run.

    Raises: UsageError when there is no such file, it is damaged, of another kind, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"checkpoint {path}: no such file")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise UsageError(f"checkpoint {path}: ends in {path.suffix or 'nothing'}, wanted .safetensors, .pth or .pt")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(f"checkpoint {path}: refused, it holds Python objects that would run code on loading (or is damaged); "
                         f"save its tensors alone: torch.save(model.state_dict(), ...) or safetensors") from None
    except Exception as e:
        raise UsageError(f"checkpoint {path}: cannot be read as {path.suffix} ({type(e).__name__}: {_line(e)})") from None
    while isinstance(state, dict):
        inner = next((state[k] for k in ("model", "state_dict") if isinstance(state.get(k), dict)), None)
        if inner is None:
            break
        state = inner
    plain = lambda v: isinstance(v, torch.Tensor) and v.layout is torch.strided and v.device.type == "cpu" and not v.is_quantized
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) and plain(v) for k, v in state.items()):
        found = ", ".join(str(k)[:40] for k in list(state)[:8]) if isinstance(state, dict) else type(state).__name__
        raise UsageError(f"checkpoint {path}: holds no state dict (a dictionary of plain tensors by name); found: {found or 'nothing'}")
    return {k.removeprefix("module."): v for k, v in state.items()}


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
    shapes = [f"{k} is {tuple(state[k].shape)}, wanted {tuple(own[k].shape)}" for k in own if k in state and state[k].shape != own[k].shape]
    wrong = [f"{title} ({len(keys)}): {', '.join(keys)}" for title, keys in
             (("missing keys", missing), ("unexpected keys", unexpected), ("other shapes", shapes)) if keys]
    if wrong:
        raise UsageError(f"checkpoint {said} does not fit this model:\n  " + "\n  ".join(wrong)
                         + "\ngive the --model and --model-kwargs it was trained with (e.g. num_classes, img_size)")
    broken = [k for k, v in state.items() if not v.is_floating_point() or not v.isfinite().all()]
    if broken:
        raise UsageError(f"checkpoint {said}: tensors that are not finite floating-point numbers: {', '.join(broken[:5])}"
                         + (f" and {len(broken) - 5} more" if len(broken) > 5 else ""))
    model.load_state_dict(state)
    return notes


def _resized_positions(model: nn.Module, pos: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    from timm.layers import resample_abs_pos_embed

    own, prefix = model.pos_embed, 0 if model.no_embed_class else model.num_prefix_tokens
    side = round((pos.shape[1] - prefix) ** 0.5) if pos.ndim == 3 and pos.shape[1] > prefix else 0
    if pos.ndim != 3 or pos.shape[-1] != own.shape[-1] or side * side != pos.shape[1] - prefix:
        return pos, []
    grid = model.patch_embed.grid_size
    pos = resample_abs_pos_embed(pos.float(), new_size=list(grid), num_prefix_tokens=prefix)
    return pos, [f"position embedding resized from {side}x{side} to {grid[0]}x{grid[1]} patches, as timm does"]


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all tensors of the state dict, in order of name."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
