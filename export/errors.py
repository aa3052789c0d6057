"""The one error that means "wrong use": the command line prints it and exits with 2."""


class UsageError(ValueError):
    """Bad input: the message says what came, what was wanted and what to do.

    Raised before anything is written. Its text is one to a few lines, meant for a person.
    """


class MissingPackageError(UsageError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package}, which is not installed: pip install 'tokexport[{extra}]'")


class GraphError(RuntimeError):
    """An exported graph is not what the schedule says (a defect of the export, never of the input)."""
