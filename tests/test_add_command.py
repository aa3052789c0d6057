"""CONTRIBUTING.md's "add a command", followed: one file and one row of COMMANDS."""

import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tokexport.tools import cli, commands

TOY = '''
import click

from tokexport.export.errors import UsageError


@click.command("toy")
@click.argument("n", type=int)
def command(n):
    """Say N twice."""
    if n < 0:
        raise UsageError(f"N is {n}: wanted 0 or more")
    click.echo(f"{n} {n}")
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.setitem(cli.COMMANDS, "toy", "Say a number twice.")
    yield
    sys.modules.pop(f"{commands.__name__}.toy", None)
    vars(commands).pop("toy", None)


def test_a_command_is_one_file_and_one_row(toy, monkeypatch, capsys):
    runner = CliRunner()
    assert "Say a number twice." in runner.invoke(cli.group, ["--help"]).output
    assert runner.invoke(cli.group, ["toy", "3"]).output == "3 3\n"
    monkeypatch.setattr(sys, "argv", ["tokexport", "toy", "--", "-3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "wanted 0 or more" in capsys.readouterr().err


def test_every_command_is_a_file_with_a_row_and_help():
    files = {path.stem for folder in commands.__path__ for path in Path(folder).glob("*.py")}
    with_a_command = {
        name for name in files - {"__init__"} if hasattr(import_module(f"tokexport.tools.commands.{name}"), "command")
    }
    assert with_a_command == set(map(cli.module_of, cli.COMMANDS))
    for name in cli.COMMANDS:
        command = import_module(f"tokexport.tools.commands.{cli.module_of(name)}").command
        assert command.name == name and command.help
        options = [p for p in command.params if isinstance(p, click.Option) and not p.help and not p.show_default]
        assert not options, (name, options)
