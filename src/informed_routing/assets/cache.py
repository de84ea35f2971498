"""The user cache: where it is, and how files get into it whole or not at all."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from informed_routing.errors import InputError, WorkError
from informed_routing.files.atomic import settle, write_json

CACHE_VARIABLE = "INFORMED_ROUTING_CACHE"
_OWN = f"set {CACHE_VARIABLE} to a folder of your own"


def cache_dir() -> Path:
    """Folder of downloaded and converted files; it need not exist yet.

    `$INFORMED_ROUTING_CACHE` if set, else `$XDG_CACHE_HOME/informed-routing`, else
    `~/.cache/informed-routing`.
    """
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "informed-routing"


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def make_cache_folder(folder: Path) -> None:
    """Make a folder of the cache as the umask says, but never one that everybody may write to."""
    root = cache_dir()
    root.parent.mkdir(parents=True, exist_ok=True)
    inside = folder.relative_to(root).parts if folder.is_relative_to(root) else ()
    for depth in range(len(inside) + 1):
        root.joinpath(*inside[:depth]).mkdir(mode=0o775, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def check_trusted(path: Path) -> None:
    """Raise InputError for a file or folder of the cache that another user could have written: code comes from it.

    Its owner must be this user or the system's, and not everybody may write to it.
    """
    if not hasattr(os, "geteuid"):
        return
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise InputError(f"{path} belongs to another user, and code is loaded from it", f"Remove it, or {_OWN}")
    if stat.S_IMODE(status.st_mode) & stat.S_IWOTH:
        raise InputError(
            f"everybody may write to {path}, and code is loaded from it", f"Run `chmod o-w {path}`, or {_OWN}"
        )


@functools.cache
def machine() -> str:
    """The processor, by its name and what it can do: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_record` stored; None where it is missing or damaged, so that it is made again."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        content, digest = stored["content"], stored["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return content if isinstance(content, dict) and digest == _digest(content) else None


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Keep a JSON mapping in the cache with its digest. That a cache cannot be written to is no error."""
    with suppress(WorkError, OSError):
        make_cache_folder(path.parent)
        write_json(path, {"content": content, "sha256": _digest(content)})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn an `OSError` of the disk into a `WorkError` that says what was being done."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WorkError(f"Failed while {doing}: {reason}", disk_remedy(reason, error.errno)) from error


def disk_remedy(reason: str, number: int | None = None) -> str:
    """What to do about a disk error, from its text or its number."""
    elsewhere = f"set {CACHE_VARIABLE} to a folder on another disk"
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in reason or "quota" in reason:
        return f"Free some disk space, or {elsewhere}"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"Make {cache_dir()} writable, or {elsewhere}"
    return f"Check the disk that holds {cache_dir()}, or {elsewhere}"


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold a lock file beside `target`, so that two processes do not build it at once."""
    from filelock import FileLock

    with disk_errors(f"opening the cache at {target.parent}"):
        make_cache_folder(target.parent)
        lock = FileLock(str(target.parent / f".{target.name}.lock"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A fresh folder on the same file system as `target`, removed afterwards whatever happens.

    Call it while holding `locked(target)`: what an earlier, killed process left behind is then surely dead
    and is removed first.
    """
    prefix = f".{target.name}.tmp-"
    with disk_errors(f"making room for {target}"):
        for stale in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(stale, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(built: Path, target: Path) -> None:
    """Move a finished file or folder to its place: flushed to disk, readable as the umask says, renamed in one step."""
    with disk_errors(f"writing {target}"):
        settle(built)
        if target.is_dir():
            shutil.rmtree(target)  # a damaged earlier copy: the caller has found it incomplete
        built.replace(target)
