"""The truncation boundary of predictions is where its interval is narrowest."""

from __future__ import annotations

import math

import numpy as np
import pytest

from informed_routing.study.paper.synthetic_workload import workload
from informed_routing.whatif import boundary
from informed_routing.whatif.ratio_law import NominalSupport

L = math.log(2 / 0.05)


def test_b4_minimises_the_width_and_needs_no_truncation_for_equal_laws() -> None:
    support = NominalSupport(workload("nominal"))
    assert boundary.b4(support.ratio_laws(workload("same"))[0], 1000, L) == pytest.approx(1.0)
    law = support.ratio_laws(workload("t", shift=1.0))[0]

    def width(m: float) -> float:
        spread = math.sqrt(2 * float(law.clipped_second_moment(m)) * L / 1000)
        return float(law.lost_mass(m)) / 2 + spread / 2 + m * L / 3000

    best = boundary.b4(law, 1000, L)
    assert all(width(best) <= width(m) + 1e-9 for m in np.geomspace(1, 1000, 500))
