"""What a host has that serves and does not export: the base requirements and nothing else.

They are linked out of this environment into a folder that a Python without site-packages sees: nothing is downloaded.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tokexport.tools.cli import COMMANDS

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "export", "engines", "tools")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ("torch", "timm", "torchvision", "onnxscript", "onnxsim", "onnxruntime", "openvino", "scipy", "matplotlib")
RUN = """
import contextlib, io, json, sys
from tokexport.tools import cli
results, lines, heavy = [], *map(json.loads, sys.argv[1:])
for line in lines:
    out, err, code = io.StringIO(), io.StringIO(), None
    sys.argv = ["tokexport", *line]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as e:
            code = e.code or 0
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps({"results": results, "heavy": sorted(set(heavy) & sys.modules.keys())}))
"""


def base_requirements() -> set[str]:
    """Names of all packages that `pip install tokexport` brings on this platform."""
    names, walk = set(), [Requirement(line) for line in PROJECT["dependencies"]]
    while walk:
        requirement = walk.pop()
        if requirement.name not in names and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            names.add(requirement.name)
            walk += map(Requirement, distribution(requirement.name).requires or [])
    return names


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """A folder like the site-packages of `pip install tokexport`, without tokexport itself."""
    folder = tmp_path_factory.mktemp("bare")
    for name in base_requirements():
        files = distribution(name).files
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(distribution(name).locate_file(top)).resolve())
    return folder


@pytest.fixture(scope="session")
def from_sources(bare, tmp_path_factory):
    """Folders for PYTHONPATH: the bare one, and tokexport's as setuptools maps them."""
    package = tmp_path_factory.mktemp("sources") / "tokexport"
    package.mkdir()
    for path in (ROOT / "tokexport").iterdir():
        (package / path.name).symlink_to(path)
    for room in ROOMS:
        (package / room).symlink_to(ROOT / room)
    info = package.parent / "tokexport-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tokexport\nVersion: {PROJECT['version']}\n")
    return [package.parent, bare]


def python(folders, code, *arguments):
    return subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=folders[0],
        capture_output=True,
        text=True,
        timeout=300,
    )


def commands(folders, *lines):
    """[exit code, stdout, stderr] of each command line, run in one process, and which heavy packages it imported."""
    run = python(folders, RUN, json.dumps(lines), json.dumps(HEAVY))
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout.splitlines()[-1])
    return answer["results"], answer["heavy"]


def test_every_commands_help_and_inspect_need_the_base_alone(from_sources, exported):
    file = str(exported("tiny_vit"))
    results, heavy = commands(
        from_sources,
        ["--version"],
        ["--help"],
        *([name, "--help"] for name in COMMANDS),
        ["inspect", file],
        ["inspect", file, "--json"],
    )
    assert [code for code, _, _ in results] == [0] * len(results), results
    assert all("Usage: tokexport" in out for _, out, _ in results[1:-2])
    assert json.loads(results[-1][1])["provenance"]["model"] == "vit_tiny_patch16_224"
    assert heavy == []


def test_what_needs_more_says_which_extra_has_it(from_sources, exported, tmp_path):
    file = str(exported("tiny_vit"))
    photo = str(tmp_path / "photo.png")
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(photo)
    lines = {
        "torch": ["onnx", "--r", "13", "-o", str(tmp_path / "a.onnx")],
        "onnxruntime": ["run", file, photo],
        "openvino": ["run", file, photo, "--runtime", "openvino"],
    }
    results, _ = commands(from_sources, *lines.values())
    for package, (code, out, err) in zip(lines, results, strict=True):
        assert (code, out) == (2, "") and err.count("\n") == 1, err
        assert f"package {package}," in err and "pip install 'tokexport[" in err
    assert "tokexport[export,cpu]" in results[0][2]
    assert not (tmp_path / "a.onnx").exists()
    code = "import tokexport; tokexport.Schedule; tokexport.load_model"
    run = python(from_sources, code)
    assert run.returncode == 1 and "MissingPackageError" in run.stderr and "tokexport[export,cpu]" in run.stderr


@pytest.mark.slow
def test_the_wheel_is_complete(bare, exported, tmp_path):
    """Built, put beside the base requirements, and used: every folder, the data files, the type marker."""
    source = tmp_path / "source"  # a copy: setuptools builds in place, and what it leaves would go into the next wheel
    for room in (*ROOMS, "tokexport"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md"):
        shutil.copy(ROOT / name, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "-q",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (tmp_path / "site/tokexport" / path.relative_to(ROOT)).is_file(), path
    assert (tmp_path / "site/tokexport/py.typed").is_file()
    results, heavy = commands(
        [tmp_path / "site", bare], ["--version"], ["inspect", str(exported("tiny_vit"))], ["rates", "--json"]
    )
    assert [code for code, _, _ in results] == [0, 0, 0] and heavy == [], results
