"""The errors of tokexport. Each kind has an exit code of its own on the command line; the text of each is meant for a person.

| error                                  | exit code | what it means                                                |
|----------------------------------------|-----------|--------------------------------------------------------------|
| UsageError, MissingPackageError        | 2         | wrong use: bad input, a foreign or newer file, a missing package |
| EngineError, BuildError, StorageError, GraphError | 3 | a runtime, a builder, the disk or the export itself failed    |
"""


class UsageError(ValueError):
    """Bad input: the message says what came, what was wanted and what to do.

    Raised before anything is written. Its text is one to a few lines, meant for a person.
    """


class MissingPackageError(UsageError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package {package}, which is not installed: pip install 'tokexport[{extra}]'"
        )


EXPORT_PACKAGES = ("torch", "torchvision", "timm", "onnxscript", "onnxsim", "onnx_ir", "ml_dtypes")


def missing_export_package(error: ModuleNotFoundError) -> MissingPackageError | None:
    """The error for a person, when what could not be imported is one of the packages that the extra `export` brings; else None."""
    package = (error.name or "").split(".")[0]
    if package not in EXPORT_PACKAGES:
        return None
    return MissingPackageError(package, "export,cpu", "this")


class FailureError(RuntimeError):
    """Something failed that the user did not do wrong. Never raised itself: one of its kinds below is."""


class EngineError(FailureError):
    """A runtime failed while it loaded or ran a file that should work (out of memory, an operator it lacks, a GPU that is gone)."""


class BuildError(FailureError):
    """A TensorRT builder refused, failed or crashed; nothing was written."""


class StorageError(FailureError):
    """A file could not be written or read: the disk is full, the folder is read-only, the device failed. Nothing was left behind."""


class GraphError(FailureError):
    """An exported graph is not what the schedule says: a defect of tokexport, never of the input."""
