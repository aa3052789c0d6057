"""Files whose reductions are nodes of their own (`export/graph/calls`), as a runtime takes them: with native code, or as plain operators."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..export.errors import UsageError
from ..export.files import weight_files
from ..export.graph import calls, stages


def prepared(path: Path, *, native: bool, outputs: tuple[str, ...] = (), functions: bool = True):
    """The model to hand to a runtime in the place of a file.

    Args:
        path: an ONNX file.
        native: the nodes are run by a library.
        outputs: inner values that will be asked for.
        functions: the runtime reads functions by itself.
    Returns:
        onnx.ModelProto, weights beside the file not loaded; None when the file can be taken as it is.
    Raises:
        UsageError: a library is to run the nodes, and the file decides by plain operators. One that decides nothing, a dense one,
            is taken as it is.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    if not calls.has_calls(model):
        if native and any(stages.of_node(n.name).endswith(".match") for n in model.graph.node):
            raise UsageError(
                f"{path} has no {calls.NAME} nodes for a native library to run: make it with `tokexport onnx --plugin`"
            )
        return None
    if native:
        return calls.for_native(model, outputs)
    return None if functions else calls.inline(model)


def with_outputs(model, outputs: tuple[str, ...]):
    """A model with inner values as outputs too.

    Args:
        model: onnx.ModelProto, changed in place.
        outputs: names of the values; those that are outputs already stay as they are.
    Returns:
        The model.
    """
    import onnx

    known = {o.name for o in model.graph.output}
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, types.get(name, onnx.TensorProto.INT64), None)
        for name in outputs
        if name not in known
    )
    return model


def write_copy(model, path: Path, folder: Path) -> Path:
    """A model as a file in a folder, beside links to the weights that it does not hold itself.

    Args:
        model: onnx.ModelProto made of the file.
        path: of that file.
        folder: where the copy goes.
    Returns:
        Its path.
    """
    import onnx

    copy = folder / f"nodes-{path.name}"
    onnx.save(model, copy)
    for weights in weight_files(model, path):
        (folder / weights.name).symlink_to(weights.resolve())
    return copy


@contextmanager
def as_file(model, path: Path) -> Iterator[Path]:
    """A model as a file while the block runs, its weights where it looks for them.

    Args:
        model: from `prepared`; None: the file itself.
        path: the file that it was made of.
    """
    if model is None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="tokexport-") as folder:
        yield write_copy(model, path, Path(folder))
