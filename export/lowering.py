"""The reductions of the eager reference by Triton's kernels on a GPU: `reduce_model(..., lowering="triton")`.

What a kernel takes is a step whose method has a node `TokenReduce` (see `kernels/token_reduce.py`) and whose shape is within
the limits of `kernels/triton/variants.py`. Every other step stays in PyTorch's operators, and a warning says which and why.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.token_reduce import Reduction
from ..kernels.triton import variants
from . import nodes
from .errors import MissingPackageError, UsageError
from .models.plain_vit import PlainViT
from .plan import MergePlan
from .schedule import Schedule

LOWERINGS = ("eager", "triton")
TYPES = (torch.float32, torch.float16, torch.bfloat16)
COMBINE = {
    "size_mean": "size",
    "mean": "mean",
    "squeeze": "weighted",
    "sum": "sum",
}  # fold of a node -> of a merge plan


class Reduced(NamedTuple):
    """What a kernel makes of the tokens.

    Args:
        plan: the decisions as row numbers; weights are not kept (the reference computes them when it replays the plan).
        x: tokens [B, K, C].
        size: [B, K, 1] input tokens that each stands for.
    """

    plan: MergePlan
    x: Tensor
    size: Tensor


@dataclass(frozen=True)
class TritonReductions:
    """The steps of a schedule that run as kernels.

    Args:
        nodes: what each does, by block.
    """

    nodes: dict[int, Reduction]

    @classmethod
    def of(cls, plain: PlainViT, schedule: Schedule) -> TritonReductions:
        """The kernels of a model under a schedule; a warning names the steps that no kernel takes.

        Args:
            plain: the model.
            schedule: of the same model.
        Raises:
            MissingPackageError: Triton is not installed.
        """
        if find_spec("triton") is None:
            raise MissingPackageError("triton", "kernels", 'lowering="triton"')
        covered, left = {}, []
        for step in schedule.steps:
            if not nodes.has_node(schedule.method, step):
                left.append((step.block, f"{schedule.method} has no kernel for it"))
                continue
            node = nodes.reduction(schedule, step, by_score=not plain.has_class_token)
            head = plain.blocks()[step.block].qkv.out_features // 3 // plain.blocks()[step.block].heads
            problem = variants.limit(node, plain.width, head)
            if problem:
                left.append((step.block, problem))
            else:
                covered[step.block] = node
        for reason in dict.fromkeys(reason for _, reason in left):
            blocks = ", ".join(str(block) for block, r in left if r == reason)
            warnings.warn(f"the reduction of block {blocks} stays in PyTorch's operators: {reason}", stacklevel=3)
        return cls(covered)

    def reduce(self, block: int, x: Tensor, *, signal: Tensor, size: Tensor) -> Reduced:
        """One reduction.

        Args:
            block: of the step.
            x: tokens [B, N, C].
            signal: keys [B, heads, N, D] in the type of x, or scores [B, N, 1].
            size: input tokens that each stands for [B, N, 1].
        Raises:
            UsageError: the tokens are on no NVIDIA GPU, and Triton does not interpret; or they are of a type that it does not take.
        """
        if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise UsageError(
                f'lowering "triton" runs on an NVIDIA GPU, and the model is on {x.device}: move model and images there, '
                'or take lowering "eager"'
            )
        if x.dtype not in TYPES:
            raise UsageError(f'lowering "triton" takes {", ".join(map(str, TYPES))}, and the model is {x.dtype}')
        from ..kernels.triton import launch

        node = self.nodes[block]
        signal = signal.to(x.dtype) if node.select == "pairs" else signal.float()
        sizes = size.float() if node.has_size else None
        out = launch.token_reduce(replace(node, decisions=1), x, signal=signal, size=sizes, check=False)
        plan = _plan(node, out)
        return Reduced(plan, out["x"], out["size"].to(size) if node.sizes else _added(plan, size))


def _plan(node: Reduction, out: dict[str, Tensor]) -> MergePlan:
    """The decisions of a node that folds tokens, as row numbers of its output."""
    src = out["src"]
    dst = torch.full_like(src, node.n_kept) if node.fold == "sum" else out["dst"] + node.first_host
    return MergePlan(out["keep"], src, dst, COMBINE[node.fold])


def _added(plan: MergePlan, size: Tensor) -> Tensor:
    """Sizes that the node does not follow: those of folded rows added to their hosts'."""
    kept = size.gather(1, plan.keep)
    kept = torch.cat([kept, kept.new_zeros(len(kept), plan.n_extra, 1)], 1)
    return kept.scatter_add(1, plan.dst, size.gather(1, plan.src))
