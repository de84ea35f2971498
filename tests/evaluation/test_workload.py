"""One pass over a workload gives a table that repeats, resumes and adds up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.routed import make_routed
from tests.tiny import random_ids

from informed_routing.config.folder import ThresholdRow
from informed_routing.errors import InputError
from informed_routing.evaluation import workload
from informed_routing.evaluation.workload import Measurement, Request, measure_workload, read_rows, write_rows

REQUESTS = [Request("a", 7, 3), Request("b", 12, 0), Request("a", 5, 4), Request("b", 9, 2)]
STREAMS = {"a": random_ids(1, 90, seed=1)[0], "b": random_ids(1, 60, seed=2)[0]}


def routed_model() -> Any:
    model = make_routed("llama")
    rows = tuple(
        ThresholdRow(threshold=t, units=u, attention=u, ffn=u, macs=u) for t, u in ((-9.0, 0.0), (0.0, 0.4), (9.0, 1.0))
    )
    model.with_thresholds(rows, "units", 0.4, 16)
    return model


def without_clock(rows: list[Measurement]) -> list[Measurement]:
    zero = {"prefill_seconds": 0.0, "decode_seconds": 0.0, "dense_prefill_seconds": 0.0, "dense_decode_seconds": 0.0}
    return [replace(row, **zero) for row in rows]  # type: ignore[arg-type]


def test_rows_add_up_and_repeat() -> None:
    model = routed_model()
    rows = measure_workload(model, STREAMS, REQUESTS, sparsity=0.4)
    assert [(row.domain, row.prompt_tokens, row.output_tokens) for row in rows] == [
        (r.domain, r.prompt_tokens, r.output_tokens) for r in REQUESTS
    ]
    for row in rows:
        assert row.possible == (row.prompt_tokens + row.output_tokens) * len(model.units)
        assert row.executed == row.attention_executed + row.ffn_executed
        assert 0 < row.executed < row.possible
        assert row.loss_tokens == row.output_tokens
        assert (row.loss_sum > 0) == (row.output_tokens > 0)
        assert row.loss_sum != row.dense_loss_sum or not row.output_tokens
        assert row.macs != row.dense_macs
    again = measure_workload(routed_model(), STREAMS, REQUESTS, sparsity=0.4)
    assert without_clock(rows) == without_clock(again)
    assert without_clock(measure_workload(routed_model(), STREAMS, REQUESTS, sparsity=0.4, seed=5)) != without_clock(
        rows
    )


def test_loss_is_that_of_the_forced_text() -> None:
    model, request = routed_model(), Request("a", 86, 4)  # the only piece of that length begins the stream
    row = measure_workload(model, STREAMS, [request], sparsity=0.4)[0]
    model.set_sparsity(0.0)
    with torch.inference_mode():
        logits = model(input_ids=STREAMS["a"][None]).logits[0, 85:89]
    expected = torch.nn.functional.cross_entropy(logits, STREAMS["a"][86:90], reduction="sum")
    assert row.dense_loss_sum == pytest.approx(float(expected), rel=1e-4)


def test_a_killed_pass_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "SAVE_EVERY", 1)
    out, model = tmp_path / "table.parquet", routed_model()
    whole = measure_workload(model, STREAMS, REQUESTS, sparsity=0.4, out=out)
    assert read_rows(out) == whole
    identity = workload._identity(model, STREAMS, REQUESTS, 0.4, None, 17)
    write_rows(out, whole[:2], identity)
    continued = measure_workload(model, STREAMS, REQUESTS, sparsity=0.4, out=out, resume=True)
    assert continued[:2] == whole[:2]
    assert without_clock(continued) == without_clock(whole)
    with pytest.raises(InputError, match="other settings"):
        measure_workload(model, STREAMS, REQUESTS, sparsity=0.3, out=out, resume=True)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("c", 3, 1), "domain 'c' has no text"),
        (Request("a", 0, 1), "cannot be run"),
        (Request("a", 3, -1), "cannot be run"),
        (Request("b", 60, 1), "60 tokens, a request needs 61"),
    ],
)
def test_bad_requests_are_named(request_: Request, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_workload(routed_model(), STREAMS, [request_], sparsity=0.4)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "table.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"table\.parquet cannot be read"):
        read_rows(tmp_path / "table.parquet")
