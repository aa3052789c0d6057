"""The public names of the package, and the exit codes of the command line."""

import errno
import subprocess
import sys

import pytest
from tokexport.export import errors
from tokexport.tools import cli

import tokexport


def test_every_public_name_is_there_and_listed():
    for name in tokexport.__all__:
        assert getattr(tokexport, name) is not None and name in dir(tokexport)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tokexport.nothing


def test_every_error_type_is_public():
    kinds = {k for k, v in vars(errors).items() if isinstance(v, type) and issubclass(v, Exception)}
    assert kinds <= set(tokexport.__all__)


def test_the_package_and_its_help_load_no_heavy_library():
    script = (
        "import sys, tokexport; tokexport.UsageError; from tokexport.tools import cli\n"
        "from click.testing import CliRunner; assert CliRunner().invoke(cli.group, ['--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'numpy', 'onnx', 'rich', 'timm') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


ENDINGS = {
    "done": (None, 0, ""),
    "a code of its own": (1, 1, ""),
    "wrong use": (errors.UsageError("so not"), 2, "Error: so not\n"),
    "missing package": (errors.MissingPackageError("x", "cpu", "y"), 2, "Error: y needs the package x"),
    "engine": (errors.EngineError("broke"), 3, "Error: broke\n"),
    "builder": (errors.BuildError("broke"), 3, "Error: broke\n"),
    "disk": (errors.StorageError("full"), 3, "Error: full\n"),
    "graph": (errors.GraphError("odd"), 3, "Error: odd\n"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "a.onnx"), 3, "Error: a.onnx: No space left"),
    "file too large": (OSError(errno.EFBIG, "File too large"), 3, "Error: input or output: File too large"),
    "missing input": (FileNotFoundError(errno.ENOENT, "No such file or directory", "b"), 2, "Error: b: No such file"),
    "no permission": (PermissionError(errno.EACCES, "Permission denied", "b"), 2, "Error: b: Permission denied"),
    "memory": (MemoryError(), 3, "Error: out of memory: give a smaller"),
    "interrupted": (KeyboardInterrupt(), 130, "Interrupted.\n"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_way_to_end_has_its_exit_code_and_at_most_one_line(ending, monkeypatch, capsys):
    outcome, code, words = ENDINGS[ending]

    def command(*args, **kwargs):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(cli.group, "invoke", command)
    monkeypatch.setattr(sys, "argv", ["tokexport", "demo"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == code and error.strip().startswith(words.strip()) and error.strip().count("\n") == 0
    assert code in cli.EXIT_CODES


def test_an_error_that_is_ours_keeps_its_traceback(monkeypatch):
    def command(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(cli.group, "invoke", command)
    monkeypatch.setattr(sys, "argv", ["tokexport", "demo"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_the_help_tells_every_exit_code(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tokexport", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    assert "Exit codes:" in text and all(f"  {code} " in text for code in cli.EXIT_CODES)
