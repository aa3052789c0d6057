"""Runs the TensorRT plugin on the CPU: its launches go to a CUDA driver that is none, and from there to the interpreted kernels.

usage: python fake_gpu.py CASES RESULTS PLUGIN, with the folder of the fake libcuda.so.1 in LD_LIBRARY_PATH. CASES as `interpret.py`.
RESULTS: of each case its outputs by name, and "launched": (kernel, grid, threads, shared) in order.
"""

import ctypes
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from tokexport.kernels.token_reduce import Reduction
from tokexport.kernels.triton import apply, compile, match, rank, unit

KERNELS = {"unit": unit.unit_kernel, "match": match.match_kernel, "rank": rank.rank_kernel, "apply": apply.apply_kernel}
NV_TYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 7, torch.int64: 8}  # nvinfer1::DataType
TORCH = {"*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16, "*i64": torch.int64}
LAUNCH = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_int),
    ctypes.c_int,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p),
)


class Tensor(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("rank", ctypes.c_int), ("shape", ctypes.c_long * 4), ("data", ctypes.c_void_p)]

    @classmethod
    def of(cls, t):
        return cls(NV_TYPE[t.dtype], t.ndim, (ctypes.c_long * 4)(*t.shape), t.data_ptr())


def memory(address, dtype, blocks):
    """The rest of the block that an address lies in; any one value for null."""
    if not address:
        return torch.zeros(1, dtype=dtype)
    start, size = next((b.data_ptr(), b.nbytes) for b in blocks if b.data_ptr() <= address < b.data_ptr() + b.nbytes)
    buffer = (ctypes.c_char * (start + size - address)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype, count=(start + size - address) // dtype.itemsize)


def launcher(blocks, launched):
    """The function that the fake driver calls: the kernel, interpreted on the same memory."""
    table = {"_".join(filter(None, (v.name, t))): (v, t) for v, t in compile.all_variants()}

    def launch(code, symbol, grid, threads, shared, parameters):
        variant, token_type = table[code.decode().rpartition("_sm")[0]]
        arguments = []
        for i, kind in enumerate(compile.PARAMETERS[variant.kernel].values()):
            kind = kind.replace("T", token_type)
            as_type = ctypes.c_void_p if kind.startswith("*") else ctypes.c_int if kind == "i32" else ctypes.c_float
            value = ctypes.cast(parameters[i], ctypes.POINTER(as_type))[0]
            arguments.append(memory(value, TORCH[kind], blocks) if kind.startswith("*") else value)
        launched.append((code.decode(), tuple(grid[:3]), threads, shared))
        KERNELS[variant.kernel][tuple(grid[:3])](*arguments, **variant.constants)

    return LAUNCH(launch)


def run(case, plugin, driver):
    """One case: outputs by name and what was launched."""
    op, x = Reduction(**case["op"]), case["x"].contiguous()
    batch = [x.shape[0]] if x.ndim == 3 else []
    shapes = {
        "x": [*batch, op.n_out, x.shape[-1]],
        "size": [*batch, op.n_out, 1],
        "log_size": [*(batch or [1]), 1, 1, op.n_out],
    }
    shapes |= {"keep": [*batch, op.n_kept, 1], "src": [*batch, op.n_folded, 1], "dst": [*batch, op.n_folded, 1]}
    types = {"x": x.dtype, "size": torch.float32, "log_size": torch.float32}
    outputs = {name: torch.empty(shapes[name], dtype=types.get(name, torch.int64)) for name in op.outputs}
    inputs = [t.contiguous() for t in (x, case["signal"], case["size"]) if t is not None]
    workspace = torch.zeros(1 << 22, dtype=torch.uint8)
    launched, counts = [], {k: v for k, v in op.attributes.items() if isinstance(v, int)}
    callback = launcher([*inputs, *outputs.values(), workspace], launched)
    array = lambda kind, values: (kind * len(values))(*values)
    failed = driver.run_node(
        plugin.encode(), case.get("chip", 80), array(ctypes.c_char_p, [op.select.encode(), op.fold.encode()]),
        array(ctypes.c_char_p, [k.encode() for k in counts]), array(ctypes.c_long, list(counts.values())), len(counts),
        ctypes.c_float(op.eps), array(Tensor, [Tensor.of(t) for t in inputs]), len(inputs),
        array(Tensor, [Tensor.of(t) for t in outputs.values()]), len(outputs),
        array(ctypes.c_long, [workspace.nbytes, workspace.data_ptr()]), callback,
    )  # fmt: skip
    return f"step {failed} failed" if failed else {**outputs, "launched": launched}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save([run(case, sys.argv[3], ctypes.CDLL("libcuda.so.1")) for case in torch.load(sys.argv[1])], sys.argv[2])
