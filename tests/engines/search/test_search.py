"""DiffRate's search: the published code's numbers (units, gradients, whole steps), and a search that learns, resumes and refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokexport.engines.search import rates
from tokexport.engines.search.cost import BlockCost, expected_macs
from tokexport.engines.search.masked_vit import MaskedViT
from tokexport.engines.search.selectors import Selector, masked_softmax

from tokexport import UsageError

FOLDER = Path(__file__).parents[2] / "golden" / "search"


def case(name):
    return json.loads((FOLDER / f"{name}.json").read_text()), dict(np.load(FOLDER / f"{name}.npz"))


def close(value, wanted, limit=1e-6):
    return float(np.abs(np.asarray(value.detach()) - wanted).max(initial=0)) <= limit * max(
        float(np.abs(wanted).max()), 1.0
    )


def test_a_selector_is_the_published_one():
    about, arrays = case("diffrate_ddp.units_a")
    for i, item in enumerate(about["items"]):
        selector = Selector(item["patch_number"], granularity=item["granularity"])
        selector.logits.data = torch.from_numpy(arrays[f"u{i}.logits"])
        own = lambda name: arrays[f"u{i}.{name}"]  # noqa: B023, E731
        kept = selector.kept()
        assert int(kept) == item["kept"]
        assert close(selector.probability, own("probability")) and close(
            selector.token_probability(), own("token_probability")
        )
        assert close(torch.autograd.grad(kept, selector.logits)[0], own("grad_kept"))
        for n_present, name in ((item["mask_n_in"], "mask"), (None, "mask_all")):
            mask = selector.mask(int(kept.detach()), n_present)
            (grad,) = torch.autograd.grad((mask * torch.from_numpy(own("w"))).sum(), selector.logits)
            assert close(mask, own(name)) and close(grad, own(f"grad_{name}"))


def test_the_masked_softmax_is_the_published_one():
    _, arrays = case("diffrate_policy.a")
    logits, soft = (torch.from_numpy(arrays[k]).requires_grad_() for k in ("logits", "soft"))
    out = masked_softmax(logits, torch.from_numpy(arrays["policy"]) - soft.detach() + soft)
    to_logits, to_soft = torch.autograd.grad((out * torch.from_numpy(arrays["w"])).sum(), (logits, soft))
    assert close(out, arrays["out"]) and close(to_logits, arrays["grad_logits"])
    assert close(to_soft, arrays["grad_policy"])


@pytest.mark.parametrize("name", ["tiny_vit.diffrate_search_g4", "tiny_vit.diffrate_search_g4_heavy"])
def test_whole_steps_are_the_published_ones(name, tiny, golden):
    about, arrays = case(name)
    masked = MaskedViT(tiny("tiny_vit").module, granularity=about["granularity"])
    selectors = {f"block{i}.{kind}": getattr(masked, kind)[i] for i in range(6) for kind in ("prune", "merge")}
    for key, selector in selectors.items():
        selector.logits.data = torch.from_numpy(arrays[f"{key}.logits"])
    cost = BlockCost.as_published(64, patch_values=192, classes=10, n_tokens=65)
    logits = [s.logits for s in selectors.values()]
    optimizer = torch.optim.AdamW(logits, lr=0.01, weight_decay=0)
    wanted = torch.nn.functional.one_hot(torch.tensor(about["labels"]), 10) * 0.9 + 0.01
    for i, step in enumerate(about["steps"]):
        flops = expected_macs(masked.kept(), 65, cost=cost)
        out = masked(golden.image)
        distance = -(wanted * out.log_softmax(-1)).sum(1).mean()
        over = (flops / 1e9 - about["target_gflops"]) ** 2
        if i == 0:
            assert close(out, arrays["train_logits"], 2e-5)
            by_loss = {
                "grad_cls64": torch.autograd.grad(distance, logits, retain_graph=True, allow_unused=True),
                "grad_flops64": torch.autograd.grad(over, logits, retain_graph=True),
            }
            for part, grads in by_loss.items():
                for key, grad in zip(selectors, grads):
                    grad, own = (
                        torch.zeros_like(selectors[key].logits) if grad is None else grad,
                        arrays[f"{key}.{part}"],
                    )
                    assert float(np.abs(grad.numpy() - own).max()) <= 1e-4 * max(float(np.abs(own).max()), 1e-9), (
                        key,
                        part,
                    )
        optimizer.zero_grad()
        (about["lambda_flops"] * over + distance).backward()
        optimizer.step()
        assert float(flops.detach()) == step["flops"]
        assert float(distance.detach()) == pytest.approx(step["loss_cls"], abs=1e-5)
        assert list(masked.counts()) == step["kept_after"]
        for key, selector in selectors.items():
            assert close(selector.logits, arrays[f"{key}.after64"][i], 1e-4), (key, i)


@pytest.fixture
def search(tiny):
    """search(share of the dense cost, ...) -> LearnedRates on seeded noise, and the lines of progress."""
    pixels = np.random.default_rng(0).standard_normal((12, 3, 64, 64)).astype(np.float32)
    loaded = tiny("tiny_vit")

    def run(share=0.7, steps=8, **options):
        dense = 18_000_000
        options = {"n_images": 12, "settings": rates.SearchSettings(steps=steps, batch=3), **options}
        return rates.learn_rates(loaded, lambda rows: pixels[list(rows)], target=int(dense * share), **options)

    return run


def test_a_search_ends_at_its_target_and_its_counts_are_a_schedule(search, tiny, schedule_of):
    result = search()
    assert 0.93 * result.target <= result.macs <= result.target < result.macs_dense
    assert result.prune_kept[0] == result.merge_kept[0] == 65 and result.steps == 8
    schedule = schedule_of(
        tiny("tiny_vit").module,
        method="diffrate",
        rates={"prune_kept": result.prune_kept, "merge_kept": result.merge_kept},
    )
    assert schedule.n_final == result.merge_kept[-1]
    assert search() == result, "the same seed gives the same counts"


def test_a_search_that_was_stopped_goes_on_where_it_was(search, tmp_path):
    class Stop(Exception):
        pass

    def stop(line, share):
        if share > 0.95 * 11 / 12:
            raise Stop

    whole = search(steps=12)
    state = tmp_path / "rates.state"
    with pytest.raises(Stop):
        search(steps=12, resume=state, progress=stop)
    assert state.is_file()
    lines = []
    assert search(steps=12, resume=state, progress=lambda line, share: lines.append(line)) == whole
    assert len(lines) == 2 and not state.exists(), "ten steps were done before"
    with pytest.raises(Stop):
        search(steps=12, resume=state, progress=stop)
    with pytest.raises(UsageError, match="another search"):
        search(0.6, steps=12, resume=state)


@pytest.mark.parametrize(
    "request_, words",
    [
        ({"share": 1.5}, "wanted a number between"),
        ({"share": 0.01}, "wanted a number between"),
        ({"n_images": 2}, "at least 3"),
        ({"labels": [0] * 11}, "one for each image"),
        ({"labels": [10] * 12}, "0 to 9"),
    ],
)
def test_what_cannot_be_searched_is_refused(search, request_, words):
    with pytest.raises(UsageError, match=words):
        search(**request_)
