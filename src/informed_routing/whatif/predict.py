"""Measure once, predict many: metrics of a routed model on target workloads, from prompts of one nominal workload."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..extras import need
from ..progress import NullProgress, Progress
from . import diagnostics
from .advice import advise
from .arrays import Floats
from .boundary import b4
from .intervals import Truncation
from .metrics import DEFAULT_METRICS, Metric, Ranking
from .points import Chunk, Divergence, Points, mean_points, quantile_points
from .predictions import Prediction, Predictions
from .ratio_law import NominalSupport
from .strata import domain_shares, stratified_weights
from .table import Table, load_table
from .weights import clipped
from .workloads import AnyWorkload

CHUNK = 2**20  # weights that are held at a time
SMALLEST_DELTA = 1e-12  # below, logarithms of its shares would leave the numbers
ADVISED_ERROR = 0.05  # of the metric's range: what advice aims at where the tolerance is not tighter


def predict(
    table: Mapping[str, Any] | str | Path,
    nominal: AnyWorkload,
    targets: Sequence[AnyWorkload],
    metrics: Sequence[Metric] = DEFAULT_METRICS,
    *,
    delta: float = 0.05,
    tolerance: float | Mapping[str, float] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Predictions:
    """Predictions of all `metrics` at all `targets` from a table measured at `nominal`.

    table: columns or a Parquet file, one independent prompt of the nominal workload per row; see `load_table`.
    delta: the limits of all rows hold together with probability 1 - delta.
    tolerance: half-width up to which an interval is good enough: in a metric's units, by name; or one share of the
        range of each metric.
    seed: of the order in which the prompts enter the limits (any order of independent prompts is valid).

    Raises InputError for a bad table (see `load_table`), prompts that are impossible in the nominal workload, unknown
    names in `tolerance`, and `delta` outside [1e-12, 1). What cannot be predicted is a red row without an estimate.
    """
    return Predictor(nominal, targets).predict(
        table, metrics, delta=delta, tolerance=tolerance, seed=seed, progress=progress
    )


class Predictor:
    """A nominal workload and its targets, compared once: `predict` can then be called with many tables."""

    def __init__(self, nominal: AnyWorkload, targets: Sequence[AnyWorkload]) -> None:
        need("arviz_stats", "scipy", extra="whatif", for_what="Predictions of workloads")
        if not targets:
            raise InputError("no target workload is given", "Give at least one")
        self.nominal = nominal
        self.targets = list(targets)
        self._support = NominalSupport(nominal)
        self._known: dict[tuple[int, float, bool], list[list[Divergence]]] = {}

    def predict(
        self,
        table: Mapping[str, Any] | str | Path,
        metrics: Sequence[Metric] = DEFAULT_METRICS,
        *,
        delta: float = 0.05,
        tolerance: float | Mapping[str, float] | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Predictions:
        """See the function of this name."""
        if not SMALLEST_DELTA <= delta < 1:
            raise InputError(f"delta is {delta}", "Give a probability between 0 and 1, such as 0.05")
        if not metrics:
            raise InputError("no metric is given", "Give at least one")
        _check_tolerance(tolerance, metrics)
        progress = progress or NullProgress()
        loaded = load_table(table, [column for metric in metrics for column in metric.columns])
        n = len(loaded)
        loaded = loaded.in_order(np.random.default_rng(seed).permutation(n))
        log_q = self._nominal_density(loaded)
        each = delta / (len(self.targets) * len(metrics))
        outcomes = [metric.outcome(loaded) for metric in metrics]
        progress.stage("divergences", len(self.targets))
        exact = self._divergences(n, math.log(2 / each), any(outcome.by_tokens for outcome in outcomes), progress)
        progress.stage("predictions", len(self.targets))
        rows: list[Prediction] = []
        step = max(CHUNK // n, 1)
        for first in range(0, len(self.targets), step):
            views = self._views(loaded, log_q, exact, slice(first, first + step))
            chunks = [views[outcome.by_tokens] for outcome in outcomes]
            points = [
                quantile_points(chunk, outcome, each)
                if isinstance(outcome, Ranking)
                else mean_points(chunk, outcome, each)
                for chunk, outcome in zip(chunks, outcomes, strict=True)
            ]
            rows += _rows(chunks, metrics, points, delta, len(self.targets) * len(metrics), tolerance)
            progress.advance(len(rows) // len(metrics))
        progress.done()
        return Predictions(tuple(rows), n, delta, seed)

    def _nominal_density(self, table: Table) -> Floats:
        log_q = self.nominal.log_density(table.inputs)
        impossible = np.flatnonzero(~np.isfinite(log_q))
        if len(impossible):
            at, inputs = impossible[0], table.inputs
            raise InputError(
                f"a prompt of domain {inputs.domain[at]} with {inputs.prompt_tokens[at]} tokens and an output of "
                f"{inputs.output_tokens[at]} is impossible in the nominal workload {self.nominal.name} "
                f"({len(impossible)} such rows)",
                "Give the workload that the table was measured with",
            )
        return log_q

    def _divergences(self, n: int, log_level: float, by_tokens: bool, progress: Progress) -> list[list[Divergence]]:
        """Of all targets; with `by_tokens` also of those that count each prompt by its tokens."""
        key = (n, log_level, by_tokens)
        if key not in self._known:
            found: list[list[Divergence]] = [[], []] if by_tokens else [[]]
            for done, target in enumerate(self.targets):
                for view, law in zip(found, self._support.ratio_laws(target, by_tokens), strict=True):
                    boundary = b4(law, n, log_level)
                    lost, moment = float(law.lost_mass(boundary)), float(law.clipped_second_moment(boundary))
                    view.append(Divergence(boundary, lost, moment, law.d2, law.kl, law.outside))
                progress.advance(done + 1)
            self._known[key] = found
        return self._known[key]

    def _views(self, table: Table, log_q: Floats, exact: Sequence[Sequence[Divergence]], part: slice) -> list[Chunk]:
        """Some targets with their weights: as they are and, if `exact` has both, with prompts counted by tokens."""
        inputs, targets = table.inputs, self.targets[part]
        log_w = np.stack([target.log_density(inputs) for target in targets]) - log_q
        shares = [domain_shares(self.nominal, target, inputs) for target in targets]
        mean_tokens = np.array([target.mean_tokens() for target in targets])
        per_token = np.log(inputs.tokens) - np.log(mean_tokens)[:, None]
        views = []
        for log_ratio, units, facts in zip(
            (log_w, log_w + per_token),
            (np.ones(len(inputs)), inputs.tokens),
            (view[part] for view in exact),
            strict=False,
        ):
            columns = [(fact.boundary, fact.lost_mass, fact.second_moment) for fact in facts]
            truncation = Truncation(*np.array(columns).T)
            weights = clipped(log_ratio, truncation.boundary)
            points = weights.copy() if any(shares) else weights
            for row, share in enumerate(shares):
                if share is not None:
                    points[row] = stratified_weights(share, inputs) * units
            views.append(
                Chunk(inputs, targets, facts, log_ratio, weights, points, units, shares, truncation, mean_tokens)
            )
        return views


def _rows(
    chunks: Sequence[Chunk],
    metrics: Sequence[Metric],
    points: Sequence[Points],
    delta: float,
    cells: int,
    tolerance: float | Mapping[str, float] | None,
) -> list[Prediction]:
    """Predictions of the targets of a chunk: target by target, metric by metric."""
    n = len(chunks[0].inputs)
    rows = []
    for k, target in enumerate(chunks[0].targets):
        for metric, chunk, point in zip(metrics, chunks, points, strict=True):
            exact = chunk.divergences[k]
            lower, upper = float(point.lower[k]), float(point.upper[k])
            allowed = _tolerance(tolerance, metric.name, float(point.scale[k]))
            colour, reasons = diagnostics.traffic_light(
                diagnostics.Evidence(
                    prompts=n,
                    lost_mass=exact.lost_mass,
                    outside=exact.outside,
                    exact_ess=exact.worth(n),
                    ess=float(chunk.ess[k]),
                    kl=exact.kl,
                    khat_weights=float(chunk.khat[k]),
                    khat_metric=float(point.khat[k]),
                    mass_z=float(chunk.mass_z[k]),
                    clipped=point.clipped,
                    half_width=(upper - lower) / 2,
                    tolerance=allowed,
                    point=float(point.estimate[k]),
                )
            )
            error = min(allowed / float(point.scale[k]), ADVISED_ERROR)
            rows.append(
                Prediction(
                    target=target.name,
                    metric=metric.name,
                    estimate=None if colour == "red" else float(point.estimate[k]),
                    estimator="truncated self-normalised" if chunk.shares[k] is None else "post-stratified",
                    standard_error=float(point.standard_error[k]),
                    lower=lower,
                    upper=upper,
                    likelihood_ratio=float(point.likelihood_ratio[k]),
                    truncated_self_normalised=float(point.truncated[k]),
                    mass_corrected=float(point.mass_corrected[k]),
                    truncation=exact.boundary,
                    lost_mass=exact.lost_mass,
                    outside=exact.outside,
                    d2=exact.d2,
                    kl=exact.kl,
                    ess=float(chunk.ess[k]),
                    exact_ess=exact.worth(n),
                    khat_weights=float(chunk.khat[k]),
                    khat_metric=float(point.khat[k]),
                    mass_z=float(chunk.mass_z[k]),
                    top_share=float(chunk.top_share[k]),
                    clipped=point.clipped,
                    colour=colour,
                    reasons=tuple(reasons),
                    advice="" if colour == "green" else advise(n, exact.d2, error, delta, cells, exact.outside),
                )
            )
    return rows


def _tolerance(tolerance: float | Mapping[str, float] | None, name: str, scale: float) -> float:
    """In the metric's units; inf where none is given."""
    if isinstance(tolerance, Mapping):
        return tolerance.get(name, math.inf)
    return math.inf if tolerance is None else tolerance * scale


def _check_tolerance(tolerance: float | Mapping[str, float] | None, metrics: Sequence[Metric]) -> None:
    given = tolerance if isinstance(tolerance, Mapping) else {} if tolerance is None else {"all metrics": tolerance}
    known = [metric.name for metric in metrics]
    for name, value in given.items():
        if isinstance(tolerance, Mapping) and name not in known:
            raise InputError(f"tolerance names {name}, which is no metric", f"Known are {', '.join(known)}")
        if not 0 < value < math.inf:
            raise InputError(f"the tolerance of {name} is {value}", "Give a positive half-width")
