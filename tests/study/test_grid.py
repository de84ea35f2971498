"""Grids become cells with stable keys, shared stages, and equal amounts of training text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.study.conftest import ALL_METHODS, FEW_METHODS

from informed_routing.config.recipe import Recipe
from informed_routing.errors import InputError
from informed_routing.study.grid import Grid, built_in_grids, load_grid
from informed_routing.study.identity import content_id
from informed_routing.study.plan import expand, matching
from informed_routing.training.stages import text_read

NAMES = (
    *("control", "equal-cost", "figure1", "figure3"),
    *("table1", "table2", "table3", "table4", "table5", "table8", "table9"),
)


@pytest.mark.parametrize("scale", ["cpu", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_built_in_grids_expand_at_every_scale(name: str, scale: str) -> None:
    cells = expand(load_grid(name, models=("some/model",), scale=scale))
    assert len({cell.key for cell in cells}) == len(cells)
    assert {cell.model for cell in cells} == {"some/model"}


def test_all_built_in_grids_are_known() -> None:
    assert tuple(built_in_grids()) == NAMES


def test_table_1_has_the_paper_rows_at_both_sparsities() -> None:
    found = {(cell.method, cell.sparsity, cell.recovered) for cell in expand(load_grid("table1"))}
    for sparsity in (0.25, 0.40):
        for method in ("slicegpt", "shortened", "shortgpt", "skipgpt", "informed", "mod", "d-llm"):
            assert (method, sparsity, True) in found
        for method in ("skipgpt", "informed"):
            assert (method, sparsity, False) in found
    assert ("dense", 0.0, False) in found
    assert len(found) == 19


def test_equal_cost_shares_its_cells_with_table_1() -> None:
    known = {cell.key for cell in expand(load_grid("table1"))}
    own = [cell for cell in expand(load_grid("equal-cost")) if cell.key not in known]
    assert [(cell.method, cell.sparsity) for cell in own] == [("informed", 0.55), ("informed", 0.70)]


def test_keys_do_not_depend_on_the_run_and_names_tell_cells_apart(make_grid: Callable[..., Grid]) -> None:
    one, two = expand(make_grid(ALL_METHODS)), expand(make_grid(ALL_METHODS))
    assert [cell.key for cell in one] == [cell.key for cell in two]
    assert len({cell.name for cell in one}) == len(one)


@pytest.mark.parametrize(
    "change",
    [
        {"evaluation": {"tasks": ["boolq@0"], "limit": 2}},
        {"seeds": [18]},
        {"sparsities": [0.3]},
        {"training": {"tokens": 640}},
        {"training": {"recovery": {"rank": 3}}},
    ],
)
def test_keys_change_with_what_determines_the_result(make_grid: Callable[..., Grid], change: dict[str, Any]) -> None:
    methods = {"informed": {**ALL_METHODS["informed"], "recovered": [True]}}
    assert expand(make_grid(methods))[0].key != expand(make_grid(methods, **change))[0].key


def test_batch_size_of_the_evaluation_is_not_part_of_the_key(make_grid: Callable[..., Grid]) -> None:
    grid = make_grid(FEW_METHODS)
    other = grid.model_copy(update={"evaluation": grid.evaluation.model_copy(update={"batch_size": 1})})
    assert [cell.key for cell in expand(grid)] == [cell.key for cell in expand(other)]


def test_keys_follow_the_content_of_files_not_their_place(
    make_grid: Callable[..., Grid], text_file: Path, tmp_path: Path
) -> None:
    moved, changed = tmp_path / "moved.txt", tmp_path / "changed.txt"
    moved.write_bytes(text_file.read_bytes())
    changed.write_bytes(text_file.read_bytes() + b"\n\nmore")
    keys = [expand(make_grid(FEW_METHODS, training={"data": [str(path)]}))[-1].key for path in (moved, changed)]
    here = expand(make_grid(FEW_METHODS))[-1].key
    assert keys[0] == here
    assert keys[1] != here


def test_a_copied_data_folder_has_the_same_keys(make_grid: Callable[..., Grid], data_dir: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(data_dir, tmp_path / "copy")
    keys = [expand(make_grid(FEW_METHODS), folder)[0].key for folder in (data_dir, copy, None)]
    assert keys[0] == keys[1] != keys[2]


def test_routers_are_trained_once_for_what_follows(make_grid: Callable[..., Grid]) -> None:
    """Recovery starts from the routers of the row without it, and one router may serve all sparsities."""
    plain, recovered = expand(make_grid({"informed": ALL_METHODS["informed"]}))
    assert recovered.stages[:-1] == plain.stages
    shared = {**ALL_METHODS["informed"], "overrides": {"route.sparsity": 0.3}}
    cells = expand(make_grid({"informed": shared}, sparsities=[0.25, 0.4]))
    assert len({cell.stages[0].key for cell in cells}) == 1
    assert len({cell.key for cell in cells}) == 4
    assert cells[0].stages[0].settings["calibration"]["targets"] == [0.25, 0.4]


def test_forecasters_that_need_no_routers_are_a_stage_of_their_own(make_grid: Callable[..., Grid]) -> None:
    """By gradient, as in the paper: then both sparsities have the same forecasters."""
    method = {
        "label": "As in the paper",
        "recipe": "paper-135m",
        "recovered": [False],
        "overrides": {"forecast.steps": 2, "forecast.batch_size": 2},
    }
    cells = expand(make_grid({"paper": method}, sparsities=[0.25, 0.4]))
    assert [stage.settings["stages"] for stage in cells[0].stages] == [["forecast"], ["route"]]
    assert cells[0].stages[0].key == cells[1].stages[0].key
    assert cells[0].stages[1].key != cells[1].stages[1].key


def test_all_methods_train_on_the_same_text(make_grid: Callable[..., Grid]) -> None:
    """768 tokens recovered, 512 without, up to one step of 64."""
    for cell in expand(make_grid(ALL_METHODS)):
        if cell.method in ("dense",) or (not cell.recovered and cell.kind == "static"):
            continue
        budget = 768 if cell.recovered else 512
        assert budget - 64 < cell.tokens <= budget, cell.name


def test_unequal_text_is_refused_naming_the_cell(make_grid: Callable[..., Grid]) -> None:
    methods = {**ALL_METHODS, "skipgpt": {**ALL_METHODS["skipgpt"], "overrides": {"route.steps": 20}}}
    with pytest.raises(
        InputError, match=r"cell \S*_skipgpt_25_recovered_s17 trains on 1,536 tokens, the others on 768"
    ):
        expand(make_grid(methods))
    expand(make_grid(methods, training={"equal_tokens": False}))


def test_closed_forms_that_leave_no_text_to_train_on_are_refused(make_grid: Callable[..., Grid]) -> None:
    with pytest.raises(InputError, match=r"Informed routing reads 256 tokens before its first route step, of 200"):
        expand(make_grid({"informed": ALL_METHODS["informed"]}, training={"tokens": 200}))


def test_joint_training_has_no_row_without_recovery(make_grid: Callable[..., Grid]) -> None:
    with pytest.raises(InputError, match="MoD trains routers and LoRA at once"):
        expand(make_grid({"mod": {**ALL_METHODS["mod"], "recovered": [False, True]}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsities": [1.5]}, "1.5 is not between 0 and 1"),
        ({"methods": {}}, "methods is empty"),
        ({"methods": {"x": {"label": "X", "recipe": "small", "prune": "shortgpt"}}}, "not both"),
        ({"layout": "pie"}, "layout"),
        ({"colour": "red"}, "unknown setting colour"),
        ({"scale": "huge"}, "scale 'huge' does not exist"),
        ({"scale": ["cpu"]}, r"scale \['cpu'\] does not exist"),
        ({"scale": {}}, "scale {} does not exist"),
        ({"name": "../x"}, "name"),
        ({"name": "x" * 90}, "name"),
        ({"name": "agreement"}, "agreement is that of another page"),
        ({"methods": {"../../x": {"label": "X"}}}, "the method '../../x' cannot be a file's name"),
        ({"methods": {"a\tb": {"label": "X"}}}, "control character"),
        ({"methods": {"x" * 81: {"label": "X"}}}, "has 81 bytes"),
        ({"methods": {"x": {"label": "X\x1b[31m"}}}, "line|control"),
        ({"methods": {"x": {"label": "X", "overrides": {"a": 1}}}}, "overrides has no effect on a dense method"),
        ({"methods": {"x": {"label": "X", "recipe": "small", "prune_tokens": 9}}}, "prune_tokens has no effect"),
        ({"seeds": [1, 1]}, "1 is given twice"),
        ({"seeds": [-1]}, "seeds.0 = -1"),
        ({"seeds": [2**32]}, "seeds.0 = 4294967296"),
        ({"models": []}, "models"),
        ({"models": ["m", "m"]}, "m is given twice"),
        ({"sparsities": [0.25, 0.25]}, "0.25 is given twice"),
        ({"evaluation": {"tasks": ["boolq@lots"]}}, "task 'boolq@lots' is not NAME"),
        ({"training": {"batch_size": True}}, "batch_size = True"),
        ({"training": {"data": ["a\x00"]}}, "line|control"),
    ],
)
def test_bad_grids_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"methods": FEW_METHODS, **change}))
    with pytest.raises(InputError, match=message):
        load_grid(str(path))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"label": "X", "prune": "nope"}, "X: there is no way of pruning 'nope'"),
        *(
            ({"label": "X", "prune": "shortgpt", "overrides": {name: 1}}, f"X: unknown setting {name}")
            for name in ("model", "rows", "method", "sparsity", "progress")
        ),
        ({"label": "X", "prune": "shortgpt", "overrides": {"keep_first": -1}}, "X: keep_first = -1"),
        ({"label": "X", "recipe": "small", "overrides": {"nope.x": 1}}, "X: unknown setting nope.x"),
        ({"label": "X", "recipe": "small", "overrides": {"seed": 3}}, "X: seed cannot be overridden"),
        ({"label": "X", "recipe": "nope"}, "recipe 'nope' does not exist"),
    ],
)
def test_bad_methods_are_refused_before_any_cell(
    make_grid: Callable[..., Grid], method: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        expand(make_grid({"x": method}))


def test_a_null_of_a_grid_is_a_value(make_grid: Callable[..., Grid]) -> None:
    """`router.width: null` means the default width, not that of the recipe."""
    base = {**ALL_METHODS["d-llm"], "overrides": {"selection.first_layer": 1}}
    changed = {**base, "overrides": {**base["overrides"], "router.width": None}}
    one, other = (expand(make_grid({"d": method}))[-1].stages[0].settings["router"] for method in (base, changed))
    assert one["width"] == 512
    assert other["width"] is None


def test_names_of_cells_fit_into_names_of_files(make_grid: Callable[..., Grid]) -> None:
    """However long the model's is."""
    grid = make_grid(FEW_METHODS).model_copy(update={"models": ("some/" + "é" * 250,)})
    for cell in expand(grid):
        assert len(cell.file.encode()) < 200
        assert "/" not in cell.file


