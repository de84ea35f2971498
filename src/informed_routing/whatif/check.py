"""Predictions beside direct measurements of the same targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files.user_files import file_name
from ..finite import written
from .measure import Dial, Measurer
from .metrics import Metric
from .predict import predict
from .predictions import Prediction, Predictions
from .workloads import AnyWorkload


@dataclass(frozen=True)
class Comparison:
    """One target and metric: what was predicted, and what its own prompts gave."""

    target: str
    metric: str
    estimate: float | None
    lower: float
    upper: float
    colour: str
    direct: float
    direct_standard_error: float
    covered: bool

    @classmethod
    def of(cls, predicted: Prediction, direct: Prediction) -> Comparison:
        """A prediction beside that of the same target and metric from the target's own table."""
        measured = direct.truncated_self_normalised
        return cls(
            target=predicted.target,
            metric=predicted.metric,
            estimate=predicted.estimate,
            lower=predicted.lower,
            upper=predicted.upper,
            colour=predicted.colour,
            direct=measured,
            direct_standard_error=direct.standard_error,
            covered=predicted.lower <= measured <= predicted.upper,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON values: limits of a quantile may be infinite."""
        return {**asdict(self), "lower": written(self.lower), "upper": written(self.upper)}


def named_targets(targets: Sequence[AnyWorkload], names: Sequence[str]) -> list[AnyWorkload]:
    """The targets of these names (all without any), which become names of files.

    Raises InputError for a name that none has, and for one that no file can have.
    """
    known = [target.name for target in targets]
    for name in names:
        if name not in known:
            raise InputError(f"no target is called {name}", f"There are {', '.join(known)}")
    chosen = [target for target in targets if not names or target.name in names]
    for target in chosen:
        file_name(target.name, "the target")
    return chosen


def check(
    predicted: Predictions,
    targets: Sequence[AnyWorkload],
    metrics: Sequence[Metric],
    measurer: Measurer,
    dial: Dial,
    out: Path,
    prompts: int,
) -> list[Comparison]:
    """Measure targets, each into TARGET.parquet in a folder, and compare. Rows of tables that are there are kept."""
    found = []
    for target in targets:
        table = out / f"{target.name}.parquet"
        measurer.run(target, prompts, dial, table, resume=table.exists())
        direct = predict(table, target, [target], metrics, delta=predicted.delta, seed=measurer.seed)
        for metric in metrics:
            own = direct.row(target.name, metric.name)
            found.append(Comparison.of(predicted.row(target.name, metric.name), own))
    return found
