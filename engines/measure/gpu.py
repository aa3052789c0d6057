"""What the Triton kernels are worth in PyTorch on an NVIDIA GPU; `make bench-gpu` writes it into docs/benchmarks.md.

Two tables, all rows of one interleaved, timed by the device's own events (`stopwatch` on a CPU, which only the tests use):
one reduction (kernel, eager reference, the reference compiled, a copy of as many bytes as the kernel moves), and whole models (dense
with fused attention, the eager reference, the kernels) by batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ...export import nodes, reducers
from ...export.apply import apply_eager
from ...export.errors import UsageError
from ...export.files import aside
from ...export.models.load import load_model
from ...export.plan import Signals
from ...export.reference import reduce_model
from ...export.schedule import Schedule
from ...export.step import ModelSize
from ...kernels.token_reduce import Reduction
from .timing import Timer, interleaved

MARKS = ("<!-- bench-gpu: from here -->", "<!-- bench-gpu: to here -->")
MODELS = {"deit_small_patch16_224": 13, "vit_base_patch16_224": 13, "vit_large_patch16_224": 8}  # with ToMe's r
BATCHES = (1, 8, 64, 256)
LOWERED = {"eager": "eager", "kernels": "triton"}  # field of ModelTimes -> lowering
ROUNDS = 50


@dataclass(frozen=True)
class ModelTimes:
    """Median seconds of one model and batch.

    Args:
        model: timm's name.
        batch: images.
        dense, eager, kernels: seconds of the dense model, of the reduced one by PyTorch's operators, and by the kernels.
    """

    model: str
    batch: int
    dense: float
    eager: float
    kernels: float


def device_timer(run: Callable[[], object], device: torch.device) -> Timer:
    """Seconds of one run on a device, by its own events; on a CPU by the host's clock.

    Args:
        run: what is timed.
        device: where it runs.
    """
    if device.type != "cuda":
        from time import perf_counter

        def on_host() -> float:
            start = perf_counter()
            run()
            return perf_counter() - start

        return on_host

    def on_device() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return on_device


def bytes_moved(op: Reduction, batch: int, *, width: int, heads: int, head: int, itemsize: int) -> int:
    """Bytes that one reduction by pairs has to read and write at least: keys and tokens once, the new tokens, sizes and decisions.

    Args:
        op: the node.
        batch: images.
        width: channels of a token.
        heads, head: of the keys.
        itemsize: bytes of a number of tokens and keys.
    """
    numbers = op.n_in * (heads * head + width) + op.n_out * width
    return batch * (itemsize * numbers + 4 * (op.n_in + 2 * op.n_out) + 8 * (op.n_kept + 2 * op.n_folded))


def reduction_times(
    device: torch.device,
    *,
    batch: int = 64,
    n: int = 197,
    heads: int = 12,
    head: int = 64,
    r: int = 13,
    rounds: int = ROUNDS,
) -> dict[str, float]:
    """Median seconds of match and merge of ToMe, in half precision on a GPU.

    Args:
        device: where.
        batch: images.
        n: tokens of an image, one class token among them.
        heads, head: of the keys; a token has heads x head channels.
        r: pairs that merge.
        rounds: that are counted.
    Returns:
        "kernel", "eager", "compiled" and "copy".
    """

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    schedule = Schedule.parse("tome", **ModelSize(n, 1, 1)._asdict(), r=r)
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)
    x, keys = random(batch, n, heads * head), random(batch, heads, n, head)
    runs = _ways(schedule, x, keys, torch.ones(batch, n, 1, device=device))
    times = interleaved({name: device_timer(run, device) for name, run in runs.items()}, rounds)
    return {name: median(seconds) for name, seconds in times.items()}


def _ways(schedule: Schedule, x: Tensor, keys: Tensor, size: Tensor) -> dict[str, Callable[[], object]]:
    """One reduction as kernel, eager, compiled, and a copy of as many bytes."""
    from ...kernels.triton import launch

    step = schedule.steps[0]
    op = nodes.reduction(schedule, step, by_score=False)

    def eager(x, keys, size):
        metric = keys.mean(1)
        metric = metric / metric.norm(dim=-1, keepdim=True)
        plan = reducers.get("tome").reference(Signals(x, 1, True, size, metric=metric), step, None)
        return apply_eager(plan, x, size.to(x.dtype))

    compiled = torch.compile(eager)
    (batch, heads, _, head), itemsize = keys.shape, x.element_size()
    total = bytes_moved(op, batch, width=x.shape[-1], heads=heads, head=head, itemsize=itemsize)
    source = torch.empty(total // 2, dtype=torch.uint8, device=x.device)  # a copy reads and writes
    target = torch.empty_like(source)
    return {
        "kernel": lambda: launch.token_reduce(op, x, signal=keys, size=size, check=False),
        "eager": lambda: eager(x, keys, size),
        "compiled": lambda: compiled(x, keys, size),
        "copy": lambda: target.copy_(source),
    }


@torch.no_grad()
def model_times(
    device: torch.device,
    name: str,
    r: int,
    *,
    batches: tuple[int, ...] = BATCHES,
    kwargs: dict | None = None,
    rounds: int = ROUNDS,
) -> list[ModelTimes]:
    """Median seconds of a model, dense and with ToMe, by batch; in half precision on a GPU.

    Args:
        device: where.
        name: of timm's model.
        r: of ToMe.
        batches: images at a time.
        kwargs: of the model, see `load_model`.
        rounds: that are counted.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    loaded = load_model(name, kwargs)
    module, schedule = loaded.module.to(device, dtype).eval(), loaded.schedule("tome", r=r)
    models = {"dense": module} | {k: reduce_model(module, schedule, lowering=v) for k, v in LOWERED.items()}
    rows = []
    for batch in batches:
        image = torch.randn(batch, 3, *module.patch_embed.img_size, device=device, dtype=dtype)
        timers = {k: device_timer(lambda model=model, image=image: model(image), device) for k, model in models.items()}
        times = interleaved(timers, rounds)
        rows.append(ModelTimes(name, batch, **{k: median(seconds) for k, seconds in times.items()}))
    return rows


