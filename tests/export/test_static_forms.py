"""The static graph's arithmetic against the eager reference: every kind of plain ViT, every form, and exact ties.

The eager comparison runs in float64, where no rounding comes near a tie and a difference of 1e-9 is a fault.
"""

import functools
from dataclasses import replace

import pytest
import torch
from tokexport.export import apply, reducers
from tokexport.export.graph import static_vit
from tokexport.export.graph.trace import quiet
from tokexport.export.plan import MergePlan, Signals, StaticLayout
from tokexport.export.reducers import tome
from tokexport.export.schedule import Step
from tokexport.kernels import ops

from tokexport import export_onnx, load_model, reduce_model

VIT, SMALL = (
    "vit_tiny_patch16_224",
    {"img_size": 40, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5},
)
VARIANTS = {
    "class token": (VIT, {}),
    "even token count": (VIT, {"img_size": (40, 56)}),
    "no class token": (VIT, {"class_token": False, "global_pool": "avg"}),
    "no class token, even": (VIT, {"class_token": False, "global_pool": "avg", "img_size": 48}),
    "distillation token": ("deit_tiny_distilled_patch16_224", {}),
    "registers": (VIT, {"reg_tokens": 4}),
    "registers, even": (VIT, {"reg_tokens": 4, "img_size": (40, 56)}),
    "registers, no class token": (VIT, {"reg_tokens": 4, "class_token": False, "global_pool": "avg"}),
    "one register, no class token": ("vit_betwixt_patch16_reg1_gap_256", {}),
    "qk_norm": (VIT, {"qk_norm": True}),
    "LayerScale": (VIT, {"init_values": 0.5}),
    "norm_pre": (VIT, {"pre_norm": True}),
    "no_embed_class": (VIT, {"no_embed_class": True, "reg_tokens": 2}),
    "average pooling over patches": (VIT, {"global_pool": "avg", "fc_norm": False}),
    "fc_norm": (VIT, {"global_pool": "avg", "fc_norm": True}),
    "average and maximum": (VIT, {"global_pool": "avgmax"}),
    "attention pooling": (VIT, {"global_pool": "map", "class_token": False}),
    "no biases": (VIT, {"qkv_bias": False, "proj_bias": False}),
    "no classifier": (VIT, {"num_classes": 0}),
    "no classifier, average": (VIT, {"num_classes": 0, "global_pool": "avg"}),
    "norm in attention and MLP": (VIT, {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "dynamic_img_size": (VIT, {"dynamic_img_size": True}),
    "DeiT III": ("deit3_small_patch16_224", {}),
    "CLIP": ("vit_base_patch16_clip_224", {}),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {}),
    "DINOv2 with SwiGLU": ("vit_giant_patch14_dinov2", {}),
    "SigLIP": ("vit_base_patch16_siglip_224", {}),
}
R = [7, 0, 12]  # some, none, and for most variants cut to half
FORMS = [(kind, form) for kind in ("single", "fixed", "dynamic") for form in ("gather", "matmul")]


def _make(variant):
    """A small model whose parameters are all far from their neutral values."""
    name, kwargs = VARIANTS[variant]
    loaded = load_model(name, {**SMALL, **kwargs})
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, p in loaded.module.named_parameters():
            noise = torch.randn(p.shape, generator=random)
            if key.endswith("gamma"):
                p.copy_(0.5 + noise.abs())
            elif p.ndim == 2:
                p.copy_(noise * 1.5 / p.shape[1] ** 0.5)
            else:
                p.add_(0.3 * noise)
    return loaded


@functools.cache
def _model(variant):
    """The timm model in float64, made once; only for tests with the fixture `double`."""
    assert torch.get_default_dtype() == torch.float64
    return _make(variant).module


def _image(model, n=2):
    return torch.randn(n, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(11))


def _rows(plan):
    """A static plan in the reference's terms: row numbers instead of labels, and with a batch."""
    labels, target = torch.tensor(plan.layout.labels), plan.layout.target
    assert len(set(plan.layout.labels)) == len(plan.layout.labels)
    hit = plan.dst == labels
    assert hit.any(-1).all(), "a host without an output row"
    if target is not None:
        assert (target.gather(-2, plan.keep)[..., 0] == labels).all()
        assert (target.gather(-2, plan.src) == plan.dst).all()
    columns = plan.keep, plan.src, hit.to(torch.int8).argmax(-1, keepdim=True)
    return MergePlan(*(c if c.ndim == 3 else c[None] for c in columns))


def _same(a, b):
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("keep", "src", "dst"))


def _image_of(plan, i):
    """The plan of one image of a batch."""
    return MergePlan(*(t[i : i + 1] for t in (plan.keep, plan.src, plan.dst)))


