"""Graphs that take pixels: uint8 images, whose normalisation is folded into the patch embedding.

A patch embedding is linear: w * (u / 255 - mean) / std + b = w' * u + b' with w' = w / (255 std) for each channel and b' = b - the sum
of w mean / std. So the graph's own cost is a Transpose (of [B, H, W, C] images) and a Cast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import UsageError
from .provenance import Preprocess

if TYPE_CHECKING:
    import torch
    from torch import nn

INPUTS = {  # as it is typed -> as it is stored
    "float32": "float32",
    "uint8": "uint8-nhwc",
    "uint8-nhwc": "uint8-nhwc",
    "uint8-nchw": "uint8-nchw",
}


def input_form(name: str) -> str:
    """The form of an input as it is stored. Raises: UsageError when there is none of that name."""
    if name not in INPUTS:
        raise UsageError(f"input {name!r}: wanted {', '.join(INPUTS)}")
    return INPUTS[name]


def input_shape(form: str, preprocess: Preprocess, channels: int) -> tuple[int, int, int]:
    """The axes of one image.

    Args:
        form: of the input, a value of INPUTS.
        preprocess: with the size.
        channels: of the image.
    """
    height, width = preprocess.size
    return (height, width, channels) if form == "uint8-nhwc" else (channels, height, width)


@dataclass(frozen=True)
class Pixels:
    """uint8 images, and how the model wants them.

    Args:
        layout: "nhwc" or "nchw".
        mean, std: one a channel, of values in [0, 1].
    """

    layout: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def planes(self, image: torch.Tensor) -> torch.Tensor:
        """Pixels as [B, channels, H, W], uint8 as they are. image: [B, H, W, channels] or [B, channels, H, W]."""
        return image.permute(0, 3, 1, 2) if self.layout == "nhwc" else image

    def normalised(self, image: torch.Tensor) -> torch.Tensor:
        """Images as the model was trained on [B, channels, H, W] float32. image: pixels, uint8."""
        import torch

        if image.dtype != torch.uint8:
            raise UsageError(f"image is {image.dtype}: wanted the pixels themselves, torch.uint8")
        column = lambda values: torch.tensor(values, dtype=torch.float32, device=image.device)[:, None, None]
        return (self.planes(image).float() / 255 - column(self.mean)) / column(self.std)

    def folded(self, patch: nn.Conv2d) -> nn.Conv2d:
        """A patch embedding that takes pixels as numbers from 0 to 255.

        Raises: UsageError when it pads the image: its border would be black instead of mean.
        """
        import torch
        from torch import nn

        if patch.padding not in (0, (0, 0), "valid"):
            raise UsageError(
                "input uint8: the model pads its images, so the normalisation cannot be folded: take float32"
            )
        weight = patch.weight.detach().double()
        mean, std = (
            torch.tensor(v, dtype=torch.float64, device=weight.device)[:, None, None] for v in (self.mean, self.std)
        )
        bias = weight.new_zeros(len(weight)) if patch.bias is None else patch.bias.detach().double()
        new = nn.Conv2d(patch.in_channels, patch.out_channels, patch.kernel_size, patch.stride, device="meta")
        kind = patch.weight.dtype
        new.weight = nn.Parameter((weight / (255 * std)).to(kind), requires_grad=False)
        new.bias = nn.Parameter((bias - (weight * (mean / std)).sum((1, 2, 3))).to(kind), requires_grad=False)
        return new


def pixels_of(form: str, preprocess: Preprocess) -> Pixels | None:
    """How pixels become the model's images; None where the input is normalised already.

    Args:
        form: of the input, a value of INPUTS.
        preprocess: of images.
    """
    return None if form == "float32" else Pixels(form.partition("-")[2], preprocess.mean, preprocess.std)
