"""What a damage is, and those that any file and any folder can have.

A damage is a function of the copied file that changes it in place and returns the path to name on the command line.
Commands that rightly take what it leaves are named in `taken`; one that finds out only by running, in `codes`.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Damage(NamedTuple):
    """One manner of breaking a file.

    Attributes:
        apply: good path -> path to give to the command.
        codes: command -> exit code where it is not 2.
        taken: commands that rightly take the file all the same.
    """

    apply: Callable[[Path], Path]
    codes: dict[str, int] = {}
    taken: tuple[str, ...] = ()


def removed(path: Path) -> Path:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    return path


def written(data: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return write


def share(share: float) -> Callable[[Path], Path]:
    def cut(path: Path) -> Path:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        return path

    return cut


def directory(path: Path) -> Path:
    removed(path).mkdir()
    return path


def loop(path: Path) -> Path:
    removed(path).symlink_to(path.name)
    return path


def dangling(path: Path) -> Path:
    removed(path).symlink_to("nowhere")
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(removed(path))
    return path


def _unknown_letters(path: Path) -> Path:
    """A name that is no UTF-8, of nothing that is read."""
    name = os.fsdecode(b"\xff\xfe" + os.fsencode(path.name))
    removed(path).with_name(name).write_bytes(b"\x00\x01")
    return path.with_name(name)


def _brackets(path: Path) -> Path:
    """Markup of the terminal's in a name."""
    return removed(path).with_name("[bold]no[" + path.name)


def _lines(path: Path) -> Path:
    """A name of two lines: the message is still one."""
    return removed(path).with_name("no\nError: such" + path.name)


FILE = {
    "missing": Damage(removed),
    "empty": Damage(written(b"")),
    "text": Damage(written(b"hello\n" * 50)),
    "zeros": Damage(written(bytes(4096))),
    "half": Damage(share(0.5)),
    "directory": Damage(directory),
    "symlink loop": Damage(loop),
    "dangling symlink": Damage(dangling),
    "pipe": Damage(pipe),
    "letters that are no UTF-8": Damage(_unknown_letters),
    "markup in its name": Damage(_brackets),
    "name of two lines": Damage(_lines),
    "name too long": Damage(lambda path: path.with_name("n" * 300 + path.suffix)),
    "a file for a folder": Damage(lambda path: path / path.name),
    "device": Damage(lambda path: Path("/dev/null")),
}
FOLDER = {name: FILE[name] for name in ("missing", "symlink loop", "dangling symlink", "name too long")}
FOLDER |= {"a folder of nothing": Damage(directory)}
DEEP = "[" * 100_000


def json_text(change: Callable[[dict], object]) -> Callable[[str], str]:
    """JSON text with a change to what it says."""

    def rewrite(text: str) -> str:
        data = json.loads(text)
        changed = change(data)
        return json.dumps(data if changed is None else changed)

    return rewrite
