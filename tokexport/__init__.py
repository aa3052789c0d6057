"""tokexport: Vision Transformers with fewer tokens, as static ONNX graphs that are proven to compute what PyTorch computes.

The public names are loaded when they are first used, so `import tokexport` and the command line start at once.
"""

from importlib import import_module

_HOME = {
    "load_model": "export.models.load",
    "Schedule": "export.schedule",
    "reduce_model": "export.reference",
    "export_onnx": "export.graph.export",
    "inspect": "export.inspection",
    "verify": "engines.parity.verify",
    "open_runner": "engines.runners",
    "bench": "engines.measure.bench",
    "evaluate": "engines.measure.evaluate",
    "predict": "engines.predict",
    "UsageError": "export.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("tokexport")
    if name not in _HOME:
        raise AttributeError(f"module 'tokexport' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return sorted(__all__)
