"""The kernels compiled ahead of time, without a GPU: one cubin a kernel, type and chip, and PTX for chips that are still to come.

A compiled kernel is launched with its run-time parameters in order and then two 64-bit scratch pointers that Triton adds (unread here,
so null), in blocks of 32 x warps threads with `shared` bytes of dynamic shared memory. That list is Triton's affair and has moved
between releases: it is read back from the compiled PTX and compared, so that another Triton fails here and not on somebody's GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import variants
from .variants import Variant

CHIPS = (75, 80, 86, 89, 90, 100, 120, 121)
PTX_CHIP, PTX_VERSION = 80, 80  # the oldest chip with all that is used; a version that drivers of CUDA 12.0 on take
TYPES = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
# What each kernel is launched with, constants left out. "T" is the type of the tokens, "*T" a pointer to them.
PARAMETERS = {
    "unit": {"rows_ptr": "*T", "unit_ptr": "*fp32", "n_heads": "i32", "n_rows": "i32", "width": "i32", "eps": "fp32"},
    "match": {
        **{"unit_ptr": "*fp32", "a_ptr": "*i64", "b_ptr": "*i64", "value_ptr": "*fp32", "host_ptr": "*i64"},
        **dict.fromkeys(("n_rows", "width", "n_a", "n_b", "n_order", "a_first", "b_first", "shift"), "i32"),
    },
    "rank": {
        **{"value_ptr": "*fp32", "host_ptr": "*i64", "keep_ptr": "*i64", "src_ptr": "*i64", "dst_ptr": "*i64"},
        **dict.fromkeys(("n_values", "n_kept", "n_fold", "n_prefix", "a_first", "b_first", "n_b", "by_score"), "i32"),
    },
    "apply": {
        **{"x_ptr": "*T", "keep_ptr": "*i64", "src_ptr": "*i64", "dst_ptr": "*i64", "value_ptr": "*fp32"},
        **{"size_ptr": "*fp32", "out_ptr": "*T", "new_size_ptr": "*fp32", "log_size_ptr": "*fp32"},
        **dict.fromkeys(("n_rows", "width", "n_kept", "n_fold", "first_host", "fold", "with_size"), "i32"),
    },
}
ALIGNED = ("rows_ptr", "unit_ptr", "x_ptr", "out_ptr")  # 16 bytes; width is a multiple of variants.MULTIPLE


@dataclass(frozen=True)
class CompiledKernel:
    """One compiled kernel.

    Attributes:
        variant: what was compiled.
        type: of the tokens, "fp32", "fp16" or "bf16"; "" where the kernel does not see them.
        chip: compute capability, 75 to 121.
        is_ptx: text for the driver to compile, not a cubin.
        code: the cubin, or the PTX.
        symbol: name of the entry point.
        shared: bytes of dynamic shared memory.
        registers, stack: of a thread, from the cubin; stack is what registers spill to. 0 for PTX.
    """

    variant: Variant
    type: str
    chip: int
    is_ptx: bool
    code: bytes
    symbol: str
    shared: int
    registers: int
    stack: int

    @property
    def name(self) -> str:
        """Of its file, without suffix: "unit_64_fp16_sm80"."""
        kind = "ptx" if self.is_ptx else "sm"
        return "_".join(filter(None, (self.variant.name, self.type, f"{kind}{self.chip}")))


def all_variants() -> list[tuple[Variant, str]]:
    """Every kernel there is to compile, with the type of tokens it is for ("" for none)."""
    typed = [*(variants.unit_variant(w) for w in variants.WIDTHS), variants.apply_variant()]
    plain = [variants.match_variant(pairs) for pairs in (True, False)]
    plain += [variants.rank_variant(n, pairs) for n in variants.RANKED for pairs in (True, False)]
    return [(v, t) for v in typed for t in TYPES] + [(v, "") for v in plain]


def compile_kernel(variant: Variant, token_type: str = "", *, chip: int, ptx: bool = False) -> CompiledKernel:
    """Compile one kernel.

    Args:
        variant: of the table.
        token_type: "fp32", "fp16", "bf16", or "" for a kernel that sees no tokens.
        chip: compute capability, e.g. 80.
        ptx: keep the PTX, not the cubin.
    Returns:
        CompiledKernel.
    Raises:
        RuntimeError: this Triton adds other parameters than two scratch pointers; its own errors.
    """
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # 28 to 75 KB a cubin, not 170 to 430
    import triton
    from triton.backends.compiler import GPUTarget

    parameters = {k: t.replace("T", token_type) for k, t in PARAMETERS[variant.kernel].items()}
    kernel = _kernel(variant.kernel)
    names = kernel.arg_names
    signature = {name: parameters.get(name, "constexpr") for name in names}
    multiples = {n: 16 for n in ALIGNED if n in parameters} | (
        {"width": variants.MULTIPLE} if "width" in parameters else {}
    )
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in variant.constants.items()},
        attrs={(names.index(k),): [["tt.divisibility", n]] for k, n in multiples.items()},
    )
    options = {"num_warps": variant.warps, "num_stages": 2} | ({"ptx_version": PTX_VERSION} if ptx else {})
    result = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    _check_parameters(result.asm["ptx"], list(parameters.values()), variant)
    registers, stack = (0, 0) if ptx else resources(result.asm["cubin"])
    code = result.asm["ptx"].encode() + b"\0" if ptx else result.asm["cubin"]
    return CompiledKernel(
        variant,
        token_type,
        chip=chip,
        is_ptx=ptx,
        code=code,
        symbol=result.metadata.name,
        shared=result.metadata.shared,
        registers=registers,
        stack=stack,
    )


def compile_all(
    chips: tuple[int, ...] = CHIPS, *, progress: Callable[[str, float], None] = lambda what, share: None
) -> Iterator[CompiledKernel]:
    """Every kernel for every chip, and as PTX.

    Args:
        chips: compute capabilities; the PTX comes whatever they are.
        progress: called with the name of what is compiled and the share that is done.
    Yields:
        CompiledKernel.
    """
    work = [(v, t, chip, False) for chip in chips for v, t in all_variants()]
    work += [(v, t, PTX_CHIP, True) for v, t in all_variants()]
    for i, (variant, token_type, chip, ptx) in enumerate(work):
        progress(f"{variant.name} {token_type} {'PTX' if ptx else f'sm_{chip}'}", i / len(work))
        yield compile_kernel(variant, token_type, chip=chip, ptx=ptx)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as the toolkit in Triton's wheel reads them from a cubin."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return int(numbers["REG"]), int(numbers["STACK"])


def _kernel(name: str):
    from importlib import import_module

    return getattr(import_module(f".{name}", __package__), f"{name}_kernel")


def _check_parameters(ptx: str, types: list[str], variant: Variant) -> None:
    """Raises: RuntimeError unless the entry point takes these types and then two pointers."""
    sizes = {"i32": "32", "fp32": "32"}
    wanted = [*(sizes.get(t, "64") for t in types), "64", "64"]
    entry = re.search(r"\.visible \.entry \w+\((.*?)\)", ptx, re.DOTALL)
    came = re.findall(r"\.param \.[a-z](\d+)", entry[1] if entry else "")
    if came != wanted:
        import triton

        raise RuntimeError(
            f"Triton {triton.__version__} compiles {variant.name} to parameters of {came} bits, wanted {wanted}: "
            "the plugin was written for Triton 3.8"
        )
