"""Names of things by what they are: the same content has the same key on every machine."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
from pathlib import Path
from typing import Any

from ..assets.readers import SUFFIXES
from ..errors import InputError
from ..files.user_files import shown, user_path


def digest(content: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def content_id(reference: str) -> str:
    """A reference as it is (`demo:wiki`, a Hub id), or for files, folders and globs the SHA-256 of what they hold."""
    if reference.startswith("demo:"):  # whatever lies in the working directory
        return reference
    path = user_path(reference, "the reference")
    if path.is_file():
        return _file_digest(path)
    if path.is_dir():
        return digest({file.relative_to(path).as_posix(): _file_digest(file) for file in _files(path)})
    if matches := _matches(path):
        return digest([_file_digest(match) for match in matches])
    if "," in reference:  # several texts in one
        parts = [content_id(part.strip()) for part in reference.split(",") if part.strip()]
        return reference if parts == [part.strip() for part in reference.split(",")] else digest(parts)
    return reference


def check_text(reference: str) -> None:
    """Raise InputError for files of text that are not there; whether others are is found when they are asked for."""
    path = user_path(reference, "the text")
    if reference.startswith("demo:") or path.exists() or _matches(path):
        return
    if "," in reference:
        for part in reference.split(","):
            check_text(part.strip())
    elif reference.endswith(SUFFIXES) or glob.has_magic(reference):
        raise InputError(f"no file matches {shown(reference)}", "Check the path of the text")


def _matches(path: Path) -> list[Path]:
    # Path.glob takes no absolute patterns.
    names = sorted(glob.glob(str(path))) if glob.has_magic(str(path)) else []  # noqa: PTH207
    return [Path(name) for name in names if Path(name).is_file()]


def _files(folder: Path) -> list[Path]:
    """Files below a folder, without hidden ones."""
    relative = ((path, path.relative_to(folder).parts) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path, parts in relative if not any(part.startswith(".") for part in parts))


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
