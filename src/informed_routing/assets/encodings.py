"""Lines of text files as people have them: byte-order marks, any of Unicode's encodings, and never without bound."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from informed_routing.errors import InputError

LONGEST_LINE = 256 << 20
"""Bytes (in UTF-16 and UTF-32: characters) of one line, at most: a longer one is no document."""

_MARK = "\ufeff"
_MARKS = (  # the longer first: UTF-32's begins as UTF-16's does
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_LONE = re.compile("[\ud800-\udfff]")


def mended(text: str) -> str:
    """`text` with U+FFFD in place of halves of characters (lone surrogates), which no encoding has."""
    return _LONE.sub("\ufffd", text)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line, with its line end; decompressed if the name ends in `.zst`.

    UTF-8, or UTF-16 or UTF-32 with a byte-order mark. Marks at the beginning of a line are left out, also where files
    were joined. Raises `InputError` with the file and the line for what is not text, and for endless lines.
    """
    with _opened(path) as stream:
        head = stream.peek(4)[:4]
        wide = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)
        if wide is not None:
            yield from _wide_lines(path, stream, wide)
            return
        number = 0
        while raw := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE:
                raise _endless(path, number)
            try:
                yield number, raw.decode("utf-8").removeprefix(_MARK)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}, line {number} is not UTF-8 text (its byte {error.start + 1})", "Convert the file to UTF-8"
                ) from error


def _wide_lines(path: Path, stream: IO[bytes], encoding: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        text = io.TextIOWrapper(stream, encoding=encoding, newline="\n")
        while line := text.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise _endless(path, number)
            yield number, line.removeprefix(_MARK)
    except UnicodeDecodeError as error:
        where = f"{path}, line {number + 1} or a later one"
        raise InputError(f"{where} is not {encoding.upper()} text", "Convert the file to UTF-8") from error


def _endless(path: Path, number: int) -> InputError:
    return InputError(
        f"{path}, line {number} is longer than {LONGEST_LINE >> 20} MB", "Give one document a line, or cut the text"
    )


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, decompressed if its name ends in `.zst`."""
    with path.open("rb") as file:
        if path.suffix != ".zst":
            yield file
            return
        import zstandard

        try:
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            yield io.BufferedReader(reader, 1 << 20)  # type: ignore[arg-type]  # it has what a raw stream needs
        except zstandard.ZstdError as error:
            raise InputError(f"{path} is not readable as zstd: {error}", "Compress it again") from error
