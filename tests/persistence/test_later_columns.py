"""Thresholds by context and shares of units in a folder: kept, refused where damaged, unknown to earlier versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.routed import make_routed
from tests.tiny import make_tiny
from transformers import AutoConfig

from informed_routing.config.folder import ThresholdRow
from informed_routing.errors import InputError
from informed_routing.persistence.folder import read_config
from informed_routing.routed_model import RoutedModelForCausalLM

EARLIER = {"threshold", "units", "attention", "ffn", "macs", "latency"}
"""All that versions without these columns know of a row."""


def _row(share: float, threshold: float, *by_context: tuple[int, float]) -> ThresholdRow:
    shares = {"units": share, "attention": share, "ffn": share, "macs": share}
    return ThresholdRow(threshold=threshold, by_context=by_context, by_unit=(share, 1 / 3) * 3, **shares)


TABLE = (_row(0.0, -3.7, (1, -3.1), (17, -5.2)), _row(0.4, 0.1 + 0.2, (1, 1 / 3), (17, -1.0)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = make_routed("llama")
    model.with_thresholds(TABLE, "units", 0.2, 32)
    model.save_pretrained(tmp_path / "routing")
    return tmp_path / "routing"


def _load(folder: Path) -> Any:
    return RoutedModelForCausalLM.from_pretrained(folder, base=make_tiny("llama"))


def test_what_is_saved_is_loaded(saved: Path, tmp_path: Path) -> None:
    model = _load(saved)
    assert model.routing_config.thresholds == TABLE
    rule = model.routing_state.decision
    assert rule.value == pytest.approx(-1.7)
    assert rule.by_context == ((1, pytest.approx(-1.3833333)), (17, pytest.approx(-3.1)))
    model.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again").thresholds == TABLE


def test_earlier_versions_find_what_they_know_and_nothing_else(saved: Path) -> None:
    for stored, row in zip(json.loads((saved / "routing_config.json").read_text())["thresholds"], TABLE, strict=True):
        assert stored.keys() == EARLIER
        assert stored["threshold"] == row.threshold
    assert AutoConfig.from_pretrained(saved).model_type == "informed_routing"


def test_a_folder_without_them_has_one_threshold_for_all(saved: Path) -> None:
    path = saved / "config.json"
    content = json.loads(path.read_text())
    del content["thresholds_by_context"]
    path.write_text(json.dumps(content))
    assert _load(saved).routing_state.decision.threshold == pytest.approx(-1.7)
    assert _load(saved).routing_config.thresholds[0].by_unit == TABLE[0].by_unit
    path.unlink()
    assert _load(saved).routing_state.decision.threshold == pytest.approx(-1.7)


def test_a_row_that_was_replaced_since_has_one_threshold(saved: Path) -> None:
    """An earlier version calibrated in the folder, or somebody edited the table."""
    path = saved / "routing_config.json"
    content = json.loads(path.read_text())
    content["thresholds"][1]["threshold"] = 0.5
    path.write_text(json.dumps(content))
    rows = read_config(saved).thresholds
    assert rows[0] == TABLE[0]
    assert rows[1].by_context == ()
    assert rows[1].by_unit == ()


@pytest.mark.parametrize(
    "table",
    [
        5,
        [[0.5]],
        [["a", [[1, 0.5]]]],
        [[-3.7, [[1, "b"]]]],
        [[-3.7, [[2, 0.5]]]],
        [[-3.7, [[1, 0.5], [1, 0.7]]]],
        [[-3.7, [[1, 0.5]]], [0.1 + 0.2, [[1, 0.5], [9, 0.7]]]],
        [[-3.7, [[1, float("nan")]]]],
    ],
)
def test_nonsense_is_refused(saved: Path, table: Any) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "thresholds_by_context": table}))
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        _load(saved)


@pytest.mark.parametrize("table", [7, [[-3.7, [0.1]]], [[-3.7, [0.1] * 5 + [1.5]]], [[-3.7, [0.1] * 5 + ["x"]]]])
def test_shares_that_are_none_are_refused(saved: Path, table: Any) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shares_by_unit": table}))
    with pytest.raises(InputError, match=r"config\.json is damaged: shares_by_unit"):
        _load(saved)
