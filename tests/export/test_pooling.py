"""Average pooling by token size, as ToMe's and DiffRate's code for MAE has it."""

import pytest
import torch
from tokexport.export.models import as_plain

from tokexport import Schedule, UsageError, export_onnx, load_model, reduce_model, verify

from ..cases import mostly_slow

KWARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 10}
OPTIONS = {"tome": {"r": 8}, "diffrate": {"rates": {"prune_kept": [60, 50, 40, 30], "merge_kept": [50, 40, 30, 20]}}}


def model(**kwargs):
    return load_model("vit_tiny_patch16_224", {**KWARGS, "global_pool": "avg", **kwargs}, seed=3)


def schedule(method, n_prefix=1, **options):
    return Schedule.parse(
        method=method, depth=4, n_tokens=64 + n_prefix, n_prefix=n_prefix, **OPTIONS[method], **options
    )


def by_hand(loaded, s, image):
    """The authors' pool: patch tokens times their sizes over the sum of these, then fc_norm and head."""
    found, m = reduce_model(loaded.module, s).run(image), loaded.module
    tokens, size = found.tokens[:, 1:], found.size[:, 1:, None]
    return m.head(m.fc_norm((tokens * size).sum(1) / size.sum(1)))


@pytest.mark.parametrize("method", OPTIONS)
def test_a_model_like_maes_is_pooled_by_size(method, relative):
    loaded, image = model(), torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    s = schedule(method)
    assert as_plain(loaded.module).pools_by_size(s)
    with torch.no_grad():
        wanted = by_hand(loaded, s, image)
        got = reduce_model(loaded.module, s)(image)
        plain = reduce_model(loaded.module, schedule(method, pool="mean"))(image)
    assert relative(got, wanted) <= 1e-6 and relative(plain, wanted) > 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("batch", mostly_slow([1, 3, None], 1, None))
@pytest.mark.parametrize("method", OPTIONS)
def test_the_file_pools_as_the_reference_does(method, batch, dtype, tmp_path):
    path = tmp_path / "v.onnx"
    export_onnx(model(), schedule(method), path, batch=batch, dtype=dtype)
    report = verify(path)
    assert report.passed, report.summary()


def test_the_sum_of_tomes_sizes_is_the_number_of_patches():
    """So the authors' division by that number is the same."""
    found = reduce_model(model().module, schedule("tome")).run(torch.randn(2, 3, 64, 64))
    assert torch.equal(found.size[:, 1:].sum(1), torch.full((2,), 64.0))


@pytest.mark.parametrize(
    "kwargs, prefix, pools",
    [
        ({}, 1, True),
        ({"class_token": False}, 0, False),
        ({"global_pool": "token"}, 1, False),
        ({"global_pool": "map"}, 1, False),
        ({"fc_norm": False}, 1, False),
    ],
)
def test_who_is_like_mae(kwargs, prefix, pools):
    loaded = model(**kwargs)
    plain = as_plain(loaded.module)
    assert plain.pools_by_size(schedule("tome", prefix)) == pools
    assert not plain.pools_by_size(schedule("tome", prefix, pool="mean"))
    if kwargs.get("global_pool", "avg") != "avg":
        with pytest.raises(UsageError, match="pool size"):
            reduce_model(loaded.module, schedule("tome", prefix, pool="size"))
    else:
        assert plain.pools_by_size(schedule("tome", prefix, pool="size"))
    with pytest.raises(UsageError, match="wanted auto or size or mean"):
        reduce_model(loaded.module, schedule("tome", prefix, pool="max"))
    assert not plain.pools_by_size(loaded.schedule("none"))


def test_size_by_wish_is_reproduced_without_a_class_token(tmp_path):
    export_onnx(model(class_token=False), schedule("tome", 0, pool="size"), tmp_path / "v.onnx")
    assert verify(tmp_path / "v.onnx").passed
