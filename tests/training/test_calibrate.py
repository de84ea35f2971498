"""Threshold tables."""

from __future__ import annotations

import pytest
import torch
from tests.routed import make_routed
from tests.tiny import random_ids

from informed_routing.config.recipe import CalibrationConfig
from informed_routing.errors import InputError
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import Threshold
from informed_routing.training.calibrate import calibrate

ROWS = random_ids(64, 32, seed=4)


def _realised(model: RoutedModelForCausalLM, rows: torch.Tensor) -> dict[str, float]:
    model.reset_routing_stats()
    with torch.no_grad():
        model.hidden_states(rows)
    return model.routing_stats()


@pytest.mark.parametrize("budget", ["units", "macs"])
def test_every_sparsity_up_to_the_highest_target_is_realised(budget: str) -> None:
    model = make_routed("llama")
    config = CalibrationConfig(targets=(0.1, 0.2, 0.3), tokens=1, sequence_length=32)
    table = calibrate(model, ROWS, config, budget)  # type: ignore[arg-type]
    model.with_thresholds(table, budget, 0.2, 32)  # type: ignore[arg-type]
    assert [row.threshold for row in table] == sorted(row.threshold for row in table)
    for target in (0.02, 0.05, 0.1, 0.15, 0.2, 0.27, 0.3):
        model.set_sparsity(target)
        assert _realised(model, ROWS)[budget] == pytest.approx(target, abs=0.015)


def test_rows_hold_what_was_measured() -> None:
    """Exactly for the targets; the rows below and beyond them are measured on a part of the text."""
    model = make_routed("llama")
    table = calibrate(model, ROWS, CalibrationConfig(targets=(0.1, 0.25, 0.35), sequence_length=32), "units")
    model.with_thresholds(table, "units", 0.25, 32)
    assert len(table) == 1 + 2 + 3 + 1
    for place, row in enumerate(table[1:]):
        model.set_decision(Threshold(row.threshold, row.by_context))
        found = _realised(model, ROWS)
        for key in ("units", "attention", "ffn", "macs"):
            assert found[key] == pytest.approx(getattr(row, key), abs=1e-6 if 2 <= place <= 4 else 0.02)


def test_the_dial_reaches_the_last_target() -> None:
    model = make_routed("llama")
    table = calibrate(model, ROWS, CalibrationConfig(targets=(0.25,), sequence_length=32), "units")
    assert table[-1].units > 0.25


def test_targets_above_the_ceiling_are_left_out_or_refused() -> None:
    model = make_routed("llama")
    table = calibrate(model, ROWS, CalibrationConfig(targets=(0.2, 0.97), sequence_length=32), "macs")
    assert table[-1].macs < 0.3
    with pytest.raises(InputError, match="no calibration target is below"):
        calibrate(model, ROWS, CalibrationConfig(targets=(0.97,), sequence_length=32), "macs")


@pytest.mark.parametrize("budget", ["units", "macs"])
def test_every_length_of_prompt_realises_the_target(budget: str) -> None:
    model = make_routed("llama")
    rows = random_ids(128, 80, seed=5)
    table = calibrate(model, rows, CalibrationConfig(targets=(0.15, 0.3), sequence_length=80), budget)  # type: ignore[arg-type]
    assert [context for context, _ in table[0].by_context] == [1, 17, 33]
    model.with_thresholds(table, budget, 0.3, 80)  # type: ignore[arg-type]
    for target in (0.15, 0.22, 0.3):
        model.set_sparsity(target)
        for length in (16, 32, 48, 80):
            assert _realised(model, rows[:, :length])[budget] == pytest.approx(target, abs=0.02), length


def test_one_threshold_does_not_hold_where_texts_begin_otherwise_and_ranges_do() -> None:
    model, rows = make_routed("llama"), random_ids(96, 64, seed=6)
    rows[:, :16] = 3 + rows[:, :16] % 4
    table = calibrate(model, rows, CalibrationConfig(targets=(0.3,), sequence_length=64), "units")
    row = next(row for row in table if abs(row.units - 0.3) < 0.01)
    off = {}
    for name, rule in (("one", Threshold(row.threshold)), ("ranges", Threshold(row.threshold, row.by_context))):
        model.set_decision(rule)
        off[name] = max(abs(_realised(model, rows[:, :length])["units"] - 0.3) for length in (16, 32, 64))
    assert off["ranges"] < 0.02 < off["one"]


def test_the_one_threshold_for_all_contexts_realises_the_row_too() -> None:
    model = make_routed("llama")
    for row in calibrate(model, ROWS, CalibrationConfig(targets=(0.15, 0.3), sequence_length=32), "units"):
        model.set_decision(Threshold(row.threshold))
        assert _realised(model, ROWS)["units"] == pytest.approx(row.units, abs=0.02)


def test_dropped_keys_leave_one_threshold() -> None:
    model = make_routed("llama")
    model.set_execution("sparse", kv="drop")
    table = calibrate(model, ROWS, CalibrationConfig(targets=(0.2,), sequence_length=32), "units")
    assert all(row.by_context == () for row in table)
