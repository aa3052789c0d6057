"""DiffRate's own files: learned candidates of a checkpoint, lists nested in a rates file."""

import json

import pytest
import torch
from tokexport.export.checkpoints.learned_rates import list_in, names_in, rates_of_checkpoint

from tokexport import UsageError

LISTS = {
    "ViT-T-DeiT": {
        "0.9": {"prune_kept_num": [17, 12], "merge_kept_num": [15, 9]},
        "1.0": {"prune_kept_num": [17], "merge_kept_num": [15]},
    }
}


def selector(probability, candidates=(16.0, 12.0, 8.0, 4.0)):
    return {"kept_token_candidate": torch.tensor(candidates), "selected_probability": torch.tensor(probability)}


def state_of(*blocks, prefix=""):
    return {
        f"{prefix}blocks.{i}.{step}_ddp.{part}": value
        for i, pair in enumerate(blocks)
        for step, tensors in zip(("prune", "merge"), pair)
        for part, value in tensors.items()
    }


@pytest.mark.parametrize("prefix", ["", "module.", "a.b."])
def test_a_count_is_the_expected_patches_rounded_up_and_the_class_token(prefix):
    state = state_of(
        (selector([1.0, 0, 0, 0]), selector([0.5, 0.5, 0, 0])),  # 16, 14
        (selector([0.3, 0.7, 0, 0]), selector([0, 0, 0.1, 0.9])),  # 13.2 -> 14, 4.4 -> 5
        prefix=prefix,
    )
    assert rates_of_checkpoint({**state, "head.weight": torch.ones(1)}) == {
        "prune_kept": [17, 15],
        "merge_kept": [15, 6],
    }


def test_the_rounding_of_float32_gives_no_token_more():
    p = torch.softmax(torch.zeros(49), 0)  # as untrained: candidates 196, 192, ..., 4, expected 100
    state = state_of((selector(p.tolist(), tuple(range(196, 0, -4))),) * 2)
    assert rates_of_checkpoint(state)["prune_kept"] == [101]


def test_a_checkpoint_without_candidates_has_no_rates():
    assert rates_of_checkpoint({"blocks.0.norm1.weight": torch.ones(2)}) is None


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("blocks.0.merge_ddp.selected_probability"), "blocks.0.merge_ddp has no selected_probability"),
        (lambda s: s.pop("blocks.0.merge_ddp.kept_token_candidate"), "has no kept_token_candidate"),
        (lambda s: s.update({"blocks.0.prune_ddp.selected_probability": torch.ones(4)}), "do not sum to 1"),
        (
            lambda s: s.update({"blocks.0.prune_ddp.selected_probability": torch.ones(3) / 3}),
            "4 candidates, 3 probabilities",
        ),
        (lambda s: s.update({"blocks.0.prune_ddp.kept_token_candidate": torch.full((4,), torch.nan)}), "give no count"),
    ],
)
def test_what_is_no_selector_is_refused(change, words):
    state = state_of((selector([1.0, 0, 0, 0]),) * 2)
    change(state)
    with pytest.raises(UsageError, match=words):
        rates_of_checkpoint(state)


@pytest.mark.parametrize("pairs", [False, True])
def test_nested_lists_offer_their_names(pairs):
    lists = json.loads(json.dumps(LISTS), object_pairs_hook=list) if pairs else LISTS
    assert names_in(lists) == ["ViT-T-DeiT@0.9", "ViT-T-DeiT@1.0"]
    assert list_in(lists, "ViT-T-DeiT@0.9") == LISTS["ViT-T-DeiT"]["0.9"]
    assert list_in(lists, "vit-t-deit@1") == LISTS["ViT-T-DeiT"]["1.0"]
    with pytest.raises(UsageError, match="no list 'ViT-S@2' in the file; wanted one of ViT-T-DeiT@0.9, ViT-T-DeiT@1.0"):
        list_in(lists, "ViT-S@2")


def test_a_file_of_one_list_has_no_names():
    assert names_in(LISTS["ViT-T-DeiT"]["0.9"]) == [] and names_in([1, 2]) == [] and names_in("x") == []


def test_the_lists_of_a_file_are_reached_by_name(tmp_path):
    from tokexport.export.reducers.diffrate_rates import resolve

    path = tmp_path / "compression_rate.json"
    path.write_text(json.dumps(LISTS))
    assert resolve(f"{path}@ViT-T-DeiT@0.9").prune_kept == [17, 12]
    with pytest.raises(UsageError, match="several lists by name: name one, compression_rate.json@ViT-T-DeiT@0.9, "):
        resolve(path)
    with pytest.raises(UsageError, match="no list 'ViT-T-DeiT@7' in the file; wanted one of"):
        resolve(f"{path}@ViT-T-DeiT@7")
