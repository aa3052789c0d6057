"""The command within this process, and a small file that it made."""

import sys

import pytest

from .command_line import TINY


@pytest.fixture(scope="module")
def call():
    """The command within this process (torch is loaded once): call(*args) -> (exit code, stdout, stderr)."""
    import contextlib
    import io

    from tokexport.tools import cli as entry

    def run(*args):
        out, err, argv = io.StringIO(), io.StringIO(), sys.argv
        sys.argv = ["tokexport", *map(str, args)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                entry.main()
        except SystemExit as e:
            return e.code or 0, out.getvalue(), err.getvalue()
        finally:
            sys.argv = argv
        return 0, out.getvalue(), err.getvalue()

    return run


@pytest.fixture(scope="module")
def vit(call, tmp_path_factory):
    """A small ToMe file made by the command, with sources."""
    path = tmp_path_factory.mktemp("cli") / "vit.onnx"
    code, _, err = call("onnx", *TINY, "--method", "tome", "--r", 8, "--sources", "-o", path)
    assert code == 0, err
    return path
