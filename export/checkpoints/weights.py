"""From what a user names (a file, a folder, a hub) to a filled model: reading, choosing, converting and filling in
one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..errors import UsageError
from . import folders, prefixes
from .archives import fill_from_npz
from .fill import beside_note, fill
from .metric_layers import KEY, split_layers
from .read import WeightFile, read_file
from .score_heads import split_heads
from .stand_ins import Inert
from .torch_file import DamagedError, StoredTensor


@dataclass(frozen=True)
class Filled:
    """What filling a model brought.

    notes: in words. heads: score heads of the file. learned: its tensors of learned rates. record: for the provenance.
    """

    notes: list[str]
    heads: dict[str, torch.Tensor] = field(default_factory=dict)
    learned: dict[str, torch.Tensor] = field(default_factory=dict)
    record: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where weights come from.

    kind: "checkpoint" or "pretrained". words: the file's name, for the provenance. file: what it holds; None for
    random weights or
    timm's own hub. folder: what its folder says. name: the model's name in the provenance where it is not timm's own
    (hf-hub:).
    """

    kind: str
    words: str
    file: WeightFile | None
    folder: folders.Folder
    name: str | None = None

    def fill(self, model: nn.Module, weights: str | None, pos_grid: tuple[int, int] | None) -> Filled:
        """Fill a model with the weights.

        Args:
            model: of timm.
            weights: name of a set of weights in the file, or None.
            pos_grid: rows and columns of its position embedding, or None.
        Raises:
            UsageError: they cannot be read, or do not fit.
        """
        try:
            filled = fill_from(self.file, model, weights, pos_grid)
        except DamagedError as e:
            raise UsageError(f"checkpoint {self.words}: cannot be read: {e}") from None
        if self.folder.source:
            filled.notes.insert(0, f"the folder is of {self.folder.source}, which is timm's {self.folder.model}")
        return filled


def open_source(name: str | None, checkpoint: str | Path | None, pretrained: bool) -> Source:
    """What the weights are read from, opened; nothing of a model is made.

    Args:
        name: of the model; hf-hub:ORG/NAME and local-dir:DIR name weights too, taken with pretrained.
        checkpoint: a file or folder, or None.
        pretrained: take the weights that go with the name.
    Raises:
        UsageError: there is no such file or folder, or the hub is not reached.
    """
    if checkpoint and pretrained:
        raise UsageError("checkpoint and pretrained both name the weights: give one of them")
    empty = folders.Folder(Path())
    hub = name.startswith("hf-hub:") if name else False
    if hub or (name or "").startswith("local-dir:"):
        path = folders.hub_folder(name) if hub else Path(name.split(":", 1)[1])
        if not path.is_dir():
            raise UsageError(f"model {name}: no such folder")
        folder = folders.read_folder(path)
        if folder.model is None:
            raise UsageError(f"model {name}: its folder has no config.json, so the model is not known")
        if not pretrained and checkpoint is None:
            return Source("random", "", None, folder, name if hub else None)
        if pretrained:
            kind = "pretrained" if hub else "checkpoint"
            return Source(kind, name if hub else str(path), read_file(folder.weights), folder, name if hub else None)
        return Source("checkpoint", str(checkpoint), _open(Path(checkpoint))[0], folder, name if hub else None)
    if checkpoint is None:
        return Source("random", "", None, empty)
    file, folder = _open(Path(checkpoint))
    return Source("checkpoint", str(checkpoint), file, folder or empty)


def _open(path: Path) -> tuple[WeightFile, folders.Folder | None]:
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError):
        is_folder = False
    if not is_folder:
        return read_file(path), None
    folder = folders.read_folder(path)
    return read_file(folder.weights), folder


def fill_from(
    file: WeightFile, model: nn.Module, weights: str | None = None, pos_grid: tuple[int, int] | None = None
) -> Filled:
    """Fill a model with a file's weights: choose a set, convert its layout, load it strictly.

    Args:
        file: out of `read_file`.
        model: of timm.
        weights: name of a set of weights in the file, or None.
        pos_grid: rows and columns of its position embedding, or None.
    Raises:
        UsageError: no set of weights is in it, or it does not fit.
        DamagedError: a tensor's bytes are not there.
    """
    if file.kind == "npz":
        if weights is not None or pos_grid is not None:
            raise UsageError("weights and pos_grid do not go with an .npz: leave them out")
        return Filled(fill_from_npz(model, file.path, file.data))
    choice = prefixes.choose(file.data, model.embed_dim, weights)
    if choice is None:
        _refuse(file, model)
    chosen = choice.weights
    _refuse_foreign_tensors(file, chosen, model)
    heads, state = split_heads(chosen.state)
    learned = {k: v.load() for k, v in state.items() if "_ddp." in k}
    heads = {k: v.load() for k, v in (heads or split_heads(chosen.others)[0]).items()}
    metric, state = split_layers({k: v.load() for k, v in state.items()}, str(file.path))
    converted = chosen.layout.convert(state, model)
    notes = [*choice.notes]
    if metric:
        notes.append(f"checkpoint format: DTEM (metric layers for {len(metric) // 2} blocks)")
    if heads:
        notes.append(
            f"checkpoint format: DynamicViT or dTPS (score heads for {len({k.split('.')[0] for k in heads})} stages)"
        )
    if chosen.layout.name:
        notes.append(f"checkpoint format: {chosen.layout.name}")
    if chosen.prefix:
        notes.append(f"the keys' prefix {chosen.prefix} is taken off")
    notes += [*converted.notes, *beside_note(chosen.others)]
    notes += fill(model, converted.state, str(file.path), pos_grid)
    record = {"set": chosen.name or "root"} if choice.notes else {}
    return Filled(notes, heads | metric, learned, record | ({"pos_grid": list(pos_grid)} if pos_grid else {}))


