"""Mutations of text files."""

from __future__ import annotations

import json
from typing import Any

from .case import OTHER, OTHER_OR_REFUSED, SAME, SAME_OR_REFUSED, Case, Right, mutator, refused
from .world import DOCUMENTS

READERS = "evaluate-dense evaluate-routed fit prune measure benchmark"


def _lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


_ROWS = [{"text": text} for text in DOCUMENTS]


@mutator("text", only=READERS)
def _the_same_lines_written_another_way(case: Case) -> Right:
    path = case.folder / "text.jsonl"
    text = path.read_text()
    form, new = case.rng.choice(
        [
            ("byte order mark", "\ufeff" + text),
            ("line ends", text.replace("\n", "\r\n")),
            ("no last line end", text.rstrip("\n")),
            ("empty lines", "\n" + text.replace("\n", "\n\n \n")),
            ("escapes", text.replace("the ", "\\u0074he ")),
            ("spaces", text.replace(": ", "  :   ")),
            ("other columns", _lines([{"id": n, **row, "tags": ["a"], "of": {"x": 1}} for n, row in enumerate(_ROWS)])),
            ("other order of columns", _lines([{"source": "x", **row} for row in _ROWS])),
            ("empty documents", _lines([{"text": ""}, *_ROWS, {"text": "  "}])),
            ("nulls first", _lines([{"text": None}, {"text": None}, *_ROWS])),
            ("a column that comes later", _lines([{"url": "u", **_ROWS[0]}, *_ROWS[1:]])),
        ]
    )
    path.write_bytes(new.encode())
    case.note = f"text.jsonl: {form}"
    return SAME


@mutator("text", only=READERS)
def _the_same_documents_in_another_format(case: Case) -> Right:
    """Compressed, as Parquet in several forms, or in several files."""
    form = case.rng.choice(("zst", "two frames", "string", "large", "dictionary", "row groups", "nulls first", "glob"))
    if form in ("zst", "two frames"):
        import zstandard

        content, pack = _lines(_ROWS).encode(), zstandard.ZstdCompressor().compress
        at = len(content) // 2
        name, new = "text.jsonl.zst", pack(content) if form == "zst" else pack(content[:at]) + pack(content[at:])
        (case.folder / name).write_bytes(new)
    elif form == "glob":
        (case.folder / "text-1.jsonl").write_text(_lines(_ROWS[:25]))
        (case.folder / "text-2.jsonl").write_text(_lines(_ROWS[25:]))
        name = case.rng.choice(("text-*.jsonl", "text-?.jsonl", "text-[12].jsonl"))
    else:
        name = "text.parquet"
        _write_parquet(case.folder / name, form)
    case.rename("text.jsonl", name)
    case.renamed = (name, "text.jsonl")
    case.note = f"text as {form}"
    return SAME if case.command.name != "benchmark" else OTHER


def _write_parquet(path: Any, form: str) -> None:
    import pyarrow
    import pyarrow.parquet

    texts: list[str | None] = list(DOCUMENTS)
    if form == "nulls first":
        texts = [None, None, *texts]
    column = pyarrow.array(texts, pyarrow.large_string() if form == "large" else pyarrow.string())
    if form == "dictionary":
        column = column.dictionary_encode()
    table = pyarrow.table({"id": list(range(len(texts))), "text": column})
    pyarrow.parquet.write_table(table, path, row_group_size=7 if form == "row groups" else None)


@mutator("text", only=READERS)
def _no_text(case: Case) -> Right:
    """Refused, naming the file and, where there is one, the line."""
    path = case.folder / "text.jsonl"
    rows: list[Any] = list(_ROWS)
    at = case.rng.randrange(1, 40)
    form = case.rng.choice(
        (
            "empty",
            "blank",
            "a list",
            "no JSON",
            "a number",
            "no text column",
            "two columns",
            "not UTF-8",
            "a null character",
            "numbers for text",
            "lists for text",
            "deep nesting",
            "a lone surrogate",
            "cut off",
            "UTF-16",
            "renamed column",
        )
    )
    named = ["text.jsonl"]
    if form in ("a list", "a number"):
        rows[at] = [1, 2] if form == "a list" else 7
        named = [f"line {at + 1}"]
    elif form in ("numbers for text", "lists for text"):
        rows[at] = {"text": 7.5 if form == "numbers for text" else ["a", "b"]}
        named = [f"line {at + 1}"]
    elif form == "no text column":
        rows = [{"n": n} for n in range(40)]
    elif form == "two columns":
        rows = [{"first": row["text"], "second": row["text"]} for row in rows]
    elif form == "renamed column":
        rows[at:] = [{"words": row["text"]} for row in rows[at:]]
        named = [f"line {at + 1}", "words"]
    content = _lines(rows).encode()
    lines = content.split(b"\n")
    if form in ("no JSON", "deep nesting", "a null character", "not UTF-8"):
        lines[at] = {
            "no JSON": b'{"text": ',
            "deep nesting": b'{"text":' + b"[" * 100_000,
            "a null character": b"\0" * 30,
            "not UTF-8": b'{"text": "\xff\xfe caf\xe9"}',
        }[form]
        content = b"\n".join(lines)
        named = [f"line {at + 1}", "UTF-8"]
    elif form == "a lone surrogate":
        lines[at] = b'{"text": "half a pair: \\ud83d and more words to read here"}'
        content = b"\n".join(lines)
    elif form == "cut off":
        content = content[: content.find(b"\n", 3000) - 5]
    elif form == "UTF-16":
        content = content.decode().encode("utf-16")
    path.write_bytes({"empty": b"", "blank": b"\n \n\t\n"}.get(form, content))
    case.note = f"text.jsonl: {form}"
    if form == "UTF-16":
        return SAME_OR_REFUSED  # it begins with a mark that says so
    if form == "a lone surrogate":
        return Right((0, 2), False, ("text.jsonl",))
    return refused(*named)


