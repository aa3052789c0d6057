"""The reducer table: every method, by name. A method is one file with a `Reducer` record, and one row here."""

from __future__ import annotations

from ..errors import UsageError
from ..step import ModelSize
from . import diffrate, dtem, dtps, dynamicvit, etps, evit, none, pitome, tofu, tome
from .base import REQUIRED, Reducer

TABLE: dict[str, Reducer] = {
    module.REDUCER.name: module.REDUCER
    for module in (none, tome, evit, etps, diffrate, dtps, dynamicvit, pitome, tofu, dtem)
}
DEFAULT = "tome"


def get(method: str) -> Reducer:
    """The record of a method. Raises: UsageError for a name that is not in the table."""
    if method not in TABLE:
        raise UsageError(f"unknown method {str(method)[:40]!r}: wanted one of {', '.join(TABLE)}")
    return TABLE[method]


def takers(option: str) -> list[str]:
    """Names of the methods that have an option."""
    return [name for name, reducer in TABLE.items() if option in (o.name for o in reducer.options)]


def swept() -> dict[str, list[str]]:
    """Options that `bench --sweep` may vary, and the methods that take them."""
    names = dict.fromkeys(o.name for reducer in TABLE.values() for o in reducer.options if o.swept)
    return {name: takers(name) for name in names}


def check_options(method: str, given: dict, size: ModelSize) -> dict:
    """A method's options, each checked, with the defaults of those that were not given.

    Args:
        method: a name of the table.
        given: values by option name, as typed or as Python values; None counts as not given.
        size: of the model.
    Raises:
        UsageError: an option is another method's, is missing and has no default, or does not take its value.
    """
    own = {o.name: o for o in get(method).options}
    given = {name: value for name, value in given.items() if value is not None}
    check_names(method, given)
    return {name: o.check(given.get(name, o.default), size) for name, o in own.items()}


def check_names(method: str, given: dict) -> None:
    """Make sure a method has these options and that none is missing; values are not looked at.

    Args:
        method: a name of the table.
        given: the options that are given, by name.
    Raises:
        UsageError: an option is another method's, or one is missing and has no default.
    """
    own = {o.name: o for o in get(method).options}
    for name in given:
        if name not in own:
            methods = ", ".join(takers(name))
            words = f"goes with method {methods}, not with {method}" if methods else "is no option of any method"
            raise UsageError(f"{name} {words}")
    missing = [name for name, o in own.items() if o.default is REQUIRED and name not in given]
    if missing:
        raise UsageError(f"method {method} needs {', '.join(missing)}")
