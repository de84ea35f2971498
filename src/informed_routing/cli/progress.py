"""Progress on stderr: a bar on a terminal, a plain line every few seconds anywhere else."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from informed_routing.progress import NullProgress, Progress

if TYPE_CHECKING:
    from rich.progress import TaskID

_LINE_EVERY = 5.0  # seconds


def make_progress(quiet: bool) -> Progress:
    """The implementation that fits stderr; nothing is shown where that is closed."""
    if quiet or sys.stderr is None or sys.stderr.closed:
        return NullProgress()
    return BarProgress() if sys.stderr.isatty() else LineProgress()


class Stages:
    """A progress that remembers what is being done, and never ends the work: its reader may have gone."""

    def __init__(self, inner: Progress) -> None:
        self._inner: Progress | None = inner
        self._name: str | None = None

    @property
    def where(self) -> str:
        """For a message about what went wrong."""
        return f"(in {self._name}, or after it)" if self._name else "while reading the input or loading the model"

    @property
    def remedy(self) -> str:
        """What helps when memory is short there."""
        if self._name:
            return "Use smaller batches, shorter sequences, a smaller model or a machine with more memory"
        return "Use less or smaller text, a smaller model, --dtype bfloat16 or a machine with more memory"

    def stage(self, name: str, total: int) -> None:
        self._name = name
        self._tell("stage", name, total)

    def advance(self, step: int, **metrics: float | str) -> None:
        self._tell("advance", step, **metrics)

    def message(self, text: str) -> None:
        self._tell("message", text)

    def done(self) -> None:
        self._tell("done")  # the name stays: who fails closes the progress before anybody looks

    def _tell(self, what: str, *given: Any, **metrics: Any) -> None:
        if self._inner is not None:
            try:
                getattr(self._inner, what)(*given, **metrics)
            except OSError:  # a closed pipe, a full disk
                self._inner = None
            except ValueError as error:
                if "closed" not in str(error):
                    raise
                self._inner = None


class BarProgress:
    """A rich progress bar for each stage, with its metrics and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True, highlight=False, markup=False, emoji=False),
        )
        self._task: TaskID | None = None
        self._started = False

    def stage(self, name: str, total: int) -> None:
        self._close()
        if not self._started:
            self._bar.start()
            self._started = True
        self._task = self._bar.add_task(name, total=total or None, metrics="")

    def advance(self, step: int, **metrics: float | str) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=step)
            if metrics:
                self._bar.update(self._task, metrics=_format(metrics))

    def message(self, text: str) -> None:
        self._bar.console.print(text, markup=False)

    def done(self) -> None:
        self._close()
        if self._started:
            self._bar.stop()
            self._started = False

    def _close(self) -> None:
        if self._task is not None:
            self._bar.stop_task(self._task)
            self._task = None


class LineProgress:
    """Plain lines for log files and pipes: one when a stage ends, before that one every few seconds."""

    def __init__(self, stream: TextIO | None = None, every: float = _LINE_EVERY) -> None:
        self._stream = stream or sys.stderr
        self._every = every
        self._name: str | None = None
        self._total = self._step = self._first = 0
        self._metrics: dict[str, float | str] = {}
        self._start = self._last = 0.0

    def stage(self, name: str, total: int) -> None:
        self.done()
        self._name, self._total, self._step, self._first, self._metrics = name, total, 0, -1, {}
        self._start = self._last = time.monotonic()

    def advance(self, step: int, **metrics: float | str) -> None:
        now = time.monotonic()
        if self._first < 0:
            self._first = step - 1  # a resumed stage does not begin at 0
        self._step = step
        self._metrics = metrics or self._metrics
        if now - self._last >= self._every:
            self._last = now
            self._print(f"{self._where()}{self._left(now)}")

    def message(self, text: str) -> None:
        self._print(text)

    def done(self) -> None:
        if self._name is None:
            return
        self._print(f"{self._where()}, {_duration(time.monotonic() - self._start)}")
        self._name = None

    def _where(self) -> str:
        of = f"/{self._total}" if self._total else ""
        metrics = _format(self._metrics)
        return f"{self._name}: {self._step}{of}" + (f", {metrics}" if metrics else "")

    def _left(self, now: float) -> str:
        finished = self._step - self._first
        if not self._total or finished <= 0:
            return ""
        return f", {_duration((now - self._start) / finished * (self._total - self._step))} left"

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def _format(metrics: dict[str, float | str]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
