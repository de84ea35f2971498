"""Files that are whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import WorkError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, sync it to disk, and rename it over `path`.

    Raises WorkError when the disk is full or the folder is not writable; nothing half-written remains.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Atomic UTF-8 text."""
    write_atomically(path, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_several(folder: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with an empty folder inside `folder`, then rename its files, all of them whole, into `folder`."""
    for left_over in folder.glob(".new-*"):  # by a process that was killed here
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as building:
        write(Path(building))
        for file in sorted(Path(building).iterdir()):
            with file.open("rb") as written:
                os.fsync(written.fileno())
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
        except SafetensorError as error:  # it wraps the operating system's error in its message
            full = "No space left" in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error

    write_atomically(path, save)


def disk_error(path: Path, error: OSError) -> WorkError:
    """What an OSError means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WorkError(f"no disk space left while writing {path}", "Free some space and run again with --resume")
    return WorkError(f"cannot write {path}: {error.strerror or error}", "Check the folder and its permissions")
