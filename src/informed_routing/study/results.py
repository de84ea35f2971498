"""What has been found of a grid: entries, one for each row of a table, with seeds taken together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .plan import Cell
from .store import Record, Store


@dataclass(frozen=True)
class Value:
    """A number with its standard error, where there is one."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Entry:
    """The cells that differ in nothing but the seed."""

    model: str
    method: str
    label: str
    kind: str
    sparsity: float
    recovered: bool
    records: tuple[Record, ...]
    speeds: tuple[Record, ...]
    errors: tuple[str, ...]
    missing: int
    """Seeds that have not been run."""

    @property
    def name(self) -> str:
        """The method as a row calls it."""
        return f"{self.label}, recovered" if self.recovered else self.label

    def value(self, read: Callable[[Record], Any], error: Callable[[Record], Any] = lambda _: None) -> Value | None:
        """The mean over seeds of what `read` finds in a record; None where no record has it.

        The standard error is that of the items, which are the same for all seeds, joined with the spread of the seeds.
        """
        found = [(read(record), error(record)) for record in self.records]
        numbers = [float(value) for value, _ in found if value is not None]
        if not numbers:
            return None
        errors = [float(one) for _, one in found if one is not None and math.isfinite(float(one))]
        own = statistics.fmean(errors) if errors else None
        spread = statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0
        joined = math.hypot(own or 0.0, spread) if own is not None or len(numbers) > 1 else None
        return Value(statistics.fmean(numbers), joined)


def entries(cells: Iterable[Cell], store: Store) -> list[Entry]:
    """Entries of cells, in their order, by what the store has of them."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model, cell.method, cell.sparsity, cell.recovered), []).append(cell)
    found = []
    for group in groups.values():
        first = group[0]
        records = [store.record(cell) for cell in group]
        failures = [store.failure(cell) for cell, record in zip(group, records, strict=True) if record is None]
        speeds = [store.speed(cell) for cell in group]
        found.append(
            Entry(
                model=first.model,
                method=first.method,
                label=first.label,
                kind=first.kind,
                sparsity=first.sparsity,
                recovered=first.recovered,
                records=tuple(record for record in records if record is not None),
                speeds=tuple(speed for speed in speeds if speed is not None),
                errors=tuple(failure["error"] for failure in failures if failure is not None),
                missing=sum(failure is None for failure in failures),
            )
        )
    return found


def find(found: Sequence[Entry], method: str, sparsity: float, recovered: bool) -> Entry | None:
    """The entry of a method that has results."""
    for entry in found:
        if (entry.method, entry.recovered) == (method, recovered) and math.isclose(entry.sparsity, sparsity):
            return entry if entry.records else None
    return None


# -- what tables read --------------------------------------------------------------------------------------


def perplexity(entry: Entry) -> Value | None:
    """Word perplexity of WikiText-2."""
    return entry.value(lambda r: r["tasks"].get("wikitext", {}).get("word_perplexity"))


def loss(entry: Entry) -> Value | None:
    """Loss on held-out text like that of the training, nats a token."""
    return entry.value(lambda r: r.get("validation", {}).get("loss"))


def accuracy(entry: Entry, task: str) -> Value | None:
    """The headline accuracy of a task, in per cent."""
    from ..evaluation.tasks import HEADLINES

    metric = HEADLINES[task]

    def percent(key: str) -> Callable[[Record], float | None]:
        def read(record: Record) -> float | None:
            value = record["tasks"].get(task, {}).get(key)
            return None if value is None else 100 * value

        return read

    return entry.value(percent(metric), percent(f"{metric}_stderr"))


def average(entry: Entry) -> Value | None:
    """Mean accuracy of the tasks, in per cent."""

    def percent(key: str) -> Callable[[Record], float | None]:
        def read(record: Record) -> float | None:
            value = (record.get("average") or {}).get(key)  # one document has no standard error
            return None if value is None else 100 * value

        return read

    return entry.value(percent("accuracy"), percent("stderr"))


def share(entry: Entry, name: str) -> Value | None:
    """A realised share (`units`, `attention`, `ffn`), in per cent; None for methods that do not route."""

    def read(record: Record) -> float | None:
        value = record["sparsity"].get(name)
        return None if value is None else 100 * value

    return entry.value(read)


def task_share(entry: Entry) -> Value | None:
    """Units approximated on the tasks alone, in per cent: short prompts are routed unlike the long text of WikiText."""

    def read(record: Record) -> float | None:
        parts = [
            task["sparsity"] for name, task in record["tasks"].items() if name != "wikitext" and "sparsity" in task
        ]
        tokens = sum(part["tokens"] for part in parts)
        return 100 * sum(part["units"] * part["tokens"] for part in parts) / tokens if tokens else None

    return entry.value(read)


def cost(entry: Entry, name: str, scale: float = 1.0) -> Value | None:
    """A number of the accounting."""
    return entry.value(lambda record: scale * record["accounting"][name])


def speedup(entry: Entry, phase: str) -> Value | None:
    """Over the dense model in the same engine, which took turns with it: a method is not its software."""
    found = [_speedup(speed[phase]) for speed in entry.speeds if phase in speed]
    return Value(statistics.fmean(found)) if found else None


def _speedup(timed: Record) -> float:
    """Methods that only torch runs are beside transformers' dense model."""
    dense = timed["dense_engines"]
    beside = timed["engine"] if timed["engine"] in dense else "transformers"
    return float(dense[beside]["median"] / timed["seconds"])


def similar(entry: Entry) -> Value | None:
    """Features whose cosine to the dense model's is above 0.95, in per cent."""
    return entry.value(lambda r: 100 * r["features"]["similar"] if "features" in r else None)


def part(entry: Entry, name: str) -> Value | None:
    """The part of `attention` or `ffn` among all approximated units, in per cent."""

    def read(record: Record) -> float | None:
        shares = record["sparsity"]
        return 50 * shares[name] / shares["units"] if shares.get("units") else None

    return entry.value(read)


def attention_part(entry: Entry) -> Value | None:
    """Share of the approximated units that are attention, in per cent."""
    return part(entry, "attention")
