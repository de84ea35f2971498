"""What a user wrote or named, read within bounds: files of text and JSON, paths, and names that become files.

Everything here raises InputError naming the file (and line) or the value; no other exception comes from bad content.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

from ..errors import InputError

LARGEST_JSON = 256 * 2**20  # bytes
LONGEST_NAME = 200  # bytes of a name that becomes a file's: file systems take 255, with suffixes and temporary prefixes
_SHOWN = 60  # characters of a value in a message


def read_text(path: str | Path, what: str, largest: int, remedy: str) -> str:
    """The UTF-8 text of a file of at most `largest` bytes; `remedy` is for one that is missing.

    Raises InputError when it is missing, a folder, larger, no UTF-8, or cannot be read.
    """
    place = user_path(path, what)
    try:
        with place.open("rb") as file:
            content = file.read(largest + 1)
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist", remedy) from None
    except IsADirectoryError:
        raise InputError(f"{what} {path} is a folder", remedy) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{what} {shown(path)} cannot be read: {reason}", "Check its name and permissions") from None
    if len(content) > largest:
        raise InputError(f"{what} {path} has more than {largest:,} bytes", "Leave out what is not needed")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} is not UTF-8 text (byte {error.start})", "Convert it to UTF-8") from None


def read_json(path: str | Path, what: str = "file") -> Any:
    """The content of a JSON file. Raises InputError when it is missing, damaged or nested too deeply."""
    text = read_text(path, what, LARGEST_JSON, "Check the folder")
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{what} {path} is nested too deeply", "Write it again") from None
    except ValueError as error:
        raise InputError(f"{what} {path} is damaged: {error}", "Write it again") from None


def user_path(text: str | Path, what: str = "path") -> Path:
    """A path as a user writes it, `~` and all. Raises InputError where there can be no such path."""
    check_plain(str(text), what)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(
            f"{what} {shown(text)} begins with a home folder that is not there", "Write the whole path"
        ) from None


def check_plain(text: str, what: str, lines: bool = False) -> str:
    """`text` itself. Raises InputError for what is no Unicode text, and for control characters (not `lines`: tabs and
    line ends too), which would reach terminals and names of files."""
    for place, character in enumerate(text):
        if character in "\t\n\r" and lines:
            continue
        kind = unicodedata.category(character)
        if kind == "Cs":
            raise InputError(f"{what} {shown(text)} is not UTF-8 text (character {place + 1})", "Give it in UTF-8")
        if character == "\0" or (kind == "Cc" and not lines):
            raise InputError(f"{what} {shown(text)} holds a control character ({character!a})", "Leave it out")
    return text


def file_name(name: str, what: str, longest: int = LONGEST_NAME) -> str:
    """`name` itself, which may become a file's name in a folder of ours.

    Raises InputError for names that would lie elsewhere (`/`, `\\`, `..`), be hidden, or that file systems do not take.
    """
    check_plain(name, what)
    remedy = "Call it by letters, digits, spaces, dots and dashes"
    if not name.strip() or name != name.strip():
        raise InputError(f"{what} {shown(name)} is empty, or begins or ends with a space", remedy)
    if "/" in name or "\\" in name or name.startswith("."):
        raise InputError(f"{what} {shown(name)} cannot be a file's name: it has a slash or a leading dot", remedy)
    if len(name.encode()) > longest:
        raise InputError(f"{what} {shown(name)} has {len(name.encode())} bytes, at most {longest} can be kept", remedy)
    return name


def shown(value: Any) -> str:
    """A value in a message: as Python writes it, in one line of plain characters, cut where it is long."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to write out very long ones
    text = repr(str(value)) if isinstance(value, (str, Path)) else repr(value)
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 12]}...{text[-8:]}"
