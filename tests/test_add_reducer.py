"""CONTRIBUTING.md's "A whole reducer", followed: the toy one there is exported and verified like any other, from Python and the shell."""

import importlib.util
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokexport.export import reducers
from tokexport.export.reducers.base import Option, Reducer

import tokexport

from .cases import METHODS

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
SHARED = {"__init__", "base", "options", "matching", "merging", "ranking", "diffrate_rates"}  # files that are no method


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python reducer\n(.*?)```", PAGE, re.S)
    (tmp_path / "toy.py").write_text(code)
    spec = importlib.util.spec_from_file_location("toy", tmp_path / "toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(reducers.TABLE, "toy", module.REDUCER)
    return module


def test_the_readmes_reducer_works(toy, tiny, tmp_path):
    loaded = tiny("tiny_vit")
    schedule = loaded.schedule("toy", at="1,3")
    assert [m for _, m in schedule.tokens_per_block()] == [65, 33, 33, 17, 17, 17]
    for batch in (1, None):
        path = tokexport.export_onnx(loaded, schedule, tmp_path / f"{batch}.onnx", batch=batch, sources=True).path
        report = tokexport.verify(path)
        assert report.passed and report.decisions == 1.0 and {o.name for o in report.outputs} == {"logits", "sources"}


def test_a_row_of_the_table_is_a_method_of_the_command_line(toy, monkeypatch):
    """One row: the method, a new option of its own, its help, and that it may be swept."""
    from tokexport.tools.commands import method_options

    extra = Option("hop", "how far apart tokens stay", default=2, metavar="N", swept=True)
    monkeypatch.setitem(
        reducers.TABLE, "toy", Reducer("toy", "Toy", "a toy", toy.steps, options=(*toy.REDUCER.options, extra))
    )
    import click

    seen = {}
    command = click.command()(method_options.method_options(lambda **options: seen.update(options)))
    shown = CliRunner().invoke(command, ["--help"]).output
    assert "--hop N" in shown and "Toy: how far apart tokens stay; default 2." in " ".join(shown.split())
    assert CliRunner().invoke(command, ["--hop", "3"]).exit_code == 0 and seen["hop"] == "3" and seen["r"] is None
    assert reducers.swept()["hop"] == ["toy"]


def test_every_reducer_is_a_small_file_with_all_its_parts():
    folder = Path(reducers.__file__).parent
    assert {p.stem for p in folder.glob("*.py")} - SHARED == set(reducers.TABLE) == set(METHODS)
    for method, reducer in reducers.TABLE.items():
        assert reducer.name == method and reducer.help and reducer.title
        assert method == "none" or (reducer.reference and reducer.static and reducer.regret), method
        assert all(o.help and not o.help.endswith(".") for o in reducer.options)


def test_an_option_of_one_name_means_the_same_in_every_method():
    kinds = {}
    for reducer in reducers.TABLE.values():
        for o in reducer.options:
            kinds.setdefault(o.name, set()).add((o.flag, o.choices, o.metavar, o.swept))
    assert {name for name, found in kinds.items() if len(found) > 1} == set()
