"""The command line `informed-routing`: parse, call the library, print.

Every error is one line on stderr. Exit code 0: done, 1: failed while working, 2: bad input.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from informed_routing.errors import InformedRoutingError

from . import benchmark, demo, evaluate, fit, generate, prune, study, whatif

_PROGRAM = "informed-routing"
_RESUMABLE = ("demo", "study")

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
    try:
        code = typer.main.get_command(app).main(given, prog_name=_PROGRAM, standalone_mode=False)
        if code == 130:  # typer's word for Ctrl-C
            raise KeyboardInterrupt
        return int(code or 0)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return _fail("interrupted" + _again(command), 1)
    except BaseException as error:
        if isinstance(error, BrokenPipeError):  # `| head` has read enough: no reason to complain, nor at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if "--debug" in given:
            traceback.print_exc()
        if type(error).__name__ == "NoArgsIsHelpError":  # the help has been printed
            return 2
        return _fail(*explain(error, command))


def explain(error: BaseException, command: str) -> tuple[str, int]:
    """One line that says what went wrong and what to do, and the exit code."""
    if isinstance(error, InformedRoutingError):
        return str(error), error.exit_code
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
        from informed_routing.config import describe

        what, remedy = describe(error)  # type: ignore[arg-type]
        return f"{what}. {remedy}", 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory. Use a smaller --batch-size, --sequence-length or model", 1
    text = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {text[0] if text else 'no details'}. Run again with --debug to see where",
        1,
    )


def _fail(message: str, code: int) -> int:
    # stderr may be gone too, and then there is nobody to tell
    with contextlib.suppress(OSError, ValueError):
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return code


def _again(command: str) -> str:
    if command in ("fit", "prune"):
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
