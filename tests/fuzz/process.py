"""One command in a forked child of this process, which has imported all that commands need, under limits."""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY = 3 << 30  # bytes beyond what the parent has mapped already
PATIENCE = 10  # wall-clock limit over the limit of processor time, on a machine that does other things too


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line left behind. `code` is negative for a signal."""

    code: int
    out: str
    err: str
    seconds: float
    hung: bool = False


def warm_up() -> None:
    """Import what all commands need, offline; one thread, since a forked child has no others."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at import
    import torch

    torch.set_num_threads(1)
    for name in (
        "accelerate",
        "peft",
        "pyarrow.parquet",
        "transformers.models.llama.modeling_llama",
        "informed_routing.cli",
        "informed_routing.training.fit",
        "informed_routing.baselines.static",
        "informed_routing.cli.loading",
        "informed_routing.evaluation.workload",
        "informed_routing.whatif.predict",
    ):
        importlib.import_module(name)


def run(
    arguments: Sequence[str],
    *,
    folder: Path,
    streams: Path,
    environment: Mapping[str, str],
    prepare: Sequence[Callable[[], Any]] = (),
    stdin: bytes | None = b"",
    seconds: float = 30.0,
    memory: int = MEMORY,
    kill_after: float | None = None,
    learn: bool = False,
) -> Outcome:
    """`informed-routing ARGUMENTS` in `folder`, as a process of its own would do it.

    `prepare` is called in the child just before; `stdin` None closes it. Streams are kept in the folder `streams`.
    `seconds` limits processor time (and PATIENCE times as much wall-clock time). `kill_after` sends SIGKILL at that
    moment. `learn` imports what the child imported here, too, so that later children need not.
    """
    streams.mkdir(exist_ok=True)
    (streams / "in").write_bytes(stdin or b"")
    gc.freeze()  # a child's collector must not touch, and so copy, the parent's pages
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            _redirect(streams, closed_stdin=stdin is None)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            _limit(seconds, memory)
            for step in prepare:
                step()
            code = _main(list(arguments))
            if learn:
                (streams / "modules").write_text("\n".join(sorted(sys.modules)))
        finally:
            os._exit(code)
    status, hung = _wait(child, begun, seconds * PATIENCE, kill_after)
    code = os.waitstatus_to_exitcode(status)
    if learn:
        _import_all(streams / "modules")
    out, err = ((streams / name).read_bytes().decode("utf-8", "backslashreplace") for name in ("out", "err"))
    return Outcome(code, out, err, time.monotonic() - begun, hung or code == -signal.SIGXCPU)


def in_child(work: Callable[[], object], seconds: float = 300.0) -> bool:
    """Whether `work` ran to its end in a forked child, whose threads and caches go with it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return _wait(child, time.monotonic(), seconds, None)[0] == 0


def _main(arguments: list[str]) -> int:
    """What the console script does, with the interpreter's flush at its end."""
    from informed_routing.cli import main

    code = main(arguments)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except (OSError, ValueError):
            code = 120
    return code


def _redirect(streams: Path, closed_stdin: bool) -> None:
    """Standard streams of the child as the interpreter would make them, in UTF-8."""
    os.setsid()
    source = os.open(streams / "in", os.O_RDONLY)
    os.dup2(source, 0)
    for number, name in ((1, "out"), (2, "err")):
        target = os.open(streams / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, number)
        os.close(target)
    os.close(source)
    remake_streams("utf-8")
    if closed_stdin:
        os.close(0)
        sys.stdin = None  # type: ignore[assignment]


def remake_streams(encoding: str, errors: str = "strict") -> None:
    """Fresh `sys.stdin`, `stdout` and `stderr` over the descriptors 0 to 2, as at the start of an interpreter."""
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding, errors)  # type: ignore[type-var]
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding, errors)
    raw = io.BufferedWriter(io.FileIO(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]


def _limit(seconds: float, memory: int) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    whole = max(int(seconds), 1)
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _wait(child: int, begun: float, limit: float, kill_after: float | None) -> tuple[int, bool]:
    """(status, whether it was killed for taking too long); the whole group goes with a killed child."""
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status, False
        elapsed = time.monotonic() - begun
        if elapsed > limit or (kill_after is not None and elapsed > kill_after):
            for kill in (os.killpg, os.kill):
                with suppress(ProcessLookupError):
                    kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1], elapsed > limit
        time.sleep(0.002 if kill_after is None else 0.0002)


def _import_all(names: Path) -> None:
    if not names.is_file():
        return
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names.read_text().splitlines():
            if name not in sys.modules and not name.startswith(("__", "test")):
                with suppress(BaseException):
                    importlib.import_module(name)


# -- what a child can do to itself before the command begins ---------------------------------------------------------


def without_override() -> None:
    """Let file permissions hold for root, too: give up the capability to ignore them (Linux)."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice, for 64 bits
    libc.capget(header, sets)
    for word in range(3):
        sets[word] &= ~0b110 & 0xFFFFFFFF  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def file_size_limit(size: int) -> Callable[[], None]:
    """No file may grow beyond `size` bytes: a disk that is full for large files (EFBIG)."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def on_file_event(number: int, act: Callable[[], Any], *, growing: bool = False) -> Callable[[], None]:
    """Call `act` at the start of the `number`-th change of the file system (counted from 1) that Python asks for.

    `growing` counts only those that need space.
    """

    def watch() -> None:
        left = [number]

        def hook(event: str, given: tuple[Any, ...]) -> None:
            if is_file_change(event, given) and (not growing or event in ("open", "os.mkdir")):
                left[0] -= 1
                if left[0] == 0:
                    act()

        sys.addaudithook(hook)

    return watch


def count_file_events(counter: Path) -> Callable[[], None]:
    """Keep the number of changes so far in a file of eight bytes."""

    def watch() -> None:
        handle, seen = os.open(counter, os.O_RDWR | os.O_CREAT | os.O_TRUNC), [0]

        def hook(event: str, given: tuple[Any, ...]) -> None:
            if is_file_change(event, given):
                seen[0] += 1
                os.pwrite(handle, seen[0].to_bytes(8, "little"), 0)

        sys.addaudithook(hook)

    return watch


def is_file_change(event: str, given: tuple[Any, ...]) -> bool:
    """Whether an audit event is about to change the file system."""
    if event == "open":
        flags = given[2] if isinstance(given[2], int) else 0
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in (
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.chmod",
        "os.truncate",
    )
