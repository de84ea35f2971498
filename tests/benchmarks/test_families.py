"""The table over all types: its page, and, slowly, that it is still true."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import transformers

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "data" / "families.json"


def test_the_page_is_that_of_the_data() -> None:
    content = json.loads(DATA.read_text())
    assert (ROOT / "docs" / "families.md").read_text() == families.page(content) + "\n"
    assert {row["group"] for row in content["types"]} <= set(families.GROUPS)


def test_a_type_is_looked_at() -> None:
    assert families.look("qwen3_moe")["group"] == "both"
    assert families.look("longcat_flash")["group"] == "ffn"
    assert families.look("opt")["group"] == "attention"
    refused = families.look("bloom")
    assert (refused["group"], "cannot be routed" in refused["reason"]) == ("refused", True)


@pytest.mark.slow
def test_every_type_is_what_the_table_says() -> None:
    content = json.loads(DATA.read_text())
    if content["environment"]["transformers"] != transformers.__version__:
        pytest.skip("the table is of another version")
    for row in content["types"]:
        assert families.look(row["type"])["group"] == row["group"], row["type"]
