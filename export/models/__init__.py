"""The models that can be exported: a table of families, each an adapter to one PlainViT, and loading them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from .plain_vit import PlainViT

# Name -> module with `adapt(model) -> PlainViT | None` (None: of another family) and WANTED, what it takes, in words.
FAMILIES = {"timm": f"{__name__}.timm"}


def as_plain(model: nn.Module | PlainViT) -> PlainViT:
    """A model as all other code knows it; a PlainViT is given back as it is.

    Raises: UsageError for a model of no known family, or one with parts that are not reproduced, by name.
    """
    from .plain_vit import PlainViT

    if isinstance(model, PlainViT):
        return model
    families = [import_module(name) for name in FAMILIES.values()]
    for family in families:
        plain = family.adapt(model)
        if plain is not None:
            return plain
    raise UsageError(
        f"{type(model).__name__} is no plain Vision Transformer: wanted {' or '.join(f.WANTED for f in families)}; "
        f"its tokens cannot be reduced by this exporter"
    )
