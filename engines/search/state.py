"""A search that can be taken up again: what it has come to, in a file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...export.errors import UsageError
from ...export.files import aside


class SearchState:
    """The search so far in a safetensors file: logits, Adam's moments, losses.

    Args:
        path: of the file; None keeps nothing.
        request: hash of what is searched.
    """

    def __init__(self, path: str | Path | None, request: str):
        self.path, self.request = None if path is None else Path(path), request

    def read(self, parameters: list[Tensor], optimizer, losses: list[float]) -> int:
        """Take up what is there; returns the steps that are done.

        Raises:
            UsageError: the file is of another search, or damaged.
        """
        if self.path is None or not self.path.is_file():
            return 0
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as f:
                about = f.metadata() or {}
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (a file, no dictionary)
        except (SafetensorError, OSError) as e:
            raise UsageError(f"{self.path} is no state of a search ({e}): remove it to begin anew") from None
        if about.get("request") != self.request:
            raise UsageError(
                f"{self.path} is the state of another search (model, images, target or settings): remove it to begin anew"
            )
        step = int(about["step"])
        with torch.no_grad():
            for i, p in enumerate(parameters):
                p.copy_(tensors[f"{i}.value"])
                moments = {k: tensors[f"{i}.{k}"] for k in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
        losses.extend(tensors["losses"].tolist())
        return step

    def write(self, step: int, parameters: list[Tensor], optimizer, losses: list[float]) -> None:
        """Keep the state, aside and renamed."""
        if self.path is None:
            return
        from safetensors.torch import save_file

        tensors = {"losses": torch.tensor(losses)}
        for i, p in enumerate(parameters):
            kept = optimizer.state.get(p) or {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            tensors |= {f"{i}.value": p.detach().clone(), f"{i}.exp_avg": kept["exp_avg"].clone()}
            tensors[f"{i}.exp_avg_sq"] = kept["exp_avg_sq"].clone()
        with aside(self.path) as part:
            save_file(tensors, part, {"step": str(step), "request": self.request})

    def remove(self) -> None:
        """The search is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
