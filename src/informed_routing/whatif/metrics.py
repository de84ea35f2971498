"""Metrics of a measurement table: means, totals, ratios, tail probabilities, quantiles, and the bounds they need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from ..config.types import Label
from ..errors import InputError
from ..files.user_files import shown
from .arrays import Floats
from .lengths import Frozen
from .settings import checked
from .table import Table

Columns = Label | Annotated[tuple[Label, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Outcome:
    """A metric on a sample: `offset` + `scale` * E[part] / E[size], where 0 <= part <= size <= 1.

    With `by_tokens`, both are per token, and E counts each prompt by its prompt and output tokens.
    """

    part: Floats  # [n]
    size: Floats  # [n]
    offset: float
    scale: float  # the metric's range
    clipped: float  # share of the prompts whose value was cut to the bounds
    by_tokens: bool = False
    total: bool = False  # the metric is this times the mean tokens of a prompt, which are known exactly


@dataclass(frozen=True)
class Ranking:
    """A quantile metric on a sample."""

    values: Floats  # [n]
    level: float
    by_tokens: bool = False


class _Metric(Frozen):
    name: Label
    column: Columns = Field(description="of the table; several are added up")

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that the metric reads."""
        per = getattr(self, "per", None)
        return _tuple(self.column) + (_tuple(per) if per is not None else ())


class _Bounded(_Metric):
    lower: float = 0.0
    upper: float | None = Field(
        None,
        description="None: the largest value of the sample; the metric is then the one cut there",
    )

    @model_validator(mode="after")
    def _ordered(self) -> _Bounded:
        if self.upper is not None and self.lower >= self.upper:
            raise ValueError(f"lower {self.lower} is not below upper {self.upper}")
        return self


class MeanMetric(_Bounded):
    """The mean over prompts of a column, or of a quotient of columns per prompt."""

    kind: Literal["mean"] = "mean"
    per: Columns | None = None

    def outcome(self, table: Table) -> Outcome:
        """Values in the metric's bounds, as shares of the range."""
        return _outcome(self, _per_prompt(self, table), np.ones(len(table)), np.ones(len(table)))


class TotalMetric(_Bounded):
    """The mean over prompts of a column that grows about like prompt and output tokens together, such as MACs.

    It is the mean per token times the target's mean tokens, which are known exactly: limits are narrower than a
    mean's. `lower` and `upper` are per token.
    """

    kind: Literal["total"] = "total"

    def outcome(self, table: Table) -> Outcome:
        """Values per token, as shares of their range."""
        tokens = table.inputs.tokens
        values = table.sum_of(_tuple(self.column))
        return replace(_outcome(self, values, tokens, tokens, by_tokens=True), total=True)


class RatioMetric(_Bounded):
    """A quotient of expectations, such as loss per token: long prompts count more.

    The denominator must grow about like prompt and output tokens together; limits are narrow when it does.
    """

    kind: Literal["ratio"] = "ratio"
    per: Columns
    per_token: float | None = Field(
        None, gt=0, description="bound of the denominator per prompt and output token; None: the sample's largest"
    )

    def outcome(self, table: Table) -> Outcome:
        """Numerators and denominators, as shares of the range of the quotient."""
        size = table.sum_of(_tuple(self.per))
        if not (size >= 0).all() or not (size > 0).any():
            raise InputError(f"metric {self.name}: column {self.per} holds no positive denominators", "Check the table")
        tokens = table.inputs.tokens
        largest = self.per_token if self.per_token is not None else float((size / tokens).max())
        return _outcome(self, table.sum_of(_tuple(self.column)), size, largest * tokens, by_tokens=True)


class TailMetric(_Metric):
    """The probability that a column (or a quotient per prompt) exceeds a threshold."""

    kind: Literal["tail"] = "tail"
    per: Columns | None = None
    above: float

    def outcome(self, table: Table) -> Outcome:
        """Indicators."""
        exceeds = (_per_prompt(self, table) > self.above).astype(np.float64)
        return Outcome(exceeds, np.ones(len(table)), offset=0.0, scale=1.0, clipped=0.0)