def _refuse_foreign_tensors(file: WeightFile, chosen: prefixes.WeightSet, model: nn.Module) -> None:
    """Raises: UsageError when one of the model's own tensors is of another kind in the file (sparse, quantised, a
    numpy array)."""
    own = model.state_dict()
    for _, entries in prefixes.nested(file.data):
        if not any(entries.get(chosen.prefix + key) is value for key, value in chosen.state.items()):
            continue
        for key, value in entries.items():
            if isinstance(value, Inert) and str(key).removeprefix(chosen.prefix) in own:
                raise UsageError(
                    f"checkpoint {file.path}: {key} is of class {value.name}, wanted a plain tensor: save it as one"
                )


def _refuse(file: WeightFile, model: nn.Module) -> None:
    """Raises: UsageError, for a file that holds no Vision Transformer in a layout that is known."""
    held = _holder(file.data)
    if held is not None:
        where, name = held
        raise UsageError(
            f"checkpoint {file.path}: refused: {where} is an object of class {name}, and no code of a file is run to make one; "
            f"its tensors alone: torch.save(model.state_dict(), ...) or safetensors"
        )
    sets = [tensors for _, tensors in prefixes.dictionaries(file.data)]
    if not sets:
        keys = (
            ", ".join(str(k)[:40] for k in list(file.data)[:8])
            if isinstance(file.data, dict)
            else type(file.data).__name__
        )
        raise UsageError(
            f"checkpoint {file.path}: holds no state dict (a dictionary of plain tensors by name); it has: {keys or 'nothing'}"
        )
    largest = max(sets, key=len)
    fill(model, {k: v.load() for k, v in largest.items()}, str(file.path))
    raise UsageError(f"checkpoint {file.path}: holds no Vision Transformer in a layout that is known")


def _holder(data, where: str = "the file", depth: int = 0, seen: frozenset = frozenset()) -> tuple[str, str] | None:
    """Where a foreign object with tensors in its attributes is, and its class; None when there is none."""
    if depth > prefixes.DEPTH or id(data) in seen:
        return None
    seen = seen | {id(data)}
    if isinstance(data, Inert) and _has_tensors(data.state, 0, seen):
        return where, data.name
    entries = data.entries if isinstance(data, Inert) else data
    pairs = entries.items() if isinstance(entries, dict) else enumerate(entries) if isinstance(entries, list) else ()
    for key, value in pairs:
        held = _holder(value, f"{key!r}"[:60], depth + 1, seen)
        if held is not None:
            return held
    return None


def _has_tensors(value, depth: int, seen: frozenset) -> bool:
    if isinstance(value, StoredTensor):
        return True
    if depth > 12 or id(value) in seen:
        return False
    inner = (value.state, *value.entries.values()) if isinstance(value, Inert) else value
    inner = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, (list, tuple)) else ()
    return any(_has_tensors(v, depth + 1, seen | {id(value)}) for v in inner)


def read_state(path: str | Path, what: str = "checkpoint") -> dict[str, torch.Tensor]:
    """All tensors of a file that holds one dictionary of them, e.g. of score heads, or the largest of several.

    Args:
        path: of the file.
        what: the argument's name, for errors.
    Raises:
        UsageError: it cannot be read, or holds none.
    """
    file = read_file(path, what)
    sets = [tensors for _, tensors in prefixes.dictionaries(file.data)]
    sets = [s for s in sets if split_heads(s)[0] or any(map(KEY.match, s))] or sets
    if not sets:
        raise UsageError(f"{what} {path}: holds no state dict (a dictionary of plain tensors by name)")
    try:
        return {k: v.load() for k, v in max(sets, key=len).items()}
    except DamagedError as e:
        raise UsageError(f"{what} {path}: cannot be read: {e}") from None
