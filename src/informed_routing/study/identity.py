"""Names of things by what they are: the same content has the same key on every machine."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
from pathlib import Path
from typing import Any


def digest(content: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def content_id(reference: str) -> str:
    """A reference as it is (`demo:wiki`, a Hub id), or for files, folders and globs the SHA-256 of what they hold."""
    path = Path(reference).expanduser()
    if path.is_file():
        return _file_digest(path)
    if path.is_dir():
        return digest({file.relative_to(path).as_posix(): _file_digest(file) for file in _files(path)})
    # Path.glob takes no absolute patterns.
    matches = sorted(glob.glob(str(path))) if glob.has_magic(reference) else []  # noqa: PTH207
    return digest([_file_digest(Path(match)) for match in matches]) if matches else reference


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
