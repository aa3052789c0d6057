"""Halves of blocks as graphs of their own: attention or MLP on a fixed number of tokens, for a runtime to be timed on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..files import write_model
from ..models.plain_vit import PlainViT
from . import passes, precision
from .static_block import StaticBlock
from .static_vit import Rotary
from .trace import translate

HALVES = ("attention", "mlp")
CACHE = 64 << 20  # bytes that the weights of a file should exceed: those of a whole model do not stay in a cache either
FEWEST, MOST = 2, 6  # blocks in a file


class HalfBlocks(nn.Module):
    """The same half of the first blocks, one behind the other, each with its own weights.

    Args:
        plain: the model.
        half: "attention" or "mlp".
        n_tokens: tokens of an image, prefix tokens included.
        n_blocks: how many blocks.
        single: one image, whose tokens have no batch axis.
    """

    def __init__(self, plain: PlainViT, half: str, *, n_tokens: int, n_blocks: int, single: bool):
        super().__init__()
        self.half, self.n_tokens = half, n_tokens
        parts, table = plain.blocks(), plain.rotary()
        shape = {"single": single, "n_prefix": plain.n_prefix, "rotary": table is not None}
        self.blocks = nn.ModuleList(StaticBlock(part, **shape) for part in parts[:n_blocks])
        self.rotary = None
        if table is not None:  # rows in turn: where tokens stand decides nothing about time
            rows = torch.arange(n_tokens + 1) % table.shape[2]
            self.rotary = Rotary(table[:, :, rows], half=parts[0].half, single=single)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B N, C] behind the halves."""
        for i, block in enumerate(self.blocks):
            if self.half == "mlp":
                tokens = tokens + block.mlp(block.norm2(tokens))
            else:
                rope = None if self.rotary is None else self.rotary(i, None)
                tokens = block(tokens, self.n_tokens, None, None, rope)[0]
        return tokens


def blocks_in_file(plain: PlainViT) -> int:
    """How many blocks a file holds: so many that their weights exceed a processor's cache, 2 to 6."""
    block = plain.blocks()[0]
    layers = {id(p): p.numel() for m in (block.qkv, block.proj, block.mlp) for p in m.parameters()}
    wanted = -(-CACHE // (4 * max(sum(layers.values()), 1)))
    return min(max(wanted, FEWEST), MOST, plain.n_blocks)


def write_half_blocks(
    plain: PlainViT, half: str, path: Path, *, n_tokens: int, batch: int = 1, dtype: str = "fp32", opset: int = 20
) -> int:
    """Write one half of a model's first blocks as an ONNX file: input `image` [B N, C] (the tokens), output `tokens`.

    Args:
        plain: the model.
        half: "attention" or "mlp".
        path: of the file.
        n_tokens: tokens of an image, prefix tokens included.
        batch: images per run.
        dtype: of the trunk, a graph precision (see `precision`).
        opset: of ONNX.
    Returns:
        Blocks in the file.
    Raises:
        UsageError: there are no tokens, or dtype is none of the graph precisions.
    """
    if n_tokens < 1:
        raise UsageError(f"{n_tokens} tokens: wanted 1 or more")
    if dtype not in precision.graph_precisions():
        raise UsageError(f"dtype {dtype}: wanted one of {', '.join(precision.graph_precisions())}")
    n_blocks = blocks_in_file(plain)
    module = HalfBlocks(plain, half, n_tokens=n_tokens, n_blocks=n_blocks, single=batch == 1).eval()
    model = translate(module, (torch.zeros(batch * n_tokens, plain.width),), opset=opset).model
    model.graph.outputs[0].name = "tokens"
    graph = passes.finish(model, n_outputs=1, batch=batch, simplify=False)
    write_model(*precision.convert(*graph, dtype), path)
    return n_blocks