def _take_form(patch, kind, form):
    """Make every step take the gather or the matmul form."""
    patch.setitem(apply.GATHER_FROM, kind, 0 if form == "gather" else 10**9)


def _compare(model, schedule, kind, relative):
    """(largest relative difference of outputs, whether sources are equal, blocks that decide otherwise)."""
    seen, lay_out, image = [], static_vit.lay_out, _image(model)
    worst, equal, wrong = 0.0, True, []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(static_vit, "lay_out", lambda *a, **how: seen.append(lay_out(*a, **how)) or seen[-1])
        static = static_vit.StaticViT(model, schedule, {"single": 1, "fixed": 2, "dynamic": None}[kind], sources=True)
        for part in image.split(1 if kind == "single" else 2):
            seen.clear()
            wanted, got = reduce_model(model, schedule).run(part), static(part)
            worst = max(worst, relative(got[static.output_name], wanted.output))
            equal &= torch.equal(got["sources"], wanted.sources)
            wrong += [
                s.block
                for s, mine, plan in zip(schedule.steps, seen, wanted.plans, strict=True)
                if not _same(_rows(mine), plan)
            ]
    return worst, equal, wrong


@pytest.fixture
def double(monkeypatch):
    """Everything in float64, the constants of the static graph too."""
    torch.set_default_dtype(torch.float64)
    for name in ("floats", "to_float", "one_hot"):
        monkeypatch.setattr(ops, name, lambda *args, make=getattr(ops, name): make(*args).double())
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_plain_vit_is_reproduced_in_every_form(variant, double, schedule_of, relative):
    model = _model(variant)
    schedule = schedule_of(model, R)
    assert [s.block for s in schedule.steps] == [0, 2]
    wrong = {}
    for kind, form in FORMS:
        with pytest.MonkeyPatch.context() as patch:
            _take_form(patch, kind, form)
            found = _compare(model, schedule, kind, relative)
        if not (found[0] <= 1e-9 and found[1] and found[2] == []):
            wrong[kind, form] = found
    assert wrong == {}


@pytest.mark.parametrize("kind, form", FORMS)
@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("r", [None, 1, (4, -1.0), [0, 0, 5], [25, 25, 25], [1, 2, 0]], ids=str)
@pytest.mark.parametrize("variant", ["class token", "no class token", "distillation token", "registers"])
def test_every_schedule_is_reproduced(variant, r, prop_attn, kind, form, double, schedule_of, relative, monkeypatch):
    _take_form(monkeypatch, kind, form)
    model = _model(variant)
    worst, equal, wrong = _compare(model, schedule_of(model, r, prop_attn), kind, relative)
    assert worst <= 1e-9 and equal and wrong == []


def test_without_a_reduction_the_static_graph_is_timm_itself(double, schedule_of, relative):
    for variant in VARIANTS:
        model = _model(variant)
        with torch.no_grad():
            static = static_vit.StaticViT(model, schedule_of(model, None), None)
            got = static(_image(model))[static.output_name]
            assert relative(got, model(_image(model))) <= 1e-9, variant


@pytest.mark.parametrize(
    "variant, batch, opset, form",
    [
        ("no class token", None, 20, "gather"),
        ("registers", None, 21, "matmul"),
        ("registers, no class token", 1, 20, "matmul"),
        ("one register, no class token", None, 20, "gather"),
        ("DINOv2 with registers", 1, 21, "gather"),
        ("qk_norm", None, 20, "gather"),
        ("CLIP", None, 20, "matmul"),
        ("SigLIP", 2, 20, "gather"),
        ("norm in attention and MLP", 1, 20, "gather"),
        ("no classifier", 1, 21, "matmul"),
    ],
)
def test_the_graph_computes_what_the_reference_computes(
    variant, batch, opset, form, schedule_of, relative, run_onnx, tmp_path, monkeypatch
):
    _take_form(monkeypatch, {1: "single", None: "dynamic"}.get(batch, "fixed"), form)
    loaded = _make(variant)
    schedule = schedule_of(loaded.module, R)
    export_onnx(loaded, schedule, tmp_path / "vit.onnx", batch=batch, opset=opset, sources=True)
    wanted = reduce_model(loaded.module, schedule).run(_image(loaded.module))
    got = run_onnx(tmp_path / "vit.onnx", _image(loaded.module))
    assert (got["sources"] == wanted.sources.numpy()).all()
    assert relative(got["features" if variant == "no classifier" else "logits"], wanted.output) <= 1e-4


