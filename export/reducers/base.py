"""What a reducer is: a record with its options, its counts and its decisions. Imports no torch, nor does any row of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UsageError
from ..step import ModelSize, Step

if TYPE_CHECKING:
    from torch import Tensor

    from ..margins import RowMargins
    from ..plan import MergePlan, Signals


class _Required:
    """Stands for the default of an option that must be given."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()


@dataclass(frozen=True)
class Option:
    """One thing a method can be asked for, at the command line (`--keep-rate`) or as an argument (`keep_rate=`).

    Args:
        name: of the argument. An option of one name means the same in every method that has it.
        help: what it does, in words, without the methods' names and the default.
        default: taken when it is not given; REQUIRED when it must be.
        metavar: how a value is written, for the help; None for choices and flags.
        choices: the words that it takes, when it takes words.
        flag: it is true or false (`--fuse/--no-fuse`).
        swept: `bench --sweep` may vary it.
        parse: (value, model size) -> the value as it is kept; checks what can be checked without the other options.
        default_help: the default in words, where its value does not tell it.
    """

    name: str
    help: str
    default: object = REQUIRED
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    flag: bool = False
    swept: bool = False
    parse: Callable[[object, ModelSize], object] | None = None
    default_help: str | None = None

    def check(self, value: object, size: ModelSize) -> object:
        """A value as it is kept.

        Args:
            value: as typed, or as a Python value.
            size: of the model.
        Raises:
            UsageError: the option does not take this value.
        """
        if self.flag and not isinstance(value, bool):
            raise UsageError(f"{self.name} {str(value)[:40]!r}: wanted true or false")
        if self.choices and value not in self.choices:
            raise UsageError(f"{self.name} {str(value)[:40]!r}: wanted {' or '.join(self.choices)}")
        return value if self.parse is None else self.parse(value, size)


class Counts(NamedTuple):
    """What a method makes of its options for one model.

    Args:
        options: as they are kept, JSON values.
        steps: the reductions that change something, in block order.
        notes: what was cut, scaled or left out, in words.
        prop_attn: attention is proportional to the tokens' sizes.
        pool: how an average pool weighs tokens: "auto", "size" or "mean".
        n_layers: layers that were trained for the steps' signal, one for each stage.
    """

    options: dict
    steps: tuple[Step, ...] | list[Step] = ()
    notes: tuple[str, ...] | list[str] = ()
    prop_attn: bool = False
    pool: str = "mean"
    n_layers: int = 0


@dataclass(frozen=True)
class Reducer:
    """One method. Everything that the rest of the code knows of it is here.

    Args:
        name: in the table, in `--method` and in files.
        title: as its paper writes it.
        help: one line.
        steps: (options with their defaults, each checked; model size) -> Counts.
        options: what it is asked with.
        signals: the signals its steps may name (keys of `plan.SIGNALS`), or none.
        reference: (Signals, Step, given decisions or None) -> MergePlan with row numbers: the method as its paper writes it, eager,
            on a batch. Given decisions are kept, and only their weights are computed.
        static: (Signals, Step) -> MergePlan: the same decisions with fixed shapes, in the operators of `kernels.ops`.
        regret: (Signals, Step, MergePlan) -> [B]: what given decisions give away in the reference's own scores; 0: as good.
        margins: (Signals, Step, MergePlan) -> RowMargins: how clear each row's part of a plan is (see `export/margins.py`); None for
            a method that decides nothing by scores.
        labels: (Step, n_prefix) -> names of a static plan's output rows, one int per row; None: the row numbers.
        squeezes: folded tokens count as gone in the map of tokens: they only tint their hosts (TPS).
        node: select, fold and eps of the node `TokenReduce` that a step with folded tokens is (`kernels.token_reduce`); None: there
            is none, and its steps stay plain operators.
    """

    name: str
    title: str
    help: str
    steps: Callable[[dict, ModelSize], Counts]
    options: tuple[Option, ...] = ()
    signals: tuple[str, ...] = ()
    reference: Callable[..., MergePlan] | None = None
    static: Callable[[Signals, Step], MergePlan] | None = None
    regret: Callable[[Signals, Step, MergePlan], Tensor] | None = None
    margins: Callable[[Signals, Step, MergePlan], RowMargins] | None = None
    labels: Callable[[Step, int], tuple[int, ...]] | None = None
    squeezes: bool = False
    node: Mapping[str, str | float] | None = None

    def row_labels(self, step: Step, n_prefix: int) -> tuple[int, ...]:
        """Names of a static plan's output rows, one int per row (see `plan.StaticLayout`).

        Args:
            step: how many rows stay.
            n_prefix: prefix tokens at the head of the sequence.
        """
        return tuple(range(step.n_kept)) if self.labels is None else self.labels(step, n_prefix)