def break_even(rows: list[ModelTimes]) -> int | None:
    """The smallest batch at which the kernels beat the dense model; None when at none."""
    return next((row.batch for row in sorted(rows, key=lambda row: row.batch) if row.kernels < row.dense), None)


def page(gpu: str, reduction: dict[str, float], models: dict[str, list[ModelTimes]]) -> str:
    """The tables in Markdown.

    Args:
        gpu: its name, with versions.
        reduction: of `reduction_times`.
        models: rows of `model_times` by model.
    """
    kernel = reduction["kernel"]
    lines = [f"{gpu}; medians of {ROUNDS} interleaved rounds, `make bench-gpu`.", ""]
    lines += ["| match and merge, ToMe r=13, 64 x 197 x 768, fp16 | ms | kernel's share |", "|---|---|---|"]
    lines += [f"| {name} | {s * 1e3:.3f} | {kernel / s:.2f} |" for name, s in reduction.items()]
    lines += [
        "",
        "| fp16, dense with fused attention | batch | dense, ms | eager | kernels | speedup |",
        "|---|---|---|---|---|---|",
    ]
    for rows in models.values():
        for row in rows:
            times = f"{row.dense * 1e3:.2f} | {row.eager * 1e3:.2f} | {row.kernels * 1e3:.2f}"
            lines.append(f"| {row.model} | {row.batch} | {times} | {row.dense / row.kernels:.2f} |")
    even = {name: break_even(rows) for name, rows in models.items()}
    words = ", ".join(f"{name} {'at no batch' if b is None else f'from batch {b}'}" for name, b in even.items())
    return "\n".join([*lines, "", f"Faster than dense: {words}.", ""])


def write_page(text: str, path: Path) -> None:
    """Put the tables between the marks of a page.

    Args:
        text: of `page`.
        path: the page.
    Raises:
        UsageError: it has no marks.
    """
    before, start, rest = path.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (start and end):
        raise UsageError(f"{path} has no lines {' and '.join(MARKS)} between which the table could go")
    with aside(path) as temporary:
        temporary.write_text(f"{before}{start}\n{text}{end}{after}")


def main() -> None:
    """Measure and write; the page is the only argument."""
    if not torch.cuda.is_available():
        sys.exit("Error: there is no NVIDIA GPU that PyTorch can use: nothing was measured")
    device = torch.device("cuda")
    models = {name: model_times(device, name, r) for name, r in MODELS.items()}
    import triton

    gpu = f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {triton.__version__}"
    write_page(page(gpu, reduction_times(device), models), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