def _tied_signals(n, prefix, has_class, batch=3, any_batch=False):
    """Metrics of entries +-0.5 in four dimensions: every similarity is -1, -0.5, 0, 0.5 or 1 exactly, and most are tied."""
    metric = torch.randint(0, 2, (batch, n, 4), generator=torch.Generator().manual_seed(n)) - 0.5
    return Signals(torch.zeros(batch, n, 1), prefix, has_class, metric=metric, any_batch=any_batch)


@pytest.mark.parametrize("kind", ["single", "fixed", "dynamic"])
@pytest.mark.parametrize("prefix, has_class", [(0, False), (1, True), (2, True), (5, True), (1, False), (4, False)])
@pytest.mark.parametrize("n", [9, 10, 18, 33, 64])
def test_exact_ties_are_decided_alike(n, prefix, has_class, kind):
    signals, other = _tied_signals(n, prefix, has_class, any_batch=kind == "dynamic"), []
    for r in sorted({1, (n - prefix) // 4, (n - prefix) // 2} - {0}):
        step = Step(0, "post_attn", n, n - r, n - r)
        wanted = tome.reference(signals, step)
        for form in apply.Form:
            if kind == "single":
                alone = [Signals(signals.x[i], prefix, has_class, metric=signals.metric[i]) for i in range(3)]
                same = all([_same(_rows(_static(s, step, form)), _image_of(wanted, i)) for i, s in enumerate(alone)])
            else:
                same = _same(_rows(_static(signals, step, form)), wanted)
            other += [] if same else [(r, form)]
    assert other == []


def _static(signals, step, form):
    """ToMe's static plan, laid out."""
    return apply.lay_out(tome.static(signals, step), form, any_batch=signals.any_batch)


class Decide(torch.nn.Module):
    """A static plan as a module, to be exported."""

    def __init__(self, step, prefix, has_class):
        super().__init__()
        self.step, self.prefix, self.has_class = step, prefix, has_class

    def forward(self, metric):
        signals = Signals(metric, self.prefix, self.has_class, metric=metric, any_batch=metric.ndim == 3)
        plan = _static(signals, self.step, apply.Form.MATMUL)
        return plan.keep, plan.src, plan.dst, plan.layout.target


@pytest.mark.parametrize("dynamic", [False, True], ids=["one image", "any batch"])
@pytest.mark.parametrize("prefix, has_class", [(0, False), (1, True)])
def test_exact_ties_are_decided_alike_in_a_graph(prefix, has_class, dynamic):
    import onnxruntime

    n, r = 64, 20
    signals, step = _tied_signals(n, prefix, has_class), Step(0, "post_attn", n, n - r, n - r)
    traced, shapes = (
        (signals.metric, ({0: torch.export.Dim("batch", min=1)},)) if dynamic else (signals.metric[0], None)
    )
    with quiet():
        program = torch.onnx.export(
            Decide(step, prefix, has_class),
            (traced,),
            dynamo=True,
            opset_version=20,
            dynamic_shapes=shapes,
            verbose=False,
            custom_translation_table=ops.translations(),
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (feed,) = session.get_inputs()
    wanted = tome.reference(signals, step)
    for i, metric in enumerate(signals.metric):
        out = session.run(None, {feed.name: (metric[None] if dynamic else metric).numpy()})
        keep, src, dst, target = map(torch.from_numpy, out)
        layout = StaticLayout(labels=reducers.get("tome").row_labels(step, prefix), target=target)
        plan = MergePlan(keep, src, dst, layout=layout)
        same = _same(_rows(plan), _image_of(wanted, i))
        assert same


def test_other_decisions_and_other_arithmetic_are_seen(double, schedule_of, relative, monkeypatch):
    signals, step = _tied_signals(18, 1, True), Step(0, "post_attn", 18, 14, 14)
    plan = tome.reference(signals, step)
    assert not _same(plan, MergePlan(plan.keep, plan.src, plan.dst.roll(1, 1))) and not _same(
        plan, MergePlan(plan.keep.flip(1), plan.src, plan.dst)
    )
    model, merge = _model("LayerScale"), static_vit.apply_static
    flipped = lambda plan, form, **how: (
        (laid := apply.lay_out(plan, apply.Form.GATHER, **how)) and replace(laid, dst=laid.dst.flip(-2))
    )
    monkeypatch.setattr(static_vit, "lay_out", flipped)
    worst, equal, wrong = _compare(model, schedule_of(model, [4]), "fixed", relative)
    assert worst > 1e-9 and not equal and wrong == [0]
    monkeypatch.setattr(static_vit, "lay_out", apply.lay_out)
    monkeypatch.setattr(static_vit, "apply_static", lambda plan, x, *rest: merge(plan, x * (1 + 1e-6), *rest))
    assert _compare(model, schedule_of(model, [4]), "fixed", relative)[0] > 1e-9
