"""Every comparator is fed a wrong answer; verdicts are of one image each; sums of many images take no memory."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import helper, numpy_helper
from tokexport.engines.parity import decisions
from tokexport.engines.parity.compare import Chunk, Comparison
from tokexport.engines.parity.outputs import KINDS, cosines, divergence, kind_of, top
from tokexport.engines.parity.report import Flip, ParityReport, StageParity
from tokexport.engines.parity.sides import Side, run_with_reach, verifiable
from tokexport.engines.parity.sums import OutputSum
from tokexport.export import precisions
from tokexport.export.inspection import inspect
from tokexport.export.plan import SIGNALS, MergePlan
from tokexport.export.reference import ReducedViT
from tokexport.export.schedule import Step
from tokexport.tools.cli import group
from tokexport.tools.demo import samples

from tokexport import Schedule, UsageError, verify

TOME = {"method": "tome", "r": 8}
EVIT = {"method": "evit", "at": (1, 3, 4)}
NONE = Schedule("none", 65, 1, 6)


def compared(values, wanted, precision="fp16", reach=0.0):
    """A comparison of logits of a dense model, [B, classes] and [B, classes]."""
    comparison = Comparison(NONE, precision, outputs=("logits",))
    values, wanted = np.float32(values), np.float32(wanted)
    side, other = (Side([], {"logits": v}) for v in (values, wanted))
    names = [f"image {i}" for i in range(len(values))]
    chunk = Chunk(0, names, np.zeros((len(values), 3, 1, 1), np.float32))
    comparison.add(None, chunk, side=side, wanted=other, reach=np.full(len(values), reach))
    return comparison


def report_of(comparison, **more):
    """A report of nothing but a comparison."""
    fields = {
        "verdicts": dict(comparison.verdicts),
        "outputs": comparison.outputs(),
        "by_image": comparison.images(),
        "faults": comparison.faults,
        "flips": comparison.flips(),
        "n_images": sum(comparison.verdicts.values()),
    }
    start = {"path": "x.onnx", "runtime": "ort", "against": None, "precision": comparison.precision, "decisions": None}
    return ParityReport(**{**start, **fields, **more})


def test_a_loud_image_does_not_loosen_the_limit_of_a_quiet_one():
    wanted = np.float32([[10, 1, -3], [0.1, 0.02, -0.05]])
    values = wanted * np.float32([[1], [1.15]])
    report = report_of(compared(values, wanted))
    assert not report.passed and report.verdicts == {"equal": 1, "flipped": 0, "failed": 1}
    assert report.by_image[0].index == 1 and report.by_image[0].verdict == "failed"
    assert report.outputs[0].n_failed == 1 and report.outputs[0].max_rel == pytest.approx(0.15, rel=1e-3)
    assert "1 of 2 images failed" in report.summary()
    assert report_of(compared(wanted, wanted)).passed


def test_one_failed_image_fails_a_file(exported, tmp_path):
    """The quietest image is off by more than its own limit and less than that of the loudest."""
    path = exported("tiny_vit", **TOME)
    reference = reference_of(path)
    shape = (4, 3, 64, 64)
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    largest = np.sort(reference.run(torch.from_numpy(noise)).output.abs().amax(1).numpy())
    error = 2e-4 * (largest[0] * largest[-1]) ** 0.5 / largest[0]
    assert 1.1 * 2e-4 < error < largest[-1] / largest[0] * 2e-4
    model = onnx.load(path)
    between = np.float32((largest[0] + largest[1]) / 2)

    def quiet_are_off(graph):
        last = next(n for n in graph.node if "logits" in n.output)
        last.output[list(last.output).index("logits")] = "logits.right"
        graph.initializer.extend(
            [
                numpy_helper.from_array(between, "between"),
                numpy_helper.from_array(np.float32(1 + error), "off"),
                numpy_helper.from_array(np.array([1]), "axis"),
            ]
        )
        graph.node.extend(
            [
                helper.make_node("Abs", ["logits.right"], ["abs"], name="head/Abs_planted"),
                helper.make_node("ReduceMax", ["abs", "axis"], ["largest"], name="head/ReduceMax_planted"),
                helper.make_node("Less", ["largest", "between"], ["quiet"], name="head/Less_planted"),
                helper.make_node("Mul", ["logits.right", "off"], ["louder"], name="head/Mul_planted"),
                helper.make_node("Where", ["quiet", "louder", "logits.right"], ["logits"], name="head/Where_planted"),
            ]
        )

    quiet_are_off(model.graph)
    onnx.save(model, tmp_path / "off.onnx")
    report = verify(tmp_path / "off.onnx")
    assert not report.passed and report.verdicts["failed"] == 1 and report.verdicts["equal"] == 3
    assert [r.verdict for r in report.by_image] == ["failed", "equal", "equal", "equal"]


def reference_of(path):
    from tokexport.export import rebuild

    return rebuild.reference_of(inspect(path).provenance, path)


def test_a_logit_near_zero_is_no_false_alarm():
    values, wanted = [[1e-3]], [[2e-3]]
    assert not report_of(compared(values, wanted)).passed, "nothing is known of the classifier"
    report = report_of(compared(values, wanted, reach=20.0))
    assert report.passed and report.outputs[0].max_rel == pytest.approx(1e-3 / (0.01 * 20), rel=1e-3)
    assert not report_of(compared([[1e-3]], [[0.1]], reach=20.0)).passed, "what is large is still found"
    for no_number in (math.inf, math.nan):
        assert not report_of(compared(values, wanted, reach=no_number)).passed, "an infinite floor would pass all"


@pytest.mark.parametrize("kind", ["tiny_vit", "tiny_vit_nocls", "tiny_vit_distilled"])
def test_the_reach_is_what_the_classifier_could_give_for_the_feature(kind, tiny, schedule_of, golden):
    module = tiny(kind).module
    image = golden.image.numpy()
    result, reach = run_with_reach(ReducedViT(module, schedule_of(module, 8)), image)
    feature = module.forward_head(result.tokens, pre_logits=True)
    pairs = [(feature, module.head)]
    if kind == "tiny_vit_distilled":
        pairs = [(result.tokens[:, 0], module.head), (result.tokens[:, 1], module.head_dist)]
    rows = [
        (f.norm(dim=1, keepdim=True) * h.weight.norm(dim=1) + h.bias.abs()).amax(1).detach().numpy() for f, h in pairs
    ]
    assert np.allclose(reach, np.mean(rows, 0), rtol=1e-5)
    assert (reach >= result.output.abs().amax(1).numpy()).all() and not module.head._forward_hooks


def test_a_model_without_classes_has_no_reach(tmp_path, schedule_of):
    from tokexport import load_model

    kwargs = {"img_size": 32, "depth": 1, "num_classes": 0}
    module = load_model("vit_tiny_patch16_224", kwargs, seed=0).module
    _, reach = run_with_reach(ReducedViT(module, schedule_of(module)), np.zeros((2, 3, 32, 32), np.float32))
    assert reach.tolist() == [0, 0]


WRONG = {
    "logits": (np.float32([[1, 2, 3, 4, 5, 6]]), np.float32([[6, 5, 4, 3, 2, 1]])),
    "features": (np.float32([[1, 2, 3]]), np.float32([[1, 2, 3.5]])),
    "sources": (np.int64([[0, 1, 1]]), np.int64([[0, 1, 2]])),
    "tokens": (np.float32([[[900, 1], [1, 20]]]), np.float32([[[900, 1], [12, 20]]])),
    "sizes": (np.float32([[1, 2, 1]]), np.float32([[1, 1, 2]])),
    "positions": (np.float32([[[-1, -1], [0.5, 1]]]), np.float32([[[-1, -1], [0.5, 1.01]]])),
    "patches": (np.float32([[[900, 1], [1, 20]]]), np.float32([[[900, 1], [12, 20]]])),
    "honesty": (np.float32([[0.3, 0.1, 0.02]]), np.float32([[0.3, 0.1, 0.7]])),
    "mask": (np.float32([[1, 1, 1]]), np.float32([[1, 1, 0]])),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_output_tells_right_from_wrong(name):
    right, wrong = WRONG[name]
    bad = [
        wrong,
        right[:, :-1],
        *([] if right.dtype == np.int64 else [right * np.float32(v) for v in (np.nan, np.inf)]),
    ]
    for precision in precisions.TABLE:
        same = OutputSum(name, kind_of(name), precision)
        assert not same.add(right, right, np.zeros(1)).failed.any() and same.parity().passed
        for values in bad:
            for pair in ((values, right), (right, values)):
                total = OutputSum(name, kind_of(name), "fp32")
                assert total.add(*pair, np.zeros(1)).failed.all() and not total.parity().passed
    assert kind_of(f"{name}_5") is KINDS[name]


def test_loud_tokens_do_not_hide_others():
    """A register of 900 beside which the others' errors are nothing: rows are judged by their own length, in either layout."""
    wanted = np.ones((1, 2, 3), np.float32)
    wanted[0, 0] = 900
    wrong = wanted.copy()
    wrong[0, 1, 2] += 0.9  # a thousandth of the image's largest, a tenth of the row's floor of a hundredth
    for values, right in ((wrong, wanted), (wrong.transpose(0, 2, 1)[..., None], wanted.transpose(0, 2, 1)[..., None])):
        errors = kind_of("patches").errors(values, right, np.zeros(1))
        assert errors.max_rel[0] == pytest.approx(0.1, rel=1e-3)
    assert kind_of("features").errors(wrong, wanted, np.zeros(1)).max_rel[0] == pytest.approx(1e-3, rel=1e-3)


