"""The judge of the campaign sees what is wrong: each manner of being wrong is put before it."""

import os

import pytest

from . import judge

GOOD = judge.Outcome(2, "", "Error: no.onnx: no such file\n", {"in": 1}, {"in": 1})
WRONG = {
    "another exit code": (GOOD._replace(code=1), "exit code 1"),
    "it went through": (GOOD._replace(code=0, stderr=""), "exit code 0"),
    "a traceback": (GOOD._replace(stderr="Traceback (most recent call last):\nKeyError: 'x'\n"), "traceback"),
    "no error": (GOOD._replace(stderr=""), "0 errors"),
    "two errors": (GOOD._replace(stderr="Error: one that is long\nError: two that is long\n"), "2 errors"),
    "a warning before it": (GOOD._replace(stderr="UserWarning: x\n" + GOOD.stderr), "1 errors"),
    "an error of one word": (GOOD._replace(stderr="Error: 'x'\n"), "3 characters"),
    "an error nobody reads": (GOOD._replace(stderr="Error: " + "x" * 5000), "5000 characters"),
    "an error of code": (GOOD._replace(stderr="Error: damaged file (KeyError)\n"), "speaks of code"),
    "text on stdout": (GOOD._replace(stdout="hello"), "stdout has"),
    "a file that is left": (GOOD._replace(after={"in": 1, "x.onnx": 2}), "left: x.onnx"),
    "a file that is lost": (GOOD._replace(after={}), "lost: in"),
    "a file that is changed": (GOOD._replace(after={"in": 2}), "changed: in"),
}


def test_a_good_outcome_has_no_complaint():
    assert judge.complaints(GOOD, code=2, as_json=False) == judge.complaints(GOOD, code=2, as_json=True) == []
    failed = judge.Outcome(1, '{"passed": false}', "", {}, {})
    assert judge.complaints(failed, code=1, as_json=True) == []


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_outcome_is_seen(name):
    outcome, words = WRONG[name]
    assert any(words in complaint for complaint in judge.complaints(outcome, code=2, as_json=False))


@pytest.mark.parametrize("text", ["{", "NaN", '{"a": Infinity}', '{"passed": true}'])
def test_json_beside_an_error_or_none_at_all_is_seen(text):
    assert judge.complaints(GOOD._replace(stdout=text), code=2, as_json=True)


def test_a_snapshot_sees_bytes_kinds_links_and_hidden_files(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").symlink_to("a")
    states = [judge.snapshot(tmp_path)]
    for change in (
        lambda: (tmp_path / "a").write_bytes(b"two"),
        lambda: ((tmp_path / "b").unlink(), (tmp_path / "b").symlink_to("c")),
        lambda: (tmp_path / ".hidden").mkdir(),
        lambda: ((tmp_path / "a").unlink(), os.mkfifo(tmp_path / "a")),
    ):
        change()
        states.append(judge.snapshot(tmp_path))
    assert all(a != b for a, b in zip(states, states[1:]))
