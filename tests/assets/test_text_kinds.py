"""Text files as people have them: each is read rightly, or refused with the file and the line."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from informed_routing.assets import encodings, load_texts
from informed_routing.assets.text import sources
from informed_routing.errors import InputError

TEXTS = [f"Number {index}: caf\u00e9 \u4e2d \U0001f600" for index in range(12)]


def jsonl(path: Path, records: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def parquet(path: Path, columns: dict[str, Any]) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def refused(ref: str | list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_texts(ref, "all")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_marks_and_wide_encodings_give_the_same_documents(encoding: str, end: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding[-3:] in ("-le", "-be") else ""
    lines = mark + "".join(json.dumps({"text": text}, ensure_ascii=False) + end for text in TEXTS)
    story = mark + f"{end}{end}".join(text * 60 for text in TEXTS)
    (tmp_path / "a.jsonl").write_bytes(lines.encode(encoding))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode(encoding)))
    (tmp_path / "a.txt").write_bytes(story.encode(encoding))
    assert load_texts(str(tmp_path / "a.jsonl"), "all") == TEXTS
    assert load_texts(str(tmp_path / "a.jsonl.zst"), "all") == TEXTS
    assert load_texts(str(tmp_path / "a.txt"), "all") == [text * 60 for text in TEXTS]


def test_marks_inside_joined_files_are_left_out(tmp_path: Path) -> None:
    part = b"\xef\xbb\xbf" + b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_bytes(part * 2)
    assert load_texts(str(tmp_path / "a.jsonl"), "all") == TEXTS * 2
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n")
    assert load_texts(str(tmp_path / "a.txt"), "all") == ["one\ntwo\n"]


def test_half_characters_are_replaced_and_whole_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "cut \\ud83d here"}\n{"text": "\\udc00\\ud83d\\ude00"}\n')
    found = load_texts(str(path), "all")
    assert found == ["cut \ufffd here", "\ufffd\U0001f600"]
    "".join(found).encode()


def test_what_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    refused(str(tmp_path / "a.jsonl"), r"a\.jsonl, line 2 is not UTF-8 text \(its byte 14\)")
    (tmp_path / "b.txt").write_bytes("plain".encode("utf-16-le"))
    refused(str(tmp_path / "b.txt"), "null characters")
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe" + '{"text": "a"}\n'.encode("utf-16-le") + b"\x00\xd8\x00\x00")
    refused(str(tmp_path / "c.jsonl"), "c.jsonl, line 1 or a later one is not UTF-16-LE text")


def test_nulls_first_do_not_choose_another_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"id": "x", "text": None}] * 3 + [{"id": "y", "text": "good"}]
    assert load_texts(jsonl(path, records), "all") == ["good"]
    assert load_texts(jsonl(path, [{"n": 1, "body": None}, {"n": 2, "body": "good"}]), "all") == ["good"]
    refused(jsonl(path, [{"title": "t", "body": None}, {"title": "u", "body": "b"}]), "string columns are title, body")
    assert load_texts(jsonl(path, [{"body": "a", "url": None}, {"body": "b", "url": None}]), "all") == ["a", "b"]
    refused(jsonl(path, [{"text": None}] * 3), "holds no text")
    texts = pyarrow.array([None] * 3 + ["good"])
    assert load_texts(parquet(tmp_path / "a.parquet", {"id": list("abcd"), "text": texts}), "all") == ["good"]
    empty = pyarrow.nulls(4)
    refused(parquet(tmp_path / "b.parquet", {"id": list("abcd"), "text": empty}), "holds no text")
    refused(parquet(tmp_path / "c.parquet", {"x": empty}), "holds no text")


@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}, 7, 1.5, True])
def test_other_values_in_the_text_column_are_refused_by_line(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    refused(jsonl(path, [{"text": value, "body": "b"}]), r"a\.jsonl, line 1 has no text in 'text' but")
    refused(jsonl(path, [{"text": "a"}, {"text": value}]), r"a\.jsonl, line 2 has no text in 'text' but")


def test_missing_columns_are_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    refused(jsonl(path, [{"text": "a"}, {"content": "b"}]), r"line 2 has no column 'text'; it has content")
    refused(jsonl(path, [{"text": "a"}, {}]), r"line 2 has no column 'text'; it has none")


def test_files_of_a_glob_have_their_text_in_one_column(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    jsonl(tmp_path / "b.jsonl", [{"content": "b"}])
    refused(str(tmp_path / "*.jsonl"), r"b\.jsonl, line 1 has no column 'text'")
    parquet(tmp_path / "a.parquet", {"text": ["a"]})
    parquet(tmp_path / "b.parquet", {"text": [7]})
    refused(str(tmp_path / "*.parquet"), r"b\.parquet has no text in 'text' but int64")
    parquet(tmp_path / "b.parquet", {"body": ["a"]})
    refused(str(tmp_path / "*.parquet"), r"b\.parquet has no column 'text'; it has body")


def test_a_column_can_be_chosen(tmp_path: Path) -> None:
    records = [{"question": f"q{index}", "answer": f"a{index}"} for index in range(3)]
    path = jsonl(tmp_path / "a.jsonl", records)
    table = parquet(tmp_path / "a.parquet", {"question": ["q"], "answer": ["a"]})
    refused(path, r"string columns are question, answer.*data\.jsonl:question")
    assert load_texts(f"{path}:answer", "all") == ["a0", "a1", "a2"]
    assert load_texts(f"{table}:answer", "all") == ["a"]
    assert load_texts(f"{tmp_path}/*.jsonl:question", "all") == ["q0", "q1", "q2"]
    refused(f"{path}:nothing", r"line 1 has no column 'nothing'; it has question, answer")
    refused(f"{table}:nothing", "has no column 'nothing'")
    assert len(load_texts(f"{path}:answer,{table}:question", "all")) == 4


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["text", "body"])
def test_every_kind_of_string_column_is_read(kind: Any, name: str, tmp_path: Path) -> None:
    values = ["a", "b", None, "a"]
    if pyarrow.types.is_dictionary(kind):
        array = pyarrow.array(values, pyarrow.string()).dictionary_encode().cast(kind)
    else:
        array = pyarrow.array(values, kind)
    path = parquet(tmp_path / "a.parquet", {"id": [1, 2, 3, 4], name: array})
    assert load_texts(path, "all") == ["a", "b", "a"]


def test_parquet_without_strings_in_its_text_column_is_refused(tmp_path: Path) -> None:
    refused(parquet(tmp_path / "a.parquet", {"text": [["a"]], "body": ["b"]}), r"no text in 'text' but list<")
    refused(parquet(tmp_path / "b.parquet", {"text": [b"a"]}), r"no text in 'text' but binary")
    refused(parquet(tmp_path / "c.parquet", {"title": ["a"], "body": ["b"]}), r"string columns are title, body")


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    whole = Path(parquet(tmp_path / "a.parquet", {"text": [f"document {index}" * 20 for index in range(200)]}))
    data = whole.read_bytes()
    for length in (0, 3, 4, 100, len(data) // 2, len(data) - 1):
        whole.write_bytes(data[:length])
        refused(str(whole), "not a readable parquet")
    for place in range(4, len(data) - 8, max((len(data) - 12) // 40, 1)):
        whole.write_bytes(data[:place] + bytes([data[place] ^ 0xFF] * 2) + data[place + 2 :])
        with suppress(InputError):
            load_texts(str(whole), "all")


def test_many_shards_and_commas_in_names(tmp_path: Path) -> None:
    folder = tmp_path / ("a long name, with a comma " * 4)
    paths = [jsonl(folder / f"part-{index:05d}-of-00021.jsonl", [{"text": f"{index}"}] * 10) for index in range(21)]
    assert len(load_texts(paths, "heldout")) == 21
    assert len(load_texts(",".join(paths), "heldout")) == 21
    assert sources(f"demo:wiki, {paths[0]},demo:c4") == ["demo:wiki", paths[0], "demo:c4"]
    assert sources(["demo:wiki,demo:c4", paths[1]]) == ["demo:wiki", "demo:c4", paths[1]]
    assert load_texts(f"{folder}/*.jsonl", "all", limit=5) == ["0"] * 5
    refused([], "No data is named")
    refused(["demo:wiki", ""], "empty part")
    refused("x" * 300 + ".jsonl", "No file matches")
    refused("~nosuchuser/x.jsonl", "No file matches")
    refused("a\0b", "neither a file nor")


def test_a_path_into_a_folder_that_is_here_is_no_hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    refused("data/train", "neither a file nor the name of a data set")


def test_endless_lines_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "LONGEST_LINE", 1 << 20)
    start = b'{"text": "a"}\n{"text": "'
    with (tmp_path / "a.jsonl.zst").open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as packed:
        packed.write(start)
        for _ in range(64):
            packed.write(b"a" * (1 << 20))
    refused(str(tmp_path / "a.jsonl.zst"), r"a\.jsonl\.zst, line 2 is longer than 1 MB")
    (tmp_path / "b.txt").write_bytes(b"a" * (3 << 20))
    refused(str(tmp_path / "b.txt"), r"b\.txt, line 1 is longer")
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe" + ("a" * (3 << 20)).encode("utf-16-le"))
    refused(str(tmp_path / "c.jsonl"), r"c\.jsonl, line 1 is longer")


def test_odd_json_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for line, message in {
        '{"text": "a", "text": "b"}': "has the key 'text' twice",
        '{"text": ' * 100_000: "nested too deeply|not JSON",
        '{"text": "a", "n": ' + "9" * 5000 + "}": "not JSON",
        '{"text": NaN}': "no text in 'text' but a number",
        '"text"': "not a JSON object",
    }.items():
        path.write_text('{"text": "good"}\n\n' + line + "\n")
        refused(str(path), f"a.jsonl, line 3.*({message})")
    path.write_text('{"text": "a", "score": NaN, "more": {"k": [1, null]}}\n')
    assert load_texts(str(path), "all") == ["a"]


def test_packed_and_empty_files(tmp_path: Path) -> None:
    for suffix, kind in {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zip": "zip"}.items():
        (tmp_path / f"a.jsonl{suffix}").write_bytes(b"x")
        refused(str(tmp_path / f"a.jsonl{suffix}"), f"packed with {kind}, which is not read.*zstd")
    (tmp_path / "empty.jsonl").touch()
    refused(str(tmp_path / "empty.jsonl"), "holds no text")
    jsonl(tmp_path / "more.jsonl", [{"text": ""}, {"text": "  "}, {"text": "a"}])
    assert load_texts(str(tmp_path / "*.jsonl"), "all") == ["a"]
