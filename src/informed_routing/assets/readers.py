"""Documents out of files and Hub data sets, one string after the other, in a fixed order."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from informed_routing.assets.columns import COLUMNS, TextColumn, choose
from informed_routing.assets.encodings import lines, mended
from informed_routing.assets.gguf import first_line
from informed_routing.errors import InputError, WorkError
from informed_routing.extras import need

SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet", ".txt")
_PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zip": "zip", ".lz4": "lz4", ".br": "brotli"}
_PIECE = 1000  # characters: the least that a .txt file is cut into
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[^:]*){0,3}")
_FILE_COLUMN = re.compile(r"(?P<file>.+\.(?:jsonl|jsonl\.zst|parquet)):(?P<column>[^:/\\]+)", re.DOTALL)


def read_documents(ref: str) -> Iterator[str]:
    """Documents of one file, one glob (files in name order), or one Hub set `name:config:split:column`.

    `file.jsonl:column` and `*.parquet:column` choose a column. All files of a glob have their text in one column.
    Raises `InputError` when nothing is there or it cannot be read as text.
    """
    need_reader(ref)
    named = None if exists(ref) else _FILE_COLUMN.fullmatch(ref)
    name, column = (named["file"], named["column"]) if named else (ref, "")
    if paths := _files(name):
        chosen = TextColumn(column)
        for path in paths:
            yield from _read_file(path, chosen)
    elif _HUB.fullmatch(ref) and not _below_a_folder(ref):
        yield from _read_hub(ref)
    else:
        raise InputError(f"Data {ref!r} is neither a file nor the name of a data set", _remedy())


def need_reader(ref: str) -> None:
    """Raise MissingExtra if a file, glob or Hub set takes a package that is not installed. Nothing is read."""
    named = None if exists(ref) else _FILE_COLUMN.fullmatch(ref)
    name = named["file"] if named else ref
    paths = [name] if exists(name) else _glob(name)
    for path in paths:
        if path.endswith(".parquet"):
            need("pyarrow", extra="data", for_what="Parquet files")
        elif path.endswith(".zst"):
            need("zstandard", extra="data", for_what="Files packed with zstd")
    if not paths and not name.endswith(SUFFIXES) and _HUB.fullmatch(ref) and not _below_a_folder(ref):
        need("datasets", extra="data", for_what="Data sets of the Hub")


def exists(ref: str) -> bool:
    """Whether `ref` is a path of something that is there; False for what cannot be a path."""
    try:
        return Path(ref).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown user's home
        return False


def matches(ref: str) -> bool:
    """Whether `ref` names files: one, or those of a glob."""
    named = _FILE_COLUMN.fullmatch(ref)
    name = named["file"] if named and not exists(ref) else ref
    return exists(name) or (any(sign in name for sign in "*?[") and bool(_glob(name)))


def _below_a_folder(ref: str) -> bool:
    """Whether `ref` looks like a path into a folder that is here: then it is no name of the Hub's."""
    name = ref.split(":")[0]
    return "/" in name and Path(name).parent.is_dir()


def _glob(ref: str) -> list[str]:
    try:
        return sorted(glob.glob(str(Path(ref).expanduser()), recursive=True))  # noqa: PTH207  (any root)
    except (OSError, ValueError, RuntimeError, re.error):
        return []


def _files(ref: str) -> list[Path]:
    if exists(ref):
        path = Path(ref).expanduser()
        if path.is_dir():
            raise InputError(f"{ref or '.'} is a folder", f"Name the files in it, for example {path / '*.jsonl'}")
        names = [str(path)]
    else:
        names = _glob(ref)
    found = [Path(name) for name in names if not Path(name).is_dir()]
    for file in found:
        if packed := _PACKED.get(file.suffix.lower()):
            remedy = "Unpack it, or pack it with zstd (.jsonl.zst)"
            raise InputError(f"{file} is packed with {packed}, which is not read", remedy)
    if not found and (ref.endswith(SUFFIXES) or any(sign in ref for sign in "*?[")):
        raise InputError(f"No file matches {ref!r}", _remedy())
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise InputError(f"{file} is of an unknown kind", f"Known are {', '.join(SUFFIXES)}")
    return found


