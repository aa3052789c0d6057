"""Every command of the README's quick start runs, in order, in one folder; its Python example too."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tokexport.export import precisions
from tokexport.export.reducers import METHODS

README = (Path(__file__).parents[1] / "README.md").read_text()
pytestmark = pytest.mark.slow


def blocks(kind):
    return [b for b in re.findall(rf"```{kind}\n(.*?)```", README, re.S)]


def test_the_quick_start_works(tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("tokexport ")]
    assert len(lines) >= 4
    for line in lines:
        args = shlex.split(line.split("  #")[0])[1:]
        if args[0] == "bench":
            args += ["--seconds", "1"]
        out = subprocess.run(
            [sys.executable, "-m", "tokexport", *args],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert out.returncode == 0, f"{line}\n{out.stderr}"
        if "--offline" in args:  # all methods, each with its picture
            assert "All files agree" in out.stderr and out.stderr.count("100.0%") >= 6
            assert all((tmp_path / f"offline/digits_{m}.png").stat().st_size > 5_000 for m in METHODS if m != "none")


def test_the_python_example_works(tmp_path):
    (code,) = blocks("python")
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert out.returncode == 0 and "passed" in out.stdout, out.stderr


def rows(first):
    """Cells of the README's table whose header line starts so, by their first cell."""
    table = README[README.index(first) :].split("\n\n")[0].splitlines()
    return {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in (table[0], *table[2:])}


def test_the_limits_of_verify_are_those_of_the_code():
    table = rows("| | fp32 | tf32, fp16 ")
    for column, names in enumerate(table[""]):
        for precision in names.split(", "):
            row = precisions.get(precision)
            scores = {row.near_tie[signal] for signal in ("class_attention", "mean_attention", "score_head")}
            limits = {
                "outputs": [row.output_limit],
                "one stage": [row.stage_limit],
                "near-tie": [row.near_tie["keys"], *scores],
            }
            assert len(scores) == 1
            for title, wanted in limits.items():
                assert [float(v) for v in table[title][column].split("; ")] == wanted, (precision, title)


def test_make_targets_named_in_the_readme_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)`?", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_demo_does_all_it_says(tmp_path):
    """What `make demo` runs: files verified on real weights and photos, timed on both engines, and drawn."""
    out = subprocess.run(
        [sys.executable, "-m", "tokexport", "demo", "-o", "out", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    assert all(report["passed"] for report in found["verify"].values())
    assert {row["runtime"] for row in found["speed"]} == {"ONNX Runtime", "OpenVINO"}
    assert all((tmp_path / picture).stat().st_size > 10_000 for picture in found["pictures"])
