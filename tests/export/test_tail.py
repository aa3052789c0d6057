"""The class tail: what the last block leaves out changes no class-token output, and whoever asks for what it left out is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from tokexport.engines.bundle.describe import decision_entries
from tokexport.engines.measure import bound, candidates
from tokexport.engines.measure.latency_model import LatencyCurves, LatencyModel, token_counts
from tokexport.engines.parity.verify import verify
from tokexport.export import macs
from tokexport.export.errors import GraphError
from tokexport.export.graph import calls, stages
from tokexport.export.graph.precision import write_as
from tokexport.export.graph.static_block import StaticTail
from tokexport.export.graph.static_vit import StaticViT
from tokexport.export.inspection import inspect
from tokexport.export.models import as_plain
from tokexport.export.models.learned_layers import learned_layers
from tokexport.export.outputs import POOLED, Emission
from tokexport.export.provenance import Provenance
from tokexport.export.schedule import Schedule
from tokexport.export.tail import choose_tail, in_file
from tokexport.tools.cli import group

from tokexport import UsageError, export_onnx, load_model, reduce_model

from ..cases import mostly_slow
from ..engines.test_curves import KEY, stairs

LAST = 5  # block of the tiny models
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
FAMILIES = {
    "q/k norms and LayerScale": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.5}),
    "rotary": ("eva02_tiny_patch14_224", {"global_pool": "token"}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"global_pool": "token"}),
    "rotary, registers": ("vit_small_patch16_dinov3", {"global_pool": "token"}),
}


@pytest.fixture(scope="module")
def tailed(tiny, schedule_of, shared):
    """tailed(kind, method, batch, tail, plugin, ...) -> path of a tiny model's file with the pooled output alone, made once."""

    def export(kind="tiny_vit", method="tome", batch=None, tail="class", plugin=False, **options):
        loaded = tiny(kind)
        schedule = schedule_of(loaded.module, method=method, **options)
        write = lambda path: export_onnx(loaded, schedule, path, batch=batch, tail=tail, plugin=plugin)
        return shared(["tail", kind, schedule.to_json(), batch, tail, plugin], write)

    return export


def reference(loaded, schedule, images):
    """The whole model's output, the last block's reduction and all tokens included."""
    return reduce_model(loaded.module, schedule, learned_layers(loaded, schedule))(images)


def stages_of(path) -> set[str]:
    return {stages.of_node(node.name) for node in onnx.load(path, load_external_data=False).graph.node}


def check(path, kind, tiny, golden, run_onnx, relative):
    """The file gives the reference's output, computes less than the papers count, and reduces nothing behind the last attention."""
    inspection = inspect(path)
    p, loaded = inspection.provenance, tiny(kind)
    assert p.tail == "class" and p.needs == ("class_tail",) and Provenance.from_json(p.to_json()) == p
    wanted = reference(loaded, p.schedule, golden.image)
    assert relative(run_onnx(path, golden.image)["logits"], wanted) <= 1e-5
    assert inspection.macs == macs.count(p.dims, p.schedule) > inspection.macs_executed == p.macs_executed
    behind = {f"block{LAST}.match", f"block{LAST}.merge"}
    assert (LAST, "pre_block") in p.schedule.by_site or not behind & stages_of(path)
    assert not any((s.block, s.site) == (LAST, "post_attn") for s in p.file_schedule.steps)


@pytest.mark.fast_methods("none", "tome", "evit", "diffrate")
@pytest.mark.parametrize("batch", mostly_slow([None, 1], None))
def test_every_method_gives_the_same_with_less(options, batch, tailed, tiny, golden, run_onnx, relative):
    check(tailed(batch=batch, **options), "tiny_vit", tiny, golden, run_onnx, relative)


@pytest.mark.parametrize("batch", mostly_slow([None, 1, 3], 1))
@pytest.mark.parametrize("asked", [{"method": "none"}, {"method": "tome", "r": 8}], ids=["none", "tome"])
def test_a_distilled_model_keeps_both_of_its_tokens(asked, batch, tailed, tiny, golden, run_onnx, relative):
    check(tailed("tiny_vit_distilled", batch=batch, **asked), "tiny_vit_distilled", tiny, golden, run_onnx, relative)


