"""Which part of a text is scored: all of one that the fit has not read, what it held out of one that it has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from informed_routing.assets import load_texts
from informed_routing.errors import InputError
from informed_routing.evaluation.parts import fitted_on, part_of, text_records


def write(path: Path, first: int, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"document number {n}"}) + "\n" for n in range(first, first + count)))
    return path


def fitted(folder: Path, data: list[str], start: Path | None = None, *, old: bool = False) -> Path:
    """A routing folder's report of a fit; `old` ones have no records of their texts."""
    report: dict[str, Any] = {"recipe": {"data": data, "start": None if start is None else str(start)}}
    if not old:
        report["texts"] = text_records(data, start)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fit.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def read(tmp_path: Path) -> Path:
    return write(tmp_path / "read.jsonl", 0, 40)


@pytest.mark.parametrize("old", [False, True])
def test_a_text_that_the_fit_read_gives_its_held_out_part(tmp_path: Path, read: Path, old: bool) -> None:
    known = fitted_on(fitted(tmp_path / "out", [str(read)], old=old))
    part = part_of(str(read), None, known)
    assert (part.split, part.documents) == ("heldout", load_texts(str(read), "heldout"))
    assert "the fit has read the rest" in part.reason


@pytest.mark.parametrize("old", [False, True])
def test_another_text_is_scored_whole(tmp_path: Path, read: Path, old: bool) -> None:
    other = write(tmp_path / "other.jsonl", 100, 7)
    part = part_of(str(other), None, fitted_on(fitted(tmp_path / "out", ["demo:wiki", str(read)], old=old)))
    assert (part.split, len(part.documents)) == ("all", 7)
    assert "read.jsonl" in part.reason


def test_a_text_is_known_under_another_name_and_when_the_first_is_gone(tmp_path: Path, read: Path) -> None:
    out = fitted(tmp_path / "out", [str(read)])
    copy = Path(shutil.copy(read, tmp_path / "copy.jsonl"))
    assert part_of(str(copy), None, fitted_on(out)).split == "heldout"
    read.unlink()
    assert part_of(str(copy), None, fitted_on(out)).split == "heldout"
    assert part_of(str(write(tmp_path / "other.jsonl", 100, 20)), None, fitted_on(out)).split == "all"


def test_a_text_that_grew_since_is_still_the_one_that_was_read(tmp_path: Path, read: Path) -> None:
    out = fitted(tmp_path / "out", [str(read)])
    write(read, 0, 60)
    assert part_of(str(read), None, fitted_on(out)).split == "heldout"


def test_relative_names_are_compared_by_place(tmp_path: Path, read: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = fitted_on(fitted(tmp_path / "out", ["read.jsonl"], old=True))
    assert part_of(str(read), None, known).split == "heldout"
    assert part_of("./read.jsonl", None, known).split == "heldout"


def test_names_with_commas_several_texts_in_one_and_columns(tmp_path: Path, read: Path) -> None:
    odd = write(tmp_path / "a,b.jsonl", 300, 20)
    known = fitted_on(fitted(tmp_path / "out", [f"{read},{odd}"]))
    assert [len(source.files) for source in known.sources] == [1, 1]
    for ref in (str(read), str(odd)):
        assert part_of(ref, None, known).split == "heldout"
    by_column = fitted_on(fitted(tmp_path / "column", [f"{read}:text"]))
    assert part_of(str(read), None, by_column).split == "heldout"


def test_what_cannot_be_compared_counts_as_read(tmp_path: Path, read: Path) -> None:
    out = fitted(tmp_path / "out", [str(read)], old=True)
    read.unlink()
    mine = write(tmp_path / "mine.jsonl", 100, 20)
    for known in (fitted_on(out), fitted_on(tmp_path / "nowhere"), fitted_on(None)):
        part = part_of(str(mine), None, known)
        assert part.split == "heldout"
        assert "may have read" in part.reason
    (out / "fit.json").write_text("{")
    assert "fit.json cannot be read" in part_of(str(mine), None, fitted_on(out)).reason
    with pytest.raises(InputError, match="--split all"):
        part_of(str(write(tmp_path / "few.jsonl", 0, 3)), None, fitted_on(out))


@pytest.mark.parametrize("old", [False, True])
def test_the_text_of_the_fit_that_it_started_from_counts_too(tmp_path: Path, read: Path, old: bool) -> None:
    first = fitted(tmp_path / "first", [str(read)], old=old)
    second = fitted(tmp_path / "second", [str(write(tmp_path / "more.jsonl", 200, 20))], first, old=old)
    assert part_of(str(read), None, fitted_on(second)).split == "heldout"


def test_one_file_of_many_gives_what_the_fit_held_out_of_it(tmp_path: Path) -> None:
    """Documents are counted through all files: a tenth of one file alone would be text that was trained on."""
    for number in range(3):
        write(tmp_path / "shards" / f"{number}.jsonl", 15 * number, 15)
    everything = str(tmp_path / "shards" / "*.jsonl")
    known = fitted_on(fitted(tmp_path / "out", [everything]))
    part = part_of(str(tmp_path / "shards" / "1.jsonl"), None, known)
    assert part.documents == ["document number 19", "document number 29"]
    trained = set(load_texts(everything, "train")) | set(load_texts(everything, "calibration"))
    assert not trained & set(part.documents)
    wider = str(tmp_path / "[so]*" / "*.jsonl")
    write(tmp_path / "others" / "9.jsonl", 500, 4)
    found = part_of(wider, None, known).documents
    assert not trained & set(found)
    assert set(load_texts(everything, "heldout")) | {f"document number {n}" for n in range(500, 504)} == set(found)


def test_hub_sets_are_compared_by_name_and_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import informed_routing.evaluation.parts as parts

    monkeypatch.setattr(parts, "load_texts", lambda ref, split: [ref, split])
    known = fitted_on(fitted(tmp_path / "out", ["owner/set:main:train:text"]))
    assert part_of("owner/set:main:train:text", None, known).split == "heldout"
    assert part_of("owner/set:::text", None, known).split == "heldout"
    assert part_of("owner/set:main:validation:text", None, known).split == "all"
    assert part_of("owner/other", None, known).split == "all"


def test_dense_models_embedded_texts_and_the_users_own_choice(tmp_path: Path, read: Path) -> None:
    known = fitted_on(fitted(tmp_path / "out", [str(read)]))
    assert part_of(str(read), None, None).split == "all"
    assert part_of(str(read), "train", None).split == "train"
    assert part_of(str(read), "all", known).split == "all"


def test_records_name_no_folders(tmp_path: Path, read: Path) -> None:
    records = text_records([str(read), "demo:wiki"])
    assert [entry["ref"] for entry in records["sources"]] == [str(read), "demo:wiki"]  # as they were given
    (file,) = records["sources"][0]["files"]
    assert set(file) == {"bytes", "sha256"}
