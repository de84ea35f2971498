"""What the fuzz suite found and no other test holds: each ends in one line that names it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Outcome

from informed_routing.assets.gguf import is_complete
from informed_routing.config.folder import ThresholdRow
from informed_routing.config.recipe import Recipe
from informed_routing.errors import InputError
from informed_routing.evaluation.harness_results import ResultFolder, TaskResult
from informed_routing.files import atomic as files
from informed_routing.training.folder import check_folder

Run = Callable[..., Outcome]


def test_a_home_folder_that_is_not_there_is_named(run: Run, tiny_folder: Path) -> None:
    error = run("generate", tiny_folder, "-p", "the river", "--json", "~nosuchuser/x.json").one_line_error()
    assert "~nosuchuser/x.json" in error


def test_a_working_directory_that_was_removed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    table = ("whatif", "predict", tmp_path / "t.parquet", "--targets", tmp_path / "t.yaml", "--plot", "plot.svg")
    assert "directory" in run(*table).one_line_error()


@pytest.mark.parametrize("kind", ["BPE", "WordLevel"])
def test_a_tokenizer_without_words(run: Run, tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    """One gives no tokens, the other fails."""
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    data = json.loads((other / "tokenizer.json").read_text())
    data["model"] = {"type": kind, "vocab": {}, "merges": [], "unk_token": None if kind == "BPE" else "<none>"}
    data["added_tokens"] = []
    (other / "tokenizer.json").write_text(json.dumps(data))
    assert "tokenizer" in run("generate", other, "-p", "the river", "-q").one_line_error()


def test_more_examples_than_there_are(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from tests.evaluation.local_tasks import write_tasks

    data = write_tasks(tmp_path / "data")
    error = run("evaluate", tiny_folder, "--tasks", "boolq@999", "--data-dir", data, "-q").one_line_error()
    assert "boolq@999" in error
    assert "8" in error


def test_what_the_operating_system_said_is_found_in_the_message_of_a_library() -> None:
    assert "no disk space" in str(
        files.disk_error(Path("x"), files.system_error(ValueError("No space left on device")))
    )
    assert "File too large" in str(files.disk_error(Path("x"), files.system_error(ValueError("File too large"))))


def test_the_rest_of_the_checkpoints_of_a_finished_fit_goes(routing_folder: Path) -> None:
    """A fit was killed while it removed them, when their recipe had gone already."""
    rest = routing_folder / "checkpoints" / "route.safetensors"
    rest.parent.mkdir()
    rest.write_bytes(b"x")
    with pytest.raises(InputError, match="finished fit"):
        check_folder(routing_folder, Recipe(), resume=True, overwrite=False)
    assert not rest.parent.exists()


def test_what_a_kill_left_beside_a_whole_result_goes_when_that_is_used_again(tmp_path: Path) -> None:
    results = ResultFolder(tmp_path)
    results.save({"name": "boolq"}, TaskResult("boolq", 0, 1, {"acc": 1.0}, 0.1))
    left = tmp_path / f".{results.path({'name': 'boolq'}).name}.tmp-0123abcd"
    left.mkdir()
    os.utime(left, (0, 0))
    assert results.load({"name": "boolq"}) is not None
    assert not left.exists()


def test_a_threshold_table_holds_numbers() -> None:
    with pytest.raises(ValueError, match="true and false"):
        ThresholdRow.model_validate({"threshold": 0.0, "units": 0.1, "attention": 0.1, "ffn": True, "macs": 0.1})


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_conversion_that_lost_an_end_is_not_complete(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "converted"))
    assert is_complete(folder)
    content = (folder / name).read_bytes()
    for damaged in (b"", content[: len(content) // 2]):
        (folder / name).write_bytes(damaged)
        assert not is_complete(folder)
