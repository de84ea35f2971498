"""Compile the engine for this machine, once, into the cache: the fastest code is the code made for its CPU.

Beside the engine lies its SHA-256. One that is damaged, cut short or of unknown origin is compiled again instead of
loaded, and one that another user could have put there is refused.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from importlib import resources
from pathlib import Path

from ...assets.cache import cache_dir, check_trusted, disk_errors, locked, machine, make_cache_folder, sha256_of
from ...errors import InputError
from ...files.atomic import scratch_folder, write_text
from .interface import check_abi

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
FLAGS_VARIABLE = "INFORMED_ROUTING_CXXFLAGS"
"""Further compiler flags, such as -DINFORMED_ROUTING_WIDE (the layout of AVX-512 on any machine), and with it
-DINFORMED_ROUTING_TILES (matrix instructions by plain code)."""


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX, g++ or clang++; None where there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def _target(found: str) -> tuple[Path, list[str], dict[str, str]]:
    """Where the engine of this machine, compiler and source is or will be; flags; the sources by name."""
    folder = resources.files(__package__) / "source"
    sources = sorted((path.name, path) for path in folder.iterdir() if path.name.endswith((".h", ".cpp")))
    texts = {name: path.read_text(encoding="utf-8") for name, path in sources}
    flags = [*_FLAGS, *os.environ.get(FLAGS_VARIABLE, "").split()]
    key = hashlib.sha256("\0".join([*texts.values(), *flags, found, machine()]).encode()).hexdigest()[:20]
    return cache_dir() / "native" / f"engine-{key}.so", flags, texts


def is_built() -> bool:
    """Whether the engine need not be compiled first, which takes some seconds."""
    found = compiler()
    return found is not None and _is_sound(_target(found)[0])


@functools.cache
def library_path() -> Path:
    """The compiled engine, made now if need be.

    Raises InputError when there is no compiler or it fails, or when somebody else may write where the engine lies.
    """
    found = compiler()
    if found is None:
        raise InputError(
            "the native engine needs a C++ compiler and found none", "Install g++, or use the torch engine"
        )
    target, flags, texts = _target(found)
    with disk_errors("compiling the native engine"):
        if not target.parent.is_dir():
            make_cache_folder(target.parent)
        _check_trusted(target)
        if not _is_sound(target):
            with locked(target.parent):
                if not _is_sound(target):  # another process was not faster
                    _compile(found, flags, texts, target)
                    write_text(_digest_of(target), sha256_of(target) + "\n")
            _check_trusted(target)
    return target


def _digest_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _is_sound(target: Path) -> bool:
    """Whether an engine is there, and is what was compiled."""
    try:
        return _digest_of(target).read_text(encoding="utf-8").strip() == sha256_of(target)
    except (OSError, UnicodeDecodeError):
        return False


def _check_trusted(target: Path) -> None:
    for path in (cache_dir(), target.parent, target):
        if path.exists():
            check_trusted(path)


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded engine."""
    return loaded(library_path())


def loaded(path: Path) -> ctypes.CDLL:
    """A compiled engine with the types of its functions.

    Raises InputError when the system cannot load it, or when it was made for another interface.
    """
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise InputError(
            f"the native engine cannot be loaded: {error}", f"Delete {path}, or use the torch engine"
        ) from None
    check_abi(lib, str(path))
    lib.ir_packed_bytes.restype = ctypes.c_int64
    lib.ir_scratch.restype = ctypes.c_void_p
    lib.ir_checksum.restype = ctypes.c_uint64
    return lib


def _compile(found: str, flags: list[str], texts: dict[str, str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        made = folder / target.name
        done = subprocess.run(
            [found, *flags, "-o", str(made), str(folder / "engine.cpp")], capture_output=True, text=True
        )
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise InputError(f"the native engine did not compile: {first}", "Use the torch engine, and report this")
        made.chmod(made.stat().st_mode & 0o775)  # whatever the umask says: not everybody may write to it
        made.replace(target)