def test_of_an_honesty_map_of_nothing_rounding_is_no_error():
    errors = kind_of("honesty").errors(np.full((1, 4), 1e-7, np.float32), np.zeros((1, 4), np.float32), np.zeros(1))
    assert errors.max_rel[0] == pytest.approx(1e-7)


def test_an_output_nobody_can_judge_is_refused(exported):
    with pytest.raises(UsageError, match="'poolsize' cannot be verified"):
        kind_of("poolsize")


def test_figures_of_classes_are_those_of_the_text_book():
    a, b = np.log([[0.5, 0.25, 0.25, 1e-9, 1e-9, 1e-9]]), np.log([[0.25, 0.5, 0.25, 1e-9, 1e-9, 1e-9]])
    assert divergence(b, a)[0] == pytest.approx(0.25 * np.log(0.5) + 0.5 * np.log(2), rel=1e-4)
    assert top(a, b, 1).tolist() == [0] and top(a, b, 5).tolist() == [1] and divergence(b, b).tolist() == [0]
    assert top(np.float32([[1, 2, 3]]), np.float32([[3, 2, 1]]), 2).tolist() == [0.5]
    assert cosines(np.float32([[1, 0], [0, 0]]), np.float32([[0, 1], [0, 0]])).tolist() == [0, 1]