def test_keys_follow_the_content_of_several_files_in_one_reference(
    make_grid: Callable[..., Grid], tmp_path: Path
) -> None:
    one, two = tmp_path / "1.txt", tmp_path / "2.txt"
    one.write_text("a")
    two.write_text("b")
    keys = []
    for content in ("b", "b", "c"):
        content_id.cache_clear()
        two.write_text(content)
        keys.append(expand(make_grid(FEW_METHODS, training={"data": [f"{one},{two}"]}))[0].key)
    assert keys[0] == keys[1] != keys[2]


def test_a_missing_grid_is_refused_with_what_there_is() -> None:
    with pytest.raises(InputError, match=r"study 'tabel1' does not exist.*table1"):
        load_grid("tabel1")


def test_settings_of_a_grid_stand_above_those_of_its_scale(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"scale": "cpu", "methods": FEW_METHODS, "evaluation": {"limit": 7}}))
    grid = load_grid(str(path))
    assert grid.name == "mine"
    assert grid.evaluation.limit == 7
    assert grid.evaluation.tasks == load_grid("table1", scale="cpu").evaluation.tasks


def test_cells_are_chosen_by_pattern(make_grid: Callable[..., Grid]) -> None:
    cells = expand(make_grid(ALL_METHODS))
    assert {cell.method for cell in matching(cells, "*informed*")} == {"informed"}
    assert matching(cells, None) == cells
    with pytest.raises(InputError, match="no cell matches"):
        matching(cells, "nothing")


def test_text_is_counted_as_it_is_read(make_grid: Callable[..., Grid]) -> None:
    recipe = Recipe.from_mapping(
        {
            "stages": ["forecast", "route", "lora"],
            "forecaster": {"tokens": 100},
            "forecast": {"sequence_length": 32},
            "router": {"warm_start_tokens": 70, "sweeps": 2, "sweep_tokens": 40},
            "route": {"steps": 3, "batch_size": 2, "sequence_length": 32, "train_forecasters": False},
            "lora": {"steps": 5, "batch_size": 1, "sequence_length": 16, "gradient_accumulation": 2},
        }
    )
    assert text_read(recipe) == {"forecast": 96, "route": 3 * 64 + 64 + 2 * 32 + 96, "lora": 160}


def test_cells_can_be_hashed_and_compared(make_grid: Callable[..., Grid]) -> None:
    cell = expand(make_grid(FEW_METHODS))[-1]
    assert cell == dataclasses.replace(cell)
    assert len({cell, dataclasses.replace(cell)}) == 1
