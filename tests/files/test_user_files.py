"""What users write is read within bounds, and refused by name and line; no other exception comes of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from informed_routing.errors import InputError
from informed_routing.files.bounded_yaml import parse_yaml, read_yaml
from informed_routing.files.user_files import file_name, read_json, shown, user_path

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "line 1: it is nested more than 32 deep"),
        ("- " * 5_000 + "x", "nested more than 32 deep"),
        (BOMB, "stands for more than 200,000 values"),
        ("x: &a [*a]", "the alias *a has nothing complete"),
        ("x: 1\ny: *q", "line 2: the alias *q"),
        ("x: 1\ny: 2\nx: 3", "line 3: the key 'x' is given twice, first in line 1"),
        ("x: {y: 1, y: 2}", "the key 'y' is given twice"),
        ("1: a\ntrue: b", "given twice"),  # which Python takes for the same key
        ("x: !!int abc", "line 1: 'abc' is not an integer"),
        ("x: " + "9" * 5000, "is not an integer"),
        ("x: 0x" + "f" * 50, "is too large"),
        ("x: !!float abc", "'abc' is not a number"),
        ("x: .nan", "'.nan' is not a finite number"),
        ("x: -.inf", "not a finite number"),
        ("x: 1.0e+999", "not a finite number"),
        ("x: !!bool perhaps", "'perhaps' is not a boolean"),
        ("x: !!null some", "'some' is not null"),
        ("x: 010", "two readings"),
        ("x: 1:30", "two readings"),
        ("x: !!python/object:os.system [1]", "the tag '!!python/object:os.system' is not taken"),
        ("x: !!timestamp 2024-01-01", "is not taken"),
        ("? [a]\n: 1", "a key is a list or a mapping"),
        ("--- a\n--- b", "another document"),
        ("x: [", "line"),
        ("x: \x07", "control characters"),
        ("\ud800: 1", "cannot be read"),
    ],
)
def test_yaml_that_is_refused(text: str, said: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=r"^file f") as caught:
        parse_yaml(text, "file f")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("x: 2024-99-99", {"x": "2024-99-99"}),  # no setting is a date
        ("base: &b {r: 1}\nm: {<<: *b, q: 2.5}", {"base": {"r": 1}, "m": {"r": 1, "q": 2.5}}),
        ("x: [1, yes, null, ~, -3, 1.0e-3, 'a']", {"x": [1, True, None, None, -3, 1e-3, "a"]}),
        ("x: =", {"x": "="}),
        ("\ufeffx: 1", {"x": 1}),
    ],
)
def test_yaml_that_is_read(text: str, value: Any) -> None:
    assert parse_yaml(text, "f") == value


def test_both_of_pyyamls_parsers_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    import yaml

    from informed_routing.files import bounded_yaml

    monkeypatch.setattr(yaml, "CSafeLoader", yaml.SafeLoader, raising=False)
    slow = importlib.reload(bounded_yaml)
    try:
        assert slow.parse_yaml("a: &x [1, 2.5]\nb: *x", "f") == {"a": [1, 2.5], "b": [1, 2.5]}
        for text in ("a: 1\na: 2", BOMB, "[" * 1000, "x: !!int abc", "x: 2\ny: !!set {a}"):
            with pytest.raises(InputError, match=r"^f, line"):
                slow.parse_yaml(text, "f")
    finally:
        monkeypatch.undo()
        importlib.reload(bounded_yaml)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("x: \xe9".encode("latin-1"))
    (tmp_path / "huge.yaml").write_bytes(b"#" * (5 * 2**20))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "half.json").write_text('{"a": 1')
    for name, said in {
        "no.yaml": "does not exist",
        "latin.yaml": "is not UTF-8 text (byte 3)",
        "huge.yaml": "more than 4,194,304 bytes",
        "n" * 300: "cannot be read: File name too long",
        "": "is a folder",
    }.items():
        with pytest.raises(InputError) as caught:
            read_yaml(tmp_path / name, "recipe")
        assert said in str(caught.value)
    for name, said in {"deep.json": "nested too deeply", "half.json": "is damaged"}.items():
        with pytest.raises(InputError, match=said):
            read_json(tmp_path / name, "report")


@pytest.mark.parametrize(
    "name", ["", " ", "../../x", "a/b", "a\\b", ".", "..", ".x", "a\nb", "a\x1b[31m", "é" * 101, "a "]
)
def test_names_that_are_no_file_names(name: str) -> None:
    with pytest.raises(InputError, match=r"^the target"):
        file_name(name, "the target")


@pytest.mark.parametrize("name", ["long", "a b", "über-1.5", "x" * 200, "[b]"])
def test_names_that_are_file_names(name: str) -> None:
    assert file_name(name, "the target") == name


@pytest.mark.parametrize("path", ["~nosuchuser/x", "a\0b", "a\udcff", "a\x1bb"])
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(InputError, match=r"^--out"):
        user_path(path, "--out")


def test_values_in_messages_are_short_and_plain() -> None:
    assert shown("a\x1b[31m\nb") == r"'a\x1b[31m\nb'"
    assert shown(10**5000).startswith("an integer of ")
    assert len(shown("x" * 5000)) < 70
