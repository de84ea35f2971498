"""Which tasks are run, with how many examples in the prompt, and which number of each counts.

The presets are the paper's Table 7. Nothing here needs lm-evaluation-harness or torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from informed_routing.errors import InputError

__all__ = ["TaskSpec", "parse_tasks", "preset_tasks"]

WIKITEXT = "wikitext"
HEADLINES = {
    "boolq": "acc",
    "openbookqa": "acc_norm",
    "piqa": "acc",
    "winogrande": "acc",
    "hellaswag": "acc_norm",
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    WIKITEXT: "word_perplexity",
}
"""The metric of each task that the paper prints, in its order."""

Preset = Literal["table7", "table7-small"]
SMALL_SHOTS = 5


@dataclass(frozen=True)
class TaskSpec:
    """A task of lm-evaluation-harness; `shots` None is the number in the task's own definition (usually 0)."""

    name: str
    shots: int | None = None

    @classmethod
    def parse(cls, text: str) -> TaskSpec:
        """`arc_easy`, or `arc_easy@25` for 25 examples in the prompt. Raises InputError for anything else."""
        name, at, shots = text.strip().partition("@")
        if not name or (at and not (shots.isascii() and shots.isdigit() and len(shots) < 7)):
            raise InputError(f"task {text!r} is not NAME or NAME@SHOTS", "Write boolq, or arc_easy@25")
        return cls(name, int(shots) if at else None)

    def __str__(self) -> str:
        return self.name if self.shots is None else f"{self.name}@{self.shots}"


_TABLE7 = (
    TaskSpec("boolq", 0),
    TaskSpec("openbookqa", 0),
    TaskSpec("piqa", 0),
    TaskSpec("winogrande", 5),
    TaskSpec("hellaswag", 10),
    TaskSpec("arc_challenge", 25),
    TaskSpec("arc_easy", 25),
    TaskSpec(WIKITEXT, 0),
)
PRESETS: dict[Preset, tuple[TaskSpec, ...]] = {
    "table7": _TABLE7,
    "table7-small": tuple(replace(spec, shots=min(spec.shots or 0, SMALL_SHOTS)) for spec in _TABLE7),
}
"""`table7` is the paper's protocol; `table7-small` has at most five examples in a prompt, for CPUs."""


def parse_tasks(text: str) -> tuple[TaskSpec, ...]:
    """`boolq,arc_easy@25` as specs. Raises InputError for a task that is given twice: results are kept by name."""
    specs = tuple(TaskSpec.parse(part) for part in text.split(","))
    for spec in specs:
        if sum(other.name == spec.name for other in specs) > 1:
            raise InputError(f"task {spec.name} is given twice", "Run it again with the other number of shots")
    return specs


def preset_tasks(name: str) -> tuple[TaskSpec, ...]:
    """The tasks of a preset. Raises InputError for an unknown one."""
    if name not in get_args(Preset):
        raise InputError(f"there is no preset {name!r}", f"Choose one of {', '.join(get_args(Preset))}")
    return PRESETS[name]  # type: ignore[index]


def headline(name: str, metrics: Iterable[str]) -> str:
    """The metric of a task that stands in tables: the paper's, else `acc_norm` where there is one, else the first."""
    names = [metric for metric in metrics if not metric.endswith("_stderr")]
    for wanted in (HEADLINES.get(name), "acc_norm"):
        if wanted in names:
            return str(wanted)
    if not names:
        raise InputError(f"task {name} has no metric", "Give a task that is scored")
    return names[0]


def average_accuracy(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The plain mean of the headline accuracies of the paper's tasks among `results`, as in its tables; None for none.

    `stderr` takes the tasks' errors as independent, and is left out where a task has none (one document has no spread);
    `tasks` says what went into the mean.
    """
    chosen = [name for name in HEADLINES if name != WIKITEXT and HEADLINES[name] in results.get(name, {})]
    if not chosen:
        return None
    values = [float(results[name][HEADLINES[name]]) for name in chosen]
    errors = [float(results[name].get(f"{HEADLINES[name]}_stderr", math.nan)) for name in chosen]
    mean: dict[str, Any] = {"accuracy": sum(values) / len(values)}
    if all(map(math.isfinite, errors)):
        mean["stderr"] = math.sqrt(sum(error**2 for error in errors)) / len(errors)
    return {**mean, "tasks": chosen}


def subset(documents: int, limit: int | None, spread: bool) -> Sequence[int]:
    """Which of `documents` rows are evaluated: the same for every model.

    The first `limit`, as `lm_eval --limit` takes them, or with `spread` as many at equal distances. HellaSwag, for
    one, is sorted by source: its first 3,243 rows are all ActivityNet.
    """
    if limit is None or limit >= documents:
        return range(documents)
    return [number * documents // limit for number in range(limit)] if spread else range(limit)
