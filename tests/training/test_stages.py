"""Stages say what they read, leave and depend on; a fit does just that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from informed_routing.assets import Split
from informed_routing.config.kinds import kinds_of
from informed_routing.config.recipe import Recipe
from informed_routing.config.types import Frozen
from informed_routing.errors import InputError
from informed_routing.training import loop
from informed_routing.training.fit import fit
from informed_routing.training.folder import in_checkpoints
from informed_routing.training.reading import Reading
from informed_routing.training.report import seconds_of
from informed_routing.training.stages import STAGES, stages_of, text_read
from informed_routing.training.texts import Texts

ZERO = {"forecaster.fallback": "zero", "router.warm_start": False}
CHOICES: dict[str, list[Any]] = {
    "stages": [["forecast"], ["forecast", "route"], ["forecast", "route", "lora"], ["forecast", "joint"], ["route"]],
    "forecaster.fit": ["closed-form", "gradient"],
    "forecaster.start": ["closed-form", "random"],
    "forecaster.fallback": ["forecaster", "zero"],
    "forecaster.refit": [True, False],
    "forecaster.tokens": [1, 1000],
    "router.warm_start": [True, False],
    "router.sweeps": [0, 3],
    "router.sweep_tokens": [1, 100],
    "route.steps": [0, 7],
    "route.train_forecasters": [True, False],
    "lora.sparsity": [None, 0.0, 0.3],
}
overrides = st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in CHOICES.items()})


def valid(settings: dict[str, Any]) -> Recipe | None:
    try:
        return Recipe().with_overrides(settings)
    except InputError:
        return None


def test_every_stage_has_the_name_of_its_file_a_place_and_checkpoints_of_its_own() -> None:
    assert {stage.name for stage in STAGES} == set(kinds_of("stages"))
    assert len({stage.place for stage in STAGES}) == len(STAGES)
    assert STAGES[-1].name == "calibrate"
    for stage in STAGES:
        assert stage.checkpoints


def test_a_stage_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    for stages in (["forecast", "nope"], [3], [None], [["forecast"]]):
        with pytest.raises(
            InputError, match="input should be 'static', 'forecast', 'route', 'joint', 'lora' or 'calibrate'"
        ):
            Recipe.from_mapping({"stages": stages})


def test_recipes_and_questions_to_stages_import_nothing_heavy() -> None:
    code = (
        "import sys; from informed_routing.config.recipe import Recipe; "
        "from informed_routing.training.stages import text_read; "
        "text_read(Recipe.from_mapping({'stages': ['forecast', 'route']})); "
        "sys.exit(bool({'torch', 'transformers', 'accelerate', 'peft'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@given(overrides)
def test_what_is_read_names_checkpoints_in_order_and_the_last_stage_always_calibrates(settings: dict[str, Any]) -> None:
    recipe = valid(settings)
    if recipe is None:
        return
    stages = stages_of(recipe)
    assert stages[-1].name == "calibrate"
    for stage in stages:
        parts = list(stage.reads(recipe))
        assert parts == [part for part in stage.checkpoints if part in parts]
        assert all(in_checkpoints(f"{part}.safetensors") for part in stage.checkpoints)
    assert list(text_read(recipe)) == list(recipe.stages)


def test_stages_read_only_sections_of_the_recipe() -> None:
    dumped = dict(Recipe())
    for stage in STAGES:
        for setting in stage.settings:
            section, *rest = setting.split(".")
            assert isinstance(dumped[section], Frozen)
            assert all(hasattr(dumped[section], key) for key in rest)


def told_tokens(report: Any) -> int:
    """Tokens that a stage reports of its parts."""
    if not isinstance(report, dict):
        return 0
    return report["tokens"] if "tokens" in report else sum(told_tokens(part) for part in report.values())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"forecaster.fit": "gradient", "forecaster.start": "closed-form", "forecaster.refit": False},
        {"stages": ["forecast", "joint"], "route.gradient_accumulation": 2},
        {"route.steps": 0, "lora.sparsity": 0.0, "router.sweeps": 0},
        {**ZERO, "stages": ["forecast", "route", "lora"]},
        {**ZERO, "stages": ["route", "lora"], "router.kind": "ranking", "selection.decision": "top-k"},
    ],
    ids=["closed-form", "gradient", "joint", "start-only", "zero", "top-k"],
)
def test_a_fit_reads_what_its_stages_say(
    recipe: Recipe, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe.with_overrides(settings)
    asked: list[Reading] = []
    packed: set[tuple[str, int]] = set()
    rows, read = Texts.rows, Texts.read

    def noted_rows(self: Texts, split: Split, length: int) -> Tensor:
        packed.add((split, length))
        return rows(self, split, length)

    def noted_read(self: Texts, reading: Reading) -> Tensor:
        asked.append(reading)
        return read(self, reading)

    monkeypatch.setattr(Texts, "rows", noted_rows)
    monkeypatch.setattr(Texts, "read", noted_read)
    report = fit(recipe, tmp_path / "out", keep_checkpoints=True)
    expected = {part: reading for stage in stages_of(recipe) for part, reading in stage.reads(recipe).items()}
    assert asked == list(expected.values())
    assert packed == {(reading.split, reading.length) for reading in expected.values()}
    left = {path.stem for path in (tmp_path / "out" / "checkpoints").glob("*.safetensors")}
    assert left == expected.keys()
    told = {name: told_tokens(report["stages"].get(name)) for name in recipe.stages}
    assert told == text_read(recipe)


def test_a_fit_from_a_folder_reads_no_text_for_a_closed_form_start(recipe: Recipe) -> None:
    later = recipe.model_copy(update={"start": "there", "stages": ("route", "lora")})
    whole, rest = text_read(recipe), text_read(later)
    assert rest["lora"] == whole["lora"]
    assert whole["route"] - rest["route"] == 512 + 2 * 256


def test_seconds_are_those_of_a_part_or_of_all_its_parts() -> None:
    part = {"seconds": 2.0, "explained": {"seconds": 1.0}}
    assert seconds_of(part) == 2.0
    assert seconds_of({"sparsity": 0.3, "train": part, "refit": {"seconds": 0.5}, "history": [{"seconds": 9}]}) == 2.5
    assert seconds_of(None) == 0.0


@pytest.mark.parametrize("kept", ["fp16", None])
def test_a_second_precision_in_one_process_is_refused(kept: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate keeps the first for good: with it another fit would train in what nobody asked for."""

    def accelerator(**given: Any) -> Any:
        if kept is None:
            raise ValueError("has already been initialized")
        return SimpleNamespace(mixed_precision=kept)

    monkeypatch.setattr(loop, "Accelerator", accelerator)
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        with pytest.raises(InputError, match="in this process"):
            loop.accelerator_for(device, dtype)
