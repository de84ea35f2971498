"""What may be in the folder of a fit before it begins, without running one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from informed_routing.config.recipe import Recipe
from informed_routing.errors import InputError
from informed_routing.training.folder import check_folder, clear_checkpoints, what_decides

RECIPE = Recipe.from_mapping({"stages": ["forecast", "route", "lora"]})


def make(out: Path, *names: str) -> Path:
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(RECIPE.model_dump_json() if name.endswith("recipe.json") else "")
    return out


def begun(out: Path, *phases: str) -> Path:
    return make(out, "checkpoints/recipe.json", *(f"checkpoints/{phase}.safetensors" for phase in phases))


@pytest.mark.parametrize(
    "name", [".git/HEAD", ".env", "thesis.txt", "checkpoints/mine.pt", "lora/notes.md", ".hidden", "model.safetensors"]
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_with_other_things_is_never_overwritten_nor_is_that_suggested(
    tmp_path: Path, name: str, finished: bool
) -> None:
    out = make(tmp_path, name)
    if finished:
        make(out, "routing_config.json", "routing.safetensors", "fit.json")
    for resume, overwrite in ((False, False), (True, False), (False, True)):
        with pytest.raises(InputError) as error:
            check_folder(out, RECIPE, resume=resume, overwrite=overwrite)
        assert "--overwrite" not in str(error.value)
        if overwrite or not finished:
            assert name.split("/")[0] in str(error.value)
    assert (out / name).exists()


@pytest.mark.parametrize("names", [("README.md",), ("tokenizer.json", "config.json"), ("lora/adapter_config.json",)])
def test_names_that_a_fit_uses_do_not_make_a_folder_its_own(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="exists already and holds") as error:
        check_folder(make(tmp_path, *names), RECIPE, resume=False, overwrite=True)
    assert "--overwrite" not in str(error.value)


def test_what_is_ours_may_be_overwritten(tmp_path: Path) -> None:
    out = make(
        begun(tmp_path, "forecast", "route"),
        "routing_config.json",
        "tokenizer.json",
        ".lora.new/x",
        ".fit.json.a1b2c3d4",
    )
    assert check_folder(out, RECIPE, resume=False, overwrite=True) is None
    with pytest.raises(InputError, match=r"exists already. Use --resume, --overwrite, or another --out"):
        check_folder(out, RECIPE, resume=False, overwrite=False)
    clear_checkpoints(out)
    with pytest.raises(InputError, match=r"exists already. Use --overwrite, or another --out"):
        check_folder(out, RECIPE, resume=False, overwrite=False)
    with pytest.raises(InputError, match="finished fit"):
        check_folder(out, RECIPE, resume=True, overwrite=False)


@pytest.mark.parametrize(
    "names", [(), ("checkpoints/.recipe.json.abcd1234",), ("checkpoints/latency.json",), (".lock",)]
)
@pytest.mark.parametrize("how", ["plain", "resume", "overwrite"])
def test_a_kill_before_the_recipe_was_written_leaves_nothing_to_mind(
    tmp_path: Path, names: tuple[str, ...], how: str
) -> None:
    out = make(tmp_path, *names)
    if names != (".lock",):
        (out / "checkpoints").mkdir(exist_ok=True)
    assert check_folder(out, RECIPE, resume=how == "resume", overwrite=how == "overwrite") is None


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exclude each other"):
        check_folder(begun(tmp_path), RECIPE, resume=True, overwrite=True)


@pytest.mark.parametrize(
    ("phases", "key", "value"),
    [
        (("forecast",), "route.steps", 7),
        (("forecast", "warm-start", "route", "refit"), "lora.targets", ["q_proj"]),
        (("forecast", "route"), "lora.rank", 2),
        (("forecast", "route", "lora"), "calibration.targets", [0.2]),
        (("forecast", "route", "lora"), "calibration.tokens", 64),
        (("forecast", "route"), "stages", ["forecast", "route"]),
        (("forecast", "route"), "route.checkpoint_every", 3),
        (("forecast", "route"), "activation_checkpointing", True),
    ],
)
def test_a_correction_of_what_no_begun_stage_reads_goes_on(
    tmp_path: Path, phases: tuple[str, ...], key: str, value: object
) -> None:
    corrected = RECIPE.with_overrides({key: value})
    assert check_folder(begun(tmp_path, *phases), corrected, resume=True, overwrite=False) == RECIPE


@pytest.mark.parametrize(
    ("phases", "key", "value", "stage"),
    [
        (("forecast",), "seed", 18, "forecast"),
        (("forecast",), "data", ["demo:code"], "forecast"),
        (("forecast",), "forecaster.rank", 8, "forecast"),
        (("forecast", "warm-start"), "route.steps", 7, "route"),
        (("forecast", "route", "lora-threshold"), "lora.rank", 2, "lora"),
        (("forecast", "route", "lora-threshold"), "calibration.sequence_length", 64, "lora"),
        (("forecast", "route", "lora"), "stages", ["forecast", "route"], "lora"),
        (("forecast", "route", "lora", "calibrate"), "calibration.targets", [0.2], "calibrate"),
        (("forecast", "route", "lora", "calibrate"), "route.budget", "macs", "route"),
    ],
)
def test_a_change_of_what_a_begun_stage_reads_is_refused_by_name(
    tmp_path: Path, phases: tuple[str, ...], key: str, value: object, stage: str
) -> None:
    changed = RECIPE.with_overrides({key: value})
    with pytest.raises(InputError, match=rf"another recipe \({key} .*{stage} stage has begun"):
        check_folder(begun(tmp_path, *phases), changed, resume=True, overwrite=False)


def test_a_damaged_recipe_is_named(tmp_path: Path) -> None:
    out = begun(tmp_path, "forecast")
    for text in ("", "{", json.dumps({"model": 3}), "\0"):
        (out / "checkpoints" / "recipe.json").write_text(text)
        with pytest.raises(InputError, match=r"recipe.json is damaged.*--overwrite"):
            check_folder(out, RECIPE, resume=True, overwrite=False)


def test_every_setting_decides_about_the_last_stage() -> None:
    """A setting that is added to recipes must not be forgotten here."""
    decides = what_decides(RECIPE, "calibrate")
    for name, value in RECIPE.model_dump().items():
        if isinstance(value, dict):
            assert {f"{name}.{key}" for key in value} - set(decides) <= {f"{name}.checkpoint_every"}
        else:
            assert name in decides or name == "activation_checkpointing"
