"""tokexport: Vision Transformers with fewer tokens, as static ONNX graphs that are proven to compute what PyTorch computes.

The public names are loaded when they are first used, so `import tokexport` and the command line start at once.
"""

from importlib import import_module
from typing import Any

_HOME = {  # public name: its module, and the name it has there
    "load_model": ("export.models.load", "load_model"),
    "Schedule": ("export.schedule", "Schedule"),
    "reduce_model": ("export.reference", "reduce_model"),
    "export_onnx": ("engines.onnx_export", "export_onnx"),
    "quantize": ("engines.quantize", "quantize"),
    "build_engine": ("engines.tensorrt.build", "build_engine"),
    "inspect": ("engines.files", "inspect_file"),
    "open_runner": ("engines.runners", "open_runner"),
    "verify": ("engines.parity.verify", "verify"),
    "bench": ("engines.measure.bench", "bench"),
    "open_ladder": ("engines.ladder", "open_ladder"),
    "evaluate": ("engines.measure.evaluate", "evaluate"),
    "tune": ("engines.search.tune", "tune"),
    "embed": ("engines.embed.local", "embed"),
    "predict": ("engines.predict", "predict"),
    "UsageError": ("export.errors", "UsageError"),
    "MissingPackageError": ("export.errors", "MissingPackageError"),
    "FailureError": ("export.errors", "FailureError"),
    "EngineError": ("export.errors", "EngineError"),
    "BuildError": ("export.errors", "BuildError"),
    "StorageError": ("export.errors", "StorageError"),
    "GraphError": ("export.errors", "GraphError"),
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tokexport")
    if name not in _HOME:
        raise AttributeError(f"module 'tokexport' has no attribute {name!r}")
    module, attribute = _HOME[name]
    try:
        return getattr(import_module(f".{module}", __name__), attribute)
    except ModuleNotFoundError as e:
        from .export.errors import missing_export_package

        raise (missing_export_package(e) or e) from None


def __dir__() -> list[str]:
    return sorted(__all__)
