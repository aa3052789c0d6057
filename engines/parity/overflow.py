"""Does a model stay within fp16? Judged by the reference's own values: a runtime that computes an fp16 file in float32 hides an overflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...export import precisions
from ...export.provenance import Provenance
from .report import StageParity

FP16_LIMIT = 65504.0


def has_fp16_trunk(provenance: Provenance) -> bool:
    """Whether the trunk's tensors are in fp16; of int8 files for CPUs they are not."""
    row = precisions.get(provenance.precision)
    return row.onnx_type == "FLOAT16" and not (row.product_type == "INT8" and provenance.target == "cpu")


@contextmanager
def watch_range(reference, largest: dict[str, float]) -> Iterator[None]:
    """Note the largest values that the reference computes in the trunk's stages while the context lasts.

    LayerScale is counted in, as it is folded into the layers of a file. The logits of attention are not looked at.

    Args:
        reference: the eager model.
        largest: stage -> absolute value; what is larger replaces what is there. Stages are in the order they are computed.
    """

    def note(stage: str, values, factor=None) -> None:
        value = float((values if factor is None else values * factor).abs().amax())
        largest[stage] = max(largest.get(stage, 0.0), value if value == value else float("inf"))

    hooks = []
    read = lambda layer, stage: hooks.append(layer.register_forward_pre_hook(lambda m, x: note(stage, x[0])))
    written = lambda layer, stage, factor=None: hooks.append(
        layer.register_forward_hook(lambda m, x, y: note(stage, y, factor))
    )
    before = "embed"
    for i, block in enumerate(reference.plain.blocks()):
        attention, mlp = f"block{i}.attn", f"block{i}.mlp"
        read(block.norm1, before)
        written(block.qkv, attention)
        written(block.proj, attention, block.gamma1)
        read(block.norm2, attention)
        last = block.mlp.get_submodule(block.mlp_last)
        for layer in block.mlp.modules():
            if not list(layer.children()) and layer is not last:
                written(layer, mlp)
        written(last, mlp, block.gamma2)
        before = mlp
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def overflow_words(largest: dict[str, float]) -> str | None:
    """The first stage that leaves fp16, in words; None when none does.

    Args:
        largest: from `watch_range`.
    """
    for stage, value in largest.items():
        if value > FP16_LIMIT:
            part = StageParity(stage, value, FP16_LIMIT).words.replace(",", "")
            return f"overflow, {part}: values up to {value:.3g}, fp16 holds {FP16_LIMIT:.0f}: use bf16"
    return None
