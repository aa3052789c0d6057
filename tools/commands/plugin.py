"""`tokexport plugin`."""

from __future__ import annotations

import click

from ...export.errors import UsageError


@click.group("plugin")
def command():
    """Native libraries that run each reduction as one node: for TensorRT, ONNX Runtime and OpenVINO. Built here, kept in the cache."""


@command.command("build")
@click.option(
    "--arch",
    metavar="86,89",
    help="GPUs with kernels of their own.  [default: all that are known; newer ones run the PTX]",
)
@click.option(
    "--tensorrt-include", metavar="DIR", help="Folder of NvInfer.h.  [default: $TENSORRT_INCLUDE_DIR, the usual places]"
)
@click.option("--cpu", is_flag=True, help="For ONNX Runtime and OpenVINO on the CPU instead, whichever are installed.")
@click.option("--runtime", metavar="ort,openvino", help="With --cpu: only these.")
@click.option(
    "--onnxruntime-include",
    metavar="DIR",
    help="With --cpu: folder of onnxruntime_cxx_api.h.  [default: $ONNXRUNTIME_INCLUDE_DIR, the usual places]",
)
@click.option("--march", metavar="NAME", help="With --cpu: processors, as GCC's -march.  [default: x86-64-v3]")
@click.option("--force", is_flag=True, help="Build again what is there.")
@click.option("--json", "as_json", is_flag=True, help="What was built as JSON on stdout.")
def build(arch, tensorrt_include, cpu, runtime, onnxruntime_include, march, force, as_json):
    """Build the TensorRT plugin, or with --cpu the libraries for the CPU; needs a C++ compiler and CMake, no GPU.

    tokexport plugin build --arch 86,89
    """
    from ...engines import plugin
    from ..show.terminal import bar, console

    out = console()
    if cpu:
        if arch or tensorrt_include:
            raise UsageError(f"{'--arch' if arch else '--tensorrt-include'} is of the TensorRT plugin: leave out --cpu")
        options = {"march": march, "force": force}
        built = []
        for kind in _kinds(runtime):
            headers = {"onnxruntime_include": onnxruntime_include} if kind == "ort" else {}
            built.append(plugin.build_cpu(kind, **headers, **options))
    else:
        if runtime or onnxruntime_include or march:
            raise UsageError("--runtime, --onnxruntime-include and --march go with --cpu")
        with bar(out) as progress:
            built = [
                plugin.build_plugin(_chips(arch), tensorrt_include=tensorrt_include, force=force, progress=progress)
            ]
    _tell(out, built, as_json)


@command.command("path")
@click.option("--cpu", is_flag=True, help="Those for ONNX Runtime and OpenVINO.")
@click.option("--json", "as_json", is_flag=True, help="As JSON on stdout, with what they were built for.")
def path(cpu, as_json):
    """Where the libraries are that fit what is installed here; exit code 2 when there are none."""
    from ...engines import plugin
    from ..show.terminal import print_json

    kinds = plugin.CPU_KINDS if cpu else ("tensorrt",)
    found = [library for library in map(plugin.find_library, kinds) if library]
    if not found:
        plugin.find_library(kinds[0], needed=True)
    if as_json:
        print_json([_data(library) for library in found])
    else:
        for library in found:
            click.echo(library.path)


def _kinds(text: str | None) -> list[str]:
    """The runtimes that are named, or all that are installed."""
    from importlib.util import find_spec

    from ...engines.plugin import CPU_KINDS

    if text is not None:
        return [kind.strip() for kind in text.split(",")]
    there = [kind for kind, package in zip(CPU_KINDS, ("onnxruntime", "openvino")) if find_spec(package)]
    if not there:
        raise UsageError("neither ONNX Runtime nor OpenVINO is installed: pip install 'tokexport[cpu]'")
    return there


def _chips(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    plain = [c.strip().lower().removeprefix("sm_").removeprefix("sm").replace(".", "") for c in text.split(",")]
    if not all(c.isascii() and c.isdigit() and len(c) < 4 for c in plain):
        raise UsageError(f"--arch {text!r}: wanted compute capabilities, e.g. 86,89")
    return tuple(map(int, plain))


def _data(library) -> dict:
    from dataclasses import asdict

    return {**asdict(library), "path": str(library.path)}


def _tell(out, built: list, as_json: bool) -> None:
    from ...engines.plugin import KINDS
    from ..show.terminal import print_json, size_words

    if as_json:
        print_json([_data(library) for library in built])
        return
    for library in built:
        chips = f", sm_{', sm_'.join(map(str, library.chips))} and PTX" if library.chips else ""
        out.print(str(library.path), style="bold", end="", markup=False, soft_wrap=True)
        size = size_words(library.path.stat().st_size)
        out.print(
            f"  for {KINDS[library.kind]} {library.runtime}, {library.processor}{chips}, {size}",
            markup=False,
            soft_wrap=True,
        )
