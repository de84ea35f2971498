"""Which rows of several texts a stage reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from informed_routing.assets import DEMO_MODEL, load_tokenizer
from informed_routing.training.reading import Reading
from informed_routing.training.texts import Texts


@pytest.fixture
def texts(tmp_path: Path, demo_model_ref: str) -> Any:
    """A long text of one letter, one of a third of its length of another, and one that fills no row."""
    names = []
    for letter, documents in (("a", 90), ("b", 30), ("c", 1)):
        path = tmp_path / f"{letter}.txt"
        path.write_text("\n\n".join(f" {letter}" * 40 for _ in range(documents)))
        names.append(str(path))
    return Texts(names, load_tokenizer(DEMO_MODEL), 17)


def _shares(texts: Texts, rows: torch.Tensor) -> list[float]:
    ids = [texts.tokenizer(f" {letter}")["input_ids"][0] for letter in "abc"]
    return [float((rows == i).float().mean()) for i in ids]


def test_texts_are_mixed_evenly_whatever_their_lengths(texts: Texts) -> None:
    reading = Reading.aside("train", 16, 16 * 40, "calibrate", even=True)
    rows = texts.read(reading)
    assert rows.shape == (40, 16)
    a, b, _ = _shares(texts, rows)
    assert a == pytest.approx(b, abs=0.05)
    assert torch.equal(rows, texts.read(reading))


def test_a_text_that_ends_leaves_the_rest_to_the_others(texts: Texts) -> None:
    rows = texts.read(Reading.aside("train", 16, 16 * 10_000, "calibrate", even=True))
    a, b, _ = _shares(texts, rows)
    assert a > 2 * b > 0
    assert abs(len(rows) - len(texts.rows("train", 16))) <= 2


def test_rows_are_those_of_a_single_text_where_there_is_one(texts: Texts) -> None:
    alone = Texts(texts.data[:1], texts.tokenizer, 17)
    plain, even = (alone.read(Reading.aside("train", 16, 160, "x", even=flag)) for flag in (False, True))
    assert torch.equal(plain, even)
