"""The TensorRT plugin: its kernels compiled for every chip, its C++ run without a GPU, its node parsed and built by TensorRT-RTX."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokexport.kernels.token_reduce import Reduction
from tokexport.kernels.triton import variants

triton = pytest.importorskip("triton", reason="Triton is not installed (it comes with torch for Linux)")
from tokexport.kernels.plugin.embed import embed
from tokexport.kernels.triton import compile as aot

KERNELS = Path(aot.__file__).parent.parent
MOST_REGISTERS, MOST_SHARED = 128, 8192  # a block of 512 threads with 128 registers fills a multiprocessor's file


def check(kernel):
    """What a compiled kernel may use of a chip."""
    assert kernel.stack == 0, f"{kernel.name} spills {kernel.stack} bytes"
    assert 0 < kernel.registers <= MOST_REGISTERS and kernel.shared <= MOST_SHARED
    assert kernel.registers * 32 * kernel.variant.warps <= 65536, "registers of a block"
    assert 4_000 < len(kernel.code) < 60_000 and kernel.code[:4] == b"\x7fELF"


@pytest.mark.parametrize("chip", [80, 120])
@pytest.mark.parametrize("variant, kind", [(variants.unit_variant(64), "fp16"), (variants.match_variant(True), ""), (variants.rank_variant(99, True), ""), (variants.apply_variant(), "bf16")], ids=lambda v: getattr(v, "name", v))  # fmt: skip
def test_a_kernel_compiles_without_spilling(variant, kind, chip):
    check(aot.compile_kernel(variant, kind, chip=chip))


@pytest.mark.slow
@pytest.mark.parametrize("chip", aot.CHIPS)
def test_every_kernel_compiles_without_spilling(chip):
    for variant, kind in aot.all_variants():
        check(aot.compile_kernel(variant, kind, chip=chip))


def test_portable_ptx_is_of_a_version_that_older_drivers_take():
    text = aot.compile_kernel(variants.apply_variant(), "fp32", chip=aot.PTX_CHIP, ptx=True).code
    assert b".version 8.0" in text and b".target sm_80\n" in text and text.endswith(b"\0")


def test_a_triton_with_other_parameters_is_refused(monkeypatch):
    monkeypatch.setitem(aot.PARAMETERS["rank"], "by_score", "i64")
    wanted = list(aot.PARAMETERS["rank"].values())
    text = ".visible .entry f(.param .u64 .ptr p0, .param .u32 p1)"
    with pytest.raises(RuntimeError, match="written for Triton 3.8"):
        aot._check_parameters(text, wanted, variants.rank_variant(5, True))


def test_the_compiled_parameters_are_those_of_the_kernel():
    for name, parameters in aot.PARAMETERS.items():
        kernel = aot._kernel(name)
        assert [p.name for p in kernel.params if not p.is_constexpr] == list(parameters)


def headers():
    """Folders of the TensorRT and CUDA headers, or a skip that says which are missing."""
    from tokexport.engines import plugin
    from tokexport.export.errors import UsageError

    try:
        plugin._tools()
        trt = plugin._headers("NvInfer.h", "TENSORRT_INCLUDE_DIR", None, ("kernel_lens", "include/tensorrt"))
        return trt, plugin._headers(
            "cuda_runtime_api.h", "CUDA_INCLUDE_DIR", None, ("triton", "backends/nvidia/include")
        )
    except UsageError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A folder with the plugin, whose kernels' code is their name, and a libcuda.so.1 that hands launches on."""
    trt, cuda = headers()
    folder = tmp_path_factory.mktemp("fake")
    (folder / "kernels").mkdir()
    rows = [(v, t, chip, ptx) for v, t in aot.all_variants() for chip, ptx in ((80, False), (90, False), (80, True))]
    named = lambda v, t, chip, ptx: aot.CompiledKernel(v, t, chip, ptx, b"", v.name, 256, 32, 0)
    made = [named(*row) for row in rows]
    made = [aot.CompiledKernel(**{**vars(k), "code": k.name.replace("_ptx", "_smptx").encode() + b"\0"}) for k in made]
    assert embed(made, folder / "kernels") == len(rows)
    options = {
        "TENSORRT_INCLUDE_DIR": trt,
        "CUDA_INCLUDE_DIR": cuda,
        "KERNELS_DIR": folder / "kernels",
        "CMAKE_CXX_FLAGS": "-Werror",
    }
    run = lambda *command: subprocess.run(list(map(str, command)), check=True, capture_output=True)
    run("cmake", "-S", KERNELS / "plugin", "-B", folder / "build", *(f"-D{k}={v}" for k, v in options.items()))
    run("cmake", "--build", folder / "build")
    source = Path(__file__).parent / "fake_gpu.cpp"
    run("c++", "-std=c++17", "-shared", "-fPIC", "-I", trt, "-I", cuda, source, "-o", folder / "libcuda.so.1", "-ldl")
    return folder


