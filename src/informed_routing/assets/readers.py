"""Documents out of files and Hub data sets, one string after the other, in a fixed order."""

from __future__ import annotations

import glob
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from informed_routing.assets.gguf import first_line
from informed_routing.errors import InputError, WorkError

SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet", ".txt")
COLUMNS = ("text", "page", "content")
_PIECE = 1000  # characters: the least that a .txt file is cut into
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[^:]*){0,3}")


def read_documents(ref: str) -> Iterator[str]:
    """Documents of one file, one glob (files in name order), or one Hub set `name:config:split:column`.

    Raises `InputError` when nothing is there or it cannot be read as text.
    """
    if paths := _files(ref):
        for path in paths:
            yield from _read_file(path)
    elif _HUB.fullmatch(ref):
        yield from _read_hub(ref)
    else:
        raise InputError(f"Data {ref!r} is neither a file nor the name of a data set", _remedy())


def _files(ref: str) -> list[Path]:
    path = Path(ref).expanduser()
    if path.is_dir():
        raise InputError(f"{ref} is a folder", f"Name the files in it, for example {path / '*.jsonl'}")
    names = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207  (any root)
    found = [Path(name) for name in names if Path(name).is_file()]
    if not found and (ref.endswith(SUFFIXES) or any(sign in ref for sign in "*?[")):
        raise InputError(f"No file matches {ref!r}", _remedy())
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise InputError(f"{file} is of an unknown kind", f"Known are {', '.join(SUFFIXES)}")
    return found


def _remedy() -> str:
    kinds = ", ".join(SUFFIXES)
    return f"Give {kinds} files, a Hub set name:config:split:column, or demo:wiki, demo:c4, demo:code"


def _read_file(path: Path) -> Iterator[str]:
    read = {".parquet": _read_parquet, ".txt": _read_txt}.get(path.suffix, _read_jsonl)
    try:
        yield from read(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})", "Convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}", "Check the file and its permissions") from error


def _read_txt(path: Path) -> Iterator[str]:
    """Pieces between blank lines, short ones joined; a text without blank lines is cut at line ends."""
    text = path.read_text(encoding="utf-8")
    pieces = re.split(r"\n[ \t]*\n", text)
    if len(pieces) > 1:
        yield from merge_short(pieces, _PIECE, "\n\n")
    else:
        yield from merge_short(text.split("\n"), _PIECE, "\n")


def merge_short(pieces: Sequence[str], least: int, joint: str) -> Iterator[str]:
    """Join pieces shorter than `least` characters with the next ones; a short last piece stays as it is."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= least:
            yield joint.join(held)
            held, size = [], 0
    if held:
        yield joint.join(held)


def _read_jsonl(path: Path) -> Iterator[str]:
    column = None
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}", "Give one JSON object a line") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number} is not a JSON object", "Give one JSON object a line")
        if column is None:
            column = _text_column(str(path), [key for key, value in record.items() if isinstance(value, str)])
        yield _value(record, column, f"{path}, line {number}")


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file, decompressed if its name ends in `.zst`."""
    if path.suffix != ".zst":
        with path.open(encoding="utf-8", newline="\n") as file:
            yield from file
        return
    import zstandard

    try:
        with path.open("rb") as file:
            stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            yield from io.TextIOWrapper(stream, encoding="utf-8", newline="\n")
    except zstandard.ZstdError as error:
        raise InputError(f"{path} is not readable as zstd: {error}", "Compress it again") from error


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = [field.name for field in table.schema_arrow if str(field.type) in ("string", "large_string")]
        column = _text_column(str(path), names)
        for batch in table.iter_batches(columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a readable parquet file: {first_line(error)}", "Write it again") from error


def _read_hub(ref: str) -> Iterator[str]:
    """Rows of a Hub set, streamed: nothing is downloaded that is not asked for."""
    name, config, split, column = [*ref.split(":"), "", "", ""][:4]
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"Data {ref!r} is neither a file nor a Hub data set: {reason}", _remedy()) from error
    except Exception as error:  # network and server errors come in many types
        raise WorkError(f"Data set {ref!r} could not be had: {first_line(error)}", "Check the network") from error
    for number, row in enumerate(rows, start=1):
        if not column:
            column = _text_column(ref, [key for key, value in row.items() if isinstance(value, str)])
        yield _value(row, column, f"{ref}, row {number}")


def _text_column(where: str, names: Sequence[str]) -> str:
    for name in COLUMNS:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    has = f"its string columns are {', '.join(names)}" if names else "it has no string column"
    raise InputError(f"{where} has no text column: {has}", f"Name one of them {COLUMNS[0]!r}")


def _value(record: Mapping[str, Any], column: str, where: str) -> str:
    value = record.get(column, "") or ""
    if not isinstance(value, str):
        raise InputError(f"{where} has no text in {column!r}", "Give a string in every record")
    return value
