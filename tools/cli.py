"""The command line. Each command is a module, imported when it is used; torch only by those that need it."""

from __future__ import annotations

import signal
import sys
import threading
from importlib import import_module

import click

from ..export.errors import FailureError, UsageError

COMMANDS = {
    "onnx": "Export a ViT, reduced or not, to a static ONNX file.",
    "trt": "Build a TensorRT engine from a file.",
    "bundle": "Pack a file with what it is and a proof that needs no PyTorch.",
    "verify": "Compare a file with the PyTorch reference it was made from.",
    "inspect": "Show what a file is and whether TensorRT would take it.",
    "run": "Run a file on images.",
    "viz": "Draw on photos which patches a file merges and drops.",
    "eval": "Accuracy on a folder of labelled images.",
    "bench": "Time files against each other in one run.",
    "rates": "List the keep counts published with DiffRate.",
    "demo": "Export, verify, time and draw ToMe on real weights and photos.",
}


class _Lazy(click.Group):
    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        return import_module(f".commands.{name}", __package__).command if name in COMMANDS else None

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="tokexport", prog_name="tokexport")
def group():
    """Vision Transformers with fewer tokens, as static ONNX graphs proven to compute what PyTorch computes."""


def main() -> None:
    """Entry point. Exit codes: 0 done or passed, 1 a check failed, 2 wrong use or a missing package, 3 a runtime, builder or disk failed,
    130 interrupted, 143 terminated."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(143)
        )  # what lies aside is cleared away, as it is on any other exit
    try:
        sys.exit(group.main(standalone_mode=False) or 0)
    except click.exceptions.Abort:
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except UsageError as e:
        click.echo(f"Error: {e}", err=True)
        sys.exit(2)
    except OSError as e:
        click.echo(f"Error: {str(e.filename)[:80] if e.filename else 'input or output'}: {e.strerror or e}", err=True)
        sys.exit(2)
    except FailureError as e:
        click.echo(f"Error: {e}", err=True)
        sys.exit(3)
    except MemoryError:
        click.echo("Error: out of memory: give a smaller --batch or a smaller model", err=True)
        sys.exit(2)