FOLDS = ("mean", "squeeze", "sum", "drop")


def case(*counts, **options):
    """A case as data: what `make` in conftest.py is called with."""
    return counts, options


CASES = {
    "pairs": case("pairs", 50, 8, width=48, channels=264),
    "pairs, one image, by score": case("pairs", 50, 12, 0, by_score=1, one=True),
    "pairs, fp16": case("pairs", 50, 24, 2, width=72, dtype=torch.float16, batch=1),
    "pairs, bf16": case("pairs", 5, 1, width=128, dtype=torch.bfloat16),
    "pruned": case("pruned", 50, 16, batch=1),
    **{f: case("scored", f, 50, 30, 13 * (f != "drop"), batch=2 if f == "sum" else 1) for f in FOLDS},
    "squeeze, fp16": case("scored", "squeeze", 50, 35, 15, dtype=torch.float16, one=True),
}
CHIPS = {
    80: "sm80",
    86: "sm80",
    90: "sm90",
    89: "sm80",
    103: "smptx80",
    121: "smptx80",
    75: None,
}  # of kernels for 80, 90 and PTX


@pytest.fixture(scope="module")
def launched(fake, node, tmp_path_factory):
    """Of every case the inputs, and what the plugin gives for them when its launches are interpreted."""
    library = str(fake / "build" / "libtokexport_plugin.so")
    cases = {**CASES, **{chip: case("pairs", 5, 1, chip=chip, batch=1) for chip in CHIPS}}
    return node.in_process(
        "fake_gpu.py", cases, tmp_path_factory.mktemp("launched"), library, LD_LIBRARY_PATH=str(fake)
    )


@pytest.mark.parametrize("name", CASES)
def test_the_plugin_launches_what_computes_the_twin(launched, node, name):
    made, came = launched[name]
    assert not isinstance(came, str), came
    node.assert_equals_twin(made, came)
    op = Reduction(**made["op"])
    hosts = [] if op.fold in ("sum", "drop") and op.select == "score" else ["unit", "match"]
    order = [*hosts, "rank"] if op.select == "pairs" else ["rank", *hosts]
    assert [code.partition("_")[0] for code, *_ in came["launched"]] == [*order, "apply"]
    assert {threads for _, _, threads, _ in came["launched"]} == {128} and {
        shared for *_, shared in came["launched"]
    } == {256}


@pytest.mark.parametrize("chip", CHIPS)
def test_a_gpu_gets_the_kernels_that_it_can_run(launched, node, chip):
    made, came = launched[chip]
    if CHIPS[chip] is None:
        assert came == "step 8 failed"
    else:
        node.assert_equals_twin(made, came)
        assert {code.rpartition("_")[2] for code, *_ in came["launched"]} == {CHIPS[chip]}


def needed(library):
    """Names of the libraries that a library wants."""
    text = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    return {line.split("[")[1].rstrip("]\n") for line in text.splitlines() if "(NEEDED)" in line}


def test_the_plugin_is_linked_to_nothing_of_tensorrt_or_cuda(fake):
    assert not [
        n for n in needed(fake / "build" / "libtokexport_plugin.so") if "cuda" in n or "nvinfer" in n or "tensorrt" in n
    ]


