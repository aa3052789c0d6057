"""All layouts of checkpoints that are known: one row each, in the group's file. Told by their anchors alone, whatever
the prefix."""

from . import timm_names, torchvision_names, transformers_names
from .layout import Converted, Layout

LAYOUTS = (*timm_names.LAYOUTS, *transformers_names.LAYOUTS, *torchvision_names.LAYOUTS)

__all__ = ["LAYOUTS", "Converted", "Layout"]
