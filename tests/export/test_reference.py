"""The reference runs where the model is and in the model's type, whatever torch's defaults are; the worked example is what it computes."""

import xml.etree.ElementTree as ElementTree

import pytest
import torch
from tokexport.export import example, plan
from tokexport.export.models.learned_layers import learned_layers

from tokexport import load_model, reduce_model


@pytest.fixture
def reduced(tiny, options):
    """The reference of tiny_vit under a row of METHOD_CASES, and an image for it."""
    loaded = tiny("tiny_vit")
    asked = dict(options)
    schedule = loaded.schedule(asked.pop("method"), **asked)
    return reduce_model(loaded.module, schedule, learned_layers(loaded, schedule))


def test_no_tensor_is_made_on_the_default_device(reduced, golden):
    """A tensor made without a device would lie on another one than the model's: here on "meta", where nothing is computed."""
    wanted = reduced.run(golden.image)
    with torch.device("meta"):
        out = reduced.run(golden.image)
        replayed = reduced.run(golden.image, replay=wanted.plans)
    for result in (out, replayed):
        assert result.output.device.type == result.sources.device.type == result.size.device.type == "cpu"
        assert torch.equal(result.output, wanted.output) and torch.equal(result.sources, wanted.sources)
    assert all((r == 0).all() for r in replayed.regrets) and len(replayed.regrets) == len(wanted.plans)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_base_patch16_siglip_224"])
def test_every_family_of_models_runs_there_too(name):
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    loaded = load_model(name, kwargs)
    reference, image = reduce_model(loaded.module, loaded.schedule("tome", r=3)), torch.ones(1, 3, 32, 32)
    wanted = reference(image)
    with torch.device("meta"):
        assert torch.equal(reference(image), wanted)


def test_a_tensor_on_another_device_is_seen():
    """The test above can fail: what is made without a device lies on "meta" there."""
    with torch.device("meta"), pytest.raises(RuntimeError):
        torch.ones(2, device="cpu") + torch.arange(2)


def test_the_models_type_is_kept(options, golden):
    from .. import cases

    name, kwargs = cases.TINY["tiny_vit"]
    loaded = load_model(name, {**cases.KWARGS, **kwargs}, seed=1)
    asked = dict(options)
    schedule = loaded.schedule(asked.pop("method"), **asked)
    heads = learned_layers(loaded, schedule)
    loaded.module.double()
    out = reduce_model(loaded.module, schedule, None if heads is None else heads.double()).run(golden.image.double())
    assert out.output.dtype == out.tokens.dtype == out.size.dtype == torch.float64
    for p in out.plans:
        weights = [w for w in (p.w_keep, p.w_src, p.w_size) if w is not None]
        assert p.keep.dtype == torch.int64 and all(w.dtype == torch.float64 for w in weights)


def test_the_worked_example_is_what_the_code_computes():
    lines = example.text().splitlines()
    assert len(lines) == 7 and all(line in plan.__doc__ for line in lines)
    computed = example.compute().plan
    assert computed.keep.flatten().tolist() == [0, 4, 1, 3, 5] and computed.combine == "size"


def test_the_example_is_drawn():
    drawing = ElementTree.fromstring(example.svg())
    of = lambda tag: drawing.findall(f"{{http://www.w3.org/2000/svg}}{tag}")
    names = [t.text for t in of("text")]
    assert len(of("rect")) == 11 and len(of("line")) == 6, (
        "six tokens, five that are left, and where each of the six goes"
    )
    assert "r+q" in names and names.count("q") == 1 and names.count("s") == 2
