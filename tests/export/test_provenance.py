"""What is stored is read back as it was, or refused in words; docs/format.md tells every field."""

import json
import re
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import pytest
from tokexport.engines.tensorrt.runtime import Gpu
from tokexport.engines.tensorrt.sidecar import Builder, EngineFile, Plugin, Tensor
from tokexport.export import records
from tokexport.export.outputs import Emission
from tokexport.export.provenance import Preprocess, Provenance
from tokexport.export.rebuild import rebuild
from tokexport.export.records import decode, encode, from_document, to_document
from tokexport.export.schedule import Schedule, Step

from tokexport import UsageError, inspect

DOCS = Path(__file__).parents[2] / "docs" / "format.md"
RECORDS = (Provenance, Preprocess, Emission, Schedule, Step, EngineFile, Plugin, Builder, Gpu, Tensor)


@pytest.fixture(scope="module")
def provenance(exported):
    return inspect(exported("tiny_vit", method="tome", r=8)).provenance


def changed(provenance, **values):
    return json.dumps({**json.loads(provenance.to_json()), **values})


def test_a_provenance_survives_json(provenance):
    data = json.loads(provenance.to_json())
    assert data["format"] == [1, 0] and data["needs"] == [] and "\n" not in provenance.to_json()
    assert Provenance.from_json(provenance.to_json()) == provenance
    other = replace(provenance, precision="fp16", target="cpu", labels=("a", "b"), activation="softmax")
    assert Provenance.from_json(other.to_json()) == other != provenance