def test_the_tables_hold_every_precision():
    rows = precisions.TABLE
    assert set(rows) == {"fp32", "tf32", "fp16", "bf16", "int8"}
    assert all(rows["fp32"].output_limit < rows[p].output_limit <= rows["int8"].output_limit for p in ("fp16", "bf16"))


@pytest.mark.parametrize("signal, kind", [(name, signal.kind) for name, signal in SIGNALS.items()])
def test_a_near_tie_is_that_of_the_steps_own_signal(signal, kind):
    for name, row in precisions.TABLE.items():
        layer = 0 if SIGNALS[signal].learned else None
        step = Step(1, "post_attn", 9, 5, 5, signal=signal, layer=layer)
        assert decisions.near_tie_limit(name, step) == row.near_tie[kind] > 0
        assert decisions.near_tie_limit(name, Step(1, "post_attn", 9, 5, 5)) == 0, "what decides nothing has no ties"


class Judge:
    """In the place of the reference: gives away what it is told in the first reduction, nothing later."""

    def __init__(self, margin, n_steps, output):
        self.margin, self.n_steps, self.output = margin, n_steps, output

    def run(self, image, replay=None):
        n = len(image)
        regrets = [torch.full((n,), self.margin if k == 0 else 0.0) for k in range(self.n_steps)]
        output = self.output[:n]
        return SimpleNamespace(plans=replay, output=output, outputs={"logits": output}, regrets=regrets)


