"""Exact facts of likelihood ratios against closed forms, sampling, and each other."""

from __future__ import annotations

import numpy as np
import pytest

from informed_routing.study.paper.synthetic_workload import workload
from informed_routing.study.paper.theory.closed_forms import NormalPair, law_of_densities
from informed_routing.whatif import ratio_law
from informed_routing.whatif.ratio_law import NominalSupport, RatioLaw

BOUNDARIES = np.geomspace(1.0, 200.0, 40)


def normal_law(pair: NormalPair, reach: float = 14.0) -> RatioLaw:
    grid = np.linspace(-reach, reach, 60_001)
    return law_of_densities(*pair.log_densities(grid), spacing=float(grid[1] - grid[0]))


@pytest.mark.parametrize("pair", [NormalPair(0, 1, 0.8, 1), NormalPair(0, 1, 0.3, 1.25), NormalPair(0, 1, -0.5, 0.7)])
def test_normal_moments_have_their_closed_forms(pair: NormalPair) -> None:
    law = normal_law(pair)
    assert law.d2 == pytest.approx(pair.moment(2.0), rel=1e-4)
    assert law.kl == pytest.approx(pair.kl, rel=1e-6)


def test_lost_mass_is_the_same_seen_from_the_target_and_from_the_nominal() -> None:
    law = NominalSupport(workload("nominal")).ratio_laws(workload("t", shift=0.6))[0]
    p, q, w = np.exp(law.log_p), np.exp(law.log_q), np.exp(law.log_w)
    from_target = (np.maximum(1 - BOUNDARIES[:, None] / w, 0) * p).sum(1) + law.outside
    from_nominal = 1 - (np.minimum(w, BOUNDARIES[:, None]) * q).sum(1)
    np.testing.assert_allclose(law.lost_mass(BOUNDARIES), from_target, atol=1e-12)
    np.testing.assert_allclose(law.lost_mass(BOUNDARIES), from_nominal, atol=1e-9)
    second = (np.minimum(w, BOUNDARIES[:, None]) ** 2 * q).sum(1)
    np.testing.assert_allclose(law.clipped_second_moment(BOUNDARIES), second, rtol=1e-9)


@pytest.mark.parametrize("sigma", [0.6, 0.8, 1.1])
def test_lost_mass_falls_and_the_second_moment_grows_with_the_boundary(sigma: float) -> None:
    law = NominalSupport(workload("nominal")).ratio_laws(workload("t", shift=0.8, sigma=sigma))[0]
    lost, second = law.lost_mass(BOUNDARIES), law.clipped_second_moment(BOUNDARIES)
    assert (np.diff(lost) <= 1e-15).all()
    assert (np.diff(second) >= -1e-12).all()
    assert second[-1] <= law.d2


def test_a_target_beyond_the_support_has_mass_outside() -> None:
    support = NominalSupport(workload("nominal", longest=300))
    target = workload("t", longest=2048)
    outside = sum(
        float(np.exp(target.log_grid(name, prompt[prompt > 300], output)).sum())
        for name, (prompt, output) in target.support().items()
    )
    law = support.ratio_laws(target)[0]
    assert law.outside == pytest.approx(outside)
    assert float(law.lost_mass(1e9)) == pytest.approx(outside)


def test_a_disjoint_target_is_wholly_outside() -> None:
    target = workload("t", medians=(2000.0, 2000.0, 2000.0)).model_dump()
    for domain in target["domains"].values():
        domain["prompt_tokens"]["minimum"] = 1500
    disjoint = type(workload("t")).model_validate(target)
    law = NominalSupport(workload("nominal", longest=1000)).ratio_laws(disjoint)[0]
    assert law.outside == pytest.approx(1)
    assert (law.d2, law.kl) == (0, 0)
    assert float(law.lost_mass(3.0)) == pytest.approx(1)


def test_counting_prompts_by_tokens_is_another_target() -> None:
    nominal, target = workload("nominal"), workload("t", shift=0.4)
    plain, tokens = NominalSupport(nominal).ratio_laws(target, by_tokens=True)
    inputs = nominal.sample(400_000, np.random.default_rng(1))
    w = np.exp(target.log_density(inputs) - nominal.log_density(inputs))
    weighted = w * inputs.tokens / target.mean_tokens()
    assert float(weighted.mean()) == pytest.approx(1, abs=0.01)
    assert float((weighted**2).mean()) == pytest.approx(tokens.d2, rel=0.05)
    assert 1 - float(np.minimum(weighted, 4).mean()) == pytest.approx(float(tokens.lost_mass(4.0)), abs=0.01)
    assert float((w**2).mean()) == pytest.approx(plain.d2, rel=0.05)


@pytest.mark.parametrize("by_tokens", [False, True])
def test_a_support_too_large_to_enumerate_is_drawn(by_tokens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    nominal, target = workload("nominal", longest=500), workload("t", shift=0.5, longest=600)
    exact = NominalSupport(nominal).ratio_laws(target, by_tokens)[-1]
    monkeypatch.setattr(ratio_law, "ENUMERABLE", 100)
    drawn = NominalSupport(nominal).ratio_laws(target, by_tokens)[-1]
    assert drawn.outside == pytest.approx(exact.outside, rel=0.1)
    assert drawn.d2 == pytest.approx(exact.d2, rel=0.1)
    assert drawn.kl == pytest.approx(exact.kl, rel=0.1)
    assert (drawn.lost_mass(BOUNDARIES) >= exact.lost_mass(BOUNDARIES)).all()
    np.testing.assert_allclose(drawn.lost_mass(BOUNDARIES), exact.lost_mass(BOUNDARIES), atol=0.012)
