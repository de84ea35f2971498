"""Single files that a user asks for at a place of their choice: `--json`, `--plot`.

A regular file is written whole or not at all. Devices, pipes and open descriptors (`/dev/null`, a FIFO, `>(jq)`) get
the content directly: renaming over them would put a file in their place.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError, WorkError
from .atomic import disk_error, write_atomically
from .user_files import user_path

try:
    import fcntl
except ImportError:  # no POSIX: descriptors are not looked into before they are written to
    fcntl = None  # type: ignore[assignment]

STDOUT = 1
READER_SECONDS = 60.0
"""How long a FIFO may wait for its reader once the work is done."""

_DESCRIPTOR = re.compile(r"/(?:dev|proc/(?:self|thread-self))/fd/(\d{1,9})")
_STREAMS = {"/dev/stdin": 0, "/dev/stdout": STDOUT, "/dev/stderr": 2}


def descriptor(target: str | Path) -> int | None:
    """The open descriptor that a path such as `/dev/stdout` or `/dev/fd/63` stands for; None for other paths."""
    text = str(target)
    if text in _STREAMS:
        return _STREAMS[text]
    found = _DESCRIPTOR.fullmatch(text)
    return int(found[1]) if found else None


def check_output(option: str, target: str | Path, ours: Callable[[bytes], bool]) -> None:
    """Raise InputError now, not after an hour of work, when `target` of an option cannot or must not be written.

    An existing regular file may be replaced when it is empty or `ours` says, of its first 4096 bytes, that a command
    like this one has written it.
    """
    try:
        number = descriptor(target)
        if number is not None:
            _check_descriptor(option, target, number)
            return
        path = user_path(target, option)
        try:
            status = path.stat()
        except FileNotFoundError:
            _check_parent(option, target, path)
            return
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            raise InputError(f"{option} {target} is a folder", "Give a file name")
        if kind not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFCHR):
            raise InputError(f"{option} {target} is no file, pipe or character device", "Give a file name")
        if not os.access(path, os.W_OK):
            raise InputError(f"{option} {target} cannot be written to", "Give another file, or change its permissions")
        if kind == stat.S_IFREG:
            _check_parent(option, target, path)
            if status.st_size and not _is(path, ours):
                raise InputError(
                    f"{option} {target} exists already and is no result of this program",
                    "Give another file, or move it away",
                )
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, (InputError, WorkError)):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{option} {target!s} cannot be used: {reason}", "Give another file name") from None


def _is(path: Path, ours: Callable[[bytes], bool]) -> bool:
    with path.open("rb") as file:
        return ours(file.read(4096))


def _check_descriptor(option: str, target: str | Path, number: int) -> None:
    writable = fcntl is None
    if fcntl is not None:
        try:
            writable = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        except OSError:
            raise InputError(f"{option} {target} is not open", "Give a file name, or - for stdout") from None
    if not writable:
        raise InputError(f"{option} {target} is not open for writing", "Give a file name, or - for stdout")


def _check_parent(option: str, target: str | Path, path: Path) -> None:
    parent = path.resolve().parent
    if not parent.is_dir():
        raise InputError(f"the folder of {option} {target} does not exist", "Create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"the folder of {option} {target} cannot be written to", "Give another file")


def write_output(target: str | Path, content: bytes) -> None:
    """Write `content` to a target that `check_output` allowed. Raises WorkError, and then leaves an old file alone."""
    path, number = Path(target), descriptor(target)
    try:
        if number is None:
            path = path.expanduser()
            if not path.exists() or path.is_file():
                write_atomically(path, lambda temporary: temporary.write_bytes(content))
                return
        handle = _open(path) if number is None else os.dup(number)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    except OSError as error:
        raise disk_error(path, error) from error


def _open(path: Path) -> int:
    """A device or FIFO for writing; a FIFO may still be without a reader."""
    patience = time.monotonic() + READER_SECONDS
    while True:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > patience:
                raise WorkError(f"nothing reads {path}", "Start its reader first, or give a file") from None
            time.sleep(0.05)
        else:
            os.set_blocking(handle, True)
            return handle
