"""The benchmark of the dial on a tiny model: prompts, the shares of their beginnings, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dial_kinds
import pytest
import torch
from tests.cli.conftest import SENTENCES, save_tokenizer
from tests.routed import make_routed
from tests.tiny import make_tiny, random_ids

from informed_routing.config.folder import ThresholdRow
from informed_routing.routing.decision import Threshold


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """All files that the kinds are read from but WikiText-2."""
    sources = ("wikipedia", "c4", "code")
    texts = [{"text": text, "source": sources[i % 3]} for i, text in enumerate(SENTENCES)]
    choices = {"label": ["A", "B"], "text": SENTENCES[:2]}
    asked = [{"question": text, "choices": choices, "answerKey": "A"} for text in SENTENCES[:9]]
    talk = [{"question": text, "passage": text, "label": 1} for text in SENTENCES[:9]]
    files: dict[str, list[dict[str, Any]]] = {
        "calibration": texts,
        "tasks/arc_easy": asked,
        "tasks/arc_challenge": asked,
        "tasks/boolq": talk,
    }
    for name, rows in files.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        path = tmp_path / "data" / name / "validation.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base: Any = make_tiny("llama", bos_token_id=None)
    base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    model = make_routed("llama", bos_token_id=None)
    rows = tuple(
        ThresholdRow(threshold=t, units=u, attention=u, ffn=u, macs=u, by_context=((1, t), (9, t + 0.1)))
        for t, u in ((-9.0, 0.0), (0.0, 0.5))
    )
    model.with_thresholds(rows, "units", 0.4, 16)
    model.save_pretrained(tmp_path / "routing")
    return tmp_path / "routing"


def test_what_it_writes(folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "dial.json"
    given = [str(folder), "--base", str(folder.parent / "base"), "--data-dir", str(data), "--out", str(out)]
    dial_kinds.main([*given, "--targets", "0.3", "--lengths", "32", "16", "--prompts", "3", "--execution", "sparse"])
    record = json.loads(out.read_text())
    (run,) = record["runs"]
    assert run["kinds"].keys() == {"encyclopaedia", "web", "code", "questions", "chat"}
    assert record["lengths"] == [16, 32]
    page = out.with_suffix(".md").read_text()
    assert "| text | 16 tokens | 32 tokens |" in page
    assert f"{100 * run['kinds']['web']['16']['units']:.1f}" in page
    assert "wikitext-2 is left out" in capsys.readouterr().out


def test_beginnings_are_counted_as_prompts_of_their_own() -> None:
    model, ids = make_routed("llama"), random_ids(3, 24)
    model.set_decision(Threshold(0.0, ((1, 0.3), (9, -0.2))))
    with torch.no_grad():
        found = dial_kinds.realised(model, ids, (7, 16, 24))
        for length in (7, 16, 24):
            model.reset_routing_stats()
            model.hidden_states(ids[:, :length])
            alone = model.routing_stats()
            for key in dial_kinds.SHARES:
                assert found[str(length)][key] == pytest.approx(alone[key]), (length, key)
