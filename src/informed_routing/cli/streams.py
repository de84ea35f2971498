"""stdin, stdout and stderr as they may be: closed, full, or of an encoding that does not hold everything."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

from informed_routing.errors import InputError, WorkError


def prepare() -> None:
    """Let no character that a stream cannot show end the work: it is written as its code.

    A closed stream's number is taken, so that no file of ours gets it and with it what libraries write there.
    """
    for number, known in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if known is None:
            _take(number)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _take(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)


def check_stdout() -> None:
    """Raise InputError when results would have nowhere to go."""
    if sys.stdout is None or sys.stdout.closed:
        raise InputError("stdout is closed, and results are written there", "Redirect it to a file, or to /dev/null")


def flush() -> None:
    """Write out what is still held. Raises WorkError when stdout cannot take it, BrokenPipeError where nobody reads."""
    with to_stdout():
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()


@contextlib.contextmanager
def to_stdout() -> Iterator[None]:
    """Around what writes to stdout alone; raises as `flush` does."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_stdout()
        reason = "no disk space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise WorkError(f"stdout cannot be written: {reason}", "Redirect it to another place") from None


def drop_stdout() -> None:
    """Forget what stdout could not take, which Python would try to write again when it ends."""
    # tests put streams in its place that have no file behind them
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        sys.stdout.flush()


def tell(text: str) -> None:
    """One line on stderr; it may be gone, and then there is nobody to tell."""
    if sys.stderr is None:  # `print` would take stdout instead
        return
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def read_stdin() -> str:
    """All of stdin. Raises InputError when it is closed, or no UTF-8 text."""
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("stdin is closed, and --prompt - reads it", "Give the text as an argument")
    try:
        source = getattr(sys.stdin, "buffer", None)
        return sys.stdin.read() if source is None else source.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 text (byte {error.start})", "Convert it to UTF-8") from None
    except OSError as error:
        raise InputError(f"stdin cannot be read: {error.strerror}", "Give the text as an argument") from None
