"""Designed nominal workloads."""

from __future__ import annotations

import numpy as np
import pytest

from informed_routing.errors import InputError
from informed_routing.study.synthetic_workload import workload
from informed_routing.whatif import Part, WorkloadMixture, design_nominal
from informed_routing.whatif.ratio_law import NominalSupport

TARGETS = [workload("short", shift=-1.5), workload("middle"), workload("long", shift=1.5)]


def test_the_design_beats_the_equal_mixture_and_bounds_every_ratio() -> None:
    design = design_nominal(TARGETS)
    equal = NominalSupport(
        WorkloadMixture(name="equal", mixture=tuple(Part(weight=1 / 3, workload=target) for target in TARGETS))
    )
    assert design.worst < max(equal.ratio_laws(target)[0].d2 for target in TARGETS) < 3
    support = NominalSupport(design.nominal)
    for target in TARGETS:
        law = support.ratio_laws(target)[0]
        assert law.d2 == pytest.approx(design.d2[target.name], rel=1e-6)
        share = next(part.weight for part in design.nominal.mixture if part.workload.name == target.name)
        assert float(np.exp(law.log_w.max())) <= 1 / share + 1e-9


def test_the_design_is_a_minimum() -> None:
    design = design_nominal(TARGETS)
    weights = np.array([part.weight for part in design.nominal.mixture])
    rng = np.random.default_rng(0)
    for _ in range(10):
        moved = np.abs(weights + 0.03 * rng.standard_normal(3))
        moved /= moved.sum()
        parts = tuple(Part(weight=float(w), workload=target) for w, target in zip(moved, TARGETS, strict=True))
        support = NominalSupport(WorkloadMixture(name="moved", mixture=parts))
        assert max(support.ratio_laws(target)[0].d2 for target in TARGETS) >= design.worst - 1e-4


def test_one_target_is_its_own_design_and_extra_parts_may_be_used() -> None:
    alone = design_nominal(TARGETS[:1])
    assert alone.worst == pytest.approx(1)
    wide = workload("wide", sigma=1.6)
    with_wide = design_nominal(TARGETS, extra=[wide])
    assert with_wide.worst <= design_nominal(TARGETS).worst + 1e-6
    assert set(with_wide.d2) == {"short", "middle", "long"}


def test_bad_requests_are_refused() -> None:
    with pytest.raises(InputError, match="0 targets"):
        design_nominal([])
