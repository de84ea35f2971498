"""Families that are not in the table, from the command line: looked at, fitted, scored, adapted, and read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Outcome, save_tokenizer
from tests.tiny import make_tiny
from transformers import AutoConfig

Run = Callable[..., Outcome]

RECIPE = """\
forecaster: {rank: 8, tokens: 1024}
router: {warm_start_tokens: 512, sweeps: 1, sweep_tokens: 512}
route: {steps: 3, batch_size: 2, sequence_length: 32, train_forecasters: true, sparsity: 0.2, budget: macs}
forecast: {sequence_length: 32}
lora: {steps: 2, batch_size: 1, sequence_length: 32}
calibration: {targets: [0.1, 0.2], tokens: 512, sequence_length: 32}
"""


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "phi", "gpt2", "nemotron_h", "gemma4_text"])
def test_another_family_is_fitted_scored_and_adapted(name: str, run: Run, text_file: Path, tmp_path: Path) -> None:
    folder, recipe, out = tmp_path / name, tmp_path / "small.yaml", tmp_path / "out"
    make_tiny(name, bos_token_id=None).save_pretrained(folder)
    save_tokenizer(folder)
    recipe.write_text(RECIPE)
    base = ["--recipe", recipe, "--data", text_file, "-q"]
    outcome = run("fit", folder, "--out", out, *base)
    assert outcome.code == 0, outcome.err
    scoring = ["--data", text_file, "--split", "all", "--sequence-length", 32, "--limit", 4, "-q", "--json", "-"]
    scored = run("evaluate", out, "-s", 0, "-s", 0.2, *scoring)
    assert scored.code == 0, scored.err
    shares = scored.json["result"]["runs"][1]["sparsity"]
    assert shares["macs"] > 0.05
    assert shares["attention"] > 0
    if name == "gpt2":
        return  # its matrices are no linear layers
    adapted = run("fit", "--start", out, "--stages", "lora", "--out", tmp_path / "adapted", *base)
    assert adapted.code == 0, adapted.err
    assert run("evaluate", tmp_path / "adapted", "-s", 0.2, *scoring).code == 0


def test_units_of_one_kind_are_routed_where_that_is_asked_for(
    run: Run, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE.replace("sparsity: 0.2, budget: macs", "sparsity: 0.2"))
    for units, other in (("ffn", "attention"), ("attention", "ffn")):
        out = tmp_path / units
        outcome = run("fit", tiny_folder, "--units", units, "--out", out, "--recipe", recipe, "--data", text_file, "-q")
        assert outcome.code == 0, outcome.err
        arguments = ["--data", text_file, "--split", "all", "--sequence-length", 32, "--limit", 4, "-q", "--json", "-"]
        scored = run("evaluate", out, "-s", 0.2, *arguments)
        assert scored.code == 0, scored.err
        shares = scored.json["result"]["runs"][0]["sparsity"]
        assert shares[other] == 0
        assert shares[units] > 0.1
    refused = run("fit", tiny_folder, "--units", "some", "--out", tmp_path / "no", "--data", text_file)
    assert refused.code == 2
    assert "units" in refused.err


def test_a_configuration_is_enough_to_look_at_a_model(run: Run, tmp_path: Path) -> None:
    AutoConfig.for_model("deepseek_v3").save_pretrained(tmp_path / "big")
    outcome = run("inspect", tmp_path / "big", "--json", "-")
    assert outcome.code == 0, outcome.err
    found = outcome.json["result"]
    assert found["source"] == "code"
    assert found["macs"] == pytest.approx(37e9, rel=0.01)  # of 671 billion parameters
    assert [(unit["module"], unit["layers"][0], unit["routed"]) for unit in found["units"]] == [
        ("DeepseekV3Attention", 0, False),
        ("DeepseekV3MLP", 0, True),
        ("DeepseekV3MoE", 3, True),
    ]
    shown = run("inspect", "demo:smollm2-135m", "-q")
    assert "self_attn(input_layernorm(h))" in shown.out
    assert "native (cpu, gpu)" in shown.out
    AutoConfig.for_model("opt").save_pretrained(tmp_path / "opt")
    unknown = run("inspect", tmp_path / "opt", "--json", "-")
    assert unknown.json["result"]["skippable"] == 0
    assert [unit["needs_weights"] for unit in unknown.json["result"]["units"]] == [True, False]
    AutoConfig.for_model("bert").save_pretrained(tmp_path / "bert")
    refused = run("inspect", tmp_path / "bert")
    assert refused.code == 2
    assert "no decoder with one list of its layers" in refused.err
