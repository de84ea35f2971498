"""The command line `informed-routing`: parse, call the library, print.

Every error is one line on stderr. Exit code 0: done, 1: failed while working, 2: bad input.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from informed_routing.errors import InformedRoutingError, InputError, WorkError
from informed_routing.files.user_files import shown

from . import benchmark, calibrate, demo, evaluate, fit, generate, inspect, prune, streams, study, whatif
from .arguments import refuse_empty

_PROGRAM = "informed-routing"
_RESUMABLE = ("demo", "study")
_NO_HOME = "there is no such home folder. Write paths without ~, and set HOME"
_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
_LONGEST = 1200  # characters of a message

app = typer.Typer(
    name=_PROGRAM,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("fit")(fit.fit)
app.command("calibrate")(calibrate.calibrate)
app.command("inspect")(inspect.inspect)
app.command("prune")(prune.prune)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("benchmark")(benchmark.benchmark)
app.command("study")(study.study)
app.add_typer(whatif.app, name="whatif")


def _show_version(wanted: bool) -> None:
    if wanted:
        from informed_routing.evaluation.environment import version

        typer.echo(version())
        raise typer.Exit


@app.callback()
def _informed_routing(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Turn a pre-trained language model into one that spends compute per token.

    Begin with: informed-routing demo
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = next((part for part in given if not part.startswith("-")), "")
    streams.prepare()
    try:
        refuse_empty(given)
        _check_working_directory()
        code = typer.main.get_command(app).main(given, prog_name=_PROGRAM, standalone_mode=False)
        if code == 130:  # typer's word for Ctrl-C
            raise KeyboardInterrupt
        streams.flush()  # a disk that is full is found here, or when Python ends and nobody can say so
        return int(code or 0)
    except SystemExit as stop:
        return _stopped(stop)
    except KeyboardInterrupt:
        return _fail("interrupted" + _again(command), 1)
    except BaseException as error:
        if isinstance(error, BrokenPipeError):  # `| head` has read enough: no reason to complain, nor at exit
            streams.drop_stdout()
            return 1
        error = _of_stdout(error)
        if "--debug" in given:
            traceback.print_exc()
        if type(error).__name__ == "NoArgsIsHelpError":  # the help has been printed
            _keep_what_was_shown()
            return 2
        message, code = explain(error, command)
        if message is _NO_HOME:
            message = f"{next((part for part in given if '~' in part), '~')}: {message}"
        return _fail(message, code)


def _stopped(stop: SystemExit) -> int:
    """The exit code of whoever stopped the program: rich does where a pipe is closed."""
    try:
        streams.flush()
    except (OSError, WorkError):
        streams.drop_stdout()
        return 1
    return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1


def _of_stdout(error: BaseException) -> BaseException:
    """What stdout has to say, where an error may have come from it."""
    if isinstance(error, OSError) and error.filename is None:
        try:
            streams.flush()
        except (OSError, WorkError) as own:
            return own
    return error


def _keep_what_was_shown() -> None:
    """Results before an error reach their reader; what stdout cannot take must not be tried again at exit."""
    try:
        streams.flush()
    except (OSError, WorkError):
        streams.drop_stdout()


def explain(error: BaseException, command: str) -> tuple[str, int]:
    """One line that says what went wrong and what to do, and the exit code."""
    if isinstance(error, InformedRoutingError):
        return str(error), error.exit_code
    if (said := unreadable(error)) is not None:
        return said, 2
    if _is_usage_error(error):
        message = str(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
        known = f"{command} " if any(command == entry.name for entry in app.registered_commands) else ""
        return f"{message}. See `{_PROGRAM} {known}--help`", 2
    if type(error).__name__ == "Abort":  # click's word for Ctrl-C
        return "interrupted" + _again(command), 1
    if _is_disk_full(error):
        where = getattr(error, "filename", None)
        return f"no disk space left{f' for {where}' if where else ''}. Free some{_again(command)}", 1
    if type(error).__module__.startswith("pydantic") and hasattr(error, "errors"):
        from informed_routing.config.types import describe

        what, remedy = describe(error)  # type: ignore[arg-type]
        return f"{what}. {remedy}", 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory. Use smaller input, a smaller model or a machine with more memory", 1
    text = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {text[0] if text else 'no details'}. Run again with --debug to see where",
        1,
    )


def _check_working_directory() -> None:
    """Raise InputError where it was removed: paths would fail one by one, each with a riddle."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise InputError("the working directory does not exist any more", "Change to one that does") from None


def unreadable(error: BaseException) -> str | None:
    """What an error means that only bad input raises, where no reader has named the file: names, encodings, nesting."""
    name = getattr(error, "filename", None)
    about = f" {shown(os.fsdecode(name))}" if isinstance(name, (str, bytes)) else ""
    if isinstance(error, OSError) and error.errno in _NAMES:
        return f"the path{about} cannot be used: {error.strerror}. Give another one"
    if isinstance(error, UnicodeDecodeError):
        return f"a file or text is not UTF-8 (byte {error.start}). Convert it to UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return f"a text is not valid Unicode (character {error.start + 1}). Give it in UTF-8"
    if isinstance(error, RecursionError):
        return "a file or value is nested too deeply. Write it flatter"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a path holds a NUL character. Leave it out"
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return _NO_HOME
    if type(error) is Exception:  # so bare only from the library of tokenizers
        return f"the tokenizer cannot encode the text: {error}. Check the model's tokenizer.json"
    return None


def _fail(message: str, code: int) -> int:
    _keep_what_was_shown()
    text = " ".join(message.split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)  # names may hold what a terminal obeys
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 300]} ... {text[-250:]}"
    streams.tell(f"error: {text}")
    return code


def _again(command: str) -> str:
    if command in ("fit", "calibrate", "prune"):
        return "; run again with --resume to continue"
    return "; run again to continue" if command in _RESUMABLE else ""


def _is_usage_error(error: BaseException) -> bool:
    # typer carries its own copy of click in newer versions, so the class cannot be named
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is at the root: safetensors and others wrap the OSError."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "os error 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
