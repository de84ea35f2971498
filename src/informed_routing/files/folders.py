"""Folders that a run writes: one writer at a time, and the old content until the new is whole."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError, WorkError
from .atomic import disk_error, remove_left_overs, scratch_folder, settle

try:
    import fcntl
except ImportError:  # no POSIX: no locks
    fcntl = None  # type: ignore[assignment]

CHECKPOINTS = "checkpoints"
LOCK_IN_FOLDER = ".lock"
_CANNOT_BE = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.ELOOP,
)


@contextmanager
def only_writer(folder: Path) -> Iterator[Path]:
    """The real path of a folder, which no other run writes into meanwhile; it need not exist yet.

    The lock is a file beside the folder (in it, where its parent cannot be written to), removed at the end; the system
    drops it when a process dies, however it does. Raises InputError when another run has it or when the folder cannot
    be made, before any work.
    """
    made: list[Path] = []
    try:
        folder = folder.resolve()
        if not folder.name:
            raise InputError(f"{folder} cannot be written as a whole", "Give a folder of its own for --out")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file", "Give a folder for --out")
        for parent in (folder.parent, *folder.parent.parents):
            if parent.exists():
                break
            made.insert(0, parent)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock, handle = _lock(folder)
    except (OSError, RuntimeError, ValueError) as error:
        _remove_empty(made)
        if isinstance(error, (InputError, WorkError)):
            raise
        if not isinstance(error, OSError) or error.errno in _CANNOT_BE:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--out {folder} cannot be written: {reason}", "Give another folder") from None
        raise disk_error(folder, error) from error
    try:
        remove_left_overs(folder.parent, folder.name, alone=True)
        remove_left_overs(folder, alone=True)
        remove_left_overs(folder / CHECKPOINTS, alone=True)
        yield folder
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(handle)
        _remove_empty(made)


def check_name(folder: Path) -> None:
    """Raises InputError for a folder that nobody could name: `demo:` stands for what comes with the package."""
    if str(folder).startswith("demo:"):
        raise InputError(f"{folder} is the name of something embedded, not of a folder", "Give another folder")


def check_apart_from(folder: Path, model: str) -> None:
    """Raises InputError when the model that a run reads is the folder that it writes, or that has no folder's name."""
    check_name(folder)
    try:
        same = folder.resolve() == Path(model).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # names that cannot be: refused where they are used
        return
    if same:
        raise InputError(f"--out {folder} is the model that is read", "Give another folder for --out")


def _lock(folder: Path) -> tuple[Path, int]:
    """The lock file of a folder and the handle that holds it."""
    path = folder.parent / f".{os.fsdecode(os.fsencode(folder.name)[:200])}.lock"
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            inside = folder / LOCK_IN_FOLDER
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not folder.is_dir() or path == inside:
                raise
            path = inside
            continue
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise InputError(
                f"another run is writing into {folder}", "Wait for it to end, or give another --out"
            ) from None
        except OSError:  # a file system without locks
            return path, handle
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return path, handle
        os.close(handle)  # its last owner has just removed it: that was no lock any more


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that were made for a run which then wrote nothing, the outer one first in the list."""
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()


def put_folder(
    folder: Path, write: Callable[[Path], None], *, ours: Callable[[str], bool], last: Sequence[str]
) -> None:
    """Make `folder` hold what `write` puts into an empty one, so that no half-written result is ever taken for one.

    Of the old content, entries that `ours` knows by name go and all others stay. An old result is exchanged for the new
    one in a single step. Where there is none, or the system cannot (a mount point, the working directory, some file
    systems), files are moved one by one: those named in `last`, without which nothing takes the folder for a result, go
    first and come last, and checkpoints, from which the run can be finished, go after them. Raises WorkError.
    """
    try:
        folder = folder.resolve()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _room_for(folder) as room:
            new = room / "new"
            new.mkdir()
            write(new)
            settle(new)
            if not folder.exists():
                new.rename(folder)
            elif not (any((folder / name).exists() for name in last) and _swap(new, folder, ours)):
                _move_in(new, folder, ours, last)
    except OSError as error:
        raise disk_error(folder, error) from error


@contextmanager
def _room_for(folder: Path) -> Iterator[Path]:
    """A scratch folder beside `folder`, or in it, where its parent cannot be written to or is another disk."""
    inside = folder.is_dir() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK))
    with scratch_folder(folder / "result" if inside else folder) as room:
        yield room


def _swap(new: Path, folder: Path, ours: Callable[[str], bool]) -> bool:
    """Exchange two folders in one step; `new` is the old one then. What is to stay is linked into both before."""
    if new.is_relative_to(folder) or Path.cwd().is_relative_to(folder):
        return False
    with suppress(OSError):
        shutil.copymode(folder, new)
    stay = [entry.name for entry in folder.iterdir() if not ours(entry.name) and not os.path.lexists(new / entry.name)]
    for name in stay:
        _link(folder / name, new / name)
    if not _exchange(new, folder):
        for name in stay:
            _remove(new / name)
        return False
    for entry in new.iterdir():
        if not ours(entry.name) and not os.path.lexists(folder / entry.name):  # came in the meantime
            entry.rename(folder / entry.name)
    return True


def _link(source: Path, target: Path) -> None:
    """The same files under another name; copies where there are no hard links."""
    if source.is_symlink():
        target.symlink_to(source.readlink())
    elif source.is_dir():
        target.mkdir()
        shutil.copymode(source, target)
        for entry in source.iterdir():
            _link(entry, target / entry.name)
    else:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system cannot."""
    if sys.platform == "win32":
        return False
    libc = ctypes.CDLL(None)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        swap = getattr(libc, "renamex_np", None)
        return swap is not None and swap(*names, 2) == 0
    rename = getattr(libc, "renameat2", None)
    here = -100  # paths are absolute: no folder to begin at
    return rename is not None and rename(here, names[0], here, names[1], 2) == 0


def _move_in(new: Path, folder: Path, ours: Callable[[str], bool], last: Sequence[str]) -> None:
    for name in last:
        (folder / name).unlink(missing_ok=True)
    names = [entry.name for entry in new.iterdir()]
    stale = [e for e in folder.iterdir() if ours(e.name) and e.name not in names and e.name != CHECKPOINTS]
    for entry in stale:
        _remove(entry)
    place = {name: number for number, name in enumerate(last, 1)}
    for name in sorted(names, key=lambda name: (place.get(name, 0), name)):
        if (folder / name).is_dir():
            _remove(folder / name)
        (new / name).replace(folder / name)
    if ours(CHECKPOINTS) and (folder / CHECKPOINTS).is_dir():
        shutil.rmtree(folder / CHECKPOINTS)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