BUILT = """
import sys, onnx, tensorrt_rtx as trt
from onnx import TensorProto as T, helper as h
from tokexport.kernels.token_reduce import Reduction
logger = trt.Logger(trt.Logger.ERROR)
assert trt.get_plugin_registry().load_library(sys.argv[1]) is not None
def build(op, type, batch, chips, channels=64, version="1"):
    tensor, n = h.make_tensor_value_info, op.n_in
    keys = op.select == "pairs"
    ins = [tensor("x", type, [batch, n, channels]), tensor("s", type if keys else T.FLOAT, [batch, 3, n, 32] if keys else [batch, n, 1])]
    ins += [tensor("z", T.FLOAT, [batch, n, 1])] if op.has_size else []
    kinds = {"x": type, "size": T.FLOAT, "log_size": T.FLOAT}
    outs = [tensor("o_" + o, kinds.get(o, T.INT64), None) for o in op.outputs]
    node = h.make_node("TokenReduce", [i.name for i in ins], [o.name for o in outs], domain="tokexport", name="block0.reduce",
                       plugin_namespace="tokexport", plugin_version=version, **op.attributes)
    opsets = [h.make_opsetid("", 20), h.make_opsetid("tokexport", 1)]
    model = h.make_model(h.make_graph([node], "g", ins, outs), opset_imports=opsets, ir_version=10)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        return "parse: " + parser.get_error(0).desc()
    assert [layer.type.name for layer in network] == ["PLUGIN_V3"]
    shapes = {network.get_output(i).name[2:]: tuple(network.get_output(i).shape) for i in range(network.num_outputs)}
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(chips)
    for i, chip in enumerate(chips):
        config.set_compute_capability(getattr(trt.ComputeCapability, chip), i)
    if batch == "B":
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            rest = tuple(network.get_input(i).shape)[1:]
            profile.set_shape(network.get_input(i).name, (1, *rest), (8, *rest), (32, *rest))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return "build" if engine is None else shapes
"""


def in_tensorrt(fake, code, tmp_path):
    """Run code after BUILT in a process that can open libtensorrt_rtx.so by that name, as the parser tries at a plugin node."""
    if find_spec("tensorrt_rtx") is None or find_spec("tensorrt_rtx_libs") is None:
        pytest.skip("TensorRT-RTX is not installed")
    folder = Path(find_spec("tensorrt_rtx_libs").submodule_search_locations[0])
    (tmp_path / "libtensorrt_rtx.so").symlink_to(next(folder.glob("libtensorrt_rtx.so*")))
    (tmp_path / "script.py").write_text(BUILT + code)
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(tmp_path / "script.py"),
        str(fake / "build" / "libtokexport_plugin.so"),
    ]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-1500:]
    return run.stdout, run.stderr


def test_tensorrt_parses_and_builds_the_node_for_several_chips(fake, tmp_path):
    in_tensorrt(
        fake,
        """
pairs = Reduction("pairs", "size_mean", 50, 40, 10, 1, sizes=2, decisions=1)
b = lambda batch: -1 if batch == "B" else batch
for type, batch in ((T.FLOAT, 2), (T.FLOAT16, "B"), (T.BFLOAT16, 1)):
    wanted = {"x": (b(batch), 40, 64), "size": (b(batch), 40, 1), "log_size": (b(batch), 1, 1, 40), "keep": (b(batch), 40, 1)}
    wanted |= {"src": (b(batch), 10, 1), "dst": (b(batch), 10, 1)}
    assert build(pairs, type, batch, ["SM80", "SM86", "SM89", "SM120"]) == wanted
assert build(Reduction("pairs", "size_mean", 50, 40, 10, 1), T.FLOAT16, "B", ["SM75"]) == {"x": (-1, 40, 64)}
for fold, folded, sizes in (("mean", 10, 2), ("squeeze", 10, 0), ("sum", 10, 0), ("drop", 0, 1)):
    op = Reduction("score", fold, 50, 30, folded, 1, sizes=sizes)
    came = build(op, T.FLOAT16, "B", ["SM80"])
    assert came["x"] == (-1, op.n_out, 64) and list(came) == list(op.outputs)
""",
        tmp_path,
    )


