"""What only a process of its own can show: a full disk, a signal, a pipe that nobody reads."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from . import generate, judge, rows
from .material import material  # noqa: F401  a fixture
from .test_campaign import command_line, place  # noqa: F401  a fixture

CHATTER = ("font_manager", "telemetry")  # matplotlib and ONNX Runtime say that they cannot keep files of their own
DEADLINE = 120  # seconds of a process
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
ONNX = f"onnx {rows.MODEL} --r 8 -o {{out.onnx}}"
LEARN = rows.ROWS["rates learn"].line


def state(place):  # noqa: F811
    """What is in the folder, but for what ONNX Runtime keeps of itself in a home and beside temporary files."""
    return {k: v for k, v in judge.snapshot(place).items() if not k.startswith(("home/", "tmp/.ses"))}


def start(line, place, material, *, limit=None, stdout=subprocess.PIPE, before=None):  # noqa: F811
    """The command in a process of its own.

    limit: largest file that it may write, in bytes. before: called in the new process.
    """
    words = command_line(generate.Case("", generate.words(line), None, "", 0, False), place, material)

    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for what runs in the background
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if before:
            before()

    return subprocess.Popen(
        [sys.executable, "-m", "tokexport", *words],
        stdout=stdout,
        stderr=subprocess.PIPE,
        cwd=place,
        env={**os.environ, **ENVIRONMENT},
        preexec_fn=prepare,
    )


def ended(process, place, before):  # noqa: F811
    """The Outcome of a process, waited for."""
    out, err = process.communicate(timeout=DEADLINE)
    text = lambda data: (data or b"").decode(errors="replace")
    lines = [x for x in text(err).splitlines(keepends=True) if not any(word in x for word in CHATTER)]
    return judge.Outcome(process.returncode, text(out), "".join(lines), before, state(place))


def _mine(place):  # noqa: F811
    """What was there before and has to stay."""
    (place / "out" / "mine.txt").write_text("mine")


FULL = {  # line -> bytes after which the disk is full
    ONNX: 100_000,
    f"{ONNX} --dtype fp16": 1_000,
    f"{ONNX} --plugin": 0,
    "inline {calls} -o {out.onnx}": 50_000,
    "viz {onnx} {photo} -o {out.png}": 1_000,
    "verify {onnx} --report {out.html}": 2_000,
    "bundle {onnx} -o {out} --images {photos}": 500_000,
    "bundle {onnx} -o {out} --images {photos} --count 1": 0,
    "bench {onnx} --dense {dense} --runtime ort --batch 1 --seconds 0.05 --plot {out.png}": 4_000,
    "trt {onnx} --fp16 --compute-capability 89 --opt-level 0 -o {out.plan}": 50_000,
    LEARN: 100,
}
QUICK = {"inline {calls} -o {out.onnx}"}


@pytest.mark.parametrize("line", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in FULL])
def test_a_full_disk_is_one_error_and_leaves_nothing(line, place, material):  # noqa: F811
    _mine(place)
    command_line(generate.Case("", generate.words(line), None, "", 0, False), place, material)
    before = state(place)
    outcome = ended(start(line, place, material, limit=FULL[line]), place, before)
    wrong = judge.complaints(outcome, code=3, as_json=False)
    assert not wrong, f"{wrong}\n{outcome.stderr[:1500]}".replace(str(place), "")


@pytest.mark.slow
def test_a_full_disk_leaves_the_file_that_was_there(place, material):  # noqa: F811
    (place / "out" / "x.onnx").write_bytes(b"mine")
    before = state(place)
    outcome = ended(start(f"{ONNX} --force", place, material, limit=100_000), place, before)
    assert not judge.complaints(outcome, code=3, as_json=False), outcome.stderr


def _unfinished(place):  # noqa: F811
    return list(place.glob("**/.tokexport-*"))


STOPS = [
    (ONNX, "begun"),
    (f"{ONNX} --dtype fp16", "begun"),
    (ONNX, "early"),
    (LEARN.replace("--steps 2", "--steps 500"), "late"),
]


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("line, moment", STOPS)
def test_a_process_that_is_stopped_leaves_what_was_there(line, moment, number, code, place, material):  # noqa: F811
    """Stopped while it starts, with an unfinished file aside, or in the middle of the work."""
    command_line(generate.Case("", generate.words(line), None, "", 0, False), place, material)
    target = place / "out" / ("x.json" if "learn" in line else "x.onnx")
    target.write_bytes(b"mine")
    before = state(place)
    process = start(f"{line} --force", place, material)
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < DEADLINE:
        age = time.monotonic() - begun
        if (moment == "early" and age > 1) or (moment == "begun" and _unfinished(place) and age > 1):
            break
        if moment == "late" and target.with_name(target.name + ".state").exists():
            break
        time.sleep(0.002)
    process.send_signal(number)
    outcome = ended(process, place, before)
    assert outcome.code == code, outcome.stderr
    assert "Traceback" not in outcome.stderr and outcome.stderr.strip() == ("Interrupted." if code == 130 else "")
    new = {name for name in outcome.after.keys() - outcome.before.keys() if not name.endswith(".state")}
    assert {k: outcome.after[k] for k in before} == before
    assert all(".tokexport-" in name for name in new) if code == -9 else not new, new


def test_a_pipe_that_nobody_reads_is_no_traceback(place, material):  # noqa: F811
    read, write = os.pipe()
    os.close(read)
    process = start("rates --json", place, material, stdout=write)
    os.close(write)
    outcome = ended(process, place, state(place))
    assert outcome.code == 1 and outcome.stderr == ""


def test_a_full_disk_behind_stdout_is_one_error(place, material):  # noqa: F811
    with open("/dev/full", "wb") as full:
        process = start("rates --json", place, material, stdout=full)
    outcome = ended(process, place, state(place))
    assert not judge.complaints(outcome, code=3, as_json=True), outcome.stderr


@pytest.mark.parametrize("line", ["inspect {onnx} --json", "inspect {onnx}", "rates"])
def test_closed_streams_are_no_traceback(line, place, material):  # noqa: F811
    """`>&- <&-` in a shell: there is no stdout to write to, and what is opened next must not become it."""
    command_line(generate.Case("", generate.words(line), None, "", 0, False), place, material)
    before = state(place)

    def close():
        os.close(0)
        os.close(1)

    outcome = ended(start(line, place, material, before=close), place, before)
    assert "Traceback" not in outcome.stderr and outcome.after == before
    assert outcome.code == 0, outcome.stderr
