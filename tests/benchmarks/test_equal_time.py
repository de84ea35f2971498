"""How curves of quality over speed are read (the timings themselves are not tested)."""

from __future__ import annotations

import equal_time
import pytest


def test_a_curve_is_read_between_its_points_and_never_beyond_them() -> None:
    curve = [(1.5, 1.4), (1.2, 1.1)]
    assert equal_time.at(curve, 1.0) == pytest.approx(1.0)
    assert equal_time.at(curve, 1.2) == pytest.approx(1.1)
    assert 1.1 < equal_time.at(curve, 1.3) < 1.4  # type: ignore[operator]
    assert equal_time.at(curve, 1.51) is None


def test_a_model_with_an_adapter_begins_at_the_dense_one_with_it() -> None:
    texts = equal_time.TEXTS

    def row(name: str, speed: float, ratio: float) -> dict[str, object]:
        shares = {f"{text} shares": {"macs": 0.0} for text in texts}
        return {"name": name, "prefill": speed, "decode": speed, **dict.fromkeys(texts, 10.0 * ratio), **shares}

    begins = {**row("a 0", 1.01, 0.8), "begins": True}
    rows = [row("dense", 1.0, 1.0), begins, row("a 0.25", 1.5, 1.2), row("b-4", 1.25, 1.3)]
    table = equal_time.table({"rows": rows})
    line = next(line for line in table.splitlines() if line.startswith("| prefill 1.25x"))
    between = 0.8 * (1.2 / 0.8) ** 0.5503  # log 1.25 / log 1.5
    assert line == f"| prefill 1.25x | {between:.3f} / {between:.3f} | 1.300 / 1.300 |"
