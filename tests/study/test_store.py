"""The folder of a study: what is damaged is made again, what cannot be written is refused first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from informed_routing.errors import InputError
from informed_routing.study.plan import Cell
from informed_routing.study.store import Store


class FakeCell:
    file, key = "dense_1.json", "1"


CELL = cast(Cell, FakeCell())


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, json.dumps({"key": "2"})])
def test_a_damaged_record_counts_as_missing(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    store.keep(CELL, {"key": "1", "cell": {}})
    assert store.record(CELL) is not None
    (tmp_path / "cells" / CELL.file).write_text(text)
    assert store.record(CELL) is None


def test_a_file_is_no_place_for_a_study(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"--out .*file is a file"):
        Store(tmp_path / "file")
    store: Any = Store(tmp_path / "file" / "below")
    with pytest.raises(InputError, match=r"--out .*below cannot be written"), store.locked():
        pass
    assert (tmp_path / "file").read_text() == "mine"
