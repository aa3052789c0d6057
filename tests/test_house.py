"""What holds the house together, read from the code: who may import whom, sizes, docstrings, packages, options."""

import ast
import re
import sys
import tomllib
from collections import defaultdict
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from itertools import chain
from pathlib import Path

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tokexport.tools.cli import COMMANDS, module_of

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "export", "engines", "tools", "tokexport")  # each may import those before it
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LONGEST_FILE, LONGEST_FUNCTION, MOST_POSITIONAL = 400, 50, 5
VARIADIC = {"nn.Sequential", "table.add_row"}  # their arguments are a list, none has a place of its own


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def sources(*folders: str) -> list[Path]:
    return sorted(chain.from_iterable((ROOT / folder).rglob("*.py") for folder in folders))


def name_of(path: Path) -> str:
    """export/schedule.py -> export.schedule; a package's __init__ is the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sources(*ROOMS)}


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports anywhere in it, its own name left out."""
    package = name_of(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    names = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names += [
                alias.name.removeprefix("tokexport.") for alias in node.names if alias.name.startswith("tokexport.")
            ]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                above = ["tokexport", *package]
                base = above[: len(above) - node.level + 1] + base
            if base[:1] == ["tokexport"]:
                names += [".".join([*base[1:], alias.name]) for alias in node.names]
    found = (name if name in MODULES else name.rpartition(".")[0] for name in names)
    return {name for name in found if name in MODULES} - {name_of(path)}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every import that leads back to where it started, as the walk that shows it."""
    done, walk, back = set(), [], []

    def visit(module):
        if module in walk:
            back.append([*walk[walk.index(module) :], module])
        elif module not in done:
            walk.append(module)
            for target in sorted(graph[module]):
                visit(target)
            done.add(walk.pop())

    for module in graph:
        visit(module)
    return back


def test_imports_only_go_down_and_never_in_a_circle():
    graph = {name: imported(path) for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 50  # the reader of imports reads them
    room = {name: ROOMS.index(name.split(".")[0]) for name in MODULES}
    assert not [f"{a} -> {b}" for a in graph for b in graph[a] if room[b] > room[a]]
    assert not circles(graph)


def test_a_circle_would_be_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]


def functions(path: Path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'name', None) or ast.unparse(node.func)}"


def long_files() -> set[str]:
    return {
        str(p.relative_to(ROOT)) for p in sources(*ROOMS, "tests") if len(p.read_text().splitlines()) > LONGEST_FILE
    }


def lines_of(function) -> int:
    """Lines from its name to its end; a docstring, which tells every argument, is not among them."""
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    return function.end_lineno - function.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def long_functions() -> set[str]:
    every = ((p, f) for p in sources(*ROOMS) for f in functions(p))
    return {where(p, f) for p, f in every if lines_of(f) > LONGEST_FUNCTION}


def long_calls() -> set[str]:
    """Calls by position; not of a Triton kernel, `kernel[grid](...)`, which has no other way for its pointers."""
    every = ((p, c) for p in sources(*ROOMS) for c in ast.walk(tree(p)) if isinstance(c, ast.Call))
    named = ((p, c) for p, c in every if not isinstance(c.func, ast.Subscript) and ast.unparse(c.func) not in VARIADIC)
    return {where(p, c) for p, c in named if len(c.args) > MOST_POSITIONAL}


def test_files_functions_and_calls_are_short():
    assert not long_files()
    assert not long_functions()
    assert not long_calls()


def undocumented() -> tuple[list[str], int]:
    """Public functions of two arguments or more without `Args:`, and how many there are with it or without.

    Commands are left out, whose options have help of their own, and Triton's kernels, which their file explains.
    """
    missing, n = [], 0
    for path in sources(*ROOMS):
        body = tree(path).body
        for node in chain(body, *(c.body for c in body if isinstance(c, ast.ClassDef))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                if any(
                    re.match(r"(click|group|command)\.command|triton\.jit", ast.unparse(d)) for d in node.decorator_list
                ):
                    continue
                if len([a for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]) < 2:
                    continue
                n += 1
                if "Args:" not in (ast.get_docstring(node) or ""):
                    missing.append(where(path, node))
    return missing, n


def test_public_functions_say_what_their_arguments_are():
    """Nine in ten of them; what is left out reads itself."""
    missing, n = undocumented()
    assert n > 100
    assert len(missing) <= 0.1 * n, missing


def test_setuptools_installs_every_folder_and_type_marker():
    settings = PROJECT["tool"]["setuptools"]
    folders = {path.parent for path in sources(*ROOMS)}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
    data = {
        path.parent for kind in ("cpp/**/*", "web/page/*") for path in ROOT.glob(f"engines/{kind}") if path.is_file()
    }
    parts = (folder.relative_to(ROOT).parts for folder in folders | data)
    assert sorted(settings["packages"]) == sorted(
        ".".join(("tokexport", *p)).replace("tokexport.tokexport", "tokexport") for p in parts
    )
    assert (ROOT / "tokexport/py.typed").exists() and "py.typed" in settings["package-data"]["*"]


# Import names that are not the package's own.
PACKAGES = {
    "PIL": "pillow",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "sklearn": "scikit-learn",
    "open_clip": "open-clip-torch",
}
# Declared and not imported by a statement: tools that run the tests, runtimes that a table names, files that are read.
TOOLS, BY_NAME, FILES = (
    {"pytest-xdist", "ruff", "mypy"},
    {"tensorrt", "tensorrt-rtx-cu13"},
    {"scikit-learn"},
)
NOT_IMPORTED = TOOLS | BY_NAME | FILES | {"onnxruntime-gpu", "tokexport"}  # onnxruntime; extras


def requirements() -> set[str]:
    table = PROJECT["project"]["optional-dependencies"]
    lines = chain(PROJECT["project"]["dependencies"], *table.values())
    return {canonicalize_name(Requirement(line).name) for line in lines}


def third_party(*folders: str) -> set[str]:
    names = set()
    for path in sources(*folders):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    names -= {*sys.stdlib_module_names, "tokexport", "packaging"}  # packaging comes with pytest
    return {canonicalize_name(PACKAGES.get(name, name)) for name in names}


def test_what_is_imported_is_declared_and_what_is_declared_is_used():
    assert third_party(*ROOMS, "tests") <= requirements()
    assert requirements() - third_party(*ROOMS, "tests") == NOT_IMPORTED


def test_the_lock_names_all_that_make_installs():
    """Every package of this platform that the extra `test` brings, however far down, has one version in the lock."""
    lines = [line for line in (ROOT / "requirements/lock.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.match(r"[\w.-]+==[\w.]+( ; .+)?$", line) for line in lines)
    locked = {canonicalize_name(Requirement(line).name) for line in lines}
    extras = PROJECT["project"]["optional-dependencies"]
    seen, walk = set(), [Requirement(line) for line in chain(PROJECT["project"]["dependencies"], extras["test"])]
    while walk:
        requirement = walk.pop()
        name, marker = canonicalize_name(requirement.name), requirement.marker
        if name == "tokexport":  # its own extras, named in another
            walk += [Requirement(line) for extra in requirement.extras for line in extras[extra]]
        elif (marker is None or marker.evaluate()) and (name, frozenset(requirement.extras)) not in seen:
            seen.add((name, frozenset(requirement.extras)))
            walk += required_by(name, requirement.extras)
    assert {name for name, _ in seen} <= locked


def required_by(name: str, extras: set[str]) -> list[Requirement]:
    """What an installed package asks for on this platform, with those of its extras; its markers are judged here."""
    try:
        lines = map(Requirement, distribution(name).requires or [])
    except PackageNotFoundError:
        return []
    judged = [r for r in lines if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in (extras or {""}))]
    for requirement in judged:
        requirement.marker = None
    return judged


# One name, one meaning: an option whose value is written in another way on another command, and how.
VARIANTS = {
    "-o": "a file, an engine, a picture or a folder: what the command writes",
    "--output": "the same",
    "--batch": "onnx: the file's; trt: the range of a dynamic one; bench: those to time",
    "--at": "blocks: of a schedule a list or a word, of pictures a list",
    "--checkpoint": "weights: of a new file any that a model is loaded with, of a file that is there the very ones it was made of",
    "--images": "photos: one folder, list or parquet where every image is a row of what is written, else any files and folders",
    "--runtime": "what runs a file: bench times several; plugin build builds for several",
}


def test_an_option_means_the_same_on_every_command():
    meanings = defaultdict(set)
    for name in COMMANDS:
        for option in import_module(f"tokexport.tools.commands.{module_of(name)}").command.params:
            if isinstance(option, click.Option):
                kind = "flag" if option.is_flag else option.metavar or option.type.name
                for spelling in option.opts:
                    meanings[spelling].add((option.name, kind, option.multiple, option.nargs))
    assert len(meanings) > 30
    unlike = {spelling: kinds for spelling, kinds in meanings.items() if len(kinds) > 1}
    assert unlike.keys() <= VARIANTS.keys(), unlike
