"""Keep counts of DiffRate: the published lists, lists from a file, other token counts, and the command that lists them."""

import json
import os
import subprocess
import sys

import pytest
from tokexport.export.reducers import diffrate
from tokexport.export.reducers import diffrate_rates as rates
from tokexport.export.step import ModelSize

from tokexport import Schedule, UsageError

NAMES = [f"{model}@{cost}" for model, lists in rates.published().items() for cost in lists]
DEPTH = {"deit_tiny": 12, "deit_small": 12, "deit_base": 12, "mae_base": 12, "mae_large": 24, "mae_huge": 32}
OFF = {"deit_tiny@0.6": 0.655}  # GFLOPs whose published name is more than 5% from our count


def schedule(prune, merge, n_tokens, n_prefix, depth):
    steps, notes = diffrate.block_counts(prune, merge, size=ModelSize(n_tokens, n_prefix, depth))
    return Schedule(
        "diffrate", n_tokens, n_prefix, depth, {"prune_kept": prune, "merge_kept": merge}, tuple(steps), tuple(notes)
    )


def test_the_published_lists_are_those_of_plain_vits():
    assert {m: len(lists) for m, lists in rates.published().items()} == {
        "deit_tiny": 5,
        "deit_small": 5,
        "deit_base": 5,
        "mae_base": 4,
        "mae_large": 5,
        "mae_huge": 4,
    }
    prune, merge = rates.published()["deit_small"]["2.9"][:2]
    assert prune == [197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3]
    assert merge == [197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3]


@pytest.mark.parametrize("name", NAMES)
def test_every_published_list_is_a_schedule(name):
    prune, merge, n_tokens = rates.resolve(name)
    model = name.split("@")[0]
    assert n_tokens == (257 if model == "mae_huge" else 197) == max(prune + merge)
    assert schedule(prune, merge, n_tokens, 1, DEPTH[model]).n_final == min(merge)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_to, n_prefix", [(65, 1), (198, 2), (577, 1), (261, 5), (1601, 1), (3, 1)])
def test_every_published_list_fits_another_model(name, n_to, n_prefix):
    prune, merge, n_from = rates.find(name)
    scaled = [rates.scale(c, n_from, n_to=n_to, n_prefix=n_prefix) for c in (prune, merge)]
    made = schedule(*scaled, n_to, n_prefix, len(prune))
    assert made.n_final == min(scaled[1]) >= n_prefix + 1 and scaled[0][0] == n_to


def test_scaling_is_exact_and_keeps_the_order():
    assert rates.scale([197, 99, 3, 2, 1], 197, n_to=197, n_prefix=1) == [197, 99, 3, 2, 1]
    assert rates.scale([197, 99, 3, 2, 1], 197, n_to=198, n_prefix=2) == [198, 100, 4, 3, 2]
    assert rates.scale([197, 99, 3, 2, 1], 197, n_to=50, n_prefix=1) == [50, 26, 2, 2, 1], (
        "98 of 196 patches are 24.5 of 49: halves go up; one is kept"
    )
    assert rates.scale([197, 99, 3], 197, n_to=785, n_prefix=1) == [785, 393, 9]
    assert (s := rates.scale(list(range(1, 198)), 197, n_to=60, n_prefix=1)) == sorted(s)


@pytest.mark.parametrize("n_from, n_to, n_prefix", [(1, 197, 1), (197, 1, 1), (197, 5, 5)])
def test_nothing_is_scaled_without_patches(n_from, n_to, n_prefix):
    with pytest.raises(UsageError, match="at least one patch"):
        rates.scale([1], n_from, n_to=n_to, n_prefix=n_prefix)


def test_a_cost_may_be_written_either_way():
    assert rates.find("deit_small@2.90") == rates.find("deit_small@2.9") and rates.find("deit_base@10") == rates.find(
        "deit_base@10.0"
    )


@pytest.mark.parametrize(
    "said, words",
    [
        ("deit_small@2.8", "deit_small@2.7, deit_small@2.9"),
        ("deit_small@", "at no GFLOPs"),
        ("deit_small@2_9", "at 2_9 GFLOPs"),
        ("deit_small@nan", "at nan"),
        ("deit_small@２.9", "deit_small@2.9"),
        ("deit_small@2.9@3", "deit_small@2.9"),
        ("@2.9", "MODEL@GFLOPS"),
        ("vit_small@2.9", "deit_tiny, deit_small, deit_base, mae_base"),
        ("caformer_s36@5.2", "no published list"),
        ("x" * 500 + "@1", "or a file"),
        ("a\0@1", "or a file"),
    ],
    ids=range(11),
)
def test_what_was_not_published_is_refused_with_what_was(said, words):
    with pytest.raises(UsageError, match="^rates") as e:
        rates.resolve(said)
    assert words in str(e.value) and len(str(e.value)) < 350


@pytest.mark.parametrize(
    "keys, n_tokens", [(("prune_kept", "merge_kept"), 9), (("prune_kept_num", "merge_kept_num"), None)]
)
def test_a_file_is_read(tmp_path, keys, n_tokens):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({keys[0]: [9, 5], keys[1]: [9, 3], **({"n_tokens": n_tokens} if n_tokens else {})}))
    assert rates.read(path) == rates.resolve(str(path)) == ([9, 5], [9, 3], n_tokens)


def test_a_file_comes_before_a_published_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deit_small@2.9").write_text('{"prune_kept": [9], "merge_kept": [9]}')
    assert rates.resolve("deit_small@2.9") == ([9], [9], None)


