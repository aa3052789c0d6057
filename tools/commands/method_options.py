"""The methods' options at the command line, made from the reducer table."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import click

from ...export import reducers
from ...export.errors import UsageError
from ...export.reducers.base import REQUIRED, Option


def method_options(command: Callable) -> Callable:
    """Add one option for every name in the table, in the table's order; a command gets them by their names, None where not given."""
    for name, takers in reversed(_by_name().items()):
        command = _add(command, name, takers)
    return command


def _by_name() -> dict[str, list[tuple[str, Option]]]:
    """Name -> (title of the method, its option) of every method that has one of this name."""
    options: dict[str, list[tuple[str, Option]]] = {}
    for reducer in reducers.TABLE.values():
        for option in reducer.options:
            options.setdefault(option.name, []).append((reducer.title, option))
    return options


def _add(command: Callable, name: str, takers: list[tuple[str, Option]]) -> Callable:
    first, flag = takers[0][1], flag_of(name)
    words = help_of(takers)
    if first.flag:
        return click.option(f"{flag}/--no-{flag.removeprefix('--')}", name, default=None, help=words)(command)
    choices = list(dict.fromkeys(c for _, option in takers for c in option.choices))
    kind = click.Choice(choices) if choices else None
    return click.option(flag, name, type=kind, metavar=first.metavar, help=words)(command)


def help_of(takers: list[tuple[str, Option]]) -> str:
    """The help of one option: which methods take it, what it does in each, and its default."""
    titles: dict[str, list[str]] = {}
    for title, option in takers:
        default = option.default_help or ("on" if option.default is True else str(option.default))
        words = option.help + ("" if option.default is REQUIRED else f"; default {default}")
        titles.setdefault(words, []).append(title)
    return " ".join(f"{', '.join(names)}: {words}." for words, names in titles.items())


def flag_of(name: str) -> str:
    """The flag of an argument: keep_rate -> --keep-rate."""
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def as_flags(names) -> Iterator[None]:
    """Errors of the library speak of arguments (`keep_rate 2: ...`, `score="mean"`); here they leave speaking of the flags.

    Args:
        names: of the arguments that are flags of the command.
    """
    try:
        yield
    except UsageError as e:
        known = "|".join(map(re.escape, names))
        text = re.sub(rf"^({known})\b", lambda m: flag_of(m[1]), str(e))
        text = re.sub(rf'\b({known})="([^"]*)"', lambda m: f"{flag_of(m[1])} {m[2]}", text)
        text = re.sub(
            r"^method (\S+) needs (.*)$",
            lambda m: f"--method {m[1]} needs {', '.join(map(flag_of, m[2].split(', ')))}",
            text,
        )
        raise UsageError(text) from None