def flipped(margin, n_images=2):
    """A comparison in which every image's first decision differs and gives away `margin`."""
    steps = (Step(0, "post_attn", 5, 4, 4, signal="keys"), Step(1, "post_attn", 4, 3, 3, signal="keys"))
    schedule = Schedule("tome", 5, 1, 2, {"r": [1, 1]}, steps)

    def column(*rows):
        return torch.tensor(rows).expand(n_images, -1)[..., None]

    first = [MergePlan(column(0, 2, 3, 4), column(1), column(1)), MergePlan(column(0, 2, 3), column(1), column(2))]
    second = [MergePlan(column(0, 1, 2, 4), column(3), column(1)), first[1]]
    logits = torch.tensor([[1.0, 2.0]]).expand(n_images, -1)
    comparison = Comparison(schedule, "fp32", outputs=("logits",))
    sides = [Side(plans, {"logits": logits.numpy()}) for plans in (first, second)]
    chunk = Chunk(0, ["same.png"] * n_images, np.zeros((n_images, 3, 1, 1), np.float32))
    judge = Judge(margin, 2, logits)
    comparison.add(judge, chunk, side=sides[0], wanted=sides[1], reach=np.zeros(n_images))
    return comparison


def test_a_decision_is_judged_by_what_it_gives_away():
    limit = precisions.get("fp32").near_tie["metric"]
    sound = report_of(flipped(0.9 * limit), decisions=flipped(0.9 * limit).share)
    assert sound.passed and sound.verdicts["flipped"] == 2 and "2 of 2 images flipped near-ties" in sound.summary()
    assert sound.decisions == 0.5 and [f.passed for f in sound.flips] == [True, True]
    for margin in (1.1 * limit, math.inf, math.nan):
        report = report_of(flipped(margin))
        assert not report.passed and report.verdicts["failed"] == 2, margin
        assert [f.passed for f in report.flips] == [False, False] and report.flips[0].block == 0
    assert math.isnan(flipped(math.nan).blocks()[0].margin)
    assert len(flipped(0.0).flips()) == 2, "an exact tie is told too"


def test_one_photo_given_twice_is_two_images(exported):
    photo = samples.sample_photos()[0]
    report = verify(exported("tiny_vit", **TOME), [photo, photo, samples.sample_photos()[1]])
    assert report.n_images == 3 and sorted(r.index for r in report.by_image) == [0, 1, 2] == sorted(report.maps)
    assert report.verdicts["equal"] + report.verdicts["flipped"] == 3
    assert {f.index for f in flipped(1.0).flips()} == {0, 1} and {f.image for f in flipped(1.0).flips()} == {"same.png"}


def test_plans_are_the_same_when_rows_are_folded_in_another_order():
    def column(rows):
        return torch.tensor(rows)[..., None]

    plan = MergePlan(column([[0, 2], [0, 2]]), column([[1, 3], [1, 3]]), column([[0, 1], [0, 1]]))
    swapped = MergePlan(plan.keep, plan.src.flip(1), plan.dst.flip(1))
    assert decisions.decided_alike([plan], [swapped]).tolist() == [[True], [True]]
    hosts = replace(plan, dst=column([[0, 1], [1, 0]]))
    assert decisions.decided_alike([plan], [hosts]).tolist() == [[True], [False]]
    order = replace(plan, keep=column([[0, 2], [2, 0]]))
    assert decisions.decided_alike([plan], [order]).tolist() == [[True], [False]]
    fewer = MergePlan(plan.keep)
    assert decisions.decided_alike([plan], [fewer]).tolist() == [[False], [False]]
    assert [len(p.keep) for p in decisions.of_images([plan, hosts], torch.tensor([1]))] == [1, 1]


