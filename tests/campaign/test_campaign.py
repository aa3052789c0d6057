"""Hostile command lines, hundreds of them, over all commands: each one clear error, and nothing written or lost.

`pytest tests/campaign -k "onnx and rates"` runs some; a new command needs a row in `rows`, or the first test fails.
"""

import shutil
import signal
import sys
import tempfile

import pytest

from . import generate, judge, rows
from .material import COMPANIONS, material  # noqa: F401  a fixture

CASES = generate.all_cases()
SHORT = generate.short_campaign(CASES)
LONGEST = 120  # seconds of a case; what waits for a pipe or a terminal waits for ever


def test_every_command_has_a_row_and_every_kind_its_damages():
    assert rows.ROWS.keys() == generate.leaves().keys()
    for row in rows.ROWS.values():
        for line in (row.line, *row.others):
            assert all(generate.table(slot) for slot in generate.slots(generate.words(line)))
    assert len(CASES) >= 300 and len(SHORT) == generate.N_SHORT
    assert {CASES[i].command for i in SHORT} == {case.command for case in CASES} == rows.ROWS.keys()
    assert generate.all_cases() == CASES and len({case.name for case in CASES}) == len(CASES)


@pytest.fixture
def alarm():
    """The test fails, instead of waiting for ever, when a case takes longer than LONGEST."""

    def late(*_):
        pytest.fail(f"the case took more than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to run in, where temporary files, caches and the home are too."""
    for name in ("in", "out", "tmp", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name, folder in {"TMPDIR": "tmp", "HOME": "home", "XDG_CACHE_HOME": "home"}.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    return tmp_path


def put(kind, place, material):  # noqa: F811
    """A copy of a good file in `in`, with what belongs to it; its path."""
    source = material(kind)
    target = place / "in" / source.name
    if not target.exists():
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        for ending in COMPANIONS.get(kind, ()):
            shutil.copy(source.with_name(source.name + ending), target.with_name(target.name + ending))
    return target


def command_line(case, place, material):  # noqa: F811
    """The words of a case, its files copied and the one broken."""
    paths = {}
    for slot in generate.slots(case.line):
        kind, _, suffix = slot.partition(".")
        good = place / "out" / f"x.{suffix}".rstrip(".") if kind == "out" else put(kind, place, material)
        damage = generate.table(slot)[case.damage].apply if slot == case.slot else lambda path: path
        paths[slot] = str(damage(good))
    line = [generate.SLOT.sub(lambda match: paths[match[1]], word) for word in case.line]
    n_words = len(case.command.split())
    return [*line[:n_words], *(["--json"] if case.as_json else []), *line[n_words:]]


def run(line, place, capfd):
    """The command within this process."""
    from tokexport.tools import cli

    before, argv = judge.snapshot(place), sys.argv
    sys.argv = ["tokexport", *line]
    capfd.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as e:
        code = e.code or 0
    finally:
        sys.argv = argv
    out, err = capfd.readouterr()
    return judge.Outcome(code, out, err, before, judge.snapshot(place))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if i in SHORT else pytest.mark.slow) for i, case in enumerate(CASES)],
)
def test_a_bad_line_is_one_clear_error_and_nothing_else(case, place, material, capfd, alarm):  # noqa: F811
    line = command_line(case, place, material)
    outcome = run(line, place, capfd)
    wrong = judge.complaints(outcome, code=case.code, as_json=case.as_json)
    assert not wrong, f"{' '.join(line)}\n{wrong}\nstderr: {outcome.stderr[:1500]}".replace(str(place), "")


GOOD = [
    pytest.param(command, line, id=line, marks=pytest.mark.slow if row.loads else ())
    for command, row in rows.ROWS.items()
    for line in (row.line, *row.others)
    if row.good is not None
]


@pytest.mark.parametrize("command, line", GOOD)
def test_the_good_lines_are_good(command, line, place, material, capfd, alarm):  # noqa: F811
    """So what is wrong with a case is what was broken, not the line."""
    case = generate.Case(command, generate.words(line), None, "", 0, False)
    outcome = run(command_line(case, place, material), place, capfd)
    assert outcome.code == rows.ROWS[command].good, outcome.stderr
