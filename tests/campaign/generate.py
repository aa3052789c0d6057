"""All cases of the campaign, made from `rows` and `damages`; the same seed, the same cases in the same order."""

import random
import re
from collections.abc import Iterator
from importlib import import_module
from typing import NamedTuple

import click
from tokexport.tools.cli import COMMANDS

from . import damages
from .rows import ROWS, Row

SEED, N_SHORT = 11, 60
SLOT = re.compile(r"\{([\w.:]+)\}")
# What no option takes, by the type of its values.
NONSENSE = {
    "text": ("", "no such thing"),
    "integer": ("", "many", "1.5", "9" * 30, "-7"),
    "integer range": ("", "many", "-7", "9" * 30),
    "float": ("", "many", "nan", "-7"),
    "choice": ("", "magic"),
}


class Case(NamedTuple):
    """One bad command line.

    Attributes:
        command: as it is typed, one word or two.
        line: words, files as {kind}.
        slot: what of the line is broken; None for a line that is wrong itself.
        damage: its name in the table of that kind.
        code: wanted exit code.
        as_json: whether --json is added.
    """

    command: str
    line: tuple[str, ...]
    slot: str | None
    damage: str
    code: int
    as_json: bool

    @property
    def name(self) -> str:
        """For people, and for pytest -k."""
        place = f"{self.slot}: " if self.slot else ""
        return f"{self.command}, {place}{self.damage}" + (", --json" if self.as_json else "")


def leaves() -> dict[str, click.Command]:
    """Every command that can be typed, those of groups too."""
    commands = {}
    for name in COMMANDS:
        command = import_module(f"tokexport.tools.commands.{name.replace('-', '_')}").command
        commands[name] = command
        if isinstance(command, click.Group):
            commands |= {f"{name} {below}": leaf for below, leaf in command.commands.items()}
    return commands


def words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


def slots(line: tuple[str, ...]) -> list[str]:
    """Kinds of the files that a line names, each once, in order."""
    return list(dict.fromkeys(kind for word in line for kind in SLOT.findall(word)))


def table(slot: str) -> dict[str, damages.Damage]:
    """The damages of a kind of file, or of an output."""
    return damages.OUTPUT if slot.split(".")[0] == "out" else damages.KINDS[slot]


def broken_files(command: str, row: Row) -> Iterator[Case]:
    """Every file of every line, in every manner."""
    for number, line in enumerate(map(words, (row.line, *row.others))):
        before = {slot for earlier in (row.line, *row.others)[:number] for slot in slots(words(earlier))}
        for slot in slots(line):
            for name, damage in table(slot).items() if slot not in before else ():
                if command not in damage.taken:
                    yield Case(command, line, slot, name, damage.codes.get(command, 2), False)


def wrong_options(command: str, row: Row, leaf: click.Command) -> Iterator[Case]:
    """Contradictions of the row, and values of no sense for every option that the command has."""
    case = lambda line, text: Case(command, line, None, text, 2, False)
    good = words(row.line)
    for text in row.contradictions:
        line = words(text[1:]) if text.startswith("=") else good + words(text)
        yield case(line, text)
    if not isinstance(leaf, click.Group) or leaf.invoke_without_command:
        yield case((*good, "--colour"), "--colour")
    for option in leaf.params:
        if not isinstance(option, click.Option):
            continue
        name = option.opts[-1]
        if option.is_flag:
            yield case((*good, f"{name}=yes"), f"{name}=yes")
            continue
        yield case((*good, name), f"{name} without a value")
        for value in NONSENSE[option.type.name]:
            if (name, value) not in row.fine and not (_is_output(option) and value):
                yield case((*good, name, value), f"{name} {value!r}")
    needed = [argument for argument in leaf.params if isinstance(argument, click.Argument) and argument.required]
    if needed:
        yield case(words(command), "nothing given")


def _is_output(option: click.Option) -> bool:
    """Whether any name is good for an option's value."""
    return "-o" in option.opts or option.opts[-1] in ("--report", "--plot", "--timing-cache")


def all_cases(seed: int = SEED) -> list[Case]:
    """Every case there is, in the order of the commands; half of those with --json, by the seed.

    Args:
        seed: of the choice.
    """
    choose, cases = random.Random(seed), []
    for command, leaf in leaves().items():
        has_json = any("--json" in parameter.opts for parameter in leaf.params)
        row = ROWS[command]
        for case in (*broken_files(command, row), *wrong_options(command, row, leaf)):
            cases.append(case._replace(as_json=has_json and choose.random() < 0.5))
    return cases


def short_campaign(cases: list[Case], seed: int = SEED, n: int = N_SHORT) -> set[int]:
    """Which cases `make test` runs: every command at least once, those that load a model seldom.

    Args:
        cases: all of them.
        seed: of the choice.
        n: how many are chosen.
    """
    choose, chosen = random.Random(seed), set()
    by_command: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        by_command.setdefault(case.command, []).append(index)
    for indices in by_command.values():
        chosen |= set(choose.sample(indices, min(2, len(indices))))
    quick = [i for i, case in enumerate(cases) if i not in chosen and not ROWS[case.command].loads]
    return chosen | set(choose.sample(quick, n - len(chosen)))