@mutator("text", only=READERS)
def _no_archive_and_no_table(case: Case) -> Right:
    import zstandard

    form = case.rng.choice(
        (
            "zst cut off",
            "no zst",
            "zst and more",
            "one long line",
            "parquet cut off",
            "no parquet",
            "parquet of numbers",
            "parquet of lists",
            "parquet of two",
            "a damaged page",
            "unknown suffix",
            "gzip",
        )
    )
    packed = zstandard.ZstdCompressor().compress(_lines(_ROWS).encode())
    name = "text.jsonl.zst"
    if form == "zst cut off":
        content = packed[: case.rng.randrange(8, len(packed) - 8)]
    elif form == "no zst":
        content = _lines(_ROWS).encode()
    elif form == "zst and more":
        content = packed + b"garbage behind the end"
    elif form == "one long line":
        frame = zstandard.ZstdCompressor().compress(b"a" * (64 << 20))
        content = zstandard.ZstdCompressor().compress(b'{"text": "') + frame * 128
    elif form == "gzip":
        import gzip

        content = gzip.compress(_lines(_ROWS).encode())
    elif form == "unknown suffix":
        name, content = "text.csv", b"text\nthe river\n"
    else:
        name, content = "text.parquet", _bad_parquet(case, form)
    (case.folder / name).write_bytes(content)
    case.rename("text.jsonl", name)
    case.note = f"text: {form}"
    return refused(name)


def _bad_parquet(case: Case, form: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, dict[str, Any]] = {
        "parquet of numbers": {"text": list(range(60))},
        "parquet of lists": {"text": [[text] for text in DOCUMENTS]},
        "parquet of two": {"first": DOCUMENTS, "second": DOCUMENTS},
    }
    path = case.folder / "text.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns.get(form, {"text": DOCUMENTS})), path, compression="none")
    content = path.read_bytes()
    if form == "parquet cut off":
        return content[: case.rng.randrange(len(content))]
    if form == "no parquet":
        return b"PAR1" + content[100:]
    if form == "a damaged page":
        return content[:4] + b"\xff" * 40 + content[44:]
    return content


@mutator("text", only="evaluate-dense evaluate-routed")
def _plain_text(case: Case) -> Right:
    form, content = case.rng.choice(
        [
            ("plain", "\n\n".join(DOCUMENTS).encode()),
            ("byte order mark", b"\xef\xbb\xbf" + "\n\n".join(DOCUMENTS).encode()),
            ("line ends", "\r\n\r\n".join(DOCUMENTS).encode()),
            ("no blank lines", "\n".join(DOCUMENTS).encode()),
        ]
    )
    (case.folder / "text.txt").write_bytes(content)
    case.rename("text.jsonl", "text.txt")
    case.note = f"text.txt: {form}"
    return OTHER


@mutator("text", only="evaluate-dense evaluate-routed fit")
def _odd_documents(case: Case) -> Right:
    """Valid text of all sorts gives numbers."""
    form, texts = case.rng.choice(
        [
            ("one very long document", [" ".join(DOCUMENTS) * 20, *DOCUMENTS]),
            ("one letter each", [*"abcdefghij" * 400]),
            ("emoji and rare letters", [text + " \U0001f30a \u0950 \u202e\u0000"[:-1] for text in DOCUMENTS]),
            ("control characters", [text + " \x01\x1b[31m\x7f" for text in DOCUMENTS]),
            ("special tokens", [text + " <eos> <pad>" for text in DOCUMENTS]),
            ("a null in the text", [text + " \0 x" for text in DOCUMENTS]),
            ("all the same", [DOCUMENTS[0]] * 60),
        ]
    )
    (case.folder / "text.jsonl").write_text(_lines([{"text": text} for text in texts]))
    case.note = f"text.jsonl: {form}"
    return OTHER


@mutator("text", only="evaluate-pages")
def _damaged_pages(case: Case) -> Right:
    path = case.folder / "test.pages.jsonl"
    choices: list[tuple[str, list[Any], Right]] = [
        ("a page of nothing", [{"page": ""}, *({"page": text} for text in DOCUMENTS[:4])], SAME),
        ("a null page", [{"page": None}, *({"page": text} for text in DOCUMENTS[:4])], SAME),
        ("no pages", [{"pages": text} for text in DOCUMENTS[:4]], OTHER_OR_REFUSED),
        ("numbers", [{"page": 3}], refused("test.pages.jsonl")),
        ("nothing", [], refused("test.pages.jsonl")),
    ]
    form, rows, right = case.rng.choice(choices)
    path.write_text(_lines(rows))
    case.note = f"pages: {form}"
    return right
