"""Every plain ViT that timm has, shrunk in depth and width: dense and with each method, the static graph is the reference.

The comparison runs in float64; one model of each distinct structure is exported too and runs in ONNX Runtime.
"""

import contextlib
import functools

import pytest
import torch
from tokexport.export import reducers
from tokexport.export.graph.static_vit import StaticViT
from tokexport.export.models import as_plain
from tokexport.export.models.learned_layers import learned_layers
from tokexport.export.models.load import LoadedModel
from tokexport.export.outputs import WITH_SOURCES
from tokexport.kernels import ops

from tokexport import UsageError, export_onnx, reduce_model

from .. import cases
from ..cases import mostly_slow

PARTS = 16  # the names are walked in as many tests: timm is imported when they run, not when they are collected


@functools.cache
def names():
    """Every model of timm's modules that have plain ViTs."""
    import timm

    modules = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva")
    return sorted(n for module in modules for n in timm.list_models(module=module))


# What is left out, by the word in its refusal, and why.
EXCLUDED = {
    "ParallelThingsBlock": "two attentions add to one residual: no one place between attention and MLP",
    "ParallelScalingBlock": "attention and MLP run side by side: nothing stands between them",
    "DiffParallelScalingBlock": "the same",
    "ResPostBlock": "norms after attention and MLP, not before",
    "EvaBlockPostNorm": "the same",
    "DiffAttention": "the difference of two attentions",
    "HybridEmbed": "the patches come out of a convolutional network",
}
OTHERS = (
    "swin_tiny_patch4_window7_224",
    "hiera_tiny_224",
    "pit_s_224",
    "xcit_nano_12_p8_224",
    "vit_relpos_small_patch16_224",
    "samvit_base_patch16",
    "beit_base_patch16_224",
    "naflexvit_base_patch16_gap",
    "cait_xxs24_224",
    "resnet18",
)
WIDTH, DEPTH, HEADS, GRID = 32, 3, 2, (5, 4)


@functools.cache
def full(name):
    """The model as timm has it, of one block, without storage."""
    import timm

    with torch.device("meta"), contextlib.suppress(Exception):
        return timm.create_model(name, depth=1)
    with torch.device("meta"):
        return timm.create_model(name)


def small(name):
    """The model shrunk, in the default type, every parameter far from neutral."""
    import timm

    model = full(name)
    size = model.patch_embed.patch_size
    kwargs = {
        "depth": DEPTH,
        "num_classes": 7,
        "img_size": (size[0] * GRID[0], size[1] * GRID[1]),
        "embed_dim": WIDTH,
        "num_heads": HEADS,
    }
    if "sapiens2" in name:
        kwargs["num_kv_heads"] = 1
    model, random = timm.create_model(name, **kwargs).eval(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=random)
            if key.endswith(("gamma", "gamma_1", "gamma_2")):
                p.copy_(0.5 + noise.abs())
            elif p.ndim == 2:
                p.copy_(noise * 1.5 / p.shape[1] ** 0.5)
            else:
                p.add_(0.3 * noise)
    return model.requires_grad_(False)


def schedule(model, method):
    plain = as_plain(model)
    options = cases.METHODS[method].short(plain.n_tokens)
    if not plain.has_class_token and "mean_attention" in reducers.get(method).signals:
        options["score"] = "mean"
    return loaded(model).schedule(method, **options)


def loaded(model, name=""):
    """A model as loaded, with random weights: trained layers are random too."""
    return LoadedModel(model, name, {}, {"source": "random", "seed": 1, "sha256": ""}, [], as_plain(model).preprocess)


def image(model, n=2):
    return torch.randn(n, 3, *as_plain(model).preprocess.size, generator=torch.Generator().manual_seed(11))


def structure(name):
    """What tells one kind of model from another: its modules, the state they hold, and how it pools."""
    model = full(name)
    kinds = [f"{k.replace('blocks.0.', '')} {type(m).__name__}" for k, m in model.named_modules() if k.count(".") < 4]
    own = [getattr(model, k, None) is not None for k in ("cls_token", "reg_token", "pos_embed")]
    return (
        type(model).__name__,
        *kinds,
        *own,
        model.global_pool,
        getattr(model, "no_embed_class", None),
        model.dynamic_img_size,
        getattr(model, "rope_mixed", None),
        getattr(model.blocks[0].attn, "qkv", 0) is None,
        getattr(model.blocks[0].attn, "rotate_half", 0),
    )