class QuantileMetric(_Metric):
    """A quantile over prompts of a column (or a quotient per prompt), such as the 95th percentile of seconds."""

    kind: Literal["quantile"] = "quantile"
    per: Columns | None = None
    level: float = Field(gt=0, lt=1)

    def outcome(self, table: Table) -> Ranking:
        """One value per prompt."""
        return Ranking(_per_prompt(self, table), self.level)


def _kind(value: Any) -> str:
    kind = value.get("kind", "mean") if isinstance(value, Mapping) else getattr(value, "kind", "mean")
    return f"<{kind if isinstance(kind, str) else shown(kind)}>"


Metric = MeanMetric | TotalMetric | RatioMetric | TailMetric | QuantileMetric
_METRICS: TypeAdapter[list[Metric]] = TypeAdapter(
    Annotated[
        list[
            Annotated[
                Annotated[MeanMetric, Tag("<mean>")]
                | Annotated[TotalMetric, Tag("<total>")]
                | Annotated[RatioMetric, Tag("<ratio>")]
                | Annotated[TailMetric, Tag("<tail>")]
                | Annotated[QuantileMetric, Tag("<quantile>")],
                Discriminator(_kind),
            ]
        ],
        Field(min_length=1),
    ]
)

DEFAULT_METRICS: tuple[Metric, ...] = (
    RatioMetric(name="executed_fraction", column="executed", per="possible", upper=1.0),
    TotalMetric(name="macs", column="macs"),
    RatioMetric(name="loss_per_token", column="loss_sum", per="loss_tokens"),
    MeanMetric(name="prefill_seconds", column="prefill_seconds"),
    MeanMetric(name="decode_seconds", column="decode_seconds"),
)
"""What `predict` reports unless told otherwise."""


def metrics_from_sequence(data: Sequence[Any]) -> list[Metric]:
    """Metrics of settings as in a YAML file. Raises InputError naming the first bad setting."""
    if not isinstance(data, Sequence) or isinstance(data, str):
        raise InputError(f"the metrics are {shown(data)}, which is no list", "Write a list of metrics, each a mapping")
    metrics: list[Metric] = checked(_METRICS, list(data), "metrics")
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two metrics are called {name}", "Give each metric a name of its own")
    return metrics


def _outcome(metric: _Bounded, values: Floats, size: Floats, largest: Floats, by_tokens: bool = False) -> Outcome:
    """From numerators and denominators; `largest` bounds the denominator of each prompt."""
    upper = metric.upper
    if upper is None:
        upper = max(float((values[size > 0] / size[size > 0]).max()), metric.lower)
    scale = (upper - metric.lower) or 1.0  # a constant metric
    if not (math.isfinite(scale) and np.isfinite(values).all() and np.isfinite(largest).all()):
        raise InputError(f"metric {metric.name} has no finite range", "Give its bounds, check its columns")
    share = size / largest
    fitting = np.minimum(share, 1.0)
    part = (values - metric.lower * size) / (scale * largest)
    cut = np.clip(part, 0.0, fitting)
    moved = (np.abs(cut - part) > 1e-9) | (share > 1 + 1e-9)
    return Outcome(cut, fitting, metric.lower, scale, clipped=float(moved.mean()), by_tokens=by_tokens)


def _per_prompt(metric: Any, table: Table) -> Floats:
    values = _finite(metric.name, table.sum_of(_tuple(metric.column)))
    if metric.per is None:
        return values
    size = table.sum_of(_tuple(metric.per))
    if not (size > 0).all():
        row = int(np.flatnonzero(~(size > 0))[0])
        raise InputError(
            f"metric {metric.name}: column {metric.per} is {size[row]:g} in row {row}",
            "Use kind: ratio, or leave it out",
        )
    with np.errstate(over="ignore"):
        quotient = values / size
    return _finite(metric.name, quotient)


def _finite(name: str, values: Floats) -> Floats:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise InputError(f"metric {name} is {values[bad[0]]} in row {bad[0]} of the table", "Check its columns")
    return values


def _tuple(columns: Columns) -> tuple[str, ...]:
    return (columns,) if isinstance(columns, str) else columns
