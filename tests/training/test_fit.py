"""The pipeline on a tiny model: all stages, exact resume, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.interruption import StopAt

from informed_routing.config.recipe import Recipe
from informed_routing.errors import InputError, WorkError
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.training.fit import fit


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(str(folder / "routing.safetensors"))
    return found | load_file(str(folder / "lora" / "adapter_model.safetensors"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"folder": tmp_path_factory.mktemp("whole") / "out"}


def _uninterrupted(whole: dict[str, Any], recipe: Recipe) -> Path:
    folder: Path = whole["folder"]
    if not folder.exists():
        whole["report"] = fit(recipe, folder)
    return folder


def test_fit_leaves_a_complete_folder(recipe: Recipe, whole: dict[str, Any]) -> None:
    folder = _uninterrupted(whole, recipe)
    names = {path.name for path in folder.iterdir()}
    assert {
        "routing_config.json",
        "routing.safetensors",
        "fit.json",
        "README.md",
        "lora",
        "config.json",
    } <= names
    assert "adapter_config.json" not in names
    assert "checkpoints" not in names
    report = json.loads((folder / "fit.json").read_text())
    assert report["stages"]["route"]["train"]["steps"] == 8
    assert report["stages"]["lora"]["tokens"] == 5 * 2 * 32
    quality = report["stages"]["forecast"]["quality"]
    assert len(quality["per_unit"]) == 6
    model = RoutedModelForCausalLM.from_pretrained(folder)
    low, high = model.calibrated_range()
    assert low == 0.0
    assert high >= 0.4
    model.set_sparsity(0.33)


def test_lora_can_come_later(recipe: Recipe, tmp_path: Path) -> None:
    """A fit that starts from a routing folder takes its settings and weights, and equals a fit in one go."""
    first = recipe.with_overrides({"stages": ["forecast", "route"], "route.train_forecasters": True})
    fit(first, tmp_path / "routed")
    fit(first.with_overrides({"stages": ["forecast", "route", "lora"]}), tmp_path / "whole")
    later = recipe.with_overrides({"stages": ["lora"], "start": str(tmp_path / "routed"), "router.kind": "mlp"})
    fit(later, tmp_path / "later")
    wanted, found = _tensors(tmp_path / "whole"), _tensors(tmp_path / "later")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[k], found[k]) for k in wanted)
    with pytest.raises(InputError, match="been through the lora stage"):
        fit(later.with_overrides({"start": str(tmp_path / "later")}), tmp_path / "again")


def test_calibrate_alone_gives_a_new_table_only(recipe: Recipe, tmp_path: Path) -> None:
    """Weights and adapter are those of the start; the folder loads and its logits are the start's."""
    first = tmp_path / "first"
    fit(recipe, first)
    again = {"stages": ["calibrate"], "start": str(first), "calibration.targets": [0.2, 0.3]}
    report = fit(recipe.with_overrides(again), tmp_path / "again")
    assert set(report["stages"]) == {"calibrate"}
    wanted, found = _tensors(first), _tensors(tmp_path / "again")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[k], found[k]) for k in wanted)
    before, after = (RoutedModelForCausalLM.from_pretrained(folder) for folder in (first, tmp_path / "again"))
    ids = torch.arange(1, 9)[None]
    for model in (before, after):
        model.set_sparsity(0)
    assert torch.equal(before(ids).logits, after(ids).logits)
    assert len(after.routing_config.thresholds) < len(before.routing_config.thresholds)
    with pytest.raises(InputError, match="what the fit starts from"):
        fit(recipe.with_overrides(again), first, overwrite=True)


def test_a_start_on_another_model_is_refused(recipe: Recipe, whole: dict[str, Any], tmp_path: Path) -> None:
    fit(recipe.with_overrides({"stages": ["forecast", "route"]}), tmp_path / "routed")
    config = json.loads((tmp_path / "routed" / "routing_config.json").read_text())
    config["base_model"]["fingerprint"] = "0" * 64
    (tmp_path / "routed" / "routing_config.json").write_text(json.dumps(config))
    later = recipe.with_overrides({"stages": ["lora"], "start": str(tmp_path / "routed")})
    with pytest.raises(InputError, match="wrong base model"):
        fit(later, tmp_path / "later")
    assert not (tmp_path / "later").exists()