@functools.cache
def refusal(name):
    """Why the model is refused; empty when it is not."""
    try:
        as_plain(full(name))
    except UsageError as e:
        return str(e)
    return ""


@pytest.fixture
def double(monkeypatch):
    torch.set_default_dtype(torch.float64)
    for name in ("floats", "to_float", "one_hot"):
        monkeypatch.setattr(ops, name, lambda *args, make=getattr(ops, name): make(*args).double())
    yield
    torch.set_default_dtype(torch.float32)


def test_what_is_left_out_is_left_out_for_a_named_reason():
    reasons = {name: refusal(name) for name in names() if refusal(name)}
    assert {name: why for name, why in reasons.items() if not any(word in why for word in EXCLUDED)} == {}
    assert {word for word in EXCLUDED if not any(word in why for why in reasons.values())} == set(), (
        "an exclusion that excludes nothing"
    )
    assert len(reasons) <= 30 and len(names()) - len(reasons) >= 200


@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_is_refused_by_name(name):
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UsageError, match=type(model).__name__):
        as_plain(model)


def differences(name, relative):
    """(method, batch) -> largest relative difference, where the static graph of a model is not its reference."""
    model, wrong = small(name), {}
    for method in reducers.TABLE:
        plan = schedule(model, method)
        heads = learned_layers(loaded(model), plan)
        wanted = reduce_model(model, plan, heads).run(image(model))
        if method == "none":
            with torch.no_grad():
                if not relative(wanted.output, model(image(model))) <= 1e-9:
                    wrong["the reference is not timm's model"] = relative(wanted.output, model(image(model)))
        for batch in (1, None):
            static = StaticViT(model, plan, batch, heads, emission=WITH_SOURCES)
            with torch.no_grad():
                parts = [static(part) for part in image(model).split(1 if batch else 2)]
            worst = relative(torch.cat([p[static.output_name] for p in parts]), wanted.output)
            if not worst <= 1e-7 or not torch.equal(torch.cat([p["sources"] for p in parts]), wanted.sources):
                wrong[method, batch] = worst
    return wrong


@pytest.mark.parametrize("part", mostly_slow(range(PARTS), 0, 6, 12))
def test_every_plain_vit_is_reproduced_with_every_method(part, double, relative):
    walked = [name for name in names()[part::PARTS] if not refusal(name)]
    wrong = {name: found for name in walked if (found := differences(name, relative))}
    assert wrong == {} and len(walked) >= 10


def _one_of_each():
    found = {}
    for name in names():
        if not refusal(name):
            found.setdefault(structure(name), name)
    return sorted(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_one_model_of_each_structure_runs_as_onnx(part, relative, run_onnx, tmp_path):
    """Methods take turns, so that each meets many structures."""
    methods = sorted(set(reducers.TABLE) - {"none"})
    for i, name in list(enumerate(_one_of_each()))[part::PARTS]:
        model = small(name)
        plan = schedule(model, methods[i % len(methods)])
        shrunk = loaded(model, name)
        wanted = reduce_model(model, plan, learned_layers(shrunk, plan)).run(image(model, 3))
        export_onnx(shrunk, plan, tmp_path / "vit.onnx", sources=True, force=True)
        got = run_onnx(tmp_path / "vit.onnx", image(model, 3))
        assert relative(got["logits"], wanted.output) <= 1e-4, name
        assert (got["sources"] == wanted.sources.numpy()).all(), name


def test_a_model_that_differs_is_seen(double, relative):
    model = small("eva02_tiny_patch14_224")
    plan = schedule(model, "tome")
    wanted = reduce_model(model, plan).run(image(model))
    static = StaticViT(model, plan, None, emission=WITH_SOURCES)
    static.rotary.tables[0].data[5] += 0.1
    with torch.no_grad():
        assert relative(static(image(model))[static.output_name], wanted.output) > 1e-7
