"""How a claim is judged by the entries of a table: which of two numbers is lower, who is first, what saturates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from .. import results
from ..results import Entry, Value

Read = Callable[[Entry], Value | None]
Side = tuple[str, float, bool]
"""Method, sparsity, recovered."""

Word = Literal["holds", "does not hold", "within the error", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """What became of a claim here, and our numbers."""

    word: Word
    ours: str


NOT_MEASURED = Verdict("not measured", "-")


def verdict(holds: bool, ours: str) -> Verdict:
    """A verdict by whether the claim holds."""
    return Verdict("holds" if holds else "does not hold", ours)


def less(found: Sequence[Entry], low: Side, high: Side, read: Read) -> Verdict:
    """Whether the first side's number is below the second's, by at least one joint standard error."""
    one, other = (_number(found, side, read) for side in (low, high))
    if one is None or other is None:
        return NOT_MEASURED
    shown = f"{text(one)} against {text(other)}"
    if abs(one.value - other.value) < _joint(one, other):
        return Verdict("within the error", shown)
    return verdict(one.value < other.value, shown)


def rising(found: Sequence[Entry], sides: Sequence[Side], read: Read) -> Verdict:
    """Whether the numbers rise from side to side."""
    numbers = [number.value for side in sides if (number := _number(found, side, read)) is not None]
    if len(numbers) < len(sides):
        return NOT_MEASURED
    return verdict(numbers == sorted(numbers), ", ".join(f"{number:.2f}" for number in numbers))


def ahead(found: Sequence[Entry], own: Side, rivals: Sequence[Side]) -> Verdict:
    """Whether a side has a lower perplexity and a higher mean accuracy than the best of its rivals in each.

    A lead below one joint standard error is none, and no loss either.
    """
    leads, shown = [], []
    for read, sign in ((results.perplexity, 1), (results.average, -1)):
        mine = _number(found, own, read)
        theirs = [number for side in rivals if (number := _number(found, side, read)) is not None]
        if mine is None or len(theirs) < len(rivals):
            return NOT_MEASURED
        best = min(theirs, key=lambda number, sign=sign: sign * number.value)  # type: ignore[misc]
        lead = sign * (best.value - mine.value)
        leads.append(0.0 if abs(lead) < _joint(mine, best) else lead)
        shown.append(f"{text(mine)} against {text(best)}")
    if min(leads) < 0:
        return verdict(False, "; ".join(shown))
    return Verdict("within the error", "; ".join(shown)) if min(leads) == 0 else verdict(True, "; ".join(shown))


def better_by_perplexity(found: Sequence[Entry], own: Side, others: Sequence[Side]) -> Verdict:
    """Whether a side's place by perplexity is better than by accuracy."""
    places = []
    for read, sign in ((results.perplexity, 1), (results.average, -1)):
        mine = _number(found, own, read)
        theirs = [number.value for side in others if (number := _number(found, side, read)) is not None]
        if mine is None or len(theirs) < len(others):
            return NOT_MEASURED
        places.append(1 + sum(sign * number < sign * mine.value for number in theirs))
    shown = f"place {places[0]} by perplexity, {places[1]} by accuracy of {len(others) + 1}"
    return verdict(places[0] < places[1], shown)


def above(found: Sequence[Entry], side: Side, bound: float, read: Read) -> Verdict:
    """Whether a side's number is above a bound."""
    number = _number(found, side, read)
    return NOT_MEASURED if number is None else verdict(number.value > bound, text(number))


def saturates(found: Sequence[Entry], sides: Sequence[Side], read: Read) -> Verdict:
    """Whether the last step between sides gains less than a tenth of the first one."""
    numbers = [number.value for side in sides if (number := _number(found, side, read)) is not None]
    if len(numbers) < len(sides):
        return NOT_MEASURED
    first, last = numbers[0] - numbers[1], numbers[-2] - numbers[-1]
    return verdict(last < first / 10, f"{last:.2f} against {first:.2f}")


def faster_and_no_worse(found: Sequence[Entry], own: Side, other: Side, share: float) -> Verdict:
    """Whether a side trains in less than `share` of the other's time, at no higher perplexity."""
    times = [_number(found, side, seconds) for side in (own, other)]
    scores = [_number(found, side, results.perplexity) for side in (own, other)]
    if times[0] is None or times[1] is None or scores[0] is None or scores[1] is None:
        return NOT_MEASURED
    shown = f"{times[0].value:.0f} s against {times[1].value:.0f} s; {text(scores[0])} against {text(scores[1])}"
    return verdict(times[0].value < share * times[1].value and scores[0].value <= scores[1].value, shown)


def seconds(entry: Entry) -> Value | None:
    """Seconds of training."""
    return entry.value(lambda record: record["training"]["seconds"])


def text(number: Value) -> str:
    """A number with its error, as pages show it."""
    return f"{number.value:.2f}" + (f" ± {number.stderr:.2f}" if number.stderr else "")


def _joint(one: Value, other: Value) -> float:
    return math.hypot(one.stderr or 0.0, other.stderr or 0.0)


def _number(found: Sequence[Entry], side: Side, read: Read) -> Value | None:
    entry = results.find(found, *side)
    return None if entry is None else read(entry)
