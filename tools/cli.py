"""The command line. Each command is a module, imported when it is used; torch only by those that need it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from importlib import import_module
from pathlib import Path

import click

from ..export.errors import FailureError, UsageError, missing_export_package

COMMANDS = {
    "onnx": "Export a ViT, reduced or not, to a static ONNX file.",
    "inline": "Turn nodes TokenReduce back into plain operators.",
    "trt": "Build a TensorRT engine from a file.",
    "bundle": "Pack a file with what it is and a proof that needs no PyTorch.",
    "verify": "Compare a file with the PyTorch reference it was made from.",
    "serve-repo": "Write a Triton model repository of bundles.",
    "inspect": "Show what a file is and whether TensorRT would take it.",
    "run": "Run a file on images.",
    "embed": "Features or classes of many images, as parquet.",
    "viz": "Draw on photos which patches a file merges and drops.",
    "eval": "Accuracy on a folder of labelled images.",
    "bench": "Time files against each other in one run.",
    "tune": "Choose a schedule for a budget, on your images and your runtime.",
    "ladder": "Write several schedules of one model over one file of weights.",
    "rates": "DiffRate's keep counts: list the published ones, learn your own.",
    "env": "Show versions, runtimes and hardware, for a bug report.",
    "plugin": "Build native libraries that run each reduction as one node.",
    "demo": "Export, verify, time and draw ToMe on real weights and photos.",
}
EXIT_CODES = {
    0: "Done, or passed.",
    1: "A check failed, a budget was not reached, or a job went on past inputs that were broken.",
    2: "Wrong use, a file that is foreign, damaged or newer, or a package that is missing.",
    3: "A runtime, a builder, the disk or the export failed, or memory ran out.",
    130: "Interrupted.",
    143: "Terminated.",
}


def module_of(command: str) -> str:
    """The name of the module in `commands` that a command stands in."""
    return command.replace("-", "_")


class _Lazy(click.Group):
    def parse_args(self, ctx, args):
        """No option and no file is an empty text, on any command."""
        for i, word in enumerate(args):
            option, equals, value = word.partition("=")
            if not word or (equals and not value and option.startswith("--")):
                name = option or (args[i - 1] if i and args[i - 1].startswith("-") else "an argument")
                raise click.UsageError(f"{name} is empty: wanted a name or a value, or leave it out", ctx)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        return import_module(f".commands.{module_of(name)}", __package__).command if name in COMMANDS else None

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), words) for code, words in EXIT_CODES.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="tokexport", prog_name="tokexport")
def group():
    """Vision Transformers with fewer tokens, as static ONNX graphs proven to compute what PyTorch computes."""


def main() -> None:
    """Entry point; ends with one of EXIT_CODES. What lies aside is cleared away on SIGTERM as on any other exit."""
    _open_streams()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(group.main(prog_name="tokexport", standalone_mode=False) or 0)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.exceptions.Abort:
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        sys.exit(e.exit_code)
    except Exception as e:
        code, text = _judge(e)
        click.echo(f"Error: {_names_on_one_line(text)}", err=True)
        sys.exit(code)


def _open_streams() -> None:
    """Streams that a shell closed (`>&-`): what is written there goes nowhere, and no file that is opened becomes them."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
        nowhere = open(os.devnull, "w")  # noqa: SIM115  open until the process ends
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere


def _names_on_one_line(text: str) -> str:
    """A text in which names that were typed have no line breaks nor other letters that a terminal would obey."""
    for word in sys.argv[1:]:
        for name in (word, Path(word).name) if not word.isprintable() else ():
            text = text.replace(name, repr(name)[1:-1])
    return text


def _judge(error: Exception) -> tuple[int, str]:
    """The exit code and the text of an error; one that is nobody's but ours is raised again, with its traceback."""
    if isinstance(error, click.ClickException):
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "tokexport"
        return error.exit_code, f"{' '.join(error.format_message().split())} (see {command} --help)"
    if isinstance(error, UsageError):
        return 2, str(error)
    if isinstance(error, FailureError):
        return 3, str(error)
    if isinstance(error, ModuleNotFoundError):
        missing = missing_export_package(error)
        if missing is None:
            raise error
        return 2, str(missing)
    if isinstance(error, OSError):
        from ..export.files import is_disk_error

        if "usable temporary directory" in str(error):  # tempfile tried to write in each
            return 3, "no folder for temporary files can be written: the disk is full, or TMPDIR names no other"
        place = str(error.filename)[:80] if error.filename else "input or output"
        return 3 if is_disk_error(error) else 2, f"{place}: {error.strerror or error}"
    if isinstance(error, MemoryError):
        return 3, "out of memory: give a smaller --batch or a smaller model"
    raise error
