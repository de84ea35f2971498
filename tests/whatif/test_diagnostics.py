"""Diagnostics and the traffic light."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from informed_routing.whatif import diagnostics
from informed_routing.whatif.advice import advise, prompts_needed

GOOD = diagnostics.Evidence(
    prompts=2000,
    lost_mass=0.0,
    outside=0.0,
    exact_ess=1800.0,
    ess=1790.0,
    kl=0.05,
    khat_weights=0.1,
    khat_metric=0.2,
    mass_z=0.4,
    clipped=0.0,
    half_width=0.01,
    point=0.5,
)


def test_a_good_prediction_is_green() -> None:
    assert diagnostics.traffic_light(GOOD) == ("green", [])


@pytest.mark.parametrize(
    ("change", "colour", "reason"),
    [
        ({"prompts": 29}, "red", "29 prompts"),
        ({"outside": 0.002}, "red", "outside"),
        ({"lost_mass": 0.11}, "red", "lose 11.0%"),
        ({"exact_ess": 20.0, "ess": 90.0}, "red", "worth 20 prompts"),
        ({"kl": math.log(201)}, "red", "exp(KL)"),
        ({"khat_weights": 0.71}, "red", "k-hat of the weights"),
        ({"khat_weights": math.nan}, "red", "k-hat of the weights"),
        ({"mass_z": -4.1}, "red", "mass check"),
        ({"mass_z": math.nan}, "red", "mass check"),
        ({"half_width": -0.01}, "red", "contradict"),
        ({"point": math.nan}, "red", "no prompt"),
        ({"khat_weights": 0.5}, "amber", "variance"),
        ({"khat_metric": 0.6}, "amber", "rare prompts"),
        ({"khat_metric": math.nan}, "amber", "rare prompts"),
        ({"ess": 399.0}, "amber", "below 400"),
        ({"lost_mass": 0.03}, "amber", "loses 3.0%"),
        ({"clipped": 0.02}, "amber", "cut"),
        ({"tolerance": 0.009}, "amber", "tolerance"),
        ({"exact_ess": 20.0, "ess": 500.0}, "green", None),
        ({"khat_weights": -math.inf, "khat_metric": -math.inf}, "green", None),
        ({"tolerance": 0.01}, "green", None),
    ],
)
def test_the_light_and_its_reasons(change: dict[str, float], colour: str, reason: str | None) -> None:
    seen, reasons = diagnostics.traffic_light(replace(GOOD, **change))  # type: ignore[arg-type]
    assert seen == colour
    assert (reason is None) == (not reasons)
    assert reason is None or any(reason in each for each in reasons)


def test_effective_sample_size_and_top_share_by_hand() -> None:
    log_w = np.log(np.array([[1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]]) + 1e-300)
    np.testing.assert_allclose(diagnostics.effective_sample_size(log_w), [4, 1, 16 / 10])
    np.testing.assert_allclose(diagnostics.top_share(log_w), [0.25, 1, 0.75])
    nothing = np.full((1, 3), -np.inf)
    assert diagnostics.effective_sample_size(nothing)[0] == 0
    assert diagnostics.top_share(nothing)[0] == 0


def test_mass_check_sees_wrong_densities() -> None:
    w = np.random.default_rng(0).exponential(size=(3, 4000))
    w[1] *= 0.9
    w[2] = 1.0
    z = diagnostics.mass_check(w, np.zeros(3))
    assert abs(z[0]) < 4
    assert z[1] < -4
    assert z[2] == 0
    assert diagnostics.mass_check(np.ones((1, 50)), np.full(1, 0.2))[0] == math.inf


@pytest.mark.parametrize("n", [200, 1000, 10_000])
@pytest.mark.parametrize("shape", [0.3, 0.8])
def test_pareto_shape_finds_the_tail(n: int, shape: float) -> None:
    w = np.random.default_rng(1).pareto(1 / shape, (20, n)) + 1
    found = diagnostics.pareto_shape(np.log(w))
    assert float(np.mean(found)) == pytest.approx(shape, abs=0.12)


def test_leaving_out_what_is_no_tail_changes_nothing() -> None:
    from arviz_stats.base import array_stats

    log_w = 1.3 * np.random.default_rng(2).standard_normal((4, 5000))
    whole = [array_stats.psislw(-row)[1] for row in log_w]
    np.testing.assert_allclose(diagnostics.pareto_shape(log_w), whole, rtol=1e-9)


def test_bounded_tails_have_no_shape() -> None:
    equal = np.zeros((1, 500))
    few = np.log(np.random.default_rng(3).choice([0.2, 1.0, 6.0], p=[0.5, 0.3, 0.2], size=(1, 500)))
    impossible = np.full((1, 500), -np.inf)
    for log_w in (equal, few, impossible):
        assert diagnostics.pareto_shape(log_w)[0] == -math.inf
    assert math.isnan(diagnostics.pareto_shape(np.zeros((1, 20)))[0])


def test_sample_sizes() -> None:
    assert prompts_needed(2.0, 0.1, 0.05) == pytest.approx(4.074 * 2 * math.log(40) / 0.01)


def test_advice() -> None:
    assert "widen" in advise(2000, 1.5, 0.05, 0.05, 10, outside=0.1)
    assert advise(2000, 1e9, 0.05, 0.05, 10, outside=0.0) == "measure this target directly"
    assert advise(2000, math.inf, 0.05, 0.05, 10, outside=0.0) == "measure this target directly"
    assert advise(2000, 2.0, 0.05, 0.05, 10, outside=0.0) == "measure about 18000 more nominal prompts"
    assert "suffices" in advise(10**6, 2.0, 0.05, 0.05, 10, outside=0.0)


def test_a_tail_that_is_level_is_bounded() -> None:
    """Its lower quarter rises above what is below it, and all of it is one value."""
    values = np.zeros((1, 40))
    values[0, :8] = 1.0
    assert diagnostics.pareto_shape(values) == -np.inf
