"""The judge of a case: one clear error, the right exit code, nothing half-written, nothing lost."""

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

LONGEST = 2000  # characters of an error that somebody still reads


class Outcome(NamedTuple):
    """What a command left behind.

    Attributes:
        code: exit code.
        stdout, stderr: as text.
        before, after: `snapshot` of the folder that it ran in.
    """

    code: int
    stdout: str
    stderr: str
    before: dict
    after: dict


def snapshot(folder: Path) -> dict:
    """Everything below a folder: relative name -> what it is and what is in it."""
    state = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root) / name
            mode = path.lstat().st_mode
            kind = stat.S_IFMT(mode)
            if stat.S_ISREG(mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                content = os.readlink(path) if stat.S_ISLNK(mode) else ""
            state[str(path.relative_to(folder))] = kind, content
    return state


def complaints(outcome: Outcome, *, code: int, as_json: bool) -> list[str]:
    """What is wrong with an outcome; nothing, when it is as it should be.

    Args:
        outcome: of the case.
        code: wanted exit code: 2 wrong use, 3 something failed, 1 a check failed.
        as_json: whether --json was given.
    """
    wrong = []
    if outcome.code != code:
        wrong.append(f"exit code {outcome.code}, wanted {code}")
    if "Traceback" in outcome.stderr or "Traceback" in outcome.stdout:
        wrong.append("a traceback")
    wrong += _text(outcome, failed_check=code == 1)
    wrong += _stdout(outcome.stdout, as_json=as_json, failed_check=code == 1)
    gone = sorted(outcome.before.keys() - outcome.after.keys())
    new = sorted(outcome.after.keys() - outcome.before.keys())
    changed = sorted(k for k in outcome.before.keys() & outcome.after.keys() if outcome.before[k] != outcome.after[k])
    wrong += [
        f"{word}: {', '.join(names)}" for word, names in (("lost", gone), ("left", new), ("changed", changed)) if names
    ]
    return wrong


def _text(outcome: Outcome, *, failed_check: bool) -> list[str]:
    """A failed check prints its report; anything else one error and nothing beside it."""
    n = len(re.findall(r"^Error: ", outcome.stderr, re.M))
    if failed_check:
        return [] if n <= 1 else [f"{n} errors"]
    if n != 1 or not outcome.stderr.startswith("Error: "):
        return [f"{n} errors in {outcome.stderr[:300]!r}"]
    message = outcome.stderr.removeprefix("Error: ").strip()
    if not 15 <= len(message) <= LONGEST:
        return [f"an error of {len(message)} characters: {message[:300]!r}"]
    if re.search(r"<[\w.]+ object at 0x|\bNoneType\b|\bKeyError\b|Errno \d", message):
        return [f"an error that speaks of code: {message[:300]!r}"]
    return []


def _stdout(text: str, *, as_json: bool, failed_check: bool) -> list[str]:
    if not text:
        return []
    if not as_json:
        return [f"stdout has {text[:100]!r}"]
    try:
        json.loads(text, parse_constant=lambda name: 1 / 0)
    except (ValueError, ZeroDivisionError):
        return [f"stdout is no JSON: {text[:100]!r}"]
    return [] if failed_check else ["stdout has JSON beside an error"]