@pytest.mark.parametrize("change", ["too large", "negative", "twice", "no host", "short"])
@pytest.mark.parametrize("method", ["tome", "evit"])
def test_decisions_that_are_no_plan_are_found_whatever_the_runtime_does(change, method, exported, run_onnx):
    path = exported("tiny_vit", **(TOME if method == "tome" else EVIT))
    provenance = inspect(path).provenance
    from tokexport import open_runner

    with open_runner(path, outputs=provenance.decisions) as runner:
        values = runner.run({"image": np.zeros((2, 3, 64, 64), np.float32)})
    assert len(decisions.read_plans(values, provenance, n_images=2)) == len(provenance.schedule.steps)
    step = provenance.schedule.steps[0]
    name = next(f"block{step.block}.{p}" for p in ("order", "keep") if f"block{step.block}.{p}" in values)
    wrong = values[name].copy()
    if change == "short":
        wrong = wrong[:, :-1]
    elif change != "no host":
        wrong[1, 0, 0] = {"too large": step.n_in, "negative": -1, "twice": wrong[1, 1, 0]}[change]
    values[name] = wrong
    hosts = [f"block{step.block}.{p}" for p in ("dst", "target") if f"block{step.block}.{p}" in values]
    if change == "no host":
        if not hosts:
            pytest.skip("EViT has no hosts: all are folded into one extra token")
        values |= {host: np.full_like(values[host], 10**6) for host in hosts}
    with pytest.raises(decisions.DecisionError, match=f"block {step.block}: the decisions of the file are no plan"):
        decisions.read_plans(values, provenance, n_images=2)


def without(path, target, *parts):
    """A copy of a file whose provenance lacks decisions whose names end so."""
    model = onnx.load(path)
    entry = next(e for e in model.metadata_props if e.key == "tokexport")
    record = json.loads(entry.value)
    record["decisions"] = [d for d in record["decisions"] if not d.startswith("block3.") or not d.endswith(parts)]
    entry.value = json.dumps(record)
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("parts", [("src",), ("dst", "target"), ("keep",)])
def test_a_decision_that_lacks_a_part_is_one_clear_error(parts, exported, tmp_path):
    path = without(exported("tiny_vit", **TOME), tmp_path / "x.onnx", *parts)
    for call in (lambda: verify(path), lambda: verifiable(path, "ort")):
        with pytest.raises(UsageError, match=f"the decision of block 3 lacks {parts[0]}"):
            call()


def test_json_is_json_in_the_failing_case(exported, tmp_path):
    path = exported("tiny_vit", **TOME)
    model = onnx.load(path)
    weight = next(i for i in model.graph.initializer if i.name == "head.head.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(np.nan), weight.name))
    onnx.save(model, tmp_path / "nan.onnx")
    out = CliRunner().invoke(group, ["verify", str(tmp_path / "nan.onnx"), "--json"])

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    record = json.loads(out.stdout, parse_constant=refuse)
    assert out.exit_code == 1 and not record["passed"] and record["outputs"][0]["max_rel"] is None
    stage = StageParity("head", math.inf, 1.0)
    report = report_of(flipped(math.nan), stages=[stage])
    record = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert record["flips"][0]["margin"] is None and not record["flips"][0]["passed"]
    assert record["stages"][0]["error"] is None and not record["stages"][0]["passed"]


def test_what_is_printed_as_json_is_json(capsys):
    from tokexport.tools.show.terminal import print_json

    with pytest.raises(ValueError, match="JSON"):
        print_json({"a": math.inf})
    assert capsys.readouterr().out == ""


def test_an_engine_is_verified_without_the_runtime_of_onnx_files(monkeypatch, tmp_path):
    """Where only TensorRT is installed: the engine itself is what is then refused here, not a missing onnxruntime."""
    from tokexport.engines import runners
    from tokexport.engines.parity import sides
    from tokexport.export.errors import MissingPackageError

    def missing(runtime):
        raise MissingPackageError("onnxruntime", "cpu", "ONNX Runtime")

    monkeypatch.setattr(runners, "require", missing)
    monkeypatch.setattr(sides, "require", missing)
    (tmp_path / "x.plan").write_bytes(b"engine")
    for call in (lambda: verify(tmp_path / "x.plan"), lambda: raised(["verify", str(tmp_path / "x.plan")])):
        with pytest.raises(UsageError) as e:
            call()
        assert not isinstance(e.value, MissingPackageError), e.value
    with pytest.raises(MissingPackageError):
        raised(["verify", str(tmp_path / "x.onnx")])


def raised(arguments):
    result = CliRunner().invoke(group, arguments)
    if result.exception:
        raise result.exception


def test_a_flip_without_a_number_is_a_fault():
    assert not Flip(0, "x", 3, math.nan, 1.0).passed and not Flip(0, "x", 3, math.inf, 1.0).passed
    assert Flip(0, "x", 3, 1.0, 1.0).passed
