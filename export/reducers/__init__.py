"""The reducer table: every method, by name.

A reducer is a module with
    NEEDS       the signals it reads: "metric", "attention" or "head" (see `Signals`);
    OPTIONS     what it is asked with, and the defaults (None: must be given);
    steps       the counts: (options, n_tokens, n_prefix, depth) -> (steps, notes);
    reference   the method as its paper writes it, eager: (Signals, Step[, given decisions]) -> MergePlan with row numbers and weights;
    static      the same with fixed shapes: (Signals, Step, by_target) -> MergePlan;
    regret      how far given decisions are from the best ones by the reference's own scores (0: as good);
    labels      optional, names of a static plan's output rows: (Step, n_prefix) -> one int per row (default: the row numbers).
"""

from importlib import import_module

from ..errors import UsageError

METHODS = ("none", "tome", "evit", "etps", "diffrate", "dtps", "dynamicvit")
SQUEEZE = ("etps", "dtps")  # methods whose folded tokens count as gone


def get(method: str):
    """The reducer module of a method; None for "none". Raises: UsageError for a name that is not in the table."""
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}: wanted one of {', '.join(METHODS)}")
    return None if method == "none" else import_module(f".{method}", __name__)


def check_options(method: str, given: dict) -> None:
    """Raises: UsageError for an option that is another method's, or when one is missing that has no default."""
    own = getattr(get(method), "OPTIONS", {})
    for name in given:
        if name not in own:
            takers = [m for m in METHODS if name in getattr(get(m), "OPTIONS", {})]
            words = (
                f"goes with --method {', '.join(takers)}, not with {method}" if takers else "is no option of any method"
            )
            raise UsageError(f"--{name.replace('_', '-')} {words}")
    missing = [name for name, default in own.items() if default is None and name not in given]
    if missing:
        raise UsageError(f"--method {method} needs {', '.join('--' + m for m in missing)}")
