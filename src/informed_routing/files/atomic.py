"""Files that are whole or absent: written in a folder of their own beside the place, synced, renamed."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import WorkError

try:
    import fcntl
except ImportError:  # no POSIX: nobody's leftovers are removed
    fcntl = None  # type: ignore[assignment]

_HAS_LOCKS: bool = fcntl is not None
_MARK = ".tmp-"
_YOUNG = 2.0
"""Seconds in which a scratch folder may not have its lock yet."""


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path on the disk of `path`, sync what it wrote, and rename it over `path`.

    A new file gets the permissions that the umask gives, an old one keeps its own; of a link, what it points to is
    replaced. Raises WorkError when the disk is full or the folder is not writable; nothing half-written remains.
    """
    path = Path(path)
    try:
        path = path.resolve() if path.is_symlink() else path
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(path) as folder:
            temporary = folder / "new"
            mode = _mode_of(path) if path.is_file() else new_file_mode(folder)
            write(temporary)
            _sync(temporary)
            _chmod(temporary, mode)
            temporary.replace(path)
    except OSError as error:
        raise disk_error(path, error) from error


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A fresh private folder beside `target`, on the same file system, gone afterwards whatever happens.

    Libraries leave temporary files beside what they write: here they go with the folder. What killed processes left
    for the same target is removed first; a lock that the system drops when a process ends tells the dead from the
    living.
    """
    remove_left_overs(target.parent, target.name)
    folder = target.parent / f"{_stem(target.name)}{secrets.token_hex(4)}"
    folder.mkdir(mode=0o700)
    handle = _locked(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def remove_left_overs(folder: Path, name: str = "", *, alone: bool = False) -> None:
    """Remove the scratch folders of dead processes in `folder`: those for a target's `name`, or all of them.

    Unless this process is `alone` to write there, very young ones stay: they may not have their lock yet.
    """
    stem = _stem(name) if name else "."
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if path.name.startswith(stem) and is_scratch(path.name) and path.is_dir() and not path.is_symlink():
                _remove_if_dead(path, 0.0 if alone else _YOUNG)


def is_scratch(name: str) -> bool:
    """Whether a file name is one of `scratch_folder`."""
    before, mark, after = name.rpartition(_MARK)
    return bool(mark) and before.startswith(".") and len(after) == 8 and all(c in "0123456789abcdef" for c in after)


def _stem(name: str) -> str:
    return "." + os.fsdecode(os.fsencode(name)[:200]) + _MARK  # a name may have 255 bytes


def _locked(folder: Path) -> int | None:
    """A handle that holds the lock of a folder; None where another process has it or there are no locks."""
    if not _HAS_LOCKS:
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle


def _remove_if_dead(folder: Path, age: float) -> None:
    with suppress(OSError):
        if abs(time.time() - folder.stat().st_mtime) < age:
            return
        handle = _locked(folder)
        if handle is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)


def new_file_mode(folder: Path) -> int:
    """Permissions that a file made in `folder` gets: asked of the system, since reading the umask would change it."""
    probe = folder / f".probe-{secrets.token_hex(4)}"
    handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)
        probe.unlink()


def _mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def _chmod(path: Path, mode: int) -> None:
    with suppress(OSError):  # file systems without permissions
        path.chmod(mode)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def settle(path: Path) -> None:
    """Sync a file, or all files of a folder, to disk, and give them the permissions of new files.

    Some libraries (safetensors) make files that only their owner can read, whatever the umask says.
    """
    if path.is_file():
        files, mode = [path], new_file_mode(path.parent)
    else:
        files, mode = sorted(p for p in path.rglob("*") if p.is_file()), new_file_mode(path)
    for file in files:
        _sync(file)
        _chmod(file, mode | (_mode_of(file) & 0o111 & (mode >> 2)))  # what can be run stays so, for who may read it


def write_text(path: Path, text: str) -> None:
    """Atomic UTF-8 text."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_several(folder: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with an empty folder, then rename its files, all of them whole, into `folder`."""
    for left_over in folder.glob(".new-*"):  # of a process of an earlier version that was killed here
        shutil.rmtree(left_over, ignore_errors=True)
    with scratch_folder(folder / "several") as building:
        write(building)
        settle(building)
        for file in sorted(building.iterdir()):
            if (folder / file.name).is_dir():  # such as additional_chat_templates/
                shutil.rmtree(folder / file.name)
            file.replace(folder / file.name)


def write_json(path: Path, data: Any) -> None:
    """Atomic, indented JSON."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Atomic safetensors file of contiguous CPU tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(temporary: Path) -> None:
        try:
            save_file(ready, str(temporary), metadata=metadata)
        except SafetensorError as error:
            raise system_error(error) from error

    write_atomically(path, save)


def system_error(error: Exception) -> OSError:
    """What the operating system said, where safetensors wrapped it in a message of its own."""
    full = "No space left" in str(error)
    return OSError(errno.ENOSPC if full else errno.EIO, str(error))


def disk_error(path: Path, error: OSError) -> WorkError:
    """What an OSError means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Free some space and run again, with --resume where the command has it"
        return WorkError(f"no disk space left while writing {path}", remedy)
    return WorkError(f"cannot write {path}: {error.strerror or error}", "Check the folder and its permissions")
