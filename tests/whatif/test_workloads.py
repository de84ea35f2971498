"""Workloads: masses, sampling, files, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from informed_routing.errors import InputError
from informed_routing.whatif import (
    LogNormalLengths,
    TabulatedLengths,
    Workload,
    WorkloadMixture,
    read_workload,
    read_workloads,
    workload_from_mapping,
    workloads_from_sequence,
)
from informed_routing.whatif.workloads import Inputs

SETTINGS: dict[str, Any] = {
    "name": "mixed",
    "domains": {
        "chat": {
            "weight": 0.7,
            "prompt_tokens": {"median": 100, "sigma": 0.7, "minimum": 16, "maximum": 300},
            "output_tokens": 8,
        },
        "code": {
            "weight": 0.3,
            "prompt_tokens": {"probabilities": {20: 0.25, 40: 0.75}},
            "output_tokens": {"probabilities": {0: 0.5, 4: 0.5}},
        },
    },
}


def made(data: dict[str, Any] = SETTINGS) -> Workload:
    workload = workload_from_mapping(data)
    assert isinstance(workload, Workload)
    return workload


@given(
    median=st.floats(1, 5000),
    sigma=st.floats(0.05, 3),
    minimum=st.integers(1, 200),
    span=st.integers(0, 3000),
)
@settings(max_examples=60, deadline=None)
def test_log_normal_masses_are_a_distribution_without_holes(
    median: float, sigma: float, minimum: int, span: int
) -> None:
    try:
        lengths = LogNormalLengths(median=median, sigma=sigma, minimum=minimum, maximum=minimum + span)
    except ValueError:  # all mass is elsewhere
        return
    mass = np.exp(lengths.log_mass)
    assert mass.sum() == pytest.approx(1)
    assert lengths.mean == pytest.approx(float(mass @ np.arange(minimum, minimum + span + 1)))


def test_log_normal_masses_are_differences_of_the_distribution_function() -> None:
    lengths = LogNormalLengths(median=90, sigma=0.6, minimum=10, maximum=400)
    k = np.arange(10, 401)
    cdf = stats.lognorm(0.6, scale=90).cdf
    expected = (cdf(k + 0.5) - cdf(k - 0.5)) / (cdf(400.5) - cdf(9.5))
    np.testing.assert_allclose(np.exp(lengths.log_pmf(k)), expected, rtol=1e-9)
    assert np.isneginf(lengths.log_pmf(np.array([9, 401, -3]))).all()


def test_far_tails_keep_their_logarithm() -> None:
    lengths = LogNormalLengths(median=10, sigma=0.05, minimum=1, maximum=1000)
    tail = lengths.log_pmf(np.array([990, 1000]))
    assert np.isfinite(tail).all()
    assert tail[0] > tail[1]


def test_density_is_normalised_and_agrees_with_the_grid() -> None:
    workload = made()
    total = 0.0
    for domain, (prompt, output) in workload.support().items():
        grid = workload.log_grid(domain, prompt, output)
        total += float(np.exp(grid).sum())
        pairs = np.stack(np.meshgrid(prompt, output, indexing="ij"), -1).reshape(-1, 2)
        inputs = Inputs(np.repeat(domain, len(pairs)), pairs[:, 0], pairs[:, 1])
        np.testing.assert_allclose(workload.log_density(inputs), grid.ravel())
    assert total == pytest.approx(1)


@pytest.mark.parametrize("mixed", [False, True])
def test_samples_follow_the_density(mixed: bool) -> None:
    other = deepcopy(SETTINGS)
    other["domains"]["chat"]["prompt_tokens"]["median"] = 30
    parts = [{"weight": 0.25, "workload": SETTINGS}, {"weight": 0.75, "workload": other}]
    workload = workload_from_mapping({"name": "both", "mixture": parts} if mixed else SETTINGS)
    inputs = workload.sample(200_000, np.random.default_rng(0))
    assert workload.mean_tokens() == pytest.approx(inputs.tokens.mean(), rel=0.01)
    chat = inputs.domain == "chat"
    for low, high in ((16, 40), (41, 100), (101, 300)):
        lengths = np.arange(low, high + 1)
        expected = float(np.exp(workload.log_grid("chat", lengths, np.array([8]))).sum())
        seen = float((chat & (inputs.prompt_tokens >= low) & (inputs.prompt_tokens <= high)).mean())
        assert seen == pytest.approx(expected, abs=4 * np.sqrt(expected / 200_000))


def test_a_mixture_adds_densities() -> None:
    first, second = made(), made(SETTINGS | {"domains": {"chat": SETTINGS["domains"]["chat"] | {"weight": 1.0}}})
    mixture = workload_from_mapping(
        {"name": "m", "mixture": [{"weight": 0.4, "workload": first}, {"weight": 0.6, "workload": second}]}
    )
    assert isinstance(mixture, WorkloadMixture)
    inputs = first.sample(100, np.random.default_rng(1))
    expected = 0.4 * np.exp(first.log_density(inputs)) + 0.6 * np.exp(second.log_density(inputs))
    np.testing.assert_allclose(np.exp(mixture.log_density(inputs)), expected)


def set_at(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


CHAT = ("domains", "chat")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (set_at(*CHAT, "weight", value=0.6), "domain weights sum to 0.9, not to 1"),
        (set_at(*CHAT, "weight", value=-0.1), "chat.weight = -0.1"),
        (set_at(*CHAT, "prompt_tokens", "median", value=-3), "chat.prompt_tokens.median = -3"),
        (set_at(*CHAT, "prompt_tokens", "median", value=float("nan")), "median = nan"),
        (set_at(*CHAT, "prompt_tokens", "minimum", value=-16), "minimum = -16"),
        (set_at(*CHAT, "prompt_tokens", "minimum", value=500), "minimum 500 is above maximum 300"),
        (set_at(*CHAT, "prompt_tokens", "mean", value=3), "unknown setting workload.domains.chat.prompt_tokens.mean"),
        (set_at(*CHAT, "prompt_tokens", value={"probabilities": {-4: 1.0}}), "-4"),
        (set_at(*CHAT, "prompt_tokens", value={"probabilities": {4: 0.9}}), "probabilities sum to 0.9"),
        (set_at(*CHAT, "prompt_tokens", value=0), "at least one token"),
        (set_at(*CHAT, "output_tokens", value=-2), "-2"),
        (set_at("domains", value={}), "domains"),
        (set_at("name", value=""), "name"),
    ],
)
def test_bad_settings_are_named(change: Callable[[dict[str, Any]], None], named: str) -> None:
    data = deepcopy(SETTINGS)
    change(data)
    with pytest.raises(InputError) as error:
        workload_from_mapping(data)
    assert named in str(error.value)
    assert "<" not in str(error.value)


def test_two_targets_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="two targets are called mixed"):
        workloads_from_sequence([SETTINGS, SETTINGS])


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "workloads.yaml"
    file.write_text(yaml.safe_dump({"targets": [SETTINGS, SETTINGS | {"name": "other"}]}))
    assert [workload.name for workload in read_workloads(file)] == ["mixed", "other"]
    file.write_text(yaml.safe_dump(SETTINGS))
    assert read_workload(file) == made()
    file.write_text("a: [")
    with pytest.raises(InputError, match="line 2"):
        read_workload(file)
    with pytest.raises(InputError, match="does not exist"):
        read_workload(tmp_path / "none.yaml")
    file.write_text("just text")
    with pytest.raises(InputError, match="no list of targets"):
        read_workloads(file)


def test_workloads_survive_json() -> None:
    assert workload_from_mapping(made().model_dump(mode="json")) == made()
    table = TabulatedLengths(probabilities={3: 0.5, 9: 0.5})
    assert TabulatedLengths.model_validate_json(table.model_dump_json()) == table
