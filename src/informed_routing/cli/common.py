"""What every command shares: options, checks, and a `Session` that reports and writes the result."""

from __future__ import annotations

import errno
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from informed_routing.config.types import LARGEST_SEED
from informed_routing.errors import InputError, WorkError
from informed_routing.execution.formats import Packed

from .arguments import check_device, check_threads, check_values, labels
from .streams import check_stdout, to_stdout

if TYPE_CHECKING:
    from rich.console import Console

    from informed_routing.progress import Progress

DEFAULT_SEED = 17
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Base model of a routing folder [default: where it was fitted]."),
]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_PANEL = "Shared options"
_PIPE_WIDTH = 160


@dataclass(frozen=True)
class Common:
    """The options that every command has."""

    json: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write the result as JSON; - prints only the JSON.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            max=LARGEST_SEED,
            help=f"Random seed [default: {DEFAULT_SEED}].",
            rich_help_panel=_PANEL,
        ),
    ] = None
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=_PANEL)] = "auto"
    dtype: Annotated[
        Dtype,
        typer.Option("--dtype", help="Number format; auto is the fast one of the device.", rich_help_panel=_PANEL),
    ] = "auto"
    threads: Annotated[
        int | None,
        typer.Option("--threads", help="CPU threads [default: all cores].", rich_help_panel=_PANEL),
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=_PANEL)] = False
    skip_self_check: Annotated[
        bool,
        typer.Option(
            "--skip-self-check",
            help="Go on where a few tokens show that routing does not compute what it must: at your own risk.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show tracebacks and the libraries' messages.", rich_help_panel=_PANEL),
    ] = False


def with_common(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command whose first parameter is `common: Common` the shared options, after its own."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    hints = inspect.get_annotations(Common, eval_str=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(Common)
    ]
    names = {field.name for field in fields(Common)}

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + shared
    called = labels(parameters)

    def run(**values: Any) -> None:
        from .envelope import check_apart

        values = check_values(values, called)
        common = Common(**{name: values.pop(name) for name in names})
        check_apart(common.json, values)
        command(common, **values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    return run


Execution = Literal["auto", "native", "sparse", "masked"]
ExecutionOption = Annotated[
    Execution,
    typer.Option(
        "--execution",
        help="native is the CPU engine, sparse skips in PyTorch, masked computes everything: the reference; "
        "auto is native where it runs.",
    ),
]
WeightsOption = Annotated[
    Packed | None,
    typer.Option("--weights", help="Format of the native engine's copy of the base weights [default: as loaded]."),
]


@dataclass
class Session:
    """One run of a command. Make it with `session`."""

    command: str
    common: Common
    device: str
    seed: int
    progress: Progress
    console: Console

    def finish(
        self,
        result: dict[str, Any],
        show: Callable[[Console], None],
        *,
        model: str,
        dtype: str,
        device: str | None = None,
    ) -> None:
        """Print the result for people, or as JSON where `--json` says so; `model` is the reference given."""
        from .envelope import envelope, is_stdout, print_json, write_json

        target = self.common.json
        self.progress.done()
        if target is not None:
            content = envelope(
                self.command,
                model=model,
                device=device or self.device,
                dtype=dtype,
                seed=self.seed,
                result=result,
            )
            if is_stdout(target):
                with to_stdout():
                    print_json(content)
                return
            # before the tables: a reader of stdout who goes early must not cost the file
            write_json(target, content)
            self.progress.message(f"wrote {target}")
        with to_stdout():
            show(self.console)


@contextmanager
def session(command: str, common: Common, seed: int | None = None) -> Iterator[Session]:
    """Check the shared options, quieten the libraries, set threads and seed, close the progress at the end.

    Raises InputError for a device that is not there and a JSON file that cannot be written, and WorkError that says
    what was being done when memory ran out.
    """
    from rich.console import Console

    from .envelope import check_target
    from .progress import Stages, make_progress

    check_stdout()
    check_target(common.json)
    check_threads(common.threads)
    if not common.debug:
        _quieten()
    from informed_routing.evaluation.environment import check_threads as use_threads

    use_threads(common.threads)
    from transformers import set_seed

    seed = next((value for value in (common.seed, seed) if value is not None), DEFAULT_SEED)
    device = check_device(common.device)
    set_seed(seed)
    progress = Stages(make_progress(common.quiet))
    try:
        # a pipe has no width: tables must not be cut to the 80 columns that rich assumes
        width = None if sys.stdout.isatty() else _PIPE_WIDTH
        # names are shown as they are: brackets and colons in them are no styles and no pictures
        console = Console(highlight=False, markup=False, emoji=False, width=width)
        with _self_check(common.skip_self_check):
            yield Session(command, common, device, seed, progress, console)
    except Exception as error:
        if not _out_of_memory(error):
            raise
        raise WorkError(f"out of memory {progress.where}", progress.remedy) from error
    finally:
        progress.done()


def _self_check(skip: bool) -> AbstractContextManager[None]:
    if not skip:
        return nullcontext()
    from informed_routing.execution.self_check import skipped

    return skipped()


def check_sparsities(values: Sequence[float], name: str = "--sparsity") -> list[float]:
    """Distinct shares in the order given. Raises InputError for one outside 0 <= s < 1."""
    for value in values:
        if not 0 <= value < 1:
            hint = f"Give a share, such as {value / 100:g}" if 2 <= value < 100 else "Give a share, such as 0.25"
            raise InputError(f"{name} {value:g} is not between 0 and 1", hint)
    return list(dict.fromkeys(float(value) for value in values))


def check_at_least(name: str, values: Sequence[int], least: int) -> None:
    """Raise InputError naming the first of `values` below `least`."""
    for value in values:
        if value < least:
            raise InputError(f"{name} {value} is below {least}", f"Give {least} or more")


def _out_of_memory(error: BaseException) -> bool:
    """Python's, a GPU's, or the CPU allocator's word for it."""
    if isinstance(error, RuntimeError) and type(error).__module__ == "builtins":
        return "allocate memory" in str(error) or "bad_alloc" in str(error)
    out_of_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or out_of_memory or type(error).__name__ == "OutOfMemoryError"


def dtype_name(model: Any) -> str:
    """`float32`, `bfloat16`, ... of a loaded model."""
    return str(model.dtype).removeprefix("torch.")


def _quieten() -> None:
    """Keep load bars and advice of the libraries off stderr, where our one-line messages are."""
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    from logging import ERROR, getLogger

    from transformers.utils import logging

    logging.set_verbosity_error()
    getLogger("huggingface_hub").setLevel(ERROR)  # it reports every attempt to reach a network that is not there
    logging.disable_progress_bar()
