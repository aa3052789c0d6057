"""What the README and docs/ say is true: the quick start runs, in order, in one folder; tables are the code's."""

import io
import json
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import click
import pytest
from tokexport.export import errors, example, precisions
from tokexport.export.reducers import TABLE as METHODS
from tokexport.tools import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    path.name: path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
}


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", README, re.S)


def run(monkeypatch, *arguments):
    """(exit code, stdout, stderr) of a command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.argv", ["tokexport", *arguments])
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, out.getvalue(), err.getvalue()


def test_the_quick_start_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("tokexport ")]
    assert len(lines) >= 8
    for line in lines:
        arguments = shlex.split(line, comments=True)[1:]
        if arguments[0] == "bench":
            arguments += ["--seconds", "1"]
        code, _, err = run(monkeypatch, *arguments)
        assert code == 0, f"{line}\n{err}"
        if "--offline" in arguments:  # all methods, each with its picture
            assert "All files agree" in err and err.count("100.0%") == 3
            assert all((tmp_path / f"offline/digits_{m}.png").stat().st_size > 5_000 for m in ("tome", "evit", "dtps"))


@pytest.mark.slow
def test_the_offline_demo_shows_every_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, "demo", "--offline", "-o", "offline", "--json")
    assert code == 0, err
    rows = {row["method"]: row for row in json.loads(out)["rows"]}
    assert rows.keys() == METHODS.keys() and all(row["passed"] for row in rows.values())
    assert all((tmp_path / f"offline/digits_{m}.png").stat().st_size > 5_000 for m in METHODS if m != "none")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--methods", "tome"], "goes with --offline"),
        (["--offline", "--methods", "tome,tomo"], "no method 'tomo'; wanted some of none, tome"),
    ],
)
def test_methods_that_the_demo_has_not_are_refused(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, "demo", "-o", "demo", *arguments)
    assert code == 2 and words in err and not list(tmp_path.iterdir())


def test_the_python_example_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert "passed" in capsys.readouterr().out


def test_the_cpp_example_is_the_one_that_is_built():
    (code,) = blocks("cpp")
    assert code in (ROOT / "engines/cpp/example/main.cpp").read_text()


@pytest.mark.slow
def test_the_demo_does_all_it_says(tmp_path, monkeypatch):
    """What `make demo` runs: files verified on real weights and photos, timed on both runtimes, and drawn."""
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, "demo", "-o", "out", "--json")
    assert code == 0, err
    figures = json.loads(out)
    assert all(report["passed"] for report in figures["verify"].values())
    assert {row["runtime"] for row in figures["speed"]} == {"ort", "openvino"}
    assert all((tmp_path / picture).stat().st_size > 10_000 for picture in figures["pictures"])


def cells(page, first):
    """Cells of the table whose header line starts so, by their first cell."""
    lines = page[page.index(first) :].split("\n\n")[0].splitlines()
    return {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in (lines[0], *lines[2:])}


def test_the_limits_of_verify_are_those_of_the_code():
    table = cells(PAGES["verify.md"], "| | fp32 | tf32, fp16 ")
    named = [name for names in table[""] for name in names.split(", ")]
    assert sorted(named) == sorted(precisions.TABLE)
    for column, names in enumerate(table[""]):
        for row in map(precisions.get, names.split(", ")):
            limits = {
                "outputs": [row.output_limit],
                "one stage": [row.stage_limit],
                "near-tie": [row.near_tie["metric"], row.near_tie["score"]],
            }
            for title, wanted in limits.items():
                assert [float(v) for v in table[title][column].split("; ")] == wanted, (row.name, title)


def test_the_drawing_of_six_tokens_is_the_codes():
    assert (ROOT / "docs/images/six_tokens.svg").read_text(encoding="utf-8") == example.svg()


def test_exit_codes_are_those_of_the_command_line(monkeypatch):
    table = {code: row for code, row in cells(README, "| code ").items() if code != "code"}
    assert sorted(map(int, table)) == sorted(cli.EXIT_CODES)
    codes = {name: int(code) for code, (_, names) in table.items() for name in re.findall(r"`(\w+Error)`", names)}
    kinds = {name: e for name, e in vars(errors).items() if isinstance(e, type) and issubclass(e, Exception)}
    assert codes.keys() == kinds.keys() - {"FailureError"}
    for name, code in codes.items():
        error = kinds[name]("torch", "export,cpu", "this") if name == "MissingPackageError" else kinds[name]("a reason")
        monkeypatch.setattr(cli.group, "main", Mock(side_effect=error))
        assert run(monkeypatch)[::2] == (code, f"Error: {error}\n"), name


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES.values():
        for target in set(re.findall(r"(?:`|    )make ([a-z-]+)", page)):
            assert re.search(rf"^{target}:", makefile, re.M), target


def test_links_and_files_that_are_named_exist():
    for name, page in PAGES.items():
        folder = ROOT if (ROOT / name).exists() else ROOT / "docs"
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page):
            assert (folder / target).exists(), (name, target)
        for target in re.findall(r"`((?:tools|engines|export|kernels|tests|docs|requirements)/[\w./]+\.\w+)`", page):
            assert (ROOT / target).exists() or "NAME" in target, (name, target)


def options_of(command):
    """The options of a command and of the commands below it."""
    own = {o for p in command.params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)}
    return own.union(*map(options_of, getattr(command, "commands", {}).values()))


def test_every_command_line_in_a_page_has_known_options():
    known = {name: options_of(import_module(f"tokexport.tools.commands.{name}").command) for name in cli.COMMANDS}
    lines = [
        match
        for page in PAGES.values()
        for match in re.findall(r"(?:^|[`;]\s?|do )tokexport ([a-z]+)((?: [^`;\n]+)?)", page, re.M)
    ]
    assert len(lines) > 15
    for name, rest in lines:
        assert name in known, name
        assert {o.split("=")[0] for o in re.findall(r"(?<= )--?[a-z][\w-]*", rest.split("  #")[0])} <= known[name] | {
            "--help",
            "--r",
        }, (name, rest)