@pytest.mark.parametrize("batch", mostly_slow([None, 1], 1))
def test_a_reduction_in_front_of_the_last_block_stays(batch, tailed, tiny, golden, run_onnx, relative):
    path = tailed(method="dynamicvit", at=(1, 3, LAST), batch=batch)
    check(path, "tiny_vit", tiny, golden, run_onnx, relative)
    p = inspect(path).provenance
    assert p.file_schedule == p.schedule and p.step_left_out is None and f"block{LAST}.match" in stages_of(path)
    assert any(name.startswith(f"block{LAST}.") for name in p.decisions) and verify(path).passed


@pytest.mark.parametrize("method", ["none", "tome"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_block_has_it(family, method, relative):
    name, kwargs = FAMILIES[family]
    loaded = load_model(name, {**SMALL, **kwargs}, seed=4)
    schedule = loaded.schedule(method, **({"r": 3} if method == "tome" else {}))
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    wanted = reduce_model(loaded.module, schedule)(image)
    for batch in (1, 2, None):
        static = StaticViT(loaded.module, schedule, batch, tail="class")
        with torch.no_grad():
            parts = [static(part)["logits"] for part in image.split(1 if batch == 1 else 2)]
        assert relative(torch.cat(parts), wanted) <= 1e-5, batch


def products(path) -> int:
    """Multiply-accumulates of the products and the patch embedding in a file for one image, from its shapes."""
    model = onnx.load(path)
    shapes = {i.name: list(i.dims) for i in model.graph.initializer}
    for v in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        shapes[v.name] = [d.dim_value for d in v.type.tensor_type.shape.dim]
    total = 0
    for node in model.graph.node:
        if node.op_type in ("Gemm", "MatMul") and stages.of_node(node.name).rpartition(".")[2] in (
            "attn",
            "mlp",
            "head",
        ):
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            total += int(np.prod(shapes[node.output[0]])) * shapes[node.input[0]][-2 if transposed else -1]
        elif node.op_type == "Conv":
            total += int(np.prod(shapes[node.output[0]])) * int(np.prod(shapes[node.input[1]][1:]))
    return total


@pytest.mark.parametrize("tail", ["class", "full"])
@pytest.mark.parametrize("kind", mostly_slow(["tiny_vit", "tiny_vit_distilled"], "tiny_vit_distilled"))
@pytest.mark.parametrize("asked", [{"method": "none"}, {"method": "tome", "r": 8}], ids=["none", "tome"])
def test_what_is_said_to_be_executed_is_in_the_graph(asked, kind, tail, tailed):
    path = tailed(kind, batch=1, tail=tail, **asked)
    assert products(path) == inspect(path).macs_executed


def test_deit_s_by_hand():
    dims = {"width": 384, "attn_width": 384, "mlp": [(384, 1536), (1536, 384)], "classes": 1000, "heads": 1}
    dims |= {"patches": 196, "patch_values": 768, "pool": "token"}
    dense = Schedule("none", 197, 1, 12)
    left_out = 196 * (2 * 384 * 384 + 2 * 197 * 384 + 2 * 384 * 1536)
    assert macs.count(dims, dense) - macs.executed(dims, dense, "class") == left_out
    assert left_out / macs.count(dims, dense) == pytest.approx(0.07, abs=0.002)
    assert macs.executed(dims, dense, "full") == macs.count(dims, dense)


def test_one_key_too_few_is_caught(tiny, schedule_of, tmp_path, monkeypatch):
    forward = StaticTail.forward

    def cut(self, x, n, bias, signal, rope=None):
        rows = x[:-1] if self.single else x.reshape(-1, n, x.shape[-1])[:, :-1].flatten(0, 1)
        return forward(self, rows, n - 1, bias if bias is None else bias[..., :-1], signal, rope)

    monkeypatch.setattr(StaticTail, "forward", cut)
    loaded = tiny("tiny_vit")
    for schedule in (schedule_of(loaded.module), schedule_of(loaded.module, 8)):
        with pytest.raises(GraphError, match="tokens in the attention of each block are"):
            export_onnx(loaded, schedule, tmp_path / "v.onnx", batch=1, tail="class")
    assert not list(tmp_path.iterdir())


def test_another_row_than_the_class_tokens_is_caught(tailed, tmp_path):
    path = tailed(batch=1, method="tome", r=8)
    model = onnx.load(path)
    gathers = [n for n in model.graph.node if n.op_type == "Gather" and stages.of_node(n.name) == f"block{LAST}.attn"]
    rows = {i.name: i for i in model.graph.initializer if i.name in {n.input[1] for n in gathers}}
    assert len(gathers) == 2 and all(numpy_helper.to_array(i).tolist() == [0] for i in rows.values())
    for initializer in rows.values():
        initializer.CopyFrom(numpy_helper.from_array(np.array([1], np.int32), initializer.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    report = verify(tmp_path / "wrong.onnx", bisect=True)
    assert not report.passed and report.departs.startswith(f"block {LAST}, attention is the first stage that departs")


@pytest.mark.parametrize("dtype", mostly_slow(["fp32", "fp16"], "fp32"))
@pytest.mark.parametrize("asked", [{"method": "none"}, {"method": "tome", "r": 8}, {"method": "evit", "at": (1, 3, 5)}],
                         ids=lambda asked: asked["method"])  # fmt: skip
def test_verify_passes_and_says_what_is_not_in_the_file(asked, dtype, tailed, tmp_path):
    path = tailed(**asked)
    if dtype != "fp32":
        path = tmp_path / "typed.onnx"
        write_as(tailed(**asked), path, dtype)
    report = verify(path, bisect=True)
    assert report.passed, report.summary()
    said = [note for note in report.notes if "is not in the file" in note]
    assert len(said) == (asked["method"] != "none") and all(note.startswith(f"block {LAST}: ") for note in said)
    assert (
        LAST not in {b.block for b in report.by_block}
        and len(report.by_block) == {"none": 0, "tome": 5, "evit": 2}[asked["method"]]
    )
    named = {s.stage for s in report.stages}
    assert {f"block{LAST}.attn", f"block{LAST}.mlp", "head"} <= named and f"block{LAST}.merge" not in named


def test_the_page_of_a_report_says_it_too(tailed):
    from tokexport.tools.show.html import page

    path = tailed(method="tome", r=8)
    assert page(verify(path), inspect(path).provenance).count("not in the file") == 2  # the note, and the block's row


def test_a_file_of_either_tail_is_compared_with_the_other(tailed, exported):
    short, whole = tailed(method="tome", r=8), exported("tiny_vit")
    for one, other in ((short, whole), (whole, short)):
        report = verify(one, against=other)
        assert report.passed and report.decisions == 1.0 and len(report.by_block) == 5
        assert any(note.startswith(f"block {LAST}: ") for note in report.notes)
        with pytest.raises(UsageError, match="so the last block's stages are not the same: bisect each by itself"):
            verify(one, against=other, bisect=True)


REFUSED = {
    "sources": ("tiny_vit", {"sources": True}, "emit asks for sources"),
    "tokens and patches": ("tiny_vit", {"emit": "pooled,tokens,patches"}, "emit asks for tokens, patches"),
    "an average": ("tiny_vit_nocls", {}, "this model's pooled output reads them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_reads_the_other_tokens_forces_full(case, tiny, tmp_path):
    kind, asked, words = REFUSED[case]
    loaded = tiny(kind)
    with pytest.raises(UsageError, match=f"^tail class leaves the last block's other tokens out, and {words}"):
        export_onnx(loaded, loaded.schedule("none"), tmp_path / "v.onnx", tail="class", **asked)
    with pytest.raises(UsageError, match="^tail 'half': wanted full or class"):
        export_onnx(loaded, loaded.schedule("none"), tmp_path / "v.onnx", tail="half")
    assert not list(tmp_path.iterdir())
    assert export_onnx(loaded, loaded.schedule("none"), tmp_path / "v.onnx", **asked).provenance.tail == "full"


def test_the_pooling_decides():
    choose = lambda tail, rows, emission=POOLED: choose_tail(tail, emission, rows=rows, n_prefix=2)
    assert choose("class", (0,)) == choose("class", (0, 1)) == "class" and choose("full", (0,)) == "full"
    assert choose(None, (2,)) == choose(None, ()) == choose(None, (0,), Emission(("pooled", "sources"))) == "full"
    for rows in ((), (0, 2)):
        with pytest.raises(UsageError, match="by their average or by attention"):
            choose("class", rows)


def test_a_provenance_that_contradicts_itself_is_refused(tailed):
    p = inspect(tailed(method="tome", r=8)).provenance
    with pytest.raises(UsageError, match="tail class with outputs logits, sources: wanted the pooled one alone"):
        replace(p, emission=Emission(("pooled", "sources")), outputs=("logits", "sources"))
    with pytest.raises(UsageError, match="tail: wanted one of full, class"):
        Provenance.from_json(json.dumps({**json.loads(p.to_json()), "tail": "half"}))


def test_a_file_whose_tail_is_not_what_it_says_is_refused(tailed, tmp_path):
    for path, tail in ((tailed(method="tome", r=8), "full"), (tailed(method="tome", r=8, tail="full"), "class")):
        model = onnx.load(path)
        entry = model.metadata_props[0]
        entry.value = json.dumps({**json.loads(entry.value), "tail": tail, "needs": ["class_tail"] * (tail == "class")})
        onnx.save(model, tmp_path / "v.onnx")
        with pytest.raises(UsageError, match="the graph is not the one its provenance speaks of"):
            inspect(tmp_path / "v.onnx")


@pytest.mark.parametrize("batch", mostly_slow([None, 1], None))
def test_a_node_per_reduction_but_the_last(batch, tailed, golden, run_onnx, tmp_path):
    path = tailed(method="tome", r=8, batch=batch, plugin=True)
    n_calls, _ = calls.inline_file(path, tmp_path / "flat.onnx")
    assert n_calls == 5 and inspect(path).provenance == inspect(tmp_path / "flat.onnx").provenance
    logits = [run_onnx(p, golden.image)["logits"] for p in (path, tmp_path / "flat.onnx")]
    np.testing.assert_array_equal(*logits)
    assert verify(path).passed


@pytest.mark.parametrize("batch", mostly_slow([None, 1], 1))
def test_both_sides_of_a_benchmark_have_the_same_tail(batch, tailed, tmp_path):
    files = [inspect(tailed(method="tome", r=8, batch=batch, tail=tail)) for tail in ("class", "full")]
    rows = candidates.collect(files, tmp_path, bound=True)
    by_path = {c.path: c.inspection.provenance.tail for c in rows}
    assert len(rows) == 4 and all(by_path[c.path] == by_path[c.dense] for c in rows)
    assert ["class tail" in c.label for c in rows if c.is_dense] == [True, False]
    for c in (c for c in rows if not c.is_dense):
        graph, n = (
            onnx.shape_inference.infer_shapes(onnx.load(c.bound)).graph,
            c.inspection.provenance.schedule.tokens_per_block()[LAST][0],
        )
        last = [node for node in graph.node if node.op_type == "Softmax"][-1].output[0]
        shape = next(v for v in graph.value_info if v.name == last).type.tensor_type.shape.dim
        assert [d.dim_value for d in shape][-2:] == [1 if by_path[c.path] == "class" else n, n]
    dense = inspect(tailed(method="none", batch=batch, tail="full"))
    with pytest.raises(UsageError, match="has tail full, .* has class: .* wanted a dense one exported with tail class"):
        candidates.check_comparable([files[0]], dense, sweep=None, bound=False)


def test_a_file_that_reduces_nothing_but_behind_the_last_attention_has_no_bound(tailed, tmp_path):
    path = tailed(method="tome", r=[0, 0, 0, 0, 0, 8])
    assert inspect(path).provenance.decisions == () and verify(path).passed
    with pytest.raises(UsageError, match="is dense: it has no bound"):
        bound.write_bound(inspect(path), tmp_path / "b.onnx")
    assert [c.bound for c in candidates.collect([inspect(path)], tmp_path, bound=True)] == [None, None]


def test_a_bundle_proves_the_decisions_that_are_in_the_file(tailed, tmp_path):
    from PIL import Image
    from tokexport.engines.bundle.proof import verify_bundle
    from tokexport.engines.bundle.write import write_bundle

    path = tailed(method="tome", r=8)
    assert [d.block for d in decision_entries(inspect(path).provenance)] == list(range(LAST))
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (70, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png")
    options = {"checkpoint": Path(__file__).parents[1] / "golden" / "tiny_vit.safetensors"}
    write_bundle(path, tmp_path / "bundle", images=tmp_path / "photos", **options)
    assert verify_bundle(tmp_path / "bundle").passed


def test_a_page_is_timed_against_the_same_tail(tailed):
    from tokexport.engines.web.write import check_web

    dense = {tail: tailed(method="none", tail=tail) for tail in ("class", "full")}
    for tail in dense:
        check_web(False, dense=dense[tail], tail=tail)
    with pytest.raises(
        UsageError, match="has tail full, the file has class: wanted a dense one exported with tail class"
    ):
        check_web(False, dense=dense["full"], tail="class")


def test_prediction_is_exact_for_a_machine_that_is_as_the_model_says():
    """A machine that takes as long for half a block as its rows say, and of the last block's for what the class tail leaves of it."""
    dims = {"width": 64, "attn_width": 64, "mlp": [(64, 256), (256, 64)], "classes": 10, "heads": 1}
    dims |= {"patches": 64, "patch_values": 192, "pool": "token"}
    counts = token_counts(65)
    curves = LatencyCurves(KEY, tuple(counts), *(tuple(k * stairs(n) for n in counts) for k in (1, 2)))
    dense, tome = Schedule("none", 65, 1, 6), Schedule.parse("tome", n_tokens=65, depth=6, r=8)

    def real(schedule):
        blocks, n_steps = schedule.tokens_per_block(), len(in_file(schedule, "class").steps)
        n, p = blocks[-1][0], 1
        products = lambda rows: rows * (2 * 64 * 64 + 2 * n * 64)  # query and projection, two products of the attention
        share = (n * 2 * 64 * 64 + products(p)) / (n * 2 * 64 * 64 + products(n))
        rest = share * stairs(n) + 2 * stairs(p)
        return 1.07 * (sum(stairs(a) + 2 * stairs(m) for a, m in blocks[:-1]) + rest + 3.5 * n_steps)

    model = LatencyModel.of_dense(curves, dense, ms=real(dense), tail_dims=dims).fitted(tome, ms=real(tome))
    assert model.scale == pytest.approx(1.07) and model.steps["tome"] == pytest.approx(3.5)
    assert model.predict(dense) == pytest.approx(real(dense)) and model.predict(tome) == pytest.approx(real(tome))
    whole = LatencyModel.of_dense(curves, dense, ms=real(dense)).fitted(tome, ms=real(tome))
    assert whole.steps["tome"] != pytest.approx(3.5, rel=0.1)


def test_tune_knows_the_tail_of_its_files(tiny, tmp_path, monkeypatch):
    from tokexport.engines.search.candidate_times import TimedFiles
    from tokexport.export import tail

    files = lambda kind: TimedFiles(tiny(kind), tmp_path, runtime="ort", dtype="fp32", batch=1, threads=1, seconds=1)
    for default, kind in (("class", "tiny_vit"), ("full", "tiny_vit"), ("class", "tiny_vit_nocls")):
        monkeypatch.setattr(tail, "DEFAULT", default)
        made, wanted = files(kind), "class" if (default, kind) == ("class", "tiny_vit") else "full"
        path = made.path_of(Schedule("none", *as_plain(tiny(kind).module).size))
        assert inspect(path).provenance.tail == wanted and (made.tail_dims is not None) == (wanted == "class")


def run(*args):
    return CliRunner().invoke(group, [str(a) for a in args])


def test_the_command_line_says_it(tailed, tmp_path):
    path = tailed(method="tome", r=8)
    data = json.loads(run("inspect", path, "--json").stdout)
    assert data["macs_executed"] < data["macs"] < data["macs_dense"] and data["provenance"]["tail"] == "class"
    shown = " ".join(run("inspect", path).stderr.split())
    assert "executed" in shown and "the reduction of block 5 is not in the file" in shown
    whole = " ".join(run("inspect", tailed(method="tome", r=8, tail="full")).stderr.split())
    assert "executed" not in whole and "full: all tokens of the last block are computed" in whole
    refused = run("onnx", "--method", "tome", "--r", "8", "--tail", "class", "--sources", "-o", tmp_path / "v.onnx")
    assert isinstance(refused.exception, UsageError) and not list(tmp_path.iterdir())
    assert "--tail class leaves the last block's other tokens out, and emit asks for sources" in str(refused.exception)