def test_tensorrt_refuses_what_the_plugin_does_not_take_in_words(fake, tmp_path):
    out, err = in_tensorrt(
        fake,
        """
op = Reduction("pairs", "size_mean", 50, 40, 10, 1)
assert build(op, T.FLOAT, 2, ["SM80"], channels=60) == "build"
assert build(op, T.FLOAT, 2, ["SM80"], version="2").startswith("parse: ")
""",
        tmp_path,
    )
    assert "multiples of 8" in out + err


@pytest.fixture
def cached(fake, tmp_path, monkeypatch):
    """The plugin where `find_library` looks for it; its path."""
    import json
    import shutil

    from tokexport.engines import plugin

    folder = tmp_path / "cache" / "tokexport" / "tensorrt-1"
    folder.mkdir(parents=True)
    shutil.copy2(fake / "build" / "libtokexport_plugin.so", folder)
    manifest = {**plugin._identity("tensorrt"), "runtime": "10.14.1", "kind": "tensorrt", "chips": [80]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder / "libtokexport_plugin.so"


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """Files of the tiny model: "dense", ToMe with calls, with and without sizes in the attention, and ToMe without calls."""
    from tokexport import export_onnx

    folder, loaded = tmp_path_factory.mktemp("files"), tiny("tiny_vit")
    schedules = {"dense": loaded.schedule("none"), "sized": loaded.schedule("tome", r=8)}
    schedules["plain"] = loaded.schedule("tome", r=8, prop_attn=False)
    schedules["bodies"] = schedules["sized"]
    for name, schedule in schedules.items():
        export_onnx(loaded, schedule, folder / f"{name}.onnx", batch=1, plugin=name in ("sized", "plain"))
    return {name: folder / f"{name}.onnx" for name in schedules}


def layers_of(path, **options):
    """Layers of the network that TensorRT-RTX parses from a file, by kind."""
    from tokexport.engines.tensorrt.build import build_engine

    result = build_engine(path, dry_run=True, builder="rtx", **options)
    return {kind: sum(types.values()) for kind, types in result.layers.items()}


@pytest.mark.parametrize("name, most", [("plain", 1.05), ("sized", 1.08)])
def test_with_the_plugin_a_network_is_hardly_larger_than_the_dense_one(cached, files, name, most):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    with_it, bodies, dense = layers_of(files[name], plugin=True), layers_of(files[name]), layers_of(files["dense"])
    assert with_it["PLUGIN_V3"] == 6 and "PLUGIN_V3" not in bodies
    assert sum(with_it.values()) <= most * sum(dense.values()) < sum(bodies.values())


def test_an_engine_with_the_plugin_says_so_beside_it(cached, files, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from tokexport.engines.tensorrt.build import build_engine
    from tokexport.engines.tensorrt.sidecar import read_sidecar
    from tokexport.export.files import sha256_of

    sizes = {}
    for embedded in (False, True):
        path = tmp_path / f"{embedded}.plan"
        options = {"precision": "fp16", "capabilities": ("80", "89"), "decisions": True, "builder": "rtx"}
        build_engine(files["sized"], path, plugin=True, embed_plugin=embedded, **options)
        engine = read_sidecar(path)
        assert (engine.plugin.sha256, engine.plugin.embedded) == (sha256_of(cached), embedded)
        assert engine.layers["PLUGIN_V3"] == {"HALF": 6} and "block0.dst" in engine.output_names
        sizes[embedded] = engine.size
    assert sizes[True] > sizes[False] + cached.stat().st_size / 2


def test_an_engine_with_the_plugin_is_refused_where_it_cannot_run(cached, files):
    from tokexport.engines.tensorrt.build import build_engine
    from tokexport.export.errors import UsageError

    refuse = lambda words: pytest.raises(UsageError, match=words)
    with refuse("embed-plugin goes with plugin"):
        build_engine(files["sized"], dry_run=True, builder="rtx", embed_plugin=True)
    with refuse("compute-capability 75: the plugin has no kernels for it"):
        build_engine(files["sized"], dry_run=True, builder="rtx", plugin=True, capabilities=("75",))
    with refuse("has no TokenReduce nodes"):
        build_engine(files["bodies"], dry_run=True, builder="rtx", plugin=True)
    cached.unlink()
    with refuse("TensorRT is not built"):
        build_engine(files["sized"], dry_run=True, builder="rtx", plugin=True)