@pytest.mark.parametrize(
    ("stages", "start", "message"),
    [
        (["lora"], None, "route before lora"),
        (["route"], None, "forecast before route"),
        (["calibrate"], None, "needs a start"),
        ([], "somewhere", "some of static"),
        (["forecast", "route"], "somewhere", "has forecasters already"),
    ],
)
def test_stages_that_cannot_follow_are_refused(
    recipe: Recipe, stages: list[str], start: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        recipe.with_overrides({"stages": stages, "start": start})


def test_lora_of_the_dense_model(recipe: Recipe, tmp_path: Path) -> None:
    """Sparsity 0 tunes the dense model: what a fair comparison needs."""
    report = fit(recipe.with_overrides({"lora.sparsity": 0.0}), tmp_path / "out")
    history = report["stages"]["lora"]["history"]
    assert history
    assert not any("approximated" in step for step in history)


def test_a_start_keeps_what_the_earlier_stages_decided(recipe: Recipe, tmp_path: Path) -> None:
    """Budget, dial and treatment of keys are the folder's, not the defaults of a recipe that does not route."""
    first = {"stages": ["forecast", "route"], "route.budget": "macs", "route.sparsity": 0.2, "kv": "drop"}
    fit(recipe.with_overrides(first), tmp_path / "routed")
    later = recipe.with_overrides({"stages": ["lora"], "start": str(tmp_path / "routed")})
    report = fit(later, tmp_path / "later")
    stored = json.loads((tmp_path / "later" / "routing_config.json").read_text())
    assert (stored["budget"], stored["sparsity"], stored["kv"]) == ("macs", 0.2, "drop")
    assert report["stages"]["lora"]["sparsity"] == 0.2


def test_stage_2_trains_each_part_at_its_own_rate(recipe: Recipe, tmp_path: Path) -> None:
    """With a rate of next to nothing the forecasters stay where the closed-form start left them."""
    settings = {"stages": ["forecast", "route"], "route.train_forecasters": True}
    still = {**settings, "route.forecaster_learning_rate": 1e-12}
    found = {}
    for name, overrides in {"start": {**settings, "route.steps": 0}, "still": still, "moved": settings}.items():
        fit(recipe.with_overrides(overrides), tmp_path / name)
        found[name] = load_file(str(tmp_path / name / "routing.safetensors"))
    forecasters = [key for key in found["start"] if ".forecaster." in key]
    routers = [key for key in found["start"] if ".router.outer.weight" in key]
    assert all(torch.allclose(found["start"][k], found["still"][k], atol=1e-7) for k in forecasters)
    assert not any(torch.allclose(found["start"][k], found["moved"][k], atol=1e-7) for k in forecasters)
    assert not any(torch.equal(found["start"][k], found["still"][k]) for k in routers)


def test_auto_model_loads_the_folder(recipe: Recipe, whole: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    folder = _uninterrupted(whole, recipe)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, RoutedModelForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("w1 w2 w3", max_new_tokens=4)
    assert text[0]["generated_text"].startswith("w1 w2 w3")


def test_adapter_is_a_peft_adapter_of_the_dense_model(recipe: Recipe, whole: dict[str, Any], tiny_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = _uninterrupted(whole, recipe)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    adapted = PeftModel.from_pretrained(base, str(folder / "lora")).merge_and_unload()
    routed = RoutedModelForCausalLM.from_pretrained(folder, dtype="float32")
    routed.set_sparsity(0.0)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, routed(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "step"),
    [("forecast", 8), ("start routers", 4), ("route", 4), ("refit", 8), ("lora", 3), ("calibrate", 1)],
)
def test_interrupted_anywhere_resume_gives_the_same_weights(
    recipe: Recipe, whole: dict[str, Any], tmp_path: Path, stage: str, step: int
) -> None:
    wanted = _uninterrupted(whole, recipe)
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, folder, progress=StopAt(stage, step))
    assert not (folder / "routing_config.json").exists()
    fit(recipe, folder, resume=True)
    expected, found = _tensors(wanted), _tensors(folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    tables = [json.loads((f / "routing_config.json").read_text())["thresholds"] for f in (wanted, folder)]
    assert tables[0] == tables[1]


def test_interrupted_training_of_routers_and_forecasters_resumes_exactly(recipe: Recipe, tmp_path: Path) -> None:
    """Two learning rates: the optimiser's groups must find their moments again."""
    both = recipe.with_overrides({"stages": ["forecast", "route"], "route.train_forecasters": True})
    fit(both, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(both, tmp_path / "out", progress=StopAt("route", 5))
    fit(both, tmp_path / "out", resume=True)
    expected, found = (load_file(str(tmp_path / name / "routing.safetensors")) for name in ("whole", "out"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


SCRIPT = """
import sys, torch
torch.set_num_threads(int(sys.argv[3]))
from pathlib import Path
from informed_routing.config import Recipe
from informed_routing.training.fit import fit
recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
fit(recipe, sys.argv[2], resume=Path(sys.argv[2]).exists())
"""


def _kill_and_resume(recipe: Recipe, folder: Path, threads: int) -> list[int]:
    """Fit in processes that are killed at the first checkpoint of each stage; the last one finishes the fit."""
    described = folder.with_suffix(".json")
    described.write_text(recipe.model_dump_json())
    command = [sys.executable, "-c", SCRIPT, str(described), str(folder), str(threads)]
    codes = []
    for name in ("forecast", "warm-start", "route", "lora"):
        process = subprocess.Popen(command)
        while process.poll() is None and not (folder / "checkpoints" / f"{name}.safetensors").exists():
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        codes.append(process.returncode)
    if not (folder / "routing_config.json").exists():
        subprocess.run(command, check=True)
    return codes


def test_kill_9_in_each_stage_then_resume(recipe: Recipe, whole: dict[str, Any], tmp_path: Path) -> None:
    """A killed process, not a raised exception."""
    wanted = _uninterrupted(whole, recipe)
    assert _kill_and_resume(recipe, tmp_path / "out", 1)[:2] == [-signal.SIGKILL, -signal.SIGKILL]
    expected, found = _tensors(wanted), _tensors(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_kill_9_in_each_stage_on_the_embedded_model(recipe: Recipe, demo_model_ref: str, tmp_path: Path) -> None:
    real = recipe.with_overrides(
        {
            "model": demo_model_ref,
            "data": ["demo:wiki"],
            "forecaster.rank": 16,
            "forecaster.tokens": 2048,
            "router.kind": "linear",
            "router.width": None,
            "router.warm_start_tokens": 1024,
            "router.sweeps": 1,
            "router.sweep_tokens": 512,
            **{f"{stage}.sequence_length": 128 for stage in ("forecast", "route", "lora", "calibration")},
            "route.train_forecasters": True,
            "calibration.tokens": 1024,
        }
    )
    described = tmp_path / "recipe.json"
    described.write_text(real.model_dump_json())
    command = [sys.executable, "-c", SCRIPT, str(described), str(tmp_path / "whole"), "2"]
    subprocess.run(command, check=True)
    assert _kill_and_resume(real, tmp_path / "out", 2) == [-signal.SIGKILL] * 4
    expected, found = _tensors(tmp_path / "whole"), _tensors(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_existing_folders_are_refused(recipe: Recipe, whole: dict[str, Any], tmp_path: Path) -> None:
    folder = _uninterrupted(whole, recipe)
    with pytest.raises(InputError, match="exists already"):
        fit(recipe, folder)
    with pytest.raises(InputError, match="finished fit"):
        fit(recipe, folder, resume=True)
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="precious"):
        fit(recipe, tmp_path, overwrite=True)


def test_another_recipe_is_not_resumed(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, folder, progress=StopAt("route", 2))
    with pytest.raises(InputError, match="another recipe"):
        fit(recipe.with_overrides({"route.steps": 9}), folder, resume=True)


def test_loss_that_is_not_finite_stops_with_step_and_units(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from informed_routing.training import route

    original = route.RouteObjective.forward

    def poisoned(self: Any, input_ids: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        if step == 5:
            with torch.no_grad():
                self.model.units[3].router.outer.weight.fill_(float("nan"))
        return original(self, input_ids, step)

    monkeypatch.setattr(route.RouteObjective, "forward", poisoned)
    folder = tmp_path / "out"
    with pytest.raises(WorkError, match=r"not finite at step 5 \(units at fault: layer 1 ffn\)"):
        fit(recipe, folder)
    checkpoint = load_file(str(folder / "checkpoints" / "route.safetensors"))
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.values())


def test_unreachable_budget_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be reached"):
        fit(recipe.with_overrides({"route.sparsity": 0.95, "route.budget": "macs"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        {"forecaster.fit": "gradient", "forecaster.refit": False},
        {
            "forecaster.fit": "gradient",
            "forecaster.activation": "silu",
            "forecaster.loss": "smooth-l1",
            "forecaster.target": "raw",
            "forecaster.refit": False,
        },
        {"forecaster.fit": "gradient", "forecaster.start": "closed-form", "forecaster.target": "normalised"},
        {"forecaster.fallback": "zero", "router.kind": "linear", "router.input": "residual"},
        {"router.kind": "mlp", "route.objective": {"kind": "distill"}, "route.budget": "macs"},
        {"route.objective": {"kind": "mixed"}, "route.balanced": True, "activation_checkpointing": True},
        {"kv": "drop", "router.warm_start": False, "route.train_forecasters": True},
        {"route.steps": 0},
    ],
    ids=[
        "gradient",
        "published-code",
        "normalised",
        "skipgpt",
        "distill",
        "balanced",
        "kv-drop",
        "start-only",
    ],
)
def test_every_setting_runs_to_the_end(recipe: Recipe, tmp_path: Path, overrides: dict[str, Any]) -> None:
    changed = recipe.with_overrides({"stages": ["forecast", "route"], "route.steps": 3, **overrides})
    report = fit(changed, tmp_path / "out")
    assert report["stages"]["calibrate"]["thresholds"]
    model = RoutedModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()


def test_latency_budget_measures_once_and_keeps_its_table(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from informed_routing.config.folder import LatencyGains
    from informed_routing.training import targets as module

    measured = []
    table = {"attention": 0.2, "ffn": 0.5, "overhead": 0.01, "seconds": 1.0, "tokens": 32, "engine": "e", "cpu": "c"}

    def fake(*_: object, **__: object) -> LatencyGains:
        measured.append(1)
        return LatencyGains(**table)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "measure_latency", fake)
    chosen = recipe.with_overrides({"route.budget": "latency", "stages": ["forecast", "route"]})
    with pytest.raises(KeyboardInterrupt):
        fit(chosen, tmp_path / "out", progress=StopAt("route", 4))
    fit(chosen, tmp_path / "out", resume=True)
    assert len(measured) == 1
    model = RoutedModelForCausalLM.from_pretrained(tmp_path / "out")
    config = model.routing_config
    assert config.budget == "latency"
    assert config.latency == LatencyGains(**table)  # type: ignore[arg-type]
    for row in config.thresholds:
        assert row.latency == pytest.approx(config.latency.saved(row.attention, row.ffn))
    model.set_sparsity(0.2)
    model.set_sparsity(0.2, "units")


def test_other_budgets_have_no_latency_table(recipe: Recipe, whole: dict[str, Any]) -> None:
    model = RoutedModelForCausalLM.from_pretrained(_uninterrupted(whole, recipe))
    with pytest.raises(InputError, match="latency"):
        model.set_sparsity(0.2, "latency")


def test_the_documented_python_api(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    import informed_routing as ir

    ir.fit(
        str(tiny_folder),
        out=tmp_path / "out",
        sparsity=0.3,
        data=[str(text_file)],
        overrides={
            "route.steps": 2,
            "route.sequence_length": 32,
            "forecaster.tokens": 512,
            "forecaster.rank": 8,
            "router.warm_start_tokens": 256,
            "forecast.sequence_length": 32,
            "calibration.tokens": 256,
            "calibration.sequence_length": 32,
            "calibration.targets": [0.3],
        },
    )
    assert ir.RoutedModelForCausalLM.from_pretrained(tmp_path / "out").routing_config.sparsity > 0.25
