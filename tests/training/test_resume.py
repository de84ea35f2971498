"""Nothing is lost: old results stay until the new are whole, corrected recipes go on, mistakes are found early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.interruption import StopAt

from informed_routing.config.recipe import Recipe
from informed_routing.errors import InputError
from informed_routing.files.folders import only_writer
from informed_routing.progress import NullProgress
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.training import result, targets
from informed_routing.training.fit import fit


class NoWork(NullProgress):
    """Fails the test as soon as a stage begins."""

    def stage(self, name: str, total: int) -> None:
        pytest.fail(f"{name} began")


@pytest.fixture
def short(recipe: Recipe) -> Recipe:
    """Two stages and a short table."""
    return recipe.with_overrides({"stages": ["forecast", "route"], "route.steps": 4, "calibration.targets": [0.25]})


@pytest.fixture(scope="module")
def _old(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"folder": tmp_path_factory.mktemp("old") / "out"}


@pytest.fixture
def old(_old: dict[str, Any], short: Recipe, tmp_path: Path) -> Path:
    """A copy of a finished fit with another seed."""
    if not _old["folder"].exists():
        fit(short.with_overrides({"seed": 99}), _old["folder"])
    return Path(shutil.copytree(_old["folder"], tmp_path / "out"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "routing.safetensors"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_overwritten_fit_stays_until_the_new_one_is_whole(short: Recipe, old: Path, tmp_path: Path) -> None:
    before = weights(old)
    fit(short, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(short, old, overwrite=True, progress=StopAt("route", 4))
    assert same(weights(old), before)
    assert RoutedModelForCausalLM.from_pretrained(old).routing_config.sparsity > 0
    with pytest.raises(KeyboardInterrupt):
        fit(short, old, resume=True, progress=StopAt("calibrate", 1))
    assert same(weights(old), before)
    fit(short, old, resume=True)
    assert same(weights(old), weights(tmp_path / "whole"))
    assert not (old / "checkpoints").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_failure_while_the_result_is_written_leaves_the_old_one(
    short: Recipe, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in old.iterdir() if path.is_file()}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(result, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(short, old, overwrite=True)
    assert {path.name: path.read_bytes() for path in old.iterdir() if path.is_file()} == before
    fit(short, old, resume=True, keep_checkpoints=True)
    assert not same(weights(old), load_file_bytes(before["routing.safetensors"]))
    assert (old / "checkpoints" / "recipe.json").is_file()
    with pytest.raises(InputError, match="another recipe"):  # the finished result would be replaced
        fit(short.with_overrides({"seed": 3}), old, resume=True, progress=NoWork())


def load_file_bytes(content: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(content)


def test_files_of_other_origin_survive_a_fit(short: Recipe, tmp_path: Path) -> None:
    """They came while it ran."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fit(short, out, progress=StopAt("route", 2))
    (out / "log.txt").write_text("mine")
    fit(short, out, resume=True)
    assert (out / "log.txt").read_text() == "mine"
    with pytest.raises(InputError, match=r"log\.txt, which no fit has written"):
        fit(short, out, overwrite=True, progress=NoWork())


