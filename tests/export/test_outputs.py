"""Outputs as people ask for them: the static graph's against the reference's for every method, and both against plain arithmetic."""

import pytest
import torch
from tokexport.export.graph.static_vit import StaticViT
from tokexport.export.models.learned_layers import learned_layers
from tokexport.export.outputs import TABLE, Emission

from tokexport import UsageError, reduce_model

EVERY = {
    "last": Emission(("pooled", "tokens", "patches", "sources")),
    "layers, nearest": Emission(("pooled", "tokens", "patches"), layers=(1, -1), dropped="nearest"),
    "layers with norm, zero, nchw": Emission(
        ("tokens", "patches"), layers=(0, 4), norm_layers=True, dropped="zero", layout="nchw"
    ),
}


def both(loaded, schedule, emission, image, batch=None):
    """The outputs of the reference and of the static graph, by name."""
    heads = learned_layers(loaded, schedule)
    wanted = reduce_model(loaded.module, schedule, heads, emission=emission).run(image).outputs
    static = StaticViT(loaded.module, schedule, batch, heads, emission=emission).eval()
    with torch.no_grad():
        parts = [static(part) for part in image.split(batch or len(image))]
    return wanted, {name: torch.cat([p[name] for p in parts]) for name in static_names(static)}


def static_names(static):
    return static.emission.names(static.output_name)


@pytest.mark.parametrize("case", EVERY)
@pytest.mark.parametrize("kind", ["tiny_vit", "tiny_vit_nocls"])
def test_every_method_gives_what_the_reference_gives(tiny, schedule_of, golden, relative, options, case, kind):
    loaded, emission = tiny(kind), EVERY[case]
    try:
        schedule = schedule_of(loaded.module, **options)
        loaded_layers = learned_layers(loaded, schedule)
        reduce_model(loaded.module, schedule, loaded_layers)
    except UsageError:
        pytest.skip("the method needs a class token")
    for batch in (None, 1, len(golden.image)):
        wanted, got = both(loaded, schedule, emission, golden.image, batch)
        assert set(got) == set(wanted) and list(got) == list(emission.resolved(6).names("logits"))
        for name, value in got.items():
            row = TABLE[name.partition("_")[0]]
            assert value.shape == wanted[name].shape, name
            if row.exact:
                assert torch.equal(value, wanted[name]), (name, batch)
            elif row.unit:
                assert float((value - wanted[name]).abs().max()) <= 1e-5, (name, batch)
            else:
                assert relative(value, wanted[name]) <= 1e-5, (name, batch)
