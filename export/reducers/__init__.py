"""The reducer table: every method, by name.

A reducer is a module with
    NEEDS       names of the `Signals` fields it reads besides x and size;
    reference   the method as its paper writes it, eager: (Signals, Step) -> MergePlan with row numbers;
    static      the same decisions with fixed shapes: (Signals, Step, by_target) -> MergePlan with labels;
    labels      names of a static plan's output rows: (Step, n_prefix) -> one int per row;
    regret      how far given decisions are from the best ones by the reference's own scores (0: as good).
"""

from importlib import import_module

from ..errors import UsageError

METHODS = {"none": None, "tome": "tome"}


def get(method: str):
    """The reducer module of a method; None for "none". Raises: UsageError for a name that is not in the table."""
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}: wanted one of {', '.join(METHODS)}")
    return METHODS[method] and import_module(f".{METHODS[method]}", __name__)
