from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from informed_routing.assets import DEMO_TEXTS, load_texts
from informed_routing.assets.readers import merge_short
from informed_routing.assets.text import _alternate
from informed_routing.errors import InputError

PARTS = ("train", "calibration", "heldout")


def write_jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def numbered(count: int, column: str = "text") -> list[dict[str, Any]]:
    return [{"id": index, column: f"document {index}"} for index in range(count)]


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.mark.parametrize("ref", DEMO_TEXTS)
def test_demo_split_is_deterministic_disjoint_and_covers_all(ref: str) -> None:
    whole = load_texts(ref, "all")
    parts = {part: load_texts(ref, part) for part in PARTS}  # type: ignore[arg-type]
    assert all(load_texts(ref, part) == parts[part] for part in PARTS)  # type: ignore[arg-type]
    assert sum(map(len, parts.values())) == len(whole)
    for position, text in enumerate(whole):
        part = "train" if position % 10 < 8 else PARTS[position % 10 - 7]
        assert parts[part].pop(0) == text
    assert len(whole) > 100
    assert all(text.strip() for text in whole)


def test_demo_documents_are_what_they_say() -> None:
    wiki, code = load_texts("demo:wiki", "all"), load_texts("demo:code", "all")
    assert len(wiki) == 2349
    assert wiki[0].startswith("2007 European Parliament election in Romania\n\nRomania elected")
    assert not any("<doc " in text or "</doc>" in text for text in wiki)
    assert all("\n" not in text for text in load_texts("demo:c4", "all"))
    assert min(len(text) for text in code[:-1]) >= 200


def test_unknown_demo_text() -> None:
    with pytest.raises(InputError, match=r"no embedded text 'demo:news'.*demo:wiki"):
        load_texts("demo:news")


@pytest.mark.parametrize("column", ["text", "page", "content", "body"])
def test_jsonl_zst_and_parquet_give_the_same(tmp_path: Path, column: str) -> None:
    import zstandard

    records = numbered(20, column)
    plain = write_jsonl(tmp_path / "a.jsonl", records)
    packed = tmp_path / "a.jsonl.zst"
    packed.write_bytes(zstandard.compress((tmp_path / "a.jsonl").read_bytes()))
    table = write_parquet(tmp_path / "a.parquet", {"id": list(range(20)), column: [r[column] for r in records]})
    expected = [f"document {index}" for index in (*range(8), *range(10, 18))]
    assert load_texts(plain) == load_texts(str(packed)) == load_texts(table) == expected
    assert load_texts(plain, "calibration") == ["document 8", "document 18"]
    assert load_texts(plain, "heldout") == ["document 9", "document 19"]
    assert load_texts(plain, "all", limit=3) == ["document 0", "document 1", "document 2"]


def test_txt_is_cut_at_blank_lines_and_loses_nothing(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {index}. " + "word " * 100 for index in range(60))
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    pieces = load_texts(str(path), "all")
    assert "\n\n".join(pieces) == text
    assert len(pieces) >= 10
    path.write_text(text.replace("\n\n", "\n"), encoding="utf-8")  # no blank line: cut at line ends
    assert "\n".join(load_texts(str(path), "all")) == text.replace("\n\n", "\n")


def test_glob_reads_files_in_name_order(tmp_path: Path) -> None:
    for name, start in (("b", 10), ("a", 0)):
        write_jsonl(tmp_path / f"{name}.jsonl", numbered(20)[start : start + 10])
    assert load_texts(str(tmp_path / "*.jsonl"), "all") == [f"document {index}" for index in range(20)]


def test_mixture_splits_each_source_and_alternates(tmp_path: Path) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", numbered(40))
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": f"short {index}"} for index in range(10)])
    mixed = load_texts(f"{long},{short}")
    assert sorted(mixed) == sorted(load_texts(long) + load_texts(short))
    assert sum(text.startswith("short") for text in mixed[:20]) == 4
    assert load_texts(f"{long}, {short}", "heldout").count("short 9") == 1


@given(st.lists(st.lists(st.text(max_size=3), min_size=1, max_size=30), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_alternate_keeps_every_document_and_each_order(groups: list[list[str]]) -> None:
    tagged = [[f"{which}:{index}" for index in range(len(group))] for which, group in enumerate(groups)]
    mixed = _alternate(tagged)
    for which, group in enumerate(tagged):
        assert [text for text in mixed if text.startswith(f"{which}:")] == group
    assert len(mixed) == sum(map(len, tagged))


@given(st.lists(st.text(alphabet="ab", max_size=30), min_size=1), st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_merge_short_loses_nothing(pieces: list[str], least: int) -> None:
    merged = list(merge_short(pieces, least, "\n"))
    assert "\n".join(merged) == "\n".join(pieces)
    assert all(len(text) >= least for text in merged[:-1])


def test_no_text_is_an_input_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n\t\n")
    blank = write_jsonl(tmp_path / "blank.jsonl", [{"text": "  "}])
    nothing = write_jsonl(tmp_path / "nothing.jsonl", [])
    for ref in (str(empty), blank, nothing):
        with pytest.raises(InputError, match="holds no text"):
            load_texts(ref, "all")
    for ref in ("demo:c4,", ""):
        with pytest.raises(InputError, match="empty part"):
            load_texts(ref)


def test_part_without_documents_is_an_input_error(tmp_path: Path) -> None:
    ref = write_jsonl(tmp_path / "few.jsonl", numbered(5))
    with pytest.raises(InputError, match=r"heldout part of .* is empty: it has 5 documents"):
        load_texts(ref, "heldout")
    assert len(load_texts(ref, "all")) == 5


def test_bad_input_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "bad.jsonl.zst").write_bytes(b"not zstd at all")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "notes.doc").touch()
    write_jsonl(tmp_path / "two.jsonl", [{"question": "a", "answer": "b"}])
    write_jsonl(tmp_path / "numbers.jsonl", [{"value": 1}])
    write_jsonl(tmp_path / "mixed.jsonl", [{"text": "a"}, {"text": 7}])
    cases = {
        "latin.txt": "not UTF-8",
        "broken.jsonl": "line 2 is not JSON",
        "list.jsonl": "not a JSON object",
        "bad.jsonl.zst": "not readable as zstd",
        "bad.parquet": "not a readable parquet",
        "notes.doc": "unknown kind",
        "two.jsonl": "string columns are question, answer",
        "numbers.jsonl": "no string column",
        "mixed.jsonl": "line 2 has no text",
        "missing.jsonl": "No file matches",
        "*.zip": "No file matches",
        "": "is a folder",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            load_texts(str(tmp_path / name), "all")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="neither a file nor"):
        load_texts("a:b:c:d:e")
    with pytest.raises(InputError, match="Unknown split 'test'"):
        load_texts("demo:wiki", "test")  # type: ignore[arg-type]


def test_hub_reference_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        asked.append((name, config, split, streaming))
        return [{"title": "t", "body": f"row {index}"} for index in range(12)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_texts("org/name:en:validation:body", "heldout") == ["row 9"]
    with pytest.raises(InputError, match="string columns are title, body"):
        load_texts("name")
    assert asked == [("org/name", "en", "validation", True), ("name", None, "train", True)]
