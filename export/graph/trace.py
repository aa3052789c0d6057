"""From a PyTorch module to ONNX nodes."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import threading
import warnings

import torch

from ...kernels import ops
from .static_vit import StaticViT

TRACED = 2  # images in a trace; for any batch, `ops.reshape` keeps this number out of the graph


def trace(static: StaticViT, image: tuple[int, int, int], *, batch: int | None, opset: int):
    """The onnx_ir.Model of a static ViT; its outputs have their names, the decisions stand last.

    A batch that is to be free is traced as a number as well: tracing with a symbol takes three times as long.

    Args:
        static: in eval mode.
        image: axes of one image, as the graph takes it.
        batch: images per run, None for any number.
        opset: of ONNX.
    """
    kind = torch.float32 if static.pixels is None else torch.uint8
    example = torch.zeros(batch or TRACED, *image, dtype=kind)
    with ops.compared_one_hots() if static.boundaries else contextlib.nullcontext():
        program = translate(static, (example,), opset=opset)
    values = program.model.graph.outputs
    names = program.exported_program.call_spec.out_spec.unflatten(list(range(len(values))))
    for name, i in names.items():
        values[i].name = name
    return program.model


def translate(module: torch.nn.Module, inputs: tuple, *, opset: int = 20, dynamic=None) -> torch.onnx.ONNXProgram:
    """Trace a module made of PyTorch's operators and those of `kernels.ops`.

    Args:
        module: in eval mode.
        inputs: examples, the first of them the image.
        opset: of ONNX.
        dynamic: torch.export's dynamic_shapes.
    """
    options = {
        "dynamo": True,
        "opset_version": opset,
        "input_names": ["image"],
        "verbose": False,
        "custom_translation_table": ops.translations(),
    }
    with _signals_later(), quiet(), torch.no_grad(), _no_collection():
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
        # torch.onnx.export traces a program again to decompose its operators (torch 2.9 to 2.14: decompose_with_registry in
        # torch.onnx._internal.exporter._fx_passes, which calls run_decompositions), whether or not any needs it. All operators of a
        # plain ViT have an ONNX form, so that would only double the time. Can go when the exporter skips programs that need none.
        retrace, program.run_decompositions = program.run_decompositions, lambda table=None: program
        try:
            return torch.onnx.export(program, **options)
        except torch.onnx.OnnxExporterError:
            program.run_decompositions = retrace
            return torch.onnx.export(program, **options)


@contextlib.contextmanager
def _no_collection():
    """No garbage collection: a trace makes millions of small objects that live, and walking them takes a tenth of its time.

    Seen with CPython 3.11 and torch 2.9 to 2.14. Can go when it measures no faster (CPython 3.14's collector walks less).
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def _signals_later():
    """What interrupts or terminates the process waits until a trace ends, some seconds: an exception out of a signal's handler in the middle
    of it has ended in a segmentation fault (torch 2.14, SIGINT), which leaves unfinished files behind."""
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread alone
        yield
        return
    caught: list[int] = []
    note = lambda number, frame: caught.append(number)
    own = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not None}
    try:
        yield
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


@contextlib.contextmanager
def quiet():
    """Keep the exporter's own chatter off the terminal; what it says is about torch's internals."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w") as null,
            contextlib.redirect_stdout(null),
            contextlib.redirect_stderr(null),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