DAMAGED = {
    "empty": (b"", "not JSON"),
    "text": (b"hello", "not JSON"),
    "cut": (b'{"prune_kept": [9', "not JSON"),
    "binary": (b"\xff\xfe\0\x81", "not JSON"),
    "deep": (b"[" * 200000, "not JSON"),
    "long number": (b'{"prune_kept": [' + b"9" * 5000 + b'], "merge_kept": [9]}', "not JSON"),
    "list": (b"[[9], [9]]", "no JSON object"),
    "number": (b"9", "no JSON object"),
    "null": (b"null", "no JSON object"),
    "nothing in it": (b"{}", "no prune_kept and no merge_kept"),
    "half": (b'{"prune_kept": [9]}', "has no merge_kept"),
    "unknown key": (b'{"prune_kept": [9], "merge_kept": [9], "n_token": 9}', "unknown key 'n_token'"),
    "twice": (b'{"prune_kept": [9], "merge_kept": [9], "prune_kept_num": [9]}', "a second 'prune_kept_num'"),
    "same twice": (b'{"prune_kept": [9], "merge_kept": [9], "merge_kept": [8]}', "a second 'merge_kept'"),
    "no list": (b'{"prune_kept": 9, "merge_kept": [9]}', "prune_kept is 9"),
    "empty list": (b'{"prune_kept": [], "merge_kept": []}', "is []"),
    "object": (b'{"prune_kept": {"0": 9}, "merge_kept": [9]}', "prune_kept has ('0', 9)"),
    "text count": (b'{"prune_kept": ["9"], "merge_kept": [9]}', "prune_kept has '9' for block 0"),
    "float": (b'{"prune_kept": [9], "merge_kept": [9.0]}', "merge_kept has 9.0"),
    "true": (b'{"prune_kept": [true], "merge_kept": [9]}', "has True"),
    "nan": (b'{"prune_kept": [NaN], "merge_kept": [9]}', "has nan"),
    "zero": (b'{"prune_kept": [0], "merge_kept": [9]}', "has 0 for block 0"),
    "unequal": (b'{"prune_kept": [9, 8], "merge_kept": [9]}', "2 counts in prune_kept, 1 in merge_kept"),
    "n_tokens": (b'{"prune_kept": [9], "merge_kept": [9], "n_tokens": true}', "n_tokens is no number"),
    "n_tokens 1": (b'{"prune_kept": [9], "merge_kept": [9], "n_tokens": 1}', "n_tokens is no number"),
    "n_tokens null": (b'{"prune_kept": [9], "merge_kept": [9], "n_tokens": null}', "n_tokens is no number"),
    "large": (b" " * (10**6 + 1), "larger than"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_refused_in_words(tmp_path, what):
    content, words = DAMAGED[what]
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="^rates .*bad.json") as e:
        rates.resolve(path)
    assert words in str(e.value)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is a directory"):
        rates.resolve(tmp_path)
    for said in (tmp_path / "none.json", tmp_path / "pipe", "n" * 5000, "a\0b"):
        with pytest.raises(UsageError, match="no such file"):
            rates.resolve(said)
    for said in ("", " ", None, 5, ["deit_small@2.9"]):
        with pytest.raises(UsageError, match="wanted a published list"):
            rates.resolve(said)


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """listed(*options) -> what `tokexport rates` gave, in a process where torch cannot be imported."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('torch was imported')")
    env = {**os.environ, "PYTHONPATH": str(folder)}
    return lambda *options: subprocess.run(
        [sys.executable, "-m", "tokexport", "rates", *options], capture_output=True, text=True, timeout=60, env=env
    )


def test_the_command_lists_them_without_torch(listed):
    out = listed()
    assert out.returncode == 0 and out.stdout == ""
    assert all(name in out.stderr for name in NAMES)
    assert (
        "deit_small@2.9   2.90 G per image (dense 4.60 G, ratio 1.583)\n  197 in, then 197 194 176 156 141"
        in out.stderr
    )


def test_the_json_says_what_each_costs(listed):
    out = listed("--json")
    rows = json.loads(out.stdout)["rates"]
    assert out.returncode == 0 and out.stderr == "" and [r["name"] for r in rows] == NAMES
    for row in rows:
        gflops = OFF.get(row["name"], row["published_gflops"])
        assert row["macs"] / 1e9 == pytest.approx(gflops, rel=0.05), row["name"]
        assert row["macs_dense"] / row["macs"] == row["ratio"] > 1
        assert [m for _, m in row["tokens"]][-1] == min(row["merge_kept"]) and len(row["tokens"]) == row["depth"]


def test_without_pruning_as_many_tokens_are_left_and_all_are_merged():
    make = lambda **more: Schedule.parse("diffrate", n_tokens=257, depth=12, rates="deit_small@2.9", **more)
    pruning, merging = make(), make(prune=False)
    assert merging.tokens_per_block() == pruning.tokens_per_block()
    assert any(s.n_folded < s.n_in - s.n_out for s in pruning.steps)
    assert all(s.n_folded == s.n_in - s.n_out for s in merging.steps)
    assert any("nothing is pruned: the " in note for note in merging.notes)


def test_counts_of_another_model_that_prune_are_said_to():
    said = lambda **size: any("counts of another model" in n for n in Schedule.parse("diffrate", **size).notes)
    assert said(n_tokens=257, depth=12, rates="deit_small@2.9")
    assert not said(n_tokens=197, depth=12, rates="deit_small@2.9")  # the model they are for
    assert not said(n_tokens=257, depth=12, rates="deit_small@2.9", prune=False)
    merging = {"prune_kept": [65, 60], "merge_kept": [60, 50], "n_tokens": 65}
    assert not said(n_tokens=129, depth=2, rates=merging)
