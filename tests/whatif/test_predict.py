"""`predict` from end to end: truth, colours, and bad input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from informed_routing.errors import InputError
from informed_routing.study.paper import synthetic_workload as synthetic
from informed_routing.whatif import (
    MeanMetric,
    Metric,
    Predictor,
    QuantileMetric,
    RatioMetric,
    TailMetric,
    TotalMetric,
    metrics_from_sequence,
    predict,
    workload_from_mapping,
)
from informed_routing.whatif.points import Divergence
from informed_routing.whatif.predictions import Prediction, Predictions

NOMINAL = synthetic.workload("nominal")
TABLE = synthetic.measure(NOMINAL, 2000, np.random.default_rng(0))
NEAR = synthetic.workload("near", shift=0.3)
FAR = synthetic.workload("far", shift=2.4)
FLIP = synthetic.workload("flip", weights=(0.1, 0.2, 0.7))


def test_near_targets_are_green_and_right() -> None:
    found = predict(TABLE, NOMINAL, [NEAR, FLIP], synthetic.METRICS)
    assert [(row.target, row.metric) for row in found.rows][:3] == [
        ("near", metric.name) for metric in synthetic.METRICS
    ]
    for row in found.rows:
        truth = synthetic.truth(NEAR if row.target == "near" else FLIP)[row.metric]
        assert row.lower <= truth <= row.upper
        assert row.estimate == pytest.approx(truth, abs=4 * row.standard_error)
        assert row.colour in ("green", "amber")


def test_the_nominal_workload_predicts_its_own_means() -> None:
    found = predict(TABLE, NOMINAL, [NOMINAL], [MeanMetric(name="seconds", column="seconds", upper=40.0)])
    row = found.rows[0]
    seconds = TABLE["seconds"]
    assert row.estimate == pytest.approx(seconds.mean())
    assert row.likelihood_ratio == row.truncated_self_normalised == pytest.approx(seconds.mean())
    assert row.standard_error == pytest.approx(seconds.std() / math.sqrt(2000))
    assert (row.truncation, row.lost_mass, row.d2) == (pytest.approx(1), 0, pytest.approx(1))
    assert row.ess == pytest.approx(2000)
    assert len(row.reasons) == 1  # some prompts take long
    assert "rare prompts" in row.reasons[0]


def test_ratios_count_tokens() -> None:
    found = predict(TABLE, NOMINAL, [NOMINAL], [RatioMetric(name="loss", column="loss_sum", per="loss_tokens")])
    assert found.rows[0].estimate == pytest.approx(TABLE["loss_sum"].sum() / TABLE["loss_tokens"].sum(), rel=2e-3)


def test_totals_use_what_is_known_of_the_tokens() -> None:
    metrics: list[Metric] = [TotalMetric(name="total", column="executed"), MeanMetric(name="mean", column="executed")]
    found = predict(TABLE, NOMINAL, [NEAR, FLIP], metrics)
    for target in (NEAR, FLIP):
        direct = synthetic.measure(target, 200_000, np.random.default_rng(4))["executed"].mean()
        total, mean = found.row(target.name, "total"), found.row(target.name, "mean")
        assert total.lower < direct < total.upper
        assert total.estimate == pytest.approx(direct, rel=0.03)
        assert total.upper - total.lower < (mean.upper - mean.lower) / 1.5
        assert total.standard_error < mean.standard_error


def test_domain_changes_are_post_stratified() -> None:
    row = predict(TABLE, NOMINAL, [FLIP], [MeanMetric(name="s", column="seconds", upper=40.0)]).rows[0]
    means = [TABLE["seconds"][TABLE["domain"] == domain].mean() for domain in synthetic.DOMAINS]
    assert row.estimator == "post-stratified"
    assert row.estimate == pytest.approx(np.dot((0.1, 0.2, 0.7), means))
    changed = predict(TABLE, NOMINAL, [NEAR], [MeanMetric(name="s", column="seconds", upper=40.0)]).rows[0]
    assert changed.estimator == "truncated self-normalised"


def test_tails_and_quantiles() -> None:
    metrics: list[Metric] = [
        TailMetric(name="slow", column="seconds", above=2.0),
        QuantileMetric(name="p95", column="seconds", level=0.95),
    ]
    found = predict(TABLE, NOMINAL, [NEAR], metrics)
    direct = synthetic.measure(NEAR, 400_000, np.random.default_rng(1))["seconds"]
    slow, p95 = found.row("near", "slow"), found.row("near", "p95")
    assert slow.lower <= float((direct > 2.0).mean()) <= slow.upper
    assert slow.estimate == pytest.approx(float((direct > 2.0).mean()), abs=4 * slow.standard_error)
    truth = float(np.quantile(direct, 0.95))
    assert p95.lower <= truth <= p95.upper
    assert p95.estimate == pytest.approx(truth, abs=4 * p95.standard_error)
    assert math.isnan(p95.likelihood_ratio)


def test_a_far_target_is_red_and_gives_no_point() -> None:
    for row in predict(TABLE, NOMINAL, [FAR], synthetic.METRICS).rows:
        assert row.colour == "red"
        assert row.estimate is None
        assert row.reasons
        assert "measure" in row.advice
        assert row.lower <= synthetic.truth(FAR)[row.metric] <= row.upper


def test_a_support_gap_is_red_though_the_sample_looks_well() -> None:
    cut = synthetic.workload("cut", medians=(256.0,) * 3, longest=1024)
    target = synthetic.workload("whole", medians=(256.0,) * 3, shift=0.5, longest=8192)
    table = synthetic.measure(cut, 4000, np.random.default_rng(2))
    for row in predict(table, cut, [target], synthetic.METRICS).rows:
        assert row.colour == "red"
        assert row.outside > 0.1
        assert row.mass_z < -4
        if row.metric == "seconds":
            assert row.outside == pytest.approx(0.134, abs=0.001)
            assert row.ess > 3000
            assert row.khat_weights < 0
        assert any("outside" in reason for reason in row.reasons)
        assert any("mass check" in reason for reason in row.reasons)


def test_an_unknown_domain_of_a_target_is_red() -> None:
    data = NEAR.model_dump()
    data["domains"]["law"] = data["domains"].pop("code")
    row = predict(TABLE, NOMINAL, [workload_from_mapping(data)], synthetic.METRICS).rows[0]
    assert row.colour == "red"
    assert row.outside == pytest.approx(0.2, abs=0.15)
    only = workload_from_mapping(
        {"name": "law", "domains": {"law": {"weight": 1.0, "prompt_tokens": 10, "output_tokens": 1}}}
    )
    for lost in predict(TABLE, NOMINAL, [only], synthetic.METRICS).rows:
        assert (lost.colour, lost.estimate, lost.outside) == ("red", None, 1)


def test_a_table_of_another_workload_is_found_out() -> None:
    table = synthetic.measure(synthetic.workload("other", shift=0.7), 2000, np.random.default_rng(3))
    assert {row.colour for row in predict(table, NOMINAL, [NEAR], synthetic.METRICS).rows} == {"red"}


def test_too_few_prompts_are_red() -> None:
    few = {name: values[:29] for name, values in TABLE.items()}
    for row in predict(few, NOMINAL, [NEAR, FAR, NOMINAL], synthetic.METRICS).rows:
        assert row.colour == "red"
        assert any("29 prompts" in reason for reason in row.reasons)
    one = {name: values[:1] for name, values in TABLE.items()}
    assert {row.colour for row in predict(one, NOMINAL, [NEAR], synthetic.METRICS).rows} == {"red"}


def changed(name: str, value: Any, row: int = 7) -> dict[str, Any]:
    values = np.array(TABLE[name], dtype=object if isinstance(value, str) else np.float64)
    values[row] = value
    return TABLE | {name: values}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({name: values for name, values in TABLE.items() if name != "loss_sum"}, "lacks loss_sum"),
        (changed("loss_sum", math.nan), "column loss_sum is nan in row 7"),
        (changed("seconds", math.inf), "column seconds is inf in row 7"),
        (changed("prompt_tokens", -4), "column prompt_tokens is -4 in row 7"),
        (changed("prompt_tokens", 0), "column prompt_tokens is 0 in row 7"),
        (changed("output_tokens", -1), "column output_tokens is -1 in row 7"),
        (changed("prompt_tokens", 20.5), "column prompt_tokens is 20.5 in row 7"),
        (changed("prompt_tokens", 5000), "5000 tokens .* impossible in the nominal workload nominal"),
        (changed("domain", "law"), "domain law .* impossible"),
        (changed("seconds", "fast"), "column seconds holds no numbers"),
        (TABLE | {"seconds": TABLE["seconds"][:-1]}, "column seconds has shape"),
        ({name: values[:0] for name, values in TABLE.items()}, "no rows"),
        (TABLE | {"loss_tokens": np.zeros(2000)}, "no positive denominators"),
        ("none.parquet", "does not exist"),
    ],
)
def test_bad_tables_are_named(table: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        predict(table, NOMINAL, [NEAR], synthetic.METRICS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta": 0.0}, "delta is 0"),
        ({"delta": 1.5}, "delta is 1.5"),
        ({"tolerance": {"speed": 0.1}}, "tolerance names speed"),
        ({"tolerance": -0.1}, "tolerance of all metrics"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        predict(TABLE, NOMINAL, [NEAR], synthetic.METRICS, **arguments)
    with pytest.raises(InputError, match="no target"):
        predict(TABLE, NOMINAL, [], synthetic.METRICS)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"name": "a"}, "metrics.0.column"),
        ({"name": "a", "column": "x", "lower": 2.0, "upper": 1.0}, "not below upper"),
        ({"name": "a", "column": "x", "kind": "quantile", "level": 1.5}, "level = 1.5"),
        ({"name": "a", "column": "x", "kind": "median"}, "kind|median"),
        ({"name": "a", "column": "x", "kind": "ratio"}, "per"),
    ],
)
def test_bad_metrics_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        metrics_from_sequence([setting])


def test_parquet_and_json_and_seeds(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "table.parquet"
    parquet.write_table(pyarrow.table({name: list(values) for name, values in TABLE.items()}), file)
    found = predict(file, NOMINAL, [NEAR, FAR], synthetic.METRICS, seed=3)
    assert found == predict(TABLE, NOMINAL, [NEAR, FAR], synthetic.METRICS, seed=3)
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert data["rows"][-1]["estimate"] is None
    other = predict(TABLE, NOMINAL, [NEAR, FAR], synthetic.METRICS, seed=4).rows[0]
    assert other.estimate == pytest.approx(found.rows[0].estimate)
    assert other.lower != found.rows[0].lower
    file.write_bytes(b"no table")
    with pytest.raises(InputError, match="no readable Parquet"):
        predict(file, NOMINAL, [NEAR], synthetic.METRICS)


def test_many_targets_give_what_each_gives_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [NEAR, FLIP, FAR]
    together = predict(TABLE, NOMINAL, targets, synthetic.METRICS, delta=0.03)
    monkeypatch.setattr(sys.modules["informed_routing.whatif.predict"], "CHUNK", 2000)  # one target at a time
    apart = predict(TABLE, NOMINAL, targets, synthetic.METRICS, delta=0.03)
    alone = [predict(TABLE, NOMINAL, [target], synthetic.METRICS, delta=0.01).rows for target in targets]
    singles = [row for rows in alone for row in rows]
    for row, other, single in zip(together.rows, apart.rows, singles, strict=True):
        assert (row.lower, row.upper) == pytest.approx((other.lower, other.upper), rel=1e-9)
        assert (row.colour, row.estimator) == (other.colour, other.estimator) == (single.colour, single.estimator)
        assert row.truncated_self_normalised == pytest.approx(single.truncated_self_normalised, rel=1e-9)
        assert (row.lower, row.upper) == pytest.approx((single.lower, single.upper), rel=1e-6)


def test_tolerance_turns_wide_intervals_amber() -> None:
    predictor = Predictor(NOMINAL, [NEAR])
    seconds = [MeanMetric(name="executed", column="executed", per="possible", upper=1.0)]
    assert predictor.predict(TABLE, seconds).rows[0].colour == "green"
    row = predictor.predict(TABLE, seconds, tolerance={"executed": 1e-3}).rows[0]
    assert row.colour == "amber"
    assert "more nominal prompts" in row.advice or "directly" in row.advice


def test_values_beyond_the_bounds_are_cut_and_said() -> None:
    row = predict(TABLE, NOMINAL, [NEAR], [MeanMetric(name="s", column="seconds", upper=1.0)]).rows[0]
    assert row.clipped == pytest.approx(float((TABLE["seconds"] > 1.0).mean()))
    assert any("cut" in reason for reason in row.reasons)


def test_worth_of_a_sample() -> None:
    assert Divergence(1.0, 0.0, 1.0, 4.0, 0.0, 0.0).worth(100) == 25


def test_the_library_needs_no_model() -> None:
    code = "import sys, informed_routing.whatif; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("domain", [None, "story"], "column domain is None in row 0"),
        ("domain", [1, 2], "column domain is 1 in row 0"),
        ("macs", ["1", "2"], "column macs holds no numbers"),
        ("macs", [1 + 1j, 2], "column macs holds no numbers"),
        ("macs", np.array(["2024-01-01", "2024-01-02"], dtype="datetime64[ns]"), "column macs holds no numbers"),
        ("macs", [[1], [2]], "column macs has shape"),
        ("macs", [np.nan, 1.0], "column macs is nan in row 0"),
        ("macs", [1e308, 1e308], "metric m is inf in row 0"),
    ],
)
def test_columns_that_are_no_measurements(column: str, values: Any, message: str) -> None:
    nominal = workload_from_mapping(
        {"name": "n", "domains": {"story": {"weight": 1.0, "prompt_tokens": 5, "output_tokens": 1}}}
    )
    table: dict[str, Any] = {
        "domain": ["story", "story"],
        "prompt_tokens": [5, 5],
        "output_tokens": [1, 1],
        "macs": [1.0, 2.0],
        "more": [1.7e308, 1.7e308],
        column: values,
    }
    with pytest.raises(InputError, match=message):
        predict(table, nominal, [nominal], [MeanMetric(name="m", column=("macs", "more"))])


def test_json_of_predictions_has_no_null_but_for_estimates_that_are_refused() -> None:
    numbers = dict.fromkeys(Prediction.__dataclass_fields__, 1.0)
    words = {"target": "t", "metric": "m", "estimator": "e", "colour": "red", "reasons": ("r",), "advice": ""}
    odd = {"estimate": None, "lower": -math.inf, "upper": math.inf, "likelihood_ratio": math.nan, "d2": math.inf}
    row = Predictions((Prediction(**{**numbers, **words, **odd}),), 1, 0.05, 0).as_dict()["rows"][0]  # type: ignore[arg-type]
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert (row["lower"], row["upper"], row["d2"]) == ("-Infinity", "Infinity", "Infinity")
    assert "likelihood_ratio" not in row
    assert row["estimate"] is None
