"""The compiled kernels as sources of the plugin: an assembler file that holds the code, and a header with the table of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..triton import variants
from ..triton.compile import CompiledKernel


def embed(kernels: Iterable[CompiledKernel], folder: Path) -> int:
    """Write every kernel's code, `kernels.S` and `kernels.inc`.

    Args:
        kernels: from `compile_all`.
        folder: an empty one.
    Returns:
        How many kernels there are.
    """
    rows, assembler = [], ['.section .rodata, "a", %progbits']
    for i, kernel in enumerate(kernels):
        file = folder / f"{kernel.name}.{'ptx' if kernel.is_ptx else 'cubin'}"
        file.write_bytes(kernel.code)
        label = f"tokexport_kernel_{i}"
        assembler += [".balign 64", f".hidden {label}", f".global {label}", f"{label}:", f'.incbin "{file}"']
        name = "_".join(filter(None, (kernel.variant.name, kernel.type)))
        ptx = "true" if kernel.is_ptx else "false"
        rows.append(
            (
                label,
                f'{{"{name}", {kernel.chip}, {ptx}, {label}, "{kernel.symbol}", {kernel.variant.warps}, {kernel.shared}}},',
            )
        )
    assembler.append('.section .note.GNU-stack, "", %progbits\n')
    (folder / "kernels.S").write_text("\n".join(assembler))
    (folder / "kernels.inc").write_text(_header(rows))
    return len(rows)


def _header(rows: list[tuple[str, str]]) -> str:
    """Generated C++: declarations, the table, tiles and limits."""
    number = lambda name, value: f"constexpr int {name} = {value};"
    steps = lambda name, values: f"constexpr int {name}[] = {{{', '.join(map(str, values))}}};"
    lines = ["// Generated from the compiled kernels' metadata.", 'extern "C" {']
    lines += [f"extern const unsigned char {label}[];" for label, _ in rows]
    lines += ["}", "constexpr Kernel kKernels[] = {", *(f"    {row}" for _, row in rows), "};"]
    lines += [
        steps("kWidths", variants.WIDTHS),
        steps("kRanked", variants.RANKED),
        number("kMultiple", variants.MULTIPLE),
    ]
    lines += [number("kMatchA", variants.MATCH["BLOCK_A"]), number("kApplyColumns", variants.APPLY["BLOCK"])]
    lines += [number("kUnitValues", variants.UNIT_VALUES)]
    return "\n".join(lines) + "\n"
