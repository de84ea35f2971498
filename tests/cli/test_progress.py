"""Progress: plain lines are few and say what matters."""

from __future__ import annotations

import io

import pytest

from informed_routing.cli.progress import LineProgress, make_progress
from informed_routing.progress import NullProgress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("informed_routing.cli.progress.time.monotonic", clock)
    return clock


def test_lines_come_at_most_every_few_seconds_with_the_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    progress = LineProgress(stream, every=5)
    progress.stage("route", 100)
    for step in range(1, 101):
        clock.now += 0.25
        progress.advance(step, loss=3.25, sparsity=0.2512345)
    progress.done()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[0] == "route: 20/100, loss 3.25, sparsity 0.2512, 20 s left"
    assert lines[-1] == "route: 100/100, loss 3.25, sparsity 0.2512, 25 s"


def test_a_resumed_stage_counts_only_its_own_steps_for_the_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    progress = LineProgress(stream, every=5)
    progress.stage("route", 100)
    for step in range(81, 91):
        clock.now += 1
        progress.advance(step)
    assert stream.getvalue().splitlines() == ["route: 85/100, 15 s left", "route: 90/100, 10 s left"]


def test_a_new_stage_closes_the_one_before(clock: Clock) -> None:
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.stage("a", 1)
    progress.advance(1)
    progress.stage("b", 0)
    clock.now += 130
    progress.advance(7)
    progress.message("note")
    progress.done()
    progress.done()
    assert stream.getvalue().splitlines() == ["a: 1/1, 0 s", "b: 7", "note", "b: 7, 2 min 10 s"]


def test_quiet_is_silent() -> None:
    assert isinstance(make_progress(quiet=True), NullProgress)
