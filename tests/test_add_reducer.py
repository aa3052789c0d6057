"""CONTRIBUTING.md's "A whole reducer", followed: the toy one there is exported and verified like any other."""

import re
from pathlib import Path

import pytest
from tokexport.export import reducers

import tokexport

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python reducer\n(.*?)```", PAGE, re.S)
    (tmp_path / "toy.py").write_text(code)
    monkeypatch.setattr(reducers, "__path__", [*reducers.__path__, str(tmp_path)])
    monkeypatch.setattr(reducers, "METHODS", (*reducers.METHODS, "toy"))
    yield
    import sys

    sys.modules.pop(f"{reducers.__name__}.toy", None)


def test_the_readmes_reducer_works(toy, tiny, tmp_path):
    loaded = tiny("tiny_vit")
    schedule = tokexport.Schedule.parse(method="toy", depth=6, n_tokens=65, at="1,3")
    assert [m for _, m in schedule.tokens_per_block()] == [65, 33, 33, 17, 17, 17]
    for batch in (1, None):
        path = tokexport.export_onnx(loaded, schedule, tmp_path / f"{batch}.onnx", batch=batch, sources=True).path
        report = tokexport.verify(path)
        assert report.passed and report.decisions == 1.0 and {o.name for o in report.outputs} == {"logits", "sources"}


def test_every_reducer_is_a_small_file_with_all_its_parts():
    folder = Path(reducers.__file__).parent
    assert {p.stem for p in folder.glob("*.py")} == set(reducers.METHODS) - {"none"} | {
        "__init__",
        "matching",
        "ranking",
    }
    for method in set(reducers.METHODS) - {"none"}:
        module = reducers.get(method)
        assert all(hasattr(module, part) for part in ("NEEDS", "OPTIONS", "steps", "reference", "static", "regret")), (
            method
        )
        assert len((folder / f"{method}.py").read_text().splitlines()) <= 120, method
