"""The user cache: where it is, and how files get into it whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from informed_routing.errors import WorkError

CACHE_VARIABLE = "INFORMED_ROUTING_CACHE"


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
        target.parent.mkdir(parents=True, exist_ok=True)
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
    """Move a finished file or folder to its place: flushed to disk, then renamed in one step.

    Files get the permissions that the user's umask gives to new ones, whoever wrote them.
    """
    with disk_errors(f"writing {target}"):
        usual = _usual_mode(built.parent)
        for path in [built] if built.is_file() else sorted(p for p in built.rglob("*") if p.is_file()):
            path.chmod(usual)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if target.is_dir():
            shutil.rmtree(target)  # a damaged earlier copy: the caller has found it incomplete
        built.replace(target)


def _usual_mode(folder: Path) -> int:
    """Permissions of a file that is made in the ordinary way (the umask cannot be read without changing it)."""
    probe = folder / f".mode-{os.getpid()}"
    try:
        probe.touch()
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