def _remedy() -> str:
    kinds = ", ".join(SUFFIXES)
    return f"Give {kinds} files, a Hub set name:config:split:column, or demo:wiki, demo:c4, demo:code"


def _read_file(path: Path, column: TextColumn) -> Iterator[str]:
    try:
        if path.suffix == ".txt":
            if column.name:
                raise InputError(f"{path} is plain text, without {column.name!r}", "Give files of one kind")
            yield from _read_txt(path)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, column)
        else:
            yield from column.documents(_records(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}", "Check the file and its permissions") from error


def _read_txt(path: Path) -> Iterator[str]:
    """Pieces between blank lines, short ones joined; a text without blank lines is cut at line ends."""
    text = mended("".join(line for _, line in lines(path))).replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        raise InputError(f"{path} holds null characters: no text, or UTF-16 without a mark", "Convert it to UTF-8")
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


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of each JSON object of a `.jsonl` file."""
    for number, line in lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line, object_pairs_hook=_distinct)
        except _Twice as error:
            raise InputError(f"{where} has the key {str(error)!r} twice", "Give each key once") from error
        except RecursionError as error:
            raise InputError(f"{where} is nested too deeply", "Give one flat JSON object a line") from error
        except ValueError as error:
            raise InputError(f"{where} is not JSON: {error}", "Give one JSON object a line") from error
        if not isinstance(record, dict):
            raise InputError(f"{where} is not a JSON object", "Give one JSON object a line")
        yield where, record


class _Twice(Exception):
    """A key that one JSON object has twice: readers differ in which value counts."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


def _read_parquet(path: Path, column: TextColumn) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        _parquet_column(path, table.schema_arrow, column)
        if not column.name:
            return  # nothing but nulls
        row = 0
        for batch in table.iter_batches(columns=[column.name]):
            values = batch.column(0).to_pylist()
            yield from column.documents(
                (f"{path}, row {row + place}", {column.name: value}) for place, value in enumerate(values, start=1)
            )
            row += len(values)
    except (pyarrow.ArrowException, UnicodeDecodeError, ValueError, TypeError, IndexError, KeyError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a readable parquet file: {first_line(error)}", "Write it again") from error


def _parquet_column(path: Path, schema: Any, column: TextColumn) -> None:
    """Settle the text column of a Parquet file, or check that it is there and holds strings."""
    names = list(schema.names)
    if column.name or any(name in names for name in COLUMNS):
        name = column.name or next(name for name in COLUMNS if name in names)
        if names.count(name) != 1:
            wrong = f"no column {name!r}; it has {', '.join(names[:10])}" if name not in names else f"{name!r} twice"
            raise InputError(f"{path} has {wrong}", "Give the same columns everywhere, each once")
        kind = schema.field(name).type
        if not _holds_strings(kind) and str(kind) != "null":
            raise InputError(f"{path} has no text in {name!r} but {kind}", "Give a column of strings")
        column.name = name
        return
    strings = [field.name for field in schema if _holds_strings(field.type)]
    if strings or not any(str(field.type) == "null" for field in schema):
        column.name = choose(str(path), strings)


def _holds_strings(kind: Any) -> bool:
    inner = getattr(kind, "value_type", None) if str(kind).startswith("dictionary<") else kind
    return str(inner) in ("string", "large_string", "string_view")


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
    try:
        yield from TextColumn(column).documents((f"{ref}, row {n}", row) for n, row in enumerate(rows, start=1))
    except (InputError, WorkError):
        raise
    except Exception as error:  # the connection broke on the way
        raise WorkError(f"Data set {ref!r} could not be had: {first_line(error)}", "Check the network") from error