FOREIGN = {
    "before format 1": (
        {"format": None},
        "made before format 1 of tokexport's files.*make it again with `tokexport onnx`",
    ),
    "newer major": ({"format": [2, 0]}, "has format 2.0, tokexport .* reads format 1: upgrade tokexport"),
    "older major": ({"format": [0, 9]}, "has format 0.9, .*make it again"),
    "no numbers": ({"format": ["1", 0]}, r"format\[0\]: wanted a whole number, got '1'"),
    "one number": ({"format": [1]}, "format: wanted a list of 2"),
    "true": ({"format": [True, 0]}, "whole number, got True"),
    "unknown need": ({"needs": ["teleport"]}, "needs teleport, which tokexport .* does not understand: upgrade"),
    "known need": ({"needs": ["class_tail"]}, r"class_tail \(its last block computes the class token alone\)"),
    "newer minor with a need": ({"format": [1, 7], "needs": ["x", "class_tail"]}, r"needs x, class_tail \("),
    "no needs": ({"needs": None}, "needs: wanted a list of text"),
    "unknown field": ({"colour": 1}, "unknown field 'colour'"),
    "kind": ({"opset": "20"}, "opset: wanted a whole number, got '20'"),
    "nested kind": ({"preprocess": {"size": [64, "x"]}}, r"preprocess: size\[1\]: wanted a whole number"),
    "choice": ({"target": "gpu"}, "target: wanted one of portable, cpu, tensorrt, got 'gpu'"),
    "precision": ({"precision": "fp7"}, "precision 'fp7'"),
    "weights": ({"weights": {"source": "moon", "sha256": ""}}, "weights: wanted source"),
    "weights without a seed": ({"weights": {"source": "random", "sha256": "a"}}, "weights: wanted source"),
    "dims": ({"dims": {}}, "dims: wanted the sizes"),
    "negative dims": ({"dims": {"width": -1}}, "dims: .*width"),
    "a need that is not told": ({"input": "uint8-nhwc"}, "needs lacks uint8_input"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_cannot_be_read_is_refused_in_words(what, provenance, monkeypatch):
    monkeypatch.setattr(records, "UNDERSTOOD", frozenset())
    values, words = FOREIGN[what]
    data = {**json.loads(provenance.to_json()), **values}
    if what == "before format 1":
        del data["format"]
    with pytest.raises(UsageError, match=words) as refusal:
        Provenance.from_json(json.dumps(data), "v.onnx")
    assert "v.onnx" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": [1, 0]}', "[" * 100_000, '"\\ud800"', "NaN"])
def test_what_is_no_provenance_is_refused(text):
    with pytest.raises(UsageError, match=r"v\.onnx"):
        Provenance.from_json(text, "v.onnx")


def test_a_number_that_is_not_finite_is_refused(provenance):
    for value in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match=r"mean\[0\]: wanted a finite number"):
            data = json.loads(provenance.to_json())
            data["preprocess"]["mean"][0] = value
            Provenance.from_json(json.dumps(data))


@pytest.mark.parametrize("name", [f.name for f in fields(Provenance)])
def test_every_field_must_be_there(name, provenance):
    data = json.loads(provenance.to_json())
    del data[name]
    with pytest.raises(UsageError, match=f"field '{name}' is missing"):
        Provenance.from_json(json.dumps(data))


def test_descriptions_of_a_newer_minor_are_left_out_everywhere(provenance):
    data = json.loads(changed(provenance, format=[1, 5], colour="red"))
    data["preprocess"]["gamma"] = 2.2
    data["schedule"]["steps"][0]["why"] = {"deep": [1]}
    assert Provenance.from_json(json.dumps(data)) == provenance


def test_a_need_follows_from_the_fields_and_is_refused_until_it_is_served(provenance, monkeypatch):
    for values, need in (
        ({"input": "uint8-nchw"}, "uint8_input"),
        ({"tail": "class", "emission": Emission(), "outputs": ("logits",)}, "class_tail"),
        ({"activation": "sigmoid"}, "activation"),
        ({"activation": "none"}, "activation"),
    ):
        other = replace(provenance, **values)
        assert other.needs == (need,) and set(other.needs) <= set(records.FEATURES)
        with monkeypatch.context() as patch:
            patch.setattr(records, "UNDERSTOOD", frozenset())
            with pytest.raises(UsageError, match=f"needs {need} "):
                Provenance.from_json(other.to_json())
            patch.setattr(records, "UNDERSTOOD", frozenset({need}))
            assert Provenance.from_json(other.to_json()) == other


def test_a_model_of_another_family_is_not_made_as_one_of_timm(provenance, tmp_path):
    with pytest.raises(UsageError, match=r"model of 'elsewhere'.*\(timm only\)"):
        rebuild(replace(provenance, family="elsewhere"), tmp_path / "v.onnx")


@dataclass(frozen=True)
class Inner:
    n: int
    ratio: float = 1.0


@dataclass(frozen=True)
class Outer:
    inner: Inner
    many: tuple[Inner, ...]
    pair: tuple[int, float]
    table: dict[str, dict[str, int]]
    choice: Literal["a", "b"] | None
    flag: bool
    maybe: tuple[int | None, ...] | None = None
    later: str = field(default="default", metadata={"since": 1})
    needs = ()


OUTER = Outer(Inner(1), (Inner(2, 0.5), Inner(3)), (1, 2.0), {"x": {"y": 1}}, None, True, (1, None), "said")


def test_a_nested_record_survives_json():
    assert decode(Outer, json.loads(json.dumps(encode(OUTER))), name="it", minor=1) == OUTER
    assert from_document(Outer, to_document(OUTER), name="it", remake="x") == OUTER


def test_a_field_that_came_later_has_its_default_in_older_files_only(monkeypatch):
    data = encode(OUTER)
    del data["later"]
    assert decode(Outer, data, name="it", minor=0).later == "default"
    with pytest.raises(UsageError, match="'later' is missing"):
        decode(Outer, data, name="it", minor=1)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"inner": 1}, "it: inner: wanted an object"),
        ({"inner": {"n": True, "ratio": 1}}, "it: inner: n: wanted a whole number, got True"),
        ({"inner": {"n": 1, "ratio": "1"}}, "ratio: wanted a finite number"),
        ({"many": {"n": 1}}, "many: wanted a list of an object"),
        ({"many": [{"n": 1, "ratio": 1}, {}]}, r"many\[1\]: field 'n' is missing"),
        ({"pair": [1]}, "pair: wanted a list of 2"),
        ({"table": {"x": {"y": "1"}}}, r"table\['x'\]\['y'\]: wanted a whole number"),
        ({"choice": "c"}, "choice: wanted one of a, b, got 'c'"),
        ({"flag": 1}, "flag: wanted true or false, got 1"),
        ({"maybe": [1, "x"]}, r"maybe\[1\]: wanted a whole number"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_place(values, words):
    with pytest.raises(UsageError, match=words):
        decode(Outer, {**encode(OUTER), **values}, name="it")


def documented(record):
    """Fields of a record by the table under its heading."""
    section = re.search(rf"^## {record.__name__}\n(.*?)(?=^## |\Z)", DOCS.read_text(), re.M | re.S)
    assert section, f"docs/format.md has no section {record.__name__}"
    return re.findall(r"^\| `(\w+)` ", section[1], re.M), section[1]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.__name__)
def test_the_page_on_the_format_tells_every_field_and_choice(record):
    rows, text = documented(record)
    assert rows == [f.name for f in fields(record)]
    for hint in typing.get_type_hints(record).values():
        for choice in (
            c
            for kind in (hint, *typing.get_args(hint))
            if typing.get_origin(kind) is Literal
            for c in typing.get_args(kind)
        ):
            assert f"`{choice}`" in text, choice


def test_the_page_tells_the_format_and_every_feature():
    text = DOCS.read_text()
    assert text.startswith("# What tokexport stores beside numbers: format {}.{}\n".format(*records.FORMAT))
    table = text[text.index("| feature ") :].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` ", table, re.M) == list(records.FEATURES)
    assert set(records.FEATURES) >= records.UNDERSTOOD


def test_records_that_are_stored_are_all_on_the_page():
    """Whatever a document nests is one of RECORDS."""
    nested = {
        kind
        for record in (Provenance, EngineFile)
        for hint in typing.get_type_hints(record).values()
        for kind in (hint, *typing.get_args(hint))
        if hasattr(kind, "__dataclass_fields__")
    }
    assert nested <= set(RECORDS)