def test_a_second_fit_into_the_same_folder_is_refused(short: Recipe, tmp_path: Path) -> None:
    with only_writer(tmp_path / "out"), pytest.raises(InputError, match="another run is writing into"):
        fit(short, tmp_path / "out", progress=NoWork())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"lora.targets": ["nope"]}, "LoRA target 'nope' is no layer"),
        ({"lora.targets": ["q_proj", "self_attn"]}, "'self_attn' is no linear layer"),
        ({"lora.targets": ["input_layernorm"]}, "'input_layernorm' is no linear layer"),
        ({"lora.targets": ["embed_tokens"]}, "'embed_tokens' is no linear layer"),
        ({"lora.targets": ["lm_head"]}, "'lm_head' is no linear layer of the decoder"),
        ({"lora.targets": ["outer"]}, "'outer' is no layer"),
        ({"lora.targets": []}, "lora.targets: .* at least 1 item"),
        ({"calibration.targets": []}, "calibration.targets: .* at least 1 item"),
        ({"calibration.targets": [0.999999999]}, "no calibration target is below the attainable 0.98.*1"),
        ({"calibration.targets": [0.9], "route.budget": "macs"}, "no calibration target is below"),
        ({"lora.sparsity": 0.95, "route.budget": "macs"}, "lora.sparsity 0.95 cannot be reached"),
        ({"lora.sequence_length": 100_000}, "one row of 100000"),
        ({"forecast.sequence_length": 100_000}, "one row of 100000"),
    ],
)
def test_mistakes_of_later_stages_are_found_before_the_first(
    recipe: Recipe, tmp_path: Path, overrides: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        fit(recipe.with_overrides(overrides), tmp_path / "out", progress=NoWork())
    assert list(tmp_path.iterdir()) == []


def test_targets_that_are_left_out_are_said(recipe: Recipe, tmp_path: Path) -> None:
    class Said(NoWork):
        texts: list[str]

        def message(self, text: str) -> None:
            self.texts.append(text)

    progress = Said()
    progress.texts = []
    given = {"calibration.targets": [0.1, 0.99], "lora.targets": ["nope"]}
    with pytest.raises(InputError, match="nope"):
        fit(recipe.with_overrides(given), tmp_path / "out", progress=progress)
    assert progress.texts == ["calibration targets beyond what the routers can reach are left out: 0.99"]


def test_a_corrected_recipe_goes_on_with_the_stages_that_it_does_not_touch(recipe: Recipe, tmp_path: Path) -> None:
    out, corrected = tmp_path / "out", recipe.with_overrides({"lora.rank": 2, "calibration.targets": [0.2, 0.3]})
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, out, progress=StopAt("lora", 1))
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "checkpoints").glob("*.safetensors")}
    assert {"forecast.safetensors", "route.safetensors"} <= kept.keys()
    assert "lora.safetensors" not in kept
    (out / "checkpoints" / "lora-threshold.safetensors").unlink()  # as if killed before it
    stopped = StopAt("calibrate", 1)
    with pytest.raises(KeyboardInterrupt):
        fit(corrected, out, resume=True, progress=stopped)
    again = {path.name: path.stat().st_mtime_ns for path in (out / "checkpoints").glob("*.safetensors")}
    assert {name: again[name] for name in kept if not name.startswith("lora")}.items() <= kept.items()
    report = fit(corrected, out, resume=True)
    assert report["recipe"]["lora"]["rank"] == 2
    fit(corrected, tmp_path / "whole")
    assert same(weights(out), weights(tmp_path / "whole"))
    one, two = (load_file(str(f / "lora" / "adapter_model.safetensors")) for f in (out, tmp_path / "whole"))
    assert same(one, two)


def test_another_text_or_base_under_the_same_name_is_not_resumed(
    short: Recipe, tmp_path: Path, text_file: Path, tiny_folder: Path
) -> None:
    text, base = tmp_path / "text.txt", Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    text.write_text(text_file.read_text())
    mine = short.with_overrides({"data": [str(text)], "model": str(base)})
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fit(mine, out, progress=StopAt("route", 2))
    text.write_text(text_file.read_text().replace("w1 ", "w2 "))
    with pytest.raises(InputError, match=r"begun with another text .*content has changed"):
        fit(mine, out, resume=True, progress=NoWork())
    text.write_text(text_file.read_text())
    from tests.tiny import make_tiny

    make_tiny("llama", seed=5).save_pretrained(base)
    with pytest.raises(InputError, match="begun with another base model"):
        fit(mine, out, resume=True, progress=NoWork())
    shutil.copyfile(tiny_folder / "model.safetensors", base / "model.safetensors")
    fit(mine, out, resume=True)


def test_a_kill_before_the_recipe_and_left_overs(short: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        fit(short, out, resume=True, progress=StopAt("route", 2))
    for name in (".route.safetensors.a1b2c3d4", ".tmpAbC123"):  # of earlier versions, and of safetensors itself
        (out / "checkpoints" / name).write_text("half")
    with pytest.raises(KeyboardInterrupt):
        fit(short, out, resume=True, progress=StopAt("route", 4))
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]
    (out / "checkpoints" / "inputs.json").write_text("{")
    with pytest.raises(InputError, match=r"inputs\.json is damaged"):
        fit(short, out, resume=True, progress=NoWork())


def test_a_damaged_latency_table_is_named(short: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from informed_routing.config.folder import LatencyGains

    table = {"attention": 0.2, "ffn": 0.5, "overhead": 0.01, "seconds": 1.0, "tokens": 32, "engine": "e", "cpu": "c"}
    monkeypatch.setattr(targets, "measure_latency", lambda *_, **__: LatencyGains.model_validate(table))
    timed, out = short.with_overrides({"route.budget": "latency"}), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fit(timed, out, progress=StopAt("route", 2))
    for text in ("", "{}", json.dumps({**table, "ffn": "much"})):
        (out / "checkpoints" / "latency.json").write_text(text)
        with pytest.raises(InputError, match=r"latency\.json is damaged"):
            fit(timed, out, resume=True, progress=NoWork())
